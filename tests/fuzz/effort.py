"""How hard the fuzz tests try: a fixed few examples by default, many until time is up when slow.

`DEAR_BATCH_FUZZ_SECONDS` is what the slow tests take together (600), `DEAR_BATCH_FUZZ_SEED` where
they begin (4). A failure names the seed of its round: with it as the first seed, that round comes
first. What was found once stays as an explicit example of its test.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from hypothesis import HealthCheck, Phase, example, given, seed, settings
from hypothesis.strategies import SearchStrategy

SECONDS = float(os.environ.get("DEAR_BATCH_FUZZ_SECONDS", "600"))
SEED = int(os.environ.get("DEAR_BATCH_FUZZ_SEED", "4"))
ROUND_SHARE = 10  # a round is an n-th of the time, once it is known how long an example takes
LEAST_ROUND = 10
FOUND = (Phase.generate, Phase.shrink)


@dataclass
class Ran:
    """What one test tried."""

    name: str
    examples: int = 0
    seconds: float = 0.0


@dataclass
class Effort:
    """Runs a check over examples: `ran` is told how many."""

    ran: Ran
    is_long: bool
    seconds: float = SECONDS
    first_seed: int = SEED

    def run(
        self,
        check: Callable[[Any], None],
        examples: SearchStrategy[Any],
        *,
        known: Sequence[Any] = (),
        few: int,
        share: float,
    ) -> None:
        """Check known examples and drawn ones.

        Args:
            check: fails on an example that shows a bug.
            examples: where they come from.
            known: those that showed one before.
            few: how many are drawn in the short run.
            share: of all the time of the long run.
        """

        def counted(value: Any) -> None:
            self.ran.examples += 1
            check(value)

        start = time.monotonic()
        try:
            if self.is_long:
                self._until(start + self.seconds * share, counted, examples, known, few)
            else:
                options = _settings(few, derandomize=True)
                options(_with(known, given(examples)(counted)))()
        finally:
            self.ran.seconds += time.monotonic() - start

    def _until(
        self,
        end: float,
        check: Callable[[Any], None],
        examples: SearchStrategy[Any],
        known: Sequence[Any],
        size: int,
    ) -> None:
        """Rounds with seeds of their own until time is up."""
        length = end - time.monotonic()
        for number in count(self.first_seed):
            start = time.monotonic()
            phases = FOUND if number > self.first_seed else (Phase.explicit, *FOUND)
            test = _settings(size, phases=phases)(_with(known, given(examples)(check)))
            try:
                seed(number)(test)()
            except BaseException as error:
                error.add_note(f"fuzz: DEAR_BATCH_FUZZ_SEED={number} tries this round first")
                raise
            now = time.monotonic()
            if now >= end:
                return
            pace = max(now - start, 1e-3) / size
            size = max(LEAST_ROUND, int(min(length / ROUND_SHARE, end - now) / pace))


def _settings(size: int, **options: Any) -> settings:
    return settings(
        max_examples=size,
        deadline=None,
        database=None,
        print_blob=True,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        **options,
    )


def _with(known: Sequence[Any], test: Any) -> Any:
    for value in known:
        test = example(value)(test)
    return test
