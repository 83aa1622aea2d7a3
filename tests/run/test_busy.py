"""How long an engine had something to do, with one batch under way and with several."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dear_batch.pointwise.rows import Batch, Layout
from dear_batch.pointwise.scorer import Finish, OneAtATime
from dear_batch.run import busy
from dear_batch.run.busy import Busy, Lap

BATCH = Batch([], (), 1)


class Clock:
    """Stands still unless it is told that time passes."""

    now = 100.0

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(busy, "perf_counter", lambda: clock.now)
    return clock


class Slow(OneAtATime):
    """A scorer whose batches take five seconds."""

    layout, engine, device, precision = Layout(True, 8, 8), "slow", "cpu", "fp32"

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def score(self, batch: Batch) -> NDArray[np.float32]:
        self.clock.passes(5)
        return np.zeros(len(batch.rows), np.float32)


class Later(Slow):
    """A scorer whose batches are computed while others begin."""

    in_flight = 2

    def start(self, batch: Batch) -> Finish:
        return lambda: self.score(batch)


def watched(scorer: Any) -> Busy:
    return Busy(scorer)


def test_what_lies_between_batches_is_idle(clock: Clock) -> None:
    engine = watched(Slow(clock))
    clock.passes(2)  # before the first one nothing is counted
    for _ in range(3):
        engine.start(BATCH)()
        clock.passes(2)
    assert engine.lap() == Lap(15, 4)
    assert engine.lap() == Lap(0, 0)
    engine.start(BATCH)()
    assert engine.lap() == Lap(5, 2)  # what lay between the laps is in the second


def test_an_engine_with_a_batch_under_way_is_busy(clock: Clock) -> None:
    engine = watched(Later(clock))
    assert engine.in_flight == 2
    first = engine.start(BATCH)
    clock.passes(1)
    second = engine.start(BATCH)
    first()
    clock.passes(1)
    second()
    assert engine.lap() == Lap(12, 0)


@pytest.mark.parametrize("late", [False, True])
def test_a_batch_that_fails_is_over(clock: Clock, late: bool) -> None:
    class Full(Later):
        full = True

        def start(self, batch: Batch) -> Finish:
            if self.full and not late:
                raise MemoryError
            return super().start(batch)

        def score(self, batch: Batch) -> NDArray[np.float32]:
            found = super().score(batch)
            if self.full:
                raise MemoryError
            return found

    scorer = Full(clock)
    engine = watched(scorer)
    call: Callable[[], Any] = engine.start(BATCH) if late else lambda: engine.start(BATCH)
    with pytest.raises(MemoryError):
        call()
    clock.passes(1)
    scorer.full = False
    engine.start(BATCH)()
    assert engine.lap() == Lap(10 if late else 5, 1)
