"""How far a job in an output folder is, from its files alone; takes no lock, changes nothing."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from dear_batch.errors import InputError, TrustError, UsageError
from dear_batch.run.published import (
    LOCK,
    MANIFEST,
    PLAN,
    REPORT,
    SUCCESS,
    Fields,
    Holder,
    commits,
    holder,
    read_fields,
    read_plan,
    sealed_manifest,
    shard_keys,
)

State = Literal[
    "empty", "planned", "running", "stopped", "failed", "listwise-outstanding", "done", "damaged"
]
OUTSTANDING = "listwise-outstanding"
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
    error: Mapping[str, Any] | None = None
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
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder.", valid="the output folder of a job")
    lock, plan = holder(folder), read_plan(folder)
    if plan is None and lock is None:
        if any(folder.iterdir()):
            raise InputError(f"{folder} has no {PLAN}: no job of dear-batch wrote into it.")
        return Status(str(folder), "empty", f"dear-batch run SPEC.toml --output {folder}")
    report = read_fields(folder / REPORT) or {}
    state, error = _state(folder, plan, report, lock)
    known = _finished(folder, plan) if state == "done" else _so_far(folder, plan)
    return Status(
        str(folder),
        state,
        _next(state, folder, report),
        result=report.get("status") if state != "running" else None,
        error=error,
        lock=lock,
        queries_planned=sum(output["queries"] for output in plan["outputs"]) if plan else None,
        updated=_updated(folder),
        **known,
    )


def _state(
    folder: Path, plan: Fields | None, report: Fields, lock: Holder | None
) -> tuple[State, Mapping[str, Any] | None]:
    if lock and lock.held:
        return "running", None
    try:
        if sealed_manifest(folder) is not None:
            return "done", None
    except TrustError as error:
        return "damaged", {"what": error.what, "where": error.where}
    said = report.get("status")
    if said == OUTSTANDING:
        return "listwise-outstanding", None
    if said in {"failed", "stopped"}:
        return said, report.get("error")
    begun = plan is not None and any(True for _ in commits(folder))
    return ("stopped" if begun else "planned" if plan else "empty"), None


def _next(state: State, folder: Path, report: Fields) -> str:
    if state == "failed":
        return (report.get("error") or {}).get("next") or AGAIN
    return {
        "empty": f"dear-batch run SPEC.toml --output {folder}",
        "running": f"wait, then dear-batch status {folder}",
        "listwise-outstanding": "the same dear-batch run with --stage listwise",
        "done": f"dear-batch verify {folder}",
        "damaged": f"dear-batch verify {folder}; if it fails, choose a new --output",
    }.get(state, AGAIN)


def _finished(folder: Path, plan: Fields | None) -> dict[str, Any]:
    """What a published folder says: its commits may be gone."""
    counts = (read_fields(folder / MANIFEST) or {})["counts"]
    n = len(shard_keys(plan)) if plan else 0
    return {"stages": {name: Progress(n, n) for name in _stages(plan)}, **counts}


def _so_far(folder: Path, plan: Fields | None) -> dict[str, Any]:
    """What the commits of this plan add up to."""
    if plan is None:
        return {}
    keys = set(shard_keys(plan))
    done = dict.fromkeys(_stages(plan), 0)
    totals: dict[str, dict[str, int]] = {"queries": {}, "candidates": {}}
    for stage, counts in _counted(folder, plan, keys):
        done[stage] += 1
        for name, total in totals.items() if stage == "pointwise" else ():
            for what, count in counts[name].items():
                total[what] = total.get(what, 0) + count
    return {"stages": {name: Progress(n, len(keys)) for name, n in done.items()}, **totals}


def _counted(folder: Path, plan: Fields, keys: set[str]) -> Iterator[tuple[str, Fields]]:
    """(stage, counts) of the commits that count: of a planned shard and this fingerprint."""
    for path, commit in commits(folder):
        stage = path.parent.name
        if stage not in _stages(plan) or path.stem not in keys or commit is None:
            continue
        if commit["fingerprint"] == plan["fingerprints"][stage]:
            yield stage, commit["counts"]


def _stages(plan: Fields | None) -> list[str]:
    if plan is None:
        return []
    return ["pointwise", "listwise"] if plan.get("listwise") else ["pointwise"]


def _updated(folder: Path) -> str:
    """When a file of the job last changed."""
    places = [folder / name for name in (LOCK, PLAN, REPORT, SUCCESS)]
    places += [folder / "commits" / stage for stage in ("pointwise", "listwise")]
    latest = max(path.lstat().st_mtime for path in places if path.exists())
    return datetime.fromtimestamp(latest, UTC).isoformat(timespec="seconds")
