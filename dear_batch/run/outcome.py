"""How a job ended: its report, what the manifest says, the metrics, also where it failed."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dear_batch.errors import EXIT_INCOMPLETE, DearBatchError, OutputError, bug
from dear_batch.files.results import published_names
from dear_batch.log import error_parts
from dear_batch.run.folder import (
    MANIFEST,
    METRICS,
    REPORT,
    SUCCESS,
    OtherJobError,
    finished,
    names_in,
    read_json,
    read_plan,
    write_json,
)
from dear_batch.run.ledger import Commit, Ledger
from dear_batch.run.metrics import write_metrics
from dear_batch.run.planning import outline
from dear_batch.run.publish import QUARANTINE, Finished, published
from dear_batch.run.rates import remember
from dear_batch.run.report import (
    FAILED,
    OK,
    OUTSTANDING,
    SCHEMA_VERSION,
    STOPPED,
    TOO_MANY_BAD,
    TOO_MANY_FAILED,
    listwise_figures,
    pointwise_figures,
)
from dear_batch.run.stopwatch import Stopwatch
from dear_batch.run.watch import StoppedError
from dear_batch.specs import JobSpec

Fields = dict[str, Any]
BUG = 1  # the exit code of a fault that is none of the user's


def report(
    spec: JobSpec, fields: Fields, outputs: Sequence[Finished], clock: Stopwatch, attempt: str
) -> Fields:
    """The report of a job whose shards are all committed."""
    first = [commit for output in outputs for commit in output.pointwise]
    second = [commit for output in outputs for commit in output.listwise or ()]
    found = _first_stage(spec, fields, first, clock)
    found["outputs"] = published(outputs)
    shards = {"pointwise": _shards(first, attempt)}
    if spec.listwise:
        shards["listwise"] = _shards(second, attempt)
        figures = listwise_figures(commit.counts for commit in second)
        figures["seconds"]["load"] = round(clock.seconds.get("load listwise", 0.0), 3)
        found["listwise"] = {
            "bundle": spec.listwise.bundle,
            **fields["listwise"],
            "max_failed_windows": str(spec.listwise.max_failed_windows),
            "device": fields["runtime"]["listwise"]["device"],
            "precision": fields["runtime"]["listwise"]["precision"],
            **figures,
        }
    found["shards"] = shards
    return {"schema_version": SCHEMA_VERSION, **_end(spec, found), **found}


def _first_stage(
    spec: JobSpec, fields: Fields, commits: Iterable[Commit], clock: Stopwatch
) -> Fields:
    figures = pointwise_figures(commit.counts for commit in commits)
    figures["seconds"] |= {k: v for k, v in clock.rounded().items() if k != "load listwise"}
    runtime = fields["runtime"]["pointwise"]
    return {
        "inputs": [pin["path"] for pin in fields["job"]["inputs"]],
        "outputs": [],
        "bundle": spec.pointwise.bundle,
        "bundle_sha256": fields["job"]["bundle_sha256"],
        **{name: runtime[name] for name in ("engine", "device", "precision", "plan")},
        "passed_over": fields["passed_over"],
        **{name: runtime[name] for name in ("row_tokens", "batch_tokens")},
        **figures,
    }


def _shards(commits: Sequence[Commit], attempt: str) -> dict[str, int]:
    new = sum(commit.attempt == attempt for commit in commits)
    return {"done": len(commits), "kept": len(commits) - new}


def _end(spec: JobSpec, found: Mapping[str, Any]) -> Fields:
    """Status and exit code of a job that is done and published."""
    status = OK
    windows = (found.get("listwise") or {}).get("windows")
    if spec.listwise and windows:
        allowed = spec.listwise.failures_allowed(windows["total"])
        status = TOO_MANY_FAILED if windows["failed"] > allowed else OK
    # A list that is set aside without candidates is bad, too.
    bad = max(found[name]["quarantined"] for name in ("queries", "candidates"))
    if bad > spec.input.bad_allowed(found["candidates"]["read"]):
        status = TOO_MANY_BAD
    return {"status": status, "exit_code": 0 if status == OK else EXIT_INCOMPLETE}


def outstanding(
    spec: JobSpec, folder: Path, fields: Fields, commits: Mapping[str, Commit], clock: Stopwatch
) -> Fields:
    """The report of a first stage whose second is to come; it is written unless all is done."""
    found = {
        "schema_version": SCHEMA_VERSION,
        "status": OUTSTANDING,
        "exit_code": 0,
        **_first_stage(spec, fields, commits.values(), clock),
        "shards": {"pointwise": {"done": len(commits)}},
    }
    if not finished(folder):
        write_json(folder / REPORT, found)
        write_metrics(folder, found, success=False)
    return found


def manifest(
    fields: Fields, inputs: Sequence[Fields], outputs: Sequence[Finished], found: Fields
) -> Fields:
    """What the manifest says beside the files."""
    return {
        **{name: fields[name] for name in ("job", "listwise", "runtime", "fingerprints")},
        "inputs": list(inputs),
        "outputs": [{"stem": output.stem, **output.counts()} for output in outputs],
        "counts": {name: found[name] for name in ("queries", "candidates")},
    }


def record(folder: Path, found: Fields) -> None:
    """Let a monitoring system and later estimates know of a job that published."""
    with suppress(OutputError):  # the job is published, and stays so
        write_metrics(folder, found, success=True)
    shards = found["shards"]["pointwise"]
    if found["tokens_per_second"] and shards["kept"] < shards["done"]:
        rate = found["tokens_per_second"]
        remember(found["bundle_sha256"], found["engine"], found["device"], rate)
    listwise = found.get("listwise")
    shards = found["shards"].get("listwise", shards)
    if listwise and listwise["seconds"].get("rank") and shards["kept"] < shards["done"]:
        rate = listwise["prompt_tokens"] / listwise["seconds"]["rank"]
        remember(listwise["bundle_sha256"], "torch", listwise["device"], rate)


def again(spec: JobSpec, folder: Path) -> Fields:
    """The report of a job that was done before; nothing changes.

    But for metrics that a death between the end of the job and theirs kept back.
    """
    found = read_json(folder / REPORT) or {}
    found |= _end(spec, found)
    metrics, success = folder / METRICS, folder / SUCCESS
    if not metrics.exists() or metrics.stat().st_mtime_ns < success.stat().st_mtime_ns:
        with suppress(OutputError):
            write_metrics(folder, found, success=True)
    return {**found, "already_done": True}


def failed(spec: JobSpec, error: Exception, phase: str) -> None:
    """Report a job that did not end well, unless the folder is another's, or done.

    A disk that is full keeps no report; the error that is on its way says why.
    """
    folder = Path(spec.output.folder)
    if isinstance(error, OtherJobError) or _is_another(spec, folder) or finished(folder):
        return
    found: Fields = {
        "schema_version": SCHEMA_VERSION,
        "status": STOPPED if isinstance(error, StoppedError) else FAILED,
        "exit_code": error.exit_code if isinstance(error, DearBatchError) else BUG,
        "phase": phase,
        "error": _described(error),
        "outputs": [],
        **_so_far(folder),
    }
    with suppress(OutputError):
        write_json(folder / REPORT, found)
        write_metrics(folder, found, success=False)


def _is_another(spec: JobSpec, folder: Path) -> bool:
    """Whether the plan that lies there asks for something else, so far as that is seen early."""
    plan = read_plan(folder)
    if plan is None:
        return False
    asked = {"depth": spec.pointwise.depth, "interpolate": spec.pointwise.interpolate}
    output = {"tag": spec.output.tag, "run_per_input": spec.output.run_per_input}
    return (plan["job"]["pointwise"], plan["job"]["output"]) != (asked, output)


def _described(error: Exception) -> dict[str, str]:
    return error_parts(error if isinstance(error, DearBatchError) else bug(error))


def _so_far(folder: Path) -> Fields:
    """Counts of what is committed."""
    plan = read_plan(folder)
    if plan is None:
        return {}
    ledger = Ledger(folder)
    shards = [shard.key for output in outline(plan) for shard in output.shards]
    commits = [c for key in shards if (c := ledger.found("pointwise", key))]
    figures = pointwise_figures(commit.counts for commit in commits)
    return {
        "shards": {"pointwise": {"total": len(shards), "done": len(commits)}},
        **{name: figures[name] for name in ("queries", "candidates", "quarantine_reasons")},
    }


def published_by(folder: Path) -> list[str]:
    """The names of all that a run of this folder may have published."""
    plan, end = read_plan(folder), read_json(folder / MANIFEST)
    stems = [output.stem for output in outline(plan)] if plan else ["run"]
    names = [name for stem in stems for name in published_names(stem).values()]
    return [*names, *names_in(end), QUARANTINE]
