"""Signals that ask a job to end: noted by the parent, obeyed where it is safe."""

import signal
import time
from types import FrameType
from typing import Any, Self

from dear_batch.run.watch import StoppedError

GRACE_S = 15.0  # from the first signal until the child is killed; all must end within 20
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Interrupts:
    """Signals that ask for an end, noted instead of obeyed for as long as this is entered."""

    def __init__(self) -> None:
        self.name = ""  # of the first
        self.since = 0.0
        self.at_once = False
        self._previous = dict[signal.Signals, Any]()

    def __enter__(self) -> Self:
        """Note signals from here on."""
        for number in STOPS:
            # What nohup or a shell's & told us to ignore stays ignored.
            if number is signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *_: object) -> None:
        """Obey them again; if this was entered within another, that one is told what came."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
            outer = getattr(handler, "__self__", None)
            if number.name == self.name and isinstance(outer, Interrupts):
                outer.note(number, None)

    def note(self, number: int, _frame: FrameType | None) -> None:
        """Remember the first; a second Ctrl-C asks for more."""
        if not self.name:
            self.name, self.since = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT:
            self.at_once = True

    @property
    def overdue(self) -> bool:
        """Whether it is time to kill: a second Ctrl-C, or the grace is over."""
        return self.at_once or (bool(self.name) and time.monotonic() - self.since > GRACE_S)

    def check(self) -> None:
        """Leave if a signal came.

        Raises:
            StoppedError: one did.
        """
        if self.name:
            raise stopped(self.name)


def stopped(by: str) -> StoppedError:
    """The error of a job that was ended by a signal."""
    return StoppedError(
        f"The job was stopped by {by}; what it has finished is kept.",
        next_step="run the same command again: it goes on from there",
    )
