"""What a job is to do in its folder: the plan that lies there, or a new one.

`plan.json` is compared with what is asked for now before any model loads; a plan that fits is
taken as it stands, so that a restart does not read the inputs again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dear_batch.bundle import open_bundle
from dear_batch.errors import ConfigurationError
from dear_batch.files.durable import scratch_folder
from dear_batch.files.parquet import InputFile, grouped
from dear_batch.files.regroup import regroup
from dear_batch.run.folder import PLAN, SCHEMA_VERSION, read_plan, refuse_other_job
from dear_batch.run.identity import digest, job_fields, listwise_settings
from dear_batch.run.inputs import Pin, hash_blocks, joined, opened, record, recorded_of_source
from dear_batch.run.ledger import Ledger
from dear_batch.run.plan import (
    Plan,
    check_together,
    expand,
    is_there,
    plan_job,
)
from dear_batch.run.plan_json import outputs_from_json, outputs_to_json
from dear_batch.run.watch import Watch
from dear_batch.specs import JobSpec, ListwiseSpec

LEAST_QUERIES = 128  # of a shard of the second stage: what a GPU takes at once
Fields = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked for now. `files` are the inputs that are there, opened by their footers."""

    job: Fields
    listwise: Fields | None
    pins: tuple[Pin, ...]
    files: tuple[InputFile, ...]


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """A shard as `plan.json` names it; `inputs` are the numbers of those it is made from."""

    key: str
    n_queries: int
    inputs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PlannedOutput:
    """An output as `plan.json` names it."""

    stem: str
    shards: tuple[PlannedShard, ...]


def wanted_now(spec: JobSpec, stage: str, folder: Path) -> Wanted:
    """Open the inputs and the manifests of the bundles, and say what the job is.

    Where the second stage runs alone, inputs that are gone are those of the plan, and the
    first stage is the one that was planned.

    Raises:
        InputError: an input is missing, unreadable, or does not go with the others.
        ConfigurationError: a bundle is not one, or not of its task, or there is no first
            stage for a second one alone.
    """
    if stage == "listwise" and spec.listwise:
        found = read_plan(folder)
        if found is None or found["listwise"] is None:
            raise no_stage_one(folder)
        depth = _depth_within(found["job"]["text_depth"], spec.listwise, folder)
        pins, files = _pins_left(spec, found)
        sha256 = open_bundle(spec.pointwise.bundle, task="pointwise", verify=False).sha256
        settings = _settings(spec.listwise, stage)
        return Wanted(
            {**job_fields(spec, pins, sha256), "text_depth": depth}, settings, pins, files
        )
    files, pins = _opened(expand(spec.input.paths))
    check_together(files, spec)
    sha256 = open_bundle(spec.pointwise.bundle, task="pointwise", verify=False).sha256
    listwise = _settings(spec.listwise, stage) if spec.listwise else None
    return Wanted(job_fields(spec, pins, sha256), listwise, pins, files)


def _settings(spec: ListwiseSpec, stage: str) -> Fields:
    """The second stage; where the first runs alone, another machine may have its bundle."""
    if stage == "pointwise" and not Path(spec.bundle).is_dir():
        return listwise_settings(spec, None)
    sha256 = open_bundle(spec.bundle, task="listwise", verify=False).sha256
    return listwise_settings(spec, sha256)


def _depth_within(text_depth: int, spec: ListwiseSpec, folder: Path) -> int:
    if spec.depth > text_depth:
        raise ConfigurationError(
            f"The parts of stage 1 carry the text of the first {text_depth} candidates, "
            f"and the listwise depth is {spec.depth}.",
            where=str(folder / PLAN),
            valid=f"a listwise depth of 2 to {text_depth}",
            next_step="lower --listwise-depth, or run both stages into another --output",
        )
    return text_depth


def _pins_left(spec: JobSpec, found: Fields) -> tuple[tuple[Pin, ...], tuple[InputFile, ...]]:
    """The planned inputs where those that are there are unchanged, else the ones there."""
    planned = tuple(Pin(**fields) for fields in found["job"]["inputs"])
    left = tuple(pin for pin in planned if is_there(pin.path))
    files, now = _opened(expand(spec.input.paths, may_be_gone=True))
    return (planned, files) if now == left else (now, files)


def _opened(paths: Sequence[str]) -> tuple[tuple[InputFile, ...], tuple[Pin, ...]]:
    both = [opened(path) for path in paths]
    return tuple(file for file, _ in both), tuple(pin for _, pin in both)


def no_stage_one(folder: Path) -> ConfigurationError:
    """The error for a second stage without a first."""
    return ConfigurationError(
        f"There is no finished stage 1 for a listwise stage in {folder}.",
        valid="a folder in which this job ran with --stage pointwise, or without --stage",
        next_step="the same command with --stage pointwise; a folder without [listwise] in its "
        "plan needs another --output",
    )


def fitting_plan(folder: Path, wanted: Wanted, stage: str) -> Fields | None:
    """The plan of a folder, seen to be of this job; None where there is none yet.

    Raises:
        ConfigurationError: it is another job's.
    """
    found = read_plan(folder)
    if found is None:
        if (folder / PLAN).is_file():
            raise ConfigurationError(
                f"The plan of {folder} is damaged, or of another version of dear-batch.",
                where=str(folder / PLAN),
                next_step="begin anew with --restart, or choose another --output",
            )
        return None
    compared: Fields = {"job": wanted.job, "listwise": wanted.listwise}
    if stage != "all" and found["listwise"]:  # one stage leaves or replaces the other's
        compared["listwise"] = found["listwise"]
    refuse_other_job(folder, found, compared, again=stage == "all")
    return found


def new_plan(spec: JobSpec, wanted: Wanted, ledger: Ledger, watch: Watch) -> tuple[Plan, Fields]:
    """Read and divide the inputs; the second is what `plan.json` will hold.

    Raises:
        InputError, UsageError, OutputError: see `plan_job`.
    """
    _forget_others(wanted, ledger)
    with scratch_folder(ledger.folder / "plan") as scratch:
        regrouped = _Regrouped(wanted, ledger, watch)
        plan = plan_job(
            spec, scratch, files=wanted.files, regrouped=regrouped.path, beat=watch.check
        )
    nothing = {"pointwise": None, "listwise": None}
    return plan, {
        "schema_version": SCHEMA_VERSION,
        "job": wanted.job,
        "listwise": wanted.listwise,
        "runtime": nothing,
        "fingerprints": nothing,
        "passed_over": [],  # engines; known once one was chosen
        "outputs": outputs_to_json(plan),
    }


def _forget_others(wanted: Wanted, ledger: Ledger) -> None:
    """Drop what was noted of inputs for a plan that never was, where they are not these."""
    known = (ledger.found("input", f"{number:05d}") for number in range(len(wanted.pins)))
    for commit, pin in zip(known, wanted.pins, strict=True):
        if commit and (commit.fingerprint, commit.counts["path"]) != (
            pin.footer_sha256,
            pin.path,
        ):
            ledger.drop("input")
            ledger.drop("regroup")
            return


def plan_again(fields: Fields, wanted: Wanted, ledger: Ledger, watch: Watch) -> Plan:
    """The plan that lies in the folder, without reading the inputs again."""
    regrouped = _Regrouped(wanted, ledger, watch)
    return outputs_from_json(fields["outputs"], wanted.files, regrouped.path)


@dataclass(frozen=True, slots=True)
class _Regrouped:
    """Scattered flat rows brought together: the work of the plan that outlives a crash."""

    wanted: Wanted
    ledger: Ledger
    watch: Watch

    def path(self, number: int, paths: Sequence[str]) -> Path:
        """The regrouped file of an output, made if it is not committed."""
        shard = f"{number:05d}"
        pins = {pin.path: pin for pin in self.wanted.pins}
        fingerprint = digest([asdict(pins[path]) for path in paths])
        numbers = [i for i, pin in enumerate(self.wanted.pins) if pin.path in paths]
        known = recorded_of_source(self.ledger, numbers)
        kept = known and self.ledger.kept("regroup", shard, fingerprint, known)
        if kept:
            return self.ledger.path_of(kept.files["part"])
        out = self.ledger.new_file("parts", shard, fingerprint, ".regrouped")
        regroup(paths, out, beat=self.watch.check)
        found = [hash_blocks(path, self.watch.check) for path in paths]
        for n, sha256 in zip(numbers, found, strict=True):
            record(self.ledger, n, self.wanted.pins[n], sha256)
        made = self.ledger.commit(
            "regroup",
            shard,
            fingerprint=fingerprint,
            input_sha256=joined(found),
            files={"part": out},
            counts={},
        )
        return self.ledger.path_of(made.files["part"])


def outline(fields: Fields) -> list[PlannedOutput]:
    """The shards of each output, in the order of the run, as a plan names them."""
    return [
        PlannedOutput(
            output["stem"],
            tuple(
                PlannedShard(shard["key"], shard["n_queries"], tuple(source["inputs"]))
                for source in output["sources"]
                for shard in source["shards"]
            ),
        )
        for output in fields["outputs"]
    ]


def second_stage(output: PlannedOutput) -> Iterator[list[PlannedShard]]:
    """The shards of a second stage: those of the first, several together where they are small."""
    shards = output.shards
    return grouped(shards, lambda s: s.n_queries, most=len(shards), limit=LEAST_QUERIES)


def with_runtime(fields: Fields, stage: str, runtime: Fields, before: str = "") -> Fields:
    """A plan that says what computes a stage; `before` is the fingerprint it builds on."""
    settings = fields["job"] if stage == "pointwise" else [before, fields["listwise"]]
    return {
        **fields,
        "runtime": {**fields["runtime"], stage: runtime},
        "fingerprints": {**fields["fingerprints"], stage: digest(settings, runtime)},
    }
