"""Runs a job on this machine: stage 1, and stage 2 where the job has one, never both at once.

A job of one stage publishes its rankings. One of two leaves them in `parts/`, releases the
scorer, and stage 2 goes on from there, in the same process or in another.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

from dear_batch.bundle import Bundle, open_bundle
from dear_batch.data import RankedList, Ranking
from dear_batch.errors import UsageError
from dear_batch.files.durable import scratch_folder, writing
from dear_batch.files.parts import part_writer
from dear_batch.files.results import published_names, quarantine_writer, run_writer
from dear_batch.pointwise.recipe import PairEncoder
from dear_batch.pointwise.scorer import Scorer, open_scorer
from dear_batch.run.admission import Admitted
from dear_batch.run.folder import (
    check_folder,
    claim_folder,
    listwise_settings,
    retract_report,
)
from dear_batch.run.handover import part_path, write_handover
from dear_batch.run.listwise import prepare, run_listwise
from dear_batch.run.plan import Plan, plan_job
from dear_batch.run.pointwise import HandOn, Stage
from dear_batch.run.report import Tally, write_report
from dear_batch.specs import JobSpec, ListwiseSpec

Advance = Callable[[str, float, int], None]  # (stage, queries done, queries in all)
Stages = Literal["all", "pointwise", "listwise"]
OUTSTANDING = "listwise-outstanding"  # the status of a report


def run_job(
    spec: JobSpec,
    advance: Advance = lambda _stage, _done, _total: None,
    *,
    stage: Stages = "all",
) -> dict[str, Any]:
    """Rerank all inputs of a spec and publish the output folder; returns the report.

    With `stage` "pointwise" a job of two stages ends with its parts, with "listwise" it
    begins with those that lie in the folder.

    Raises:
        InputError, OutputError, TrustError, ConfigurationError, UsageError: before anything
            is published; see each step.
    """
    if spec.listwise is None and stage != "all":
        raise UsageError(
            f"The job has one stage, so there is no --stage {stage}.",
            valid="--listwise BUNDLE or a table [listwise], or no --stage",
        )
    folder = Path(spec.output.folder)
    check_folder(folder)
    if spec.listwise is None:
        report = {"status": "ok", **_pointwise(spec, advance, stage)}
    else:
        report = _two_stages(spec, spec.listwise, advance, stage)
    write_report(folder, report)
    return report


def _two_stages(
    spec: JobSpec, listwise: ListwiseSpec, advance: Advance, stage: Stages
) -> dict[str, Any]:
    if stage != "listwise":
        fields = _pointwise(spec, advance, stage)
        gc.collect()  # the scorer is gone before the other model comes
        if stage == "pointwise":
            return {"status": OUTSTANDING, **fields, "outputs": []}
    return run_listwise(
        spec, listwise, partial(advance, "listwise"), may_differ=stage == "listwise"
    )


def _pointwise(spec: JobSpec, advance: Advance, stage: Stages) -> dict[str, Any]:
    """Plan, claim the folder, run stage 1; whatever would refuse stage 2 refuses here."""
    folder = Path(spec.output.folder)
    tally = Tally()
    # A refused job makes no folders: its scratch lies where folders exist already.
    place = next(parent for parent in folder.absolute().parents if parent.is_dir())
    with tally.timed("total"), scratch_folder(place / folder.absolute().name) as scratch:
        with tally.timed("plan"):
            plan = plan_job(spec, scratch)
        with tally.timed("load"):
            settings = _listwise_settings(spec, stage)
            bundle, encoder, scorer = _load(spec)
        alone = stage == "pointwise"
        claim_folder(folder, plan, spec, bundle.sha256, settings, may_differ=alone)
        retract_report(folder)
        total = sum(output.n_queries for output in plan.outputs)
        with quarantine_writer(folder) as refuse:
            progress = partial(_advance, advance, total)
            job = Stage(spec, encoder, scorer, tally, refuse, progress)
            for output in plan.outputs:
                with _sink(spec, folder, output.stem) as hand_on:
                    job.rank(output, hand_on)
    report = _report(plan, bundle, scorer, tally)
    if spec.listwise:
        write_handover(folder, [o.stem for o in plan.outputs], spec.listwise.depth, report)
    return report


def _advance(advance: Advance, total: int, done: float) -> None:
    advance("pointwise", done, total)


def _listwise_settings(spec: JobSpec, stage: Stages) -> dict[str, Any] | None:
    if spec.listwise is None:
        return None
    if stage == "pointwise":  # another machine may run the other stage, and have its bundle
        if Path(spec.listwise.bundle).is_dir():
            open_bundle(spec.listwise.bundle, task="listwise", verify=False)
        return listwise_settings(spec.listwise, None)
    bundle = prepare(spec.listwise, spec.execution.device)
    return listwise_settings(spec.listwise, bundle.sha256)


def _load(spec: JobSpec) -> tuple[Bundle, PairEncoder, Scorer]:
    bundle = open_bundle(spec.pointwise.bundle, task="pointwise")
    execution = spec.execution
    scorer = open_scorer(
        bundle,
        engine=execution.engine,
        device=execution.device,
        row_tokens=execution.row_tokens,
        batch_tokens=execution.batch_tokens,
    )
    return bundle, PairEncoder.from_file(bundle.file("tokenizer.json"), bundle.recipe), scorer


@contextmanager
def _sink(spec: JobSpec, folder: Path, stem: str) -> Iterator[HandOn]:
    """Where the rankings of an output go: into its run, or into its part for stage 2."""
    if spec.listwise is None:
        with run_writer(folder, stem, spec.output.tag) as write:
            yield lambda _admitted, ranking: write(ranking)
        return
    depth, path = spec.listwise.depth, part_path(folder, stem)
    with writing(path.parent):
        path.parent.mkdir(exist_ok=True)
    with part_writer(path) as leave:
        yield lambda admitted, ranking: leave(_with_text(admitted, ranking, depth))


def _with_text(admitted: Admitted, ranking: Ranking, depth: int) -> RankedList:
    texts = {c.docid: (c.title, c.text or "") for c in admitted.candidates}
    passages = tuple(texts[entry.docid] for entry in ranking.entries[:depth])
    return RankedList(admitted.query, ranking, passages)


def _report(plan: Plan, bundle: Bundle, scorer: Scorer, tally: Tally) -> dict[str, Any]:
    layout = scorer.layout
    return {
        "inputs": [file.path for file in plan.inputs],
        "outputs": [published_names(output.stem)["run"] for output in plan.outputs],
        "bundle": str(bundle.folder),
        "bundle_sha256": bundle.sha256,
        "engine": scorer.engine,
        "device": scorer.device,
        "precision": bundle.manifest.precision,
        "row_tokens": layout.row_tokens if layout.packed else None,
        "batch_tokens": layout.batch_tokens,
        **tally.to_json(),
    }
