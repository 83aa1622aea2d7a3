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

from dear_batch.data import CandidateList, Ranking, Refusal, ScoredList, Shard
from dear_batch.files.parquet import RowReader
from dear_batch.files.parts import RANKED_SCHEMA, TEXT_SCHEMA, part_writer
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
Items = Iterable[Admitted | Refusal]
NOTHING: frozenset[int] = frozenset()


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
    encoder: PairEncoder
    scorer: Scorer
    ledger: Ledger
    hashes: Hashes
    fingerprint: str
    watch: Watch
    poison: Poison

    def run(self, todo: Sequence[tuple[Source, Shard]], done: int, total: int) -> list[Commit]:
        """Score and commit shards; `done` of `total` queries are committed already."""
        commits = []
        with closing(ahead(self._read(todo))) as stream:
            for (source, shard), items in groupby(stream, key=lambda r: (r.source, r.shard)):
                self.watch.shard(STAGE, shard.key)
                commits.append(self._shard(source, shard, items, partial(self._advance, total, done)))
                done += shard.n_queries
        return commits

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
                before = tally.queries.written
                with tally.timed("score"):
                    scored = score_block(
                        block,
                        self.scorer,
                        tally.work,
                        lambda share, n=before, b=block: advance(n + share * len(b.lists)),
                    )
                with tally.timed("write"):
                    for admitted, found in zip(block.lists, scored, strict=True):
                        refusals += self._finish(admitted, found, tally, write)
                advance(tally.queries.written)
        for refusal in refusals:
            tally.refused(refusal)
        tally.queries.read = shard.n_queries
        return self._commit(source, shard, tally, {"part": path}, refusals)

    def _commit(
        self,
        source: Source,
        shard: Shard,
        tally: Tally,
        files: dict[str, "Path"],
        refusals: Sequence[Refusal],
    ) -> Commit:
        set_aside = [refusal for refusal in refusals if refusal.reason not in SKIPPED]
        if set_aside:
            files["quarantine"] = self.ledger.new_file("quarantine", shard.key)
            write_quarantine(files["quarantine"], set_aside)
        sha256 = self.hashes.of_source(source.inputs)
        counts = tally.to_json()
        return self.ledger.commit(STAGE, shard.key, self.fingerprint, sha256, files, counts)

    def _read(self, todo: Sequence[tuple[Source, Shard]]) -> Iterator[Read]:
        """Blocks of all shards in order; runs in the reader thread."""
        for source, pairs in groupby(todo, key=lambda pair: pair[0]):
            with RowReader(source.file) as reader:
                for _, shard in pairs:
                    yield from self._read_shard(source, shard, reader)

    def _read_shard(self, source: Source, shard: Shard, reader: RowReader) -> Iterator[Read]:
        depth = self.spec.pointwise.depth
        poison = self.poison.get(f"{STAGE}/{shard.key}", NOTHING)
        items = without(admitted(self.spec, source, shard, reader), poison, depth)
        read = 0
        ...


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
