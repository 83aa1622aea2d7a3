"""Stage 1: scores the shards of a job that are not committed yet, and ranks their lists.

Three threads, across shards: a reader opens, admits, tokenises and plans ahead; this thread
scores; a writer ranks, writes and commits behind it. A shard's part is a pure function of its
rows, the engine and the poison in it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from dear_batch.data import CandidateList, Ranking, Refusal, ScoredList, Shard
from dear_batch.files.parquet import RowReader
from dear_batch.files.parts import RANKED_SCHEMA, TEXT_SCHEMA, part_writer
from dear_batch.files.places import Places
from dear_batch.files.results import write_quarantine
from dear_batch.pointwise.recipe import PairEncoder
from dear_batch.pointwise.scorer import Scorer
from dear_batch.run.admission import SKIPPED, Admission, Admitted
from dear_batch.run.blocks import Block, blocks, score_block, scored_lists
from dear_batch.run.busy import Busy
from dear_batch.run.inputs import Hashes
from dear_batch.run.ledger import Commit, Ledger
from dear_batch.run.overlap import Behind, ahead, behind
from dear_batch.run.plan import Plan, Source
from dear_batch.run.ranking import rank
from dear_batch.run.report import Tally
from dear_batch.run.watch import Watch
from dear_batch.specs import JobSpec

STAGE = "pointwise"
Poison = Mapping[str, frozenset[int]]
Todo = tuple[Source, Shard]


@dataclass(frozen=True, slots=True)
class Read:
    """A block of a shard, or at its end None; all of a shard have its one tally."""

    source: Source
    shard: Shard
    tally: Tally
    block: Block | None


@dataclass(frozen=True, slots=True)
class Scored:
    """What was read, with the scores_N of its pairs."""

    read: Read
    scores_N: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Stage:
    """What every shard of a job shares."""

    spec: JobSpec
    plan: Plan
    encoder: PairEncoder
    scorer: Scorer
    ledger: Ledger
    hashes: Hashes
    fingerprint: str
    watch: Watch
    poison: Poison
    careful: bool
    intact: Callable[[], None]  # raises where the bundle changed while it was in use

    def run(self, todo: Sequence[Todo], done: int, total: int) -> list[Commit]:
        """Score and commit shards; `done` of `total` queries are committed already.

        After a death, nothing is read for a shard before the last one is committed.
        """
        commits, engine = list[Commit](), Busy(self.scorer)
        with _Files(self.plan) as files:
            for some in [[one] for one in todo] if self.careful else [todo]:
                self.watch.shard(STAGE, some[0][1].key)
                with (
                    closing(ahead(self._read(some, files))) as stream,
                    behind(partial(self._write, commits), self.hashes.stop) as writer,
                ):
                    advance = partial(self._advance, writer, total, done)
                    self._score(stream, engine, writer, advance)
                done += sum(shard.n_queries for _, shard in some)
        return commits

    def _advance(self, writer: Behind[Read | Scored], total: int, before: int, done: float) -> None:
        self.watch.check()
        writer.check()
        self.watch.advance(STAGE, before + done, total)

    # In the reader's thread.

    def _read(self, todo: Sequence[Todo], files: "_Files") -> Iterator[Read]:
        """Blocks of all shards in order."""
        for source, shard in todo:
            yield from self._read_shard(source, shard, *files.of(source))

    def _read_shard(
        self, source: Source, shard: Shard, reader: RowReader, places: Places
    ) -> Iterator[Read]:
        tally, depth = Tally(), self.spec.pointwise.depth

        def counted(lists: Iterator[CandidateList]) -> Iterator[CandidateList]:
            for item in lists:
                tally.candidates.read += len(item.candidates)
                yield item

        lists = counted(reader.read(shard.first_row, shard.n_rows))
        items = admit(self.spec, source, places, lists)
        poison = self.poison.get(f"{STAGE}/{shard.key}")
        if poison:
            items = without(items, poison, depth)
        for block in blocks(items, self.encoder, depth, self.scorer.layout, tally):
            yield Read(source, shard, tally, block)
        yield Read(source, shard, tally, None)

    # In the engine's thread, which is the main one.

    def _score(
        self,
        stream: Iterator[Read],
        engine: Busy,
        writer: Behind[Read | Scored],
        advance: Callable[[float], None],
    ) -> None:
        """Score what was read; `advance` is told how many of its queries are done."""
        done, lists, previous = 0, 0, None
        for read in stream:
            if previous and read.shard is not previous:
                self.watch.shard(STAGE, read.shard.key)
            previous = read.shard
            if read.block is None:
                done, lists = done + read.shard.n_queries, 0
                advance(done)  # what was set aside is done, too
                writer.put(read)
                continue
            scored = partial(_share, advance, done + lists, len(read.block.lists))
            scores_N = score_block(read.block, engine, read.tally.work, scored)
            lists += len(read.block.lists)
            lap = engine.lap()
            read.tally.seconds["score"] += lap.busy
            read.tally.seconds["idle"] += lap.idle
            writer.put(Scored(read, scores_N))

    # In the writer's thread.

    def _write(self, commits: list[Commit], items: Iterator[Read | Scored]) -> None:
        """Rank, write and commit what is scored, shard by shard."""
        commits.extend(self._shard(item, items) for item in items)

    def _shard(self, first: Read | Scored, others: Iterator[Read | Scored]) -> Commit:
        """Write a shard to its end, and commit it."""
        item, refusals = first, list[Refusal]()
        schema = TEXT_SCHEMA if self.spec.listwise else RANKED_SCHEMA
        read = item.read if isinstance(item, Scored) else item
        shard, tally = read.shard, read.tally
        path = self.ledger.new_file("parts", shard.key, self.fingerprint)
        with part_writer(path, schema) as write:
            while isinstance(item, Scored):
                with tally.timed("write"):
                    refusals += self._block(item, tally, write)
                item = next(others)
        for refusal in refusals:
            tally.refused(refusal)
        tally.queries.read = shard.n_queries
        return self._commit(read, {"part": path}, refusals)

    def _block(self, item: Scored, tally: Tally, write: Callable[..., None]) -> list[Refusal]:
        block = item.read.block
        if block is None:
            return []
        refusals = [*block.refusals]
        for admitted, scored in zip(block.lists, scored_lists(block, item.scores_N), strict=True):
            refusals += self._finish(admitted, scored, tally, write)
        return refusals

    def _finish(
        self, admitted: Admitted, scored: ScoredList, tally: Tally, write: Callable[..., None]
    ) -> list[Refusal]:
        ranking, refusals = finite(admitted, scored, self.spec.pointwise.interpolate)
        if ranking is None:
            return refusals
        if self.spec.listwise:
            write(ranking, admitted.query, passages(admitted, ranking, self.spec.listwise.depth))
        else:
            write(ranking)
        tally.ranked(ranking)
        return refusals

    def _commit(self, read: Read, files: dict[str, Path], refusals: Sequence[Refusal]) -> Commit:
        shard, set_aside = read.shard, [r for r in refusals if r.reason not in SKIPPED]
        if set_aside:
            files["quarantine"] = self.ledger.new_file("quarantine", shard.key)
            write_quarantine(files["quarantine"], set_aside)
        self.intact()
        return self.ledger.commit(
            STAGE,
            shard.key,
            fingerprint=self.fingerprint,
            input_sha256=self.hashes.of_source(read.source.inputs),
            files=files,
            counts=read.tally.to_json(),
        )


class _Files:
    """The reader of the source that is being read: it goes on where its last shard ended."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._stack = plan, ExitStack()
        self._source: Source | None = None

    def of(self, source: Source) -> tuple[RowReader, Places]:
        """The reader of a source; that of another one is closed."""
        if source is not self._source:
            self._stack.close()
            self._reader = self._stack.enter_context(RowReader(source.file))
            self._source, self._places = source, self._plan.places(source)
        return self._reader, self._places

    def __enter__(self) -> Self:
        """Nothing is open yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close what is open."""
        self._stack.close()


def _share(advance: Callable[[float], None], before: int, lists: int, share: float) -> None:
    """A share of some lists is done."""
    advance(before + share * lists)


def admit(
    spec: JobSpec, source: Source, places: Places, lists: Iterator[CandidateList]
) -> Iterator[Admitted | Refusal]:
    """What of the lists of a source is scored, and what is set aside."""
    admission = Admission(
        places, source.kept_rows, need_first_scores=spec.pointwise.interpolate < 1
    )
    is_flat = source.file.layout == "flat"
    return admission.admit_flat(lists) if is_flat else admission.admit(lists)


def without(
    items: Iterable[Admitted | Refusal], poison: frozenset[int], depth: int | None
) -> Iterator[Admitted | Refusal]:
    """Set aside the scored candidates with these ordinals, counted through all lists."""
    first = 0
    for item in items:
        if isinstance(item, Refusal):
            yield item
            continue
        scored = len(item.candidates[:depth])
        bad = {n - first for n in poison if first <= n < first + scored}
        first += scored
        for n in sorted(bad):
            yield item.refuse_candidate("kills_process", item.candidates[n].docid)
        left = [n for n in range(len(item.candidates)) if n not in bad]
        if left:
            candidates = tuple(item.candidates[n] for n in left)
            ranks = tuple(item.first_ranks[n] for n in left)
            yield replace(item, candidates=candidates, first_ranks=ranks)
        else:
            yield item.refuse("no_valid_candidates", 0)


def finite(
    admitted: Admitted, scored: ScoredList, interpolate: float
) -> tuple[Ranking | None, list[Refusal]]:
    """Rank a list without its NaN and infinite scores, which mis-rank silently."""
    kept = tuple(c for c in scored.candidates if c.logit is None or math.isfinite(c.logit))
    bad = {c.docid for c in scored.candidates} - {c.docid for c in kept}
    refusals = [admitted.refuse_candidate("non_finite_score", docid) for docid in sorted(bad)]
    if all(c.logit is None for c in kept):
        return None, [*refusals, admitted.refuse("no_valid_candidates", len(kept))]
    return rank(replace(scored, candidates=kept), interpolate), refusals


def passages(admitted: Admitted, ranking: Ranking, depth: int) -> tuple[tuple[str, str], ...]:
    """Title and text of the top of a list, for the second stage."""
    texts = {c.docid: (c.title, c.text or "") for c in admitted.candidates}
    return tuple(texts[entry.docid] for entry in ranking.entries[:depth])
