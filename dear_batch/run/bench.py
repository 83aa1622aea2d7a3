"""Measures a bundle on candidates of the user's own: a job's stages one by one, on a sample.

What is done with the sample is what a job does with a shard, by the same functions; nothing
is left behind. What the measurements come to is `bench_figures`.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dear_batch.data import CandidateList, ScoredList
from dear_batch.errors import InputError
from dear_batch.files.parquet import InputFile, RowReader, open_input
from dear_batch.files.parts import part_writer
from dear_batch.files.places import Places
from dear_batch.files.sample import SAMPLE_PAIRS, sample_lists
from dear_batch.pointwise.ceiling import Ceiling, layer_products, measure_ceiling
from dear_batch.pointwise.rows import Batch
from dear_batch.pointwise.scorer import Finish, Scorer
from dear_batch.run.admission import Admission, Admitted
from dear_batch.run.blocks import Block, Work, blocks, score_block
from dear_batch.run.loading import Loaded, load_pointwise
from dear_batch.run.pointwise import finite
from dear_batch.run.report import Stopwatch
from dear_batch.run.watch import Watch
from dear_batch.specs import ExecutionSpec

PASSES = 3  # that are measured; one before them warms up
SECONDS = 60.0  # of scoring, about
FIRST_PAIRS = 16  # from which on the pairs for so many seconds are looked for
PART_PAIRS = 4096  # that a part is written of; a shard has about 1,000 to 40,000
GOLDEN = (5**0.5 - 1) / 2
# In the order of a job; all but `score` are the CPU side.
STAGES = ("read", "tokenise", "plan", "score", "write")
Fields = dict[str, Any]
Advance = Callable[[str, float, int], None]  # (pass, pairs done, pairs in all)


@dataclass(frozen=True, slots=True)
class Pass:
    """What was scored once, and the wall seconds of each stage; tokenising uses several cores.

    `real_tokens` are those of all pairs alone, so that they do not depend on how rows are packed.
    """

    work: Work
    real_tokens: int
    seconds: dict[str, float]
    tokenise_cpu_seconds: float


@dataclass(frozen=True, slots=True)
class Measured:
    """An engine on a sample: equal passes over the same lists, and what the device could do."""

    loaded: Loaded
    input: str
    lists: int
    load_seconds: float
    passes: tuple[Pass, ...]
    config: Fields
    ceiling: Ceiling


class _ClockedScorer:
    """A scorer with the seconds in which at least one batch was under way."""

    def __init__(self, scorer: Scorer) -> None:
        self.layout, self.in_flight = scorer.layout, scorer.in_flight
        self.engine, self.device, self.precision = scorer.engine, scorer.device, scorer.precision
        self.busy_seconds = 0.0
        self._scorer, self._under_way, self._since = scorer, 0, 0.0

    def start(self, batch: Batch) -> Finish:
        """See `Scorer`."""
        if not self._under_way:
            self._since = time.perf_counter()
        self._under_way += 1
        try:
            finish = self._scorer.start(batch)
        except MemoryError:
            self._end()
            raise

        def finished() -> NDArray[np.float32]:
            try:
                return finish()
            finally:
                self._end()

        return finished

    def _end(self) -> None:
        self._under_way -= 1
        if not self._under_way:
            self.busy_seconds += time.perf_counter() - self._since


def measure(
    bundle: str | Path,
    path: str | Path,
    execution: ExecutionSpec | None = None,
    *,
    pairs: int | None = None,
    seconds: float = SECONDS,
    watch: Watch | None = None,
    advance: Advance = lambda _name, _done, _total: None,
) -> Measured:
    """Load a bundle as `run` does, and measure it on a sample of the lists of a file.

    The sample has so many `pairs`, or as many as take about so many `seconds` in all.

    Raises:
        InputError: the file cannot be read, or none of its candidates can be scored.
        DearBatchError: as `load_pointwise`.
    """
    watch = watch or Watch()
    file = open_input(path)
    lists = list(_admitted(file, sample_lists(file)))
    if not lists:
        valid = "candidate lists with a query, ids and texts"
        raise InputError(f"None of the candidates of {path} can be scored.", valid=valid)
    start = time.perf_counter()
    loaded = load_pointwise(bundle, execution, watch)
    load_seconds = time.perf_counter() - start
    bench = _Bench(file, loaded, _ClockedScorer(loaded.scorer), watch, advance)
    taken = taken_from(lists, pairs or bench.affordable(lists, seconds))
    bench.run(taken, "warm-up")
    passes = tuple(bench.run(taken, f"pass {n} of {PASSES}") for n in range(1, PASSES + 1))
    config = json.loads(loaded.bundle.file("config.json").read_bytes())
    return Measured(
        loaded, str(path), len(taken), load_seconds, passes, config, bench.ceiling(config)
    )


def _admitted(file: InputFile, lists: Iterable[CandidateList]) -> Iterator[Admitted]:
    """What of the lists of a file a job would score."""
    admission = Admission(Places([file]))
    items = (admission.admit_flat if file.layout == "flat" else admission.admit)(iter(lists))
    return (item for item in items if isinstance(item, Admitted))


def taken_from(lists: Sequence[Admitted], pairs: int) -> list[Admitted]:
    """So many pairs in whole lists from all over them, the last list cut; all if they are fewer."""
    order = sorted(range(len(lists)), key=lambda n: n * GOLDEN % 1)  # any beginning is spread
    taken = dict[int, Admitted]()
    for n in order:
        item = lists[n]
        count = min(pairs, len(item.candidates))
        if not count:
            break
        ranks = item.first_ranks[:count]
        taken[n] = replace(item, candidates=item.candidates[:count], first_ranks=ranks)
        pairs -= count
    return [taken[n] for n in sorted(taken)]


@dataclass(frozen=True, slots=True)
class _Bench:
    """One bundle on one file."""

    file: InputFile
    loaded: Loaded
    scorer: _ClockedScorer
    watch: Watch
    advance: Advance

    def affordable(self, lists: Sequence[Admitted], seconds: float) -> int:
        """How many pairs can be scored in every pass, the warm-up included, in so many seconds.

        Tried with more and more of them, for a small part of the time.
        """
        most, count = sum(len(item.candidates) for item in lists), FIRST_PAIRS
        while True:
            count = min(count, most)
            tried = self.run(taken_from(lists, count), "looking for a size")
            took = tried.seconds["plan"] + tried.seconds["score"]
            if took > seconds / 50 or count == most:
                return max(1, min(most, round(count * seconds / (1 + PASSES) / took)))
            count *= 4

    def run(self, lists: Sequence[Admitted], name: str) -> Pass:
        """Take the lists through all stages, with the time of each."""
        clock, work, busy = Stopwatch(), Work(), self.scorer.busy_seconds
        with clock.timed("read"):
            read = self._read()
        cpu_seconds = time.process_time()
        with clock.timed("tokenise"):
            found = list(blocks(lists, self.loaded.encoder, None))
        cpu_seconds = time.process_time() - cpu_seconds
        with clock.timed("plan"):
            scored = list(self._scored(found, work, name))
        clock.seconds["score"] = self.scorer.busy_seconds - busy
        clock.seconds["plan"] -= clock.seconds["score"]
        with clock.timed("write"):
            copies = _write(lists, scored)
        clock.seconds["read"] *= work.pairs / read
        clock.seconds["write"] /= copies
        pairs = (pair for block in found for some in block.pairs for pair in some)
        return Pass(work, sum(map(len, pairs)), dict(clock.seconds), cpu_seconds)

    def _read(self) -> int:
        """Read and admit lists from the beginning of the file; how many pairs these were."""
        pairs = 0
        with RowReader(self.file) as reader:
            for item in _admitted(self.file, reader.read(0, self.file.n_rows)):
                pairs += len(item.candidates)
                if pairs >= SAMPLE_PAIRS:
                    break
        return pairs

    def _scored(self, found: Sequence[Block], work: Work, name: str) -> Iterator[ScoredList]:
        total = sum(len(pairs) for block in found for pairs in block.pairs)
        for block in found:
            before, count = work.pairs, sum(map(len, block.pairs))

            def progress(share: float, before: int = before, count: int = count) -> None:
                self.watch.check()
                self.advance(name, before + share * count, total)

            yield from score_block(block, self.scorer, work, progress)

    def ceiling(self, config: Fields) -> Ceiling:
        """What the device could do at best."""
        scorer, products = self.loaded.scorer, layer_products(config)
        return measure_ceiling(
            scorer.engine, scorer.device, scorer.precision, products, self.watch.check
        )


def _write(lists: Sequence[Admitted], scored: Sequence[ScoredList]) -> int:
    """Rank lists and write them as a shard's part, into a folder that goes away.

    What a file costs by itself would weigh too much on few lists, so they are written as often
    as fills a shard; how often is returned.
    """
    copies = -(-PART_PAIRS // sum(len(item.candidates) for item in scored))
    with TemporaryDirectory() as folder, part_writer(Path(folder) / "part.parquet") as write:
        for admitted, item in [*zip(lists, scored, strict=True)] * copies:
            ranking, _ = finite(admitted, item, 1.0)
            if ranking:
                write(ranking)
    return copies
