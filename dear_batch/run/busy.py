"""An engine, and for how long it had something to do."""

from dataclasses import dataclass
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from dear_batch.pointwise.rows import Batch
from dear_batch.pointwise.scorer import Finish, Scorer


@dataclass(slots=True)
class Lap:
    """Seconds in which a batch was under way, and seconds between two batches."""

    busy: float = 0.0
    idle: float = 0.0


class Busy:
    """A scorer whose time is taken; it is a `Scorer` itself.

    A batch is under way from its start until it has been waited for. What lies before the first
    one and after the last one is not counted.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.layout, self.engine, self.device = scorer.layout, scorer.engine, scorer.device
        self.precision, self.in_flight = scorer.precision, scorer.in_flight
        self._scorer = scorer
        self._lap = Lap()
        self._under_way = 0
        self._since: float | None = None  # when the first batch under way began, or the last ended

    def start(self, batch: Batch) -> Finish:
        """See `Scorer`."""
        self._begin()
        try:
            finish = self._scorer.start(batch)
        except BaseException:
            self._end()
            raise

        def finished() -> NDArray[np.float32]:
            try:
                return finish()
            finally:
                self._end()

        return finished

    def lap(self) -> Lap:
        """What was counted since the last call, between batches."""
        lap, self._lap = self._lap, Lap()
        return lap

    def _begin(self) -> None:
        if self._under_way == 0:
            now = perf_counter()
            self._lap.idle += now - (now if self._since is None else self._since)
            self._since = now
        self._under_way += 1

    def _end(self) -> None:
        self._under_way -= 1
        if self._under_way == 0 and self._since is not None:
            now = perf_counter()
            self._lap.busy += now - self._since
            self._since = now
