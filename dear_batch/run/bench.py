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

from dear_batch.data import CandidateList, ScoredCandidate, ScoredList
from dear_batch.errors import InputError
from dear_batch.files.parquet import InputFile, RowReader, open_input
from dear_batch.files.parts import part_writer
from dear_batch.files.places import Places
from dear_batch.files.sample import PAIRS, sample_lists
from dear_batch.pointwise.ceiling import Ceiling, layer_products, measure_ceiling
from dear_batch.pointwise.rows import packed_arrays, padded_arrays
from dear_batch.run.admission import Admission, Admitted
from dear_batch.run.blocks import BLOCK_PAIRS, Block, Work, blocks, score_block
from dear_batch.run.busy import Busy
from dear_batch.run.loading import Loaded, load_pointwise
from dear_batch.run.pointwise import finite
from dear_batch.run.stopwatch import Stopwatch
from dear_batch.run.watch import Watch
from dear_batch.specs import ExecutionSpec

PASSES = 3  # that are measured; one before them warms up
SECONDS = 60.0  # of scoring, about
FIRST_PAIRS = 16  # from which on the pairs for so many seconds are looked for
# The CPU side is fast, and measured on more than is scored: what a job takes at a time.
CPU_PAIRS = BLOCK_PAIRS
GOLDEN = (5**0.5 - 1) / 2
# In the order of a job; the engine's is between the last two.
CPU_STAGES = ("read", "tokenise", "plan", "write")
Fields = dict[str, Any]
Advance = Callable[[str, float, int], None]  # (pass, pairs done, pairs in all)


@dataclass(frozen=True, slots=True)
class Scoring:
    """What the engine did in one pass, and in how many seconds.

    `real_tokens` are those of all pairs alone, so that they do not depend on how rows are packed.
    """

    work: Work
    real_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class CpuSide:
    """Wall seconds of each other stage for pairs of so many tokens.

    Tokenising alone spreads over cores: CPU seconds of the thread that calls, and of the others.
    """

    real_tokens: int
    seconds: dict[str, float]
    calling_seconds: float
    spread_seconds: float


@dataclass(frozen=True, slots=True)
class Measured:
    """An engine on a sample: equal passes over the same lists, and what else a job needs."""

    loaded: Loaded
    input: str
    lists: int
    load_seconds: float
    scoring: tuple[Scoring, ...]
    cpu_side: tuple[CpuSide, ...]
    config: Fields
    ceiling: Ceiling


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
    bench = _Bench(file, loaded, watch, advance)
    taken = taken_from(lists, pairs or bench.affordable(lists, seconds))
    bench.scoring(taken, "warm-up")
    scoring = tuple(bench.scoring(taken, f"pass {n} of {PASSES}") for n in range(1, PASSES + 1))
    more = taken_from(lists, CPU_PAIRS)
    cpu_side = tuple(bench.cpu_side(more) for _ in range(PASSES))
    config = json.loads(loaded.bundle.file("config.json").read_bytes())
    return Measured(
        *(loaded, str(path), len(taken), load_seconds, scoring, cpu_side),
        *(config, bench.ceiling(config)),
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
    watch: Watch
    advance: Advance

    def affordable(self, lists: Sequence[Admitted], seconds: float) -> int:
        """How many pairs can be scored in every pass, the warm-up included, in so many seconds.

        Tried with more and more of them, for a small part of the time.
        """
        most, count = sum(len(item.candidates) for item in lists), FIRST_PAIRS
        while True:
            count = min(count, most)
            took = self.scoring(taken_from(lists, count), "looking for a size").seconds
            if took > seconds / 50 or count == most:
                return max(1, min(most, round(count * seconds / (1 + PASSES) / took)))
            count *= 4

    def scoring(self, lists: Sequence[Admitted], name: str) -> Scoring:
        """Score all pairs of the lists once."""
        found, engine = self._blocks(lists, Stopwatch()), Busy(self.loaded.scorer)
        pairs = [pair for block in found for some in block.pairs for pair in some]
        work = Work()
        for block in found:
            before, count = work.pairs, sum(map(len, block.pairs))

            def progress(share: float, before: int = before, count: int = count) -> None:
                self.watch.check()
                self.advance(name, before + share * count, len(pairs))

            score_block(block, engine, work, progress)
        return Scoring(work, sum(map(len, pairs)), engine.lap().busy)

    def cpu_side(self, lists: Sequence[Admitted]) -> CpuSide:
        """Take lists through all other stages; scores are made up of ranks."""
        clock, n_pairs = Stopwatch(), sum(len(item.candidates) for item in lists)
        with clock.timed("file"):
            n_read = self._read()
        calling, everything = time.thread_time(), time.process_time()
        with clock.timed("blocks"):
            found = self._blocks(lists, clock)
        calling, everything = time.thread_time() - calling, time.process_time() - everything
        with clock.timed("lay_out"):
            self._lay_out(found)
        with clock.timed("write"):
            _write(lists)
        self.watch.check()
        spent, pairs = clock.seconds, [p for block in found for some in block.pairs for p in some]
        seconds = {
            "read": spent["file"] * n_pairs / n_read,
            "tokenise": spent["blocks"] - spent["plan_batches"],
            "plan": spent["plan_batches"] + spent["lay_out"],
            "write": spent["write"],
        }
        spread = max(0.0, everything - calling)
        calling = max(0.0, calling - spent["plan_batches"])
        return CpuSide(sum(map(len, pairs)), seconds, calling, spread)

    def _blocks(self, lists: Sequence[Admitted], clock: Stopwatch) -> list[Block]:
        return list(blocks(lists, self.loaded.encoder, None, self.loaded.scorer.layout, clock))

    def _read(self) -> int:
        """Read and admit lists from the beginning of the file; how many pairs these were."""
        pairs = 0
        with RowReader(self.file) as reader:
            for item in _admitted(self.file, reader.read(0, self.file.n_rows)):
                pairs += len(item.candidates)
                if pairs >= PAIRS:
                    break
        return pairs

    def _lay_out(self, found: Sequence[Block]) -> None:
        """Make the arrays of all batches, as engines do before they begin."""
        pad_id, packed = self.loaded.encoder.recipe.pad_id, self.loaded.scorer.layout.packed
        for batch in (batch for block in found for batch in block.plan.batches):
            if packed:
                packed_arrays(batch, pad_id)
            else:
                padded_arrays(batch, pad_id)

    def ceiling(self, config: Fields) -> Ceiling:
        """What the device could do at best."""
        scorer, products = self.loaded.scorer, layer_products(config)
        return measure_ceiling(
            scorer.engine, scorer.device, scorer.precision, products, self.watch.check
        )


def _write(lists: Sequence[Admitted]) -> None:
    """Rank lists and write them as a shard's part, into a folder that goes away."""
    with TemporaryDirectory() as folder, part_writer(Path(folder) / "part.parquet") as write:
        for item in lists:
            candidates = zip(item.candidates, item.first_ranks, strict=True)
            scored = tuple(
                ScoredCandidate(c.docid, rank, c.first_score, rank * GOLDEN % 1)
                for c, rank in candidates
            )
            ranking, _ = finite(item, ScoredList(item.qid, scored), 1.0)
            if ranking:
                write(ranking)
