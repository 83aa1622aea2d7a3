"""What a job tells whoever watches it, and how it is asked to stop.

Knows nothing of processes, terminals or signals: who listens is the caller's affair.
"""

import threading

from dear_batch.errors import TryAgainError


class StoppedError(TryAgainError):
    """The job was asked to stop, and did; running it again goes on from there."""


class Watch:
    """A watcher that is silent. Every call is a sign of life; `stop` may be set from anywhere."""

    def __init__(self) -> None:
        self.stop = threading.Event()

    def advance(self, stage: str, done: float, total: int) -> None:
        """So many queries of a stage are done."""

    def phase(self, name: str) -> None:
        """Something begins that may take long: plan, load, pointwise, listwise, publish."""

    def shard(self, stage: str, key: str) -> None:
        """A shard begins: if the process dies from here on, this shard may be why."""

    def log(self, event: str, **fields: object) -> None:
        """Something that an operator may want to read later."""

    def check(self) -> None:
        """Called wherever a job may be left: between batches, files and shards.

        Raises:
            StoppedError: it was asked to stop.
        """
        if self.stop.is_set():
            raise StoppedError(
                "The job was stopped; what it has finished is kept.",
                next_step="run the same command again: it goes on from there",
            )
