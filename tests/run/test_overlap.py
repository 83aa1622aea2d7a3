"""Threads beside the one that works: order, bounds, and failures on either side."""

import threading
import time
from collections.abc import Iterator

import pytest

from dear_batch.run.overlap import AbandonedError, ahead, behind

READER, WRITER = "dear-batch-reader", "dear-batch-writer"


# Reading ahead.


def threads(kind: str) -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(kind)]


def test_ahead_keeps_order_and_ends() -> None:
    assert list(ahead(iter(range(100)))) == list(range(100))
    assert list(ahead([])) == []
    assert list(ahead([None, False, 0])) == [None, False, 0]  # nothing is taken for the end
    assert threads(READER) == []


def test_ahead_works_while_the_consumer_does() -> None:
    reached = threading.Event()

    def produce() -> Iterator[int]:
        for i in range(5):
            if i == 2:
                reached.set()
            yield i

    stream = ahead(produce())
    assert next(stream) == 0
    assert reached.wait(10)  # nobody asked for item 2 yet
    assert list(stream) == [1, 2, 3, 4]


def test_ahead_holds_no_more_than_its_depth() -> None:
    produced: list[int] = []
    stream = ahead((produced.append(i) or i for i in range(50)), depth=3)
    for consumed, _ in enumerate(stream, start=1):
        time.sleep(0.001)
        assert len(produced) <= consumed + 3


def test_ahead_raises_what_the_producer_raised_after_the_items_before_it() -> None:
    def produce() -> Iterator[int]:
        yield 1
        yield 2
        raise KeyError("row 7")

    got: list[int] = []
    with pytest.raises(KeyError, match="row 7"):
        got.extend(ahead(produce()))
    assert got == [1, 2]
    assert threads(READER) == []


@pytest.mark.parametrize("how", ["close", "raise"])
def test_ahead_leaves_no_thread_when_the_consumer_stops(how: str) -> None:
    closed = threading.Event()

    def produce() -> Iterator[int]:
        try:
            yield from range(1000)
        finally:
            closed.set()

    def consume() -> None:
        stream = ahead(produce())
        assert next(stream) == 0
        assert threads(READER)
        if how == "raise":
            raise RuntimeError("the consumer failed")
        stream.close()

    if how == "raise":
        with pytest.raises(RuntimeError, match="consumer"):
            consume()
    else:
        consume()
    assert threads(READER) == []
    assert closed.wait(10)  # and the producer let go of its file


# Writing behind.


@pytest.mark.parametrize("depth", [1, 3])
def test_behind_takes_all_in_order_and_waits_for_the_end(depth: int) -> None:
    taken = list[int]()

    def consume(items: Iterator[int]) -> None:
        for item in items:
            time.sleep(0.001)
            taken.append(item)

    with behind(consume, depth=depth) as writer:
        for item in range(30):
            writer.put(item)
            assert item + 1 - len(taken) <= depth + 1  # what waits, and the one in hand
            writer.check()
    assert taken == [*range(30)]
    assert threads(WRITER) == []


def test_behind_works_while_the_block_does() -> None:
    reached = threading.Event()

    def consume(items: Iterator[int]) -> None:
        for _ in items:
            reached.set()

    with behind(consume) as writer:
        writer.put(1)
        assert reached.wait(10)


@pytest.mark.parametrize("seen", ["put", "check", "end"])
def test_what_the_thread_behind_raises_rises_here(seen: str) -> None:
    failed, taken = threading.Event(), list[int]()

    def consume(items: Iterator[int]) -> None:
        try:
            for item in items:
                taken.append(item)
                if item == 2:
                    raise KeyError("a full disk")
        finally:
            failed.set()

    def block() -> None:
        with behind(consume, depth=5) as writer:
            for item in range(3):
                writer.put(item)
            assert failed.wait(10)
            if seen == "put":
                for item in range(3, 99):
                    writer.put(item)
            while seen == "check":
                writer.check()

    with pytest.raises(KeyError, match="a full disk"):
        block()
    assert taken == [0, 1, 2]
    assert threads(WRITER) == []


@pytest.mark.parametrize("waits", [False, True])
def test_a_block_that_fails_leaves_nothing_half_done(waits: bool) -> None:
    """What was put is not finished, even if the thread waits for something else meanwhile."""
    events, taken, begun = list[str](), list[int](), threading.Event()
    given_up = threading.Event()

    def consume(items: Iterator[int]) -> None:
        try:
            for item in items:
                taken.append(item)
                begun.set()
                if waits:
                    given_up.wait(10)
            events.append("finished")
        except AbandonedError:
            events.append("abandoned")
            raise

    def block() -> None:
        with behind(consume, given_up.set) as writer:
            writer.put(1)
            assert begun.wait(10)
            if waits:
                writer.put(2)
                writer.put(3)
            raise RuntimeError("the device is gone")

    with pytest.raises(RuntimeError, match="the device is gone"):
        block()
    assert (events, taken) == (["abandoned"], [1])
    assert given_up.is_set()
    assert threads(WRITER) == []
