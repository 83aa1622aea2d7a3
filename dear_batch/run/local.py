"""Runs a job on this machine, shard after shard, with one engine.

The reader thread opens, admits and tokenises ahead; this thread scores, ranks and writes.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dear_batch.bundle import Bundle, open_bundle
from dear_batch.data import CandidateList, Refusal, ScoredList
from dear_batch.files.durable import scratch_folder
from dear_batch.files.parquet import RowReader
from dear_batch.files.results import Write, quarantine_writer, run_writer
from dear_batch.pointwise.recipe import PairEncoder
from dear_batch.pointwise.scorer import Scorer, open_scorer
from dear_batch.run.admission import REASONS, Admission
from dear_batch.run.blocks import Block, ahead, blocks, score_block
from dear_batch.run.plan import Output, Plan, check_folder, claim_folder, plan_job
from dear_batch.run.ranking import rank
from dear_batch.run.report import Tally, write_report
from dear_batch.specs import JobSpec

Advance = Callable[[float, int], None]  # (queries done, queries in all)
Refuse = Callable[[Refusal], None]


def run_job(spec: JobSpec, advance: Advance = lambda _done, _total: None) -> dict[str, Any]:
    """Rerank all inputs of a spec and publish the output folder; returns the report.

    Raises:
        InputError, OutputError, TrustError, ConfigurationError, UsageError: before anything
            is published; see each step.
    """
    folder = Path(spec.output.folder)
    check_folder(folder)
    tally = Tally()
    # A refused job makes no folders: its scratch lies where folders exist already.
    place = next(parent for parent in folder.absolute().parents if parent.is_dir())
    with tally.timed("total"), scratch_folder(place / folder.absolute().name) as scratch:
        with tally.timed("plan"):
            plan = plan_job(spec, scratch)
        with tally.timed("load"):
            bundle, encoder, scorer = _load(spec)
        claim_folder(folder, plan, spec, bundle.sha256)
        total = sum(output.n_queries for output in plan.outputs)
        with quarantine_writer(folder) as refuse:
            job = _Job(spec, encoder, scorer, tally, refuse, lambda done: advance(done, total))
            for output in plan.outputs:
                job.publish(output, folder)
    report = _report(plan, bundle, scorer, tally)
    write_report(folder, report)
    return report


def _load(spec: JobSpec) -> tuple[Bundle, PairEncoder, Scorer]:
    bundle = open_bundle(spec.pointwise.bundle)
    execution = spec.execution
    scorer = open_scorer(
        bundle,
        engine=execution.engine,
        device=execution.device,
        row_tokens=execution.row_tokens,
        batch_tokens=execution.batch_tokens,
    )
    return bundle, PairEncoder.from_file(bundle.file("tokenizer.json"), bundle.recipe), scorer


@dataclass(frozen=True, slots=True)
class _Job:
    """What every output of a job shares."""

    spec: JobSpec
    encoder: PairEncoder
    scorer: Scorer
    tally: Tally
    refuse: Refuse
    advance: Callable[[float], None]

    def publish(self, output: Output, folder: Path) -> None:
        """Score one output's shards and write its files."""
        with run_writer(folder, output.stem, self.spec.output.tag) as write:
            for name, block in self._read_ahead(output):
                queries = self.tally.queries
                advance = partial(self._advance, queries.written + queries.quarantined, block)
                with self.tally.timed("score"):
                    scored_lists = score_block(block, self.scorer, self.tally.work, advance)
                with self.tally.timed("write"):
                    for refusal in block.refusals:
                        self._set_aside(refusal)
                    for scored in scored_lists:
                        self._finish(scored, name, write)
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

    def _finish(self, scored: ScoredList, name: str, write: Write) -> None:
        """Rank and write a list without its NaN and infinite scores, which mis-rank silently."""
        kept = tuple(c for c in scored.candidates if c.logit is None or math.isfinite(c.logit))
        for candidate in scored.candidates:
            if candidate.logit is not None and not math.isfinite(candidate.logit):
                self._set_aside(_unusable("non_finite_score", name, scored.qid, candidate.docid, 1))
        if all(c.logit is None for c in kept):
            self._set_aside(_unusable("no_valid_candidates", name, scored.qid, None, len(kept)))
            return
        ranking = rank(replace(scored, candidates=kept), self.spec.pointwise.interpolate)
        write(ranking)
        self.tally.ranked(ranking)


def _unusable(reason: str, path: str, qid: str, docid: str | None, candidates: int) -> Refusal:
    """A refusal after scoring, when the row is no longer at hand; the qid finds it."""
    return Refusal(reason, REASONS[reason], path, None, qid, docid, candidates)


def _report(plan: Plan, bundle: Bundle, scorer: Scorer, tally: Tally) -> dict[str, Any]:
    layout = scorer.layout
    return {
        "status": "ok",
        "inputs": [file.path for file in plan.inputs],
        "outputs": [f"{output.stem}.trec" for output in plan.outputs],
        "bundle": str(bundle.folder),
        "bundle_sha256": bundle.sha256,
        "engine": scorer.engine,
        "device": scorer.device,
        "precision": bundle.manifest.precision,
        "row_tokens": layout.row_tokens if layout.packed else None,
        "batch_tokens": layout.batch_tokens,
        **tally.to_json(),
    }
