"""Which windows a list is read in, and what the answer to one does to the order.

Pure: knows nothing of prompts, models or files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan
from typing import TypeVar

from dear_batch.data import Permutation, Window

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class WindowRequest:
    """What a model is asked: to order the passages that stand in a window at present."""

    window: Window
    query: str
    passages: tuple[str, ...]


def windows(n: int, window: int, step: int) -> list[tuple[int, int]]:
    """(start, end) of the windows over the first `n` places, from the bottom to the top.

    A list that is no longer than a window gets one over all of it. As in RankLLM's sliding
    windows (castorini/rank_llm, `sliding_windows`): start and end move up by `step`, and the
    window that reaches the top is the last; it may be a shorter one.
    """
    found = list[tuple[int, int]]()
    start, end = n, n
    while start > 0:
        start = max(0, end - window)
        found.append((start, end))
        end -= step
    return found


def kept(window: Window) -> Permutation:
    """What becomes of a window of a single passage, about which a model need not be asked."""
    places = tuple(range(window.end - window.start))
    return Permutation(window, places, "kept", (nan,) * len(places))


def apply(permutation: Permutation, order: Sequence[Item]) -> list[Item]:
    """The whole order after a window's answer: its places are filled anew, the rest stays."""
    window = permutation.window
    inside = order[window.start : window.end]
    if sorted(permutation.order) != list(range(len(inside))):
        raise AssertionError(f"no permutation of {window}: {permutation.order}")
    chosen = [inside[place] for place in permutation.order]
    return [*order[: window.start], *chosen, *order[window.end :]]
