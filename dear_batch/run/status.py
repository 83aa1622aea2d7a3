"""How far a job in an output folder is, from its files alone; takes no lock, changes nothing."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from dear_batch.errors import InputError, TrustError, UsageError
from dear_batch.run.folder import LOCK, MANIFEST, PLAN, REPORT, SUCCESS, read_json, read_plan
from dear_batch.run.ledger import Commit
from dear_batch.run.planning import outline, second_stage
from dear_batch.run.published import Holder, as_written, commits, holder, sealed_manifest
from dear_batch.run.report import FAILED, OUTSTANDING, STOPPED, pointwise_figures

Fields = dict[str, Any]
State = Literal[
    "empty", "planned", "running", "stopped", "failed", "listwise-outstanding", "done", "damaged"
]
AGAIN = "the same dear-batch run again: it goes on from what is finished"


@dataclass(frozen=True, slots=True)
class Progress:
    """Shards of one stage."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Status:
    """One folder. `result` is the report's status; queries and candidates are those so far."""

    folder: str
    state: State
    next: str
    result: str | None = None
    error: Mapping[str, str] | None = None
    lock: Holder | None = None
    stages: Mapping[str, Progress] = field(default_factory=dict)
    queries: Mapping[str, int] = field(default_factory=dict)
    candidates: Mapping[str, int] = field(default_factory=dict)
    queries_planned: int | None = None
    updated: str | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON-able fields."""
        return asdict(self)


def status_of(folder: Path) -> Status:
    """The state of a job's folder.

    Raises:
        UsageError: there is no such folder.
        InputError: it is not one of ours.
        TrustError: what it says of itself cannot be read.
        ConfigurationError: it can, and is not what a job writes.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder.", valid="the output folder of a job")
    lock, plan = holder(folder), read_plan(folder)
    if plan is None and ((folder / PLAN).is_file() or (lock is None and any(folder.iterdir()))):
        raise InputError(
            f"{folder} holds no output of this version of dear-batch.",
            where=str(folder / PLAN),
            valid="the output folder of a job",
        )
    with as_written(folder):
        return _status(folder, plan, lock)


def _status(folder: Path, plan: Fields | None, lock: Holder | None) -> Status:
    report = _report(folder)
    state, error = _state(folder, plan, report, lock)
    known = _finished(folder, plan) if state == "done" else _so_far(folder, plan)
    return Status(
        str(folder),
        state,
        _next(state, folder, error),
        result=str(report["status"]) if report and state != "running" else None,
        error=error,
        lock=lock,
        queries_planned=sum(output["queries"] for output in plan["outputs"]) if plan else None,
        updated=_updated(folder),
        **known,
    )


def _report(folder: Path) -> Fields:
    """The report, as far as it can be one: until a job is done nothing vouches for it."""
    found = read_json(folder / REPORT) or {}
    error = found.get("error")
    told = isinstance(found.get("status"), str) and (
        error is None
        or (isinstance(error, dict) and all(isinstance(v, str) for v in error.values()))
    )
    return found if told else {}


def _state(
    folder: Path, plan: Fields | None, report: Fields, lock: Holder | None
) -> tuple[State, Mapping[str, str] | None]:
    if lock and lock.held:
        return "running", None
    try:
        if sealed_manifest(folder) is not None:
            return "done", None
    except TrustError as error:
        return "damaged", {"what": error.what, "where": error.where}
    said = report.get("status")
    why = {name: str(text) for name, text in (report.get("error") or {}).items()} or None
    if said == OUTSTANDING:
        return "listwise-outstanding", None
    if said in {FAILED, STOPPED}:
        return "failed" if said == FAILED else "stopped", why
    begun = plan is not None and any(True for _ in commits(folder))
    return ("stopped" if begun else "planned" if plan else "empty"), None


def _next(state: State, folder: Path, error: Mapping[str, str] | None) -> str:
    if state == "failed":
        return (error or {}).get("next") or AGAIN
    return {
        "empty": f"dear-batch run SPEC.toml --output {folder}",
        "running": f"wait, then dear-batch status {folder}",
        "listwise-outstanding": "the same dear-batch run with --stage listwise",
        "done": f"dear-batch verify {folder}",
        "damaged": f"dear-batch verify {folder}; if it fails, choose a new --output",
    }.get(state, AGAIN)


def _finished(folder: Path, plan: Fields | None) -> dict[str, Any]:
    """What a published folder says: its commits may be gone."""
    said = (read_json(folder / MANIFEST) or {})["counts"]
    units = ("queries", "candidates")
    counts = {unit: {name: int(n) for name, n in said[unit].items()} for unit in units}
    stages = {name: Progress(len(keys), len(keys)) for name, keys in _keys(plan).items()}
    return {"stages": stages, **counts}


def _so_far(folder: Path, plan: Fields | None) -> dict[str, Any]:
    """What the commits of this plan add up to."""
    keys = _keys(plan)
    found: dict[str, list[Commit]] = {stage: [] for stage in keys}
    for path, commit in commits(folder):
        stage = path.parent.name
        if plan is None or commit is None or path.stem not in keys.get(stage, ()):
            continue
        if commit.fingerprint == plan["fingerprints"][stage]:
            found[stage].append(commit)
    figures = pointwise_figures(commit.counts for commit in found.get("pointwise", []))
    return {
        "stages": {name: Progress(len(found[name]), len(keys[name])) for name in keys},
        "queries": figures["queries"],
        "candidates": figures["candidates"],
    }


def _keys(plan: Fields | None) -> dict[str, list[str]]:
    """The shards of each stage that the job has."""
    if plan is None:
        return {}
    outputs = outline(plan)
    keys = {"pointwise": [shard.key for output in outputs for shard in output.shards]}
    if plan["listwise"]:
        keys["listwise"] = [some[0].key for output in outputs for some in second_stage(output)]
    return keys


def _updated(folder: Path) -> str | None:
    """When a file of the job last changed."""
    places = [folder / name for name in (LOCK, PLAN, REPORT, SUCCESS)]
    places += [folder / "commits" / stage for stage in ("pointwise", "listwise")]
    latest = max((path.lstat().st_mtime for path in places if path.exists()), default=None)
    if latest is None:
        return None
    return datetime.fromtimestamp(latest, UTC).isoformat(timespec="seconds")
