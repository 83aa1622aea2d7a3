"""Threads beside the one that works: what it needs is made ahead of it, what it made is put away.

Both are bounded: a thread that is faster than the others waits for them. Knows nothing of what
passes through.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from queue import Empty, Full, Queue
from threading import Event
from typing import Generic, TypeVar, cast

Item = TypeVar("Item")

DEPTH = 2  # items that wait between two threads
LOOK_S = 0.1  # between two looks at a thread that takes nothing: it may have failed
_END = object()


class AbandonedError(Exception):
    """Whoever gave a thread its items has failed; what it is at is not to be finished."""


def ahead(items: Iterable[Item], depth: int = DEPTH) -> Generator[Item, None, None]:
    """Run an iterable in a background thread, `depth` items ahead; its exceptions rise here."""
    stream, end = iter(items), object()
    with ThreadPoolExecutor(1, thread_name_prefix="dear-batch-reader") as pool:
        waiting = deque(pool.submit(next, stream, end) for _ in range(depth))
        try:
            while (item := waiting.popleft().result()) is not end:
                waiting.append(pool.submit(next, stream, end))
                yield cast("Item", item)
        finally:
            for future in waiting:  # what nobody asks for any more
                future.cancel()


class Behind(Generic[Item]):
    """A background thread that takes items in the order in which they are put."""

    def __init__(self, consume: Callable[[Iterator[Item]], None], depth: int) -> None:
        self._items, self._abandoned = Queue[object](depth), Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="dear-batch-writer")
        self._done = self._pool.submit(consume, self._given())

    def put(self, item: Item) -> None:
        """Hand an item over, once there is room. Raises what the thread raised."""
        self._put(item)

    def check(self) -> None:
        """Raise what the thread raised, if it did."""
        if self._done.done():
            self._done.result()

    def finish(self) -> None:
        """Wait until all is taken. Raises what the thread raised."""
        self._put(_END)
        self._done.result()

    def abandon(self) -> None:
        """Let the thread end with AbandonedError in place of its next item."""
        self._abandoned.set()
        with suppress(Empty):
            while True:
                self._items.get_nowait()
        self._items.put(_END)

    def close(self) -> None:
        """Wait for the thread's end."""
        self._pool.shutdown()

    def _put(self, item: object) -> None:
        while not self._done.done():
            with suppress(Full):
                self._items.put(item, timeout=LOOK_S)
                return
        self._done.result()
        raise AssertionError("a thread ended before its items did")

    def _given(self) -> Iterator[Item]:
        while True:
            item = self._items.get()
            if self._abandoned.is_set():
                raise AbandonedError
            if item is _END:
                return
            yield cast("Item", item)


@contextmanager
def behind(
    consume: Callable[[Iterator[Item]], None],
    give_up: Callable[[], None] = lambda: None,
    depth: int = DEPTH,
) -> Iterator[Behind[Item]]:
    """Run `consume` in a background thread over what the block puts; `depth` items wait at most.

    What it raises rises from the next call, or at the end of the block, which waits for it.
    Where the block raises, it is abandoned; `give_up` ends what it may be waiting for.
    """
    thread = Behind(consume, depth)
    try:
        yield thread
        thread.finish()
    except BaseException:
        thread.abandon()
        give_up()
        raise
    finally:
        thread.close()
