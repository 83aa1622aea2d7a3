"""Stage 2: reads stage 1's parts, re-orders the top of each list, publishes the final order.

What can be refused without the weights is refused by `prepare`, before stage 1 begins.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dear_batch.bundle import Bundle, open_bundle
from dear_batch.data import RankedList, Transcript
from dear_batch.errors import missing_extra
from dear_batch.files.parquet import grouped
from dear_batch.files.parts import list_size, read_part
from dear_batch.files.results import (
    RERANKED_SCHEMA,
    Write,
    published_names,
    run_writer,
    transcript_writer,
)
from dear_batch.listwise.preflight import check_listwise
from dear_batch.run.folder import listwise_settings, plan_listwise, replan, retract_report
from dear_batch.run.handover import part_path, read_handover
from dear_batch.run.report import ListwiseTally
from dear_batch.run.waves import Course, Ranker, rerank
from dear_batch.specs import JobSpec, ListwiseSpec

TOO_MANY_FAILED = "too-many-failed-windows"  # the status of a report
NEEDED = ("torch", "transformers")
WAVE_BYTES = 32 << 20  # of lists in memory, however many a model would take


def prepare(spec: ListwiseSpec, device: str) -> Bundle:
    """Open the listwise bundle and check all that needs no weights.

    Raises:
        ConfigurationError: a package or the device is missing, the bundle is not listwise, or
            it does not go with the prompt or the windows.
        TrustError: the bundle is not what its manifest says.
    """
    for package in NEEDED:
        if find_spec(package) is None:
            raise missing_extra(package, "listwise", "The listwise stage")
    if device.startswith("cuda"):  # only then is PyTorch worth its memory during stage 1
        from dear_batch.listwise.model import found_device

        found_device(device)
    bundle = open_bundle(spec.bundle, task="listwise")
    check_listwise(bundle, spec)
    return bundle


def open_ranker(bundle: Bundle, spec: ListwiseSpec, device: str) -> Ranker:
    """Load the weights."""
    from dear_batch.listwise.ranker import ListwiseRanker

    return ListwiseRanker.open(bundle, spec, device)


def run_listwise(
    job: JobSpec,
    spec: ListwiseSpec,
    advance: Callable[[float, int], None],
    *,
    may_differ: bool,
) -> dict[str, Any]:
    """Re-rank the parts in the output folder and publish; returns the report of both stages.

    Args:
        job: the whole job.
        spec: its listwise stage.
        advance: told (queries done, queries in all).
        may_differ: the folder may have been planned with other listwise settings.

    Raises:
        ConfigurationError, InputError, TrustError: see `prepare`, `plan_listwise` and
            `read_handover`.
    """
    folder, tally = Path(job.output.folder), ListwiseTally()
    with tally.timed("total"):
        with tally.timed("load"):
            bundle = prepare(spec, job.execution.device)  # anew: stage 1 may have taken hours
            settings = listwise_settings(spec, bundle.sha256)
            plan = plan_listwise(folder, job, settings, may_differ=may_differ)
            handover = read_handover(folder, spec.depth)
            ranker = open_ranker(bundle, spec, job.execution.device)
        retract_report(folder)
        total = handover.report["queries"]["written"]
        stage = _Stage(job, spec, ranker, tally, lambda done: advance(done, total))
        *others, last = handover.parts
        for stem in others:
            stage.publish(folder, stem)
        stage.publish(folder, last, lambda: tally.check(handover.report))
        replan(folder, plan)
    found = {"device": ranker.device, "precision": ranker.precision, **tally.to_json()}
    return {
        "status": TOO_MANY_FAILED if _too_many_failed(spec, tally) else "ok",
        **handover.report,
        "outputs": [published_names(stem)["run"] for stem in handover.parts],
        "listwise": {**settings, "max_failed_windows": str(spec.max_failed_windows), **found},
    }


def _too_many_failed(spec: ListwiseSpec, tally: ListwiseTally) -> bool:
    return tally.windows["failed"] > spec.failures_allowed(tally.windows.total())


@dataclass(frozen=True, slots=True)
class _Stage:
    """What every output of a job shares."""

    job: JobSpec
    spec: ListwiseSpec
    ranker: Ranker
    tally: ListwiseTally
    advance: Callable[[float], None]  # queries done

    def publish(self, folder: Path, stem: str, check: Callable[[], None] = lambda: None) -> None:
        """Write one output: once `check` is content its transcripts, its results, its run."""
        with (
            run_writer(folder, stem, self.job.output.tag, RERANKED_SCHEMA) as write,
            transcript_writer(folder, stem) as record,
        ):
            for wave in self._waves(part_path(folder, stem)):
                with self.tally.timed("rank"):
                    advance = partial(self._advance, self.tally.queries, len(wave))
                    courses = rerank(wave, self.spec, self.ranker, advance)
                with self.tally.timed("write"):
                    for course in courses:
                        self._finish(course, write, record)
            check()

    def _waves(self, path: Path) -> Iterator[list[RankedList]]:
        most = self.ranker.wave_queries
        waves = grouped(read_part(path), list_size, most=most, limit=WAVE_BYTES)
        while True:
            with self.tally.timed("read"):
                wave = next(waves, None)
            if wave is None:
                return
            yield wave

    def _advance(self, queries_before: int, queries: int, share: float) -> None:
        self.advance(queries_before + share * queries)

    def _finish(self, course: Course, write: Write, record: Callable[[Transcript], None]) -> None:
        ranking = course.ranking()
        write(ranking)
        self.tally.ranked(ranking)
        for transcript in course.transcripts:
            record(transcript)
            self.tally.answered(transcript.permutation)
