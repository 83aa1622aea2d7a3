"""Stage 1: scores the shards of a job that are not committed yet, and ranks their lists.

The reader thread opens, admits and tokenises ahead, across shards; this thread scores, ranks
and commits. A shard's part is a pure function of its rows, the engine and the poison in it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path

from dear_batch.data import CandidateList, Ranking, Refusal, ScoredList, Shard
from dear_batch.files.parquet import RowReader
from dear_batch.files.parts import RANKED_SCHEMA, TEXT_SCHEMA, part_writer
from dear_batch.files.places import Places
from dear_batch.files.results import write_quarantine
from dear_batch.pointwise.recipe import PairEncoder
from dear_batch.pointwise.scorer import Scorer
from dear_batch.run.admission import SKIPPED, Admission, Admitted
from dear_batch.run.blocks import Block, ahead, blocks, score_block
from dear_batch.run.inputs import Hashes
from dear_batch.run.ledger import Commit, Ledger
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
    """A block of a shard, or at its end None, with what was read for it."""

    source: Source
    shard: Shard
    block: Block | None
    candidates: int


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
        """Score and commit shards; `done` of `total` queries are committed already."""
        commits = []
        for source, shard, items in self._shards(todo):
            self.watch.shard(STAGE, shard.key)
            advance = partial(self._advance, total, done)
            commits.append(self._shard(source, shard, items, advance))
            done += shard.n_queries
            self.watch.advance(STAGE, done, total)  # what was set aside is done, too
        return commits

    def _shards(self, todo: Sequence[Todo]) -> Iterator[tuple[Source, Shard, Iterator[Read]]]:
        """Each shard with what is read for it; after a death, nothing is read for the next one."""
        if self.careful:
            for source, shards in groupby(todo, key=lambda pair: pair[0]):
                with RowReader(source.file) as reader:
                    places = self.plan.places(source)
                    for _, shard in shards:
                        own = self._read_shard(source, shard, reader, places)
                        with closing(ahead(own)) as found:
                            yield source, shard, found
            return
        with closing(ahead(self._read(todo))) as stream:
            for (source, shard), items in groupby(stream, key=lambda r: (r.source, r.shard)):
                yield source, shard, items

    def _advance(self, total: int, before: int, done: float) -> None:
        self.watch.check()
        self.watch.advance(STAGE, before + done, total)

    def _shard(
        self, source: Source, shard: Shard, items: Iterator[Read], advance: Callable[[float], None]
    ) -> Commit:
        """Score a shard to its end, and commit it."""
        tally, refusals = Tally(), list[Refusal]()
        schema = TEXT_SCHEMA if self.spec.listwise else RANKED_SCHEMA
        path = self.ledger.new_file("parts", shard.key, self.fingerprint)
        with part_writer(path, schema) as write:
            for block in _timed(items, tally):
                refusals += block.refusals
                for admitted, scored in self._scored(block, tally, advance):
                    refusals += self._finish(admitted, scored, tally, write)
        for refusal in refusals:
            tally.refused(refusal)
        tally.queries.read = shard.n_queries
        return self._commit(source, shard, tally, {"part": path}, refusals)

    def _scored(
        self, block: Block, tally: Tally, advance: Callable[[float], None]
    ) -> Iterator[tuple[Admitted, ScoredList]]:
        before = tally.queries.written

        def progress(share: float) -> None:
            advance(before + share * len(block.lists))

        with tally.timed("score"):
            scored = score_block(block, self.scorer, tally.work, progress)
        with tally.timed("write"):
            yield from zip(block.lists, scored, strict=True)

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

    def _commit(
        self,
        source: Source,
        shard: Shard,
        tally: Tally,
        files: dict[str, Path],
        refusals: Sequence[Refusal],
    ) -> Commit:
        set_aside = [refusal for refusal in refusals if refusal.reason not in SKIPPED]
        if set_aside:
            files["quarantine"] = self.ledger.new_file("quarantine", shard.key)
            write_quarantine(files["quarantine"], set_aside)
        self.intact()
        return self.ledger.commit(
            STAGE,
            shard.key,
            fingerprint=self.fingerprint,
            input_sha256=self.hashes.of_source(source.inputs),
            files=files,
            counts=tally.to_json(),
        )

    def _read(self, todo: Sequence[Todo]) -> Iterator[Read]:
        """Blocks of all shards in order; runs in the reader thread."""
        for source, shards in groupby(todo, key=lambda pair: pair[0]):
            with RowReader(source.file) as reader:
                places = self.plan.places(source)
                for _, shard in shards:
                    yield from self._read_shard(source, shard, reader, places)

    def _read_shard(
        self, source: Source, shard: Shard, reader: RowReader, places: Places
    ) -> Iterator[Read]:
        read, depth = 0, self.spec.pointwise.depth

        def counted(lists: Iterator[CandidateList]) -> Iterator[CandidateList]:
            nonlocal read
            for item in lists:
                read += len(item.candidates)
                yield item

        lists = counted(reader.read(shard.first_row, shard.n_rows))
        items = admit(self.spec, source, places, lists)
        poison = self.poison.get(f"{STAGE}/{shard.key}")
        if poison:
            items = without(items, poison, depth)
        for block in blocks(items, self.encoder, depth):
            yield Read(source, shard, block, 0)
        yield Read(source, shard, None, read)


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


def _timed(items: Iterator[Read], tally: Tally) -> Iterator[Block]:
    """The blocks of a shard, with the time that was waited for them."""
    while True:
        with tally.timed("wait_for_reader"):
            item = next(items, None)
        if item is None:
            return
        tally.candidates.read += item.candidates
        if item.block is not None:
            yield item.block
