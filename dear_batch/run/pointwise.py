"""Stage 1: scores the shards of an output and ranks its lists, one after the other.

The reader thread opens, admits and tokenises ahead; this thread scores and ranks. What becomes
of a ranking is the caller's affair.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from dear_batch.data import CandidateList, Ranking, Refusal, ScoredList
from dear_batch.files.parquet import RowReader
from dear_batch.pointwise.recipe import PairEncoder
from dear_batch.pointwise.scorer import Scorer
from dear_batch.run.admission import REASONS, Admission, Admitted
from dear_batch.run.blocks import Block, ahead, blocks, score_block
from dear_batch.run.plan import Output
from dear_batch.run.ranking import rank
from dear_batch.run.report import Tally
from dear_batch.specs import JobSpec

HandOn = Callable[[Admitted, Ranking], None]


@dataclass(frozen=True, slots=True)
class Stage:
    """What every output of a job shares."""

    spec: JobSpec
    encoder: PairEncoder
    scorer: Scorer
    tally: Tally
    refuse: Callable[[Refusal], None]
    advance: Callable[[float], None]  # queries done

    def rank(self, output: Output, hand_on: HandOn) -> None:
        """Score one output's shards and hand on its rankings in order."""
        for name, block in self._read_ahead(output):
            queries = self.tally.queries
            advance = partial(self._advance, queries.written + queries.quarantined, block)
            with self.tally.timed("score"):
                scored_lists = score_block(block, self.scorer, self.tally.work, advance)
            with self.tally.timed("write"):
                for refusal in block.refusals:
                    self._set_aside(refusal)
                for admitted, scored in zip(block.lists, scored_lists, strict=True):
                    self._finish(admitted, scored, name, hand_on)
            self._advance(queries.written + queries.quarantined, block, 0)

    def _advance(self, queries_before: int, block: Block, share: float) -> None:
        self.advance(queries_before + share * len(block.lists))

    def _read_ahead(self, output: Output) -> Iterator[tuple[str, Block]]:
        stream = ahead(self._blocks(output))
        while True:
            with self.tally.timed("wait_for_reader"):
                item = next(stream, None)
            if item is None:
                return
            yield item

    def _blocks(self, output: Output) -> Iterator[tuple[str, Block]]:
        """Blocks of all shards in order, with the input's name; runs in the reader thread."""
        pointwise = self.spec.pointwise
        for source, shards in zip(output.sources, output.shards, strict=True):
            with RowReader(source.file) as reader:
                for shard in shards:
                    admission = Admission(
                        source.name,
                        source.kept_rows,
                        has_rows=not source.regrouped,
                        need_first_scores=pointwise.interpolate < 1,
                    )
                    is_flat = source.file.layout == "flat"
                    admit = admission.admit_flat if is_flat else admission.admit
                    items = admit(self._counted(reader.read(shard.first_row, shard.n_rows)))
                    for block in blocks(items, self.encoder, pointwise.depth):
                        yield source.name, block
                    self.tally.queries.read += shard.n_queries

    def _counted(self, lists: Iterator[CandidateList]) -> Iterator[CandidateList]:
        for item in lists:
            self.tally.candidates.read += len(item.candidates)
            yield item

    def _set_aside(self, refusal: Refusal) -> None:
        self.refuse(refusal)
        self.tally.refused(refusal)

    def _finish(self, admitted: Admitted, scored: ScoredList, name: str, hand_on: HandOn) -> None:
        """Rank and hand on a list without its NaN and infinite scores, which mis-rank silently."""
        kept = tuple(c for c in scored.candidates if c.logit is None or math.isfinite(c.logit))
        for candidate in scored.candidates:
            if candidate.logit is not None and not math.isfinite(candidate.logit):
                self._set_aside(_unusable("non_finite_score", name, scored.qid, candidate.docid, 1))
        if all(c.logit is None for c in kept):
            self._set_aside(_unusable("no_valid_candidates", name, scored.qid, None, len(kept)))
            return
        ranking = rank(replace(scored, candidates=kept), self.spec.pointwise.interpolate)
        hand_on(admitted, ranking)
        self.tally.ranked(ranking)


def _unusable(reason: str, path: str, qid: str, docid: str | None, candidates: int) -> Refusal:
    """A refusal after scoring, when the row is no longer at hand; the qid finds it."""
    return Refusal(reason, REASONS[reason], path, None, qid, docid, candidates)
