"""A sample of a stream of unknown length, spread over all of it; the same every time."""

from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Spread(Generic[Item]):
    """Keeps every k-th item offered; k doubles when twice `size` are kept, and half of them go."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._every = 1
        self._offered = 0
        self.items: list[Item] = []

    def offer(self, make: Callable[[], Item]) -> None:
        """Make and keep an item if its turn has come."""
        if self._offered % self._every == 0:
            self.items.append(make())
        self._offered += 1
        if len(self.items) == 2 * self._size:
            self.items = self.items[::2]
            self._every *= 2
