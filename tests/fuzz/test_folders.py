"""Output folders of which files were damaged: run again, looked at, and verified."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import strategies as st

from dear_batch.errors import DearBatchError, TryAgainError
from dear_batch.inspection import inspect_path
from dear_batch.run import plan, planning
from dear_batch.run.gc import collect
from dear_batch.run.local import run_job
from dear_batch.run.status import status_of
from dear_batch.run.verify import verify
from dear_batch.run.watch import StoppedError, Watch
from dear_batch.show import show, status_table
from dear_batch.spec_files import spec_from_dict
from dear_batch.specs import JobSpec
from tests.fuzz.effort import Effort
from tests.fuzz.strategies import Damage, damages
from tests.run.fake_ranker import install, listwise_bundle
from tests.run.test_local import _rows, nested

pytestmark = pytest.mark.model
FIRST = (
    "plan.json",
    "report.json",
    "manifest.json",
    "_SUCCESS",
    "metrics.prom",
    "LOCK",
    "run.trec",
    "results.parquet",
    "transcripts.parquet",
    "quarantine.parquet",
)
KINDS = ("remove", "folder", "link", "swap", "damage")
# What an operator's copy may break; the run itself is checked by its size alone before `verify`.
UNSEEN = ("run.trec", "results.parquet", "transcripts.parquet", "quarantine.parquet", "parts")


@dataclass(frozen=True)
class Change:
    """What happens to the n-th file of a folder."""

    file: int
    kind: str
    damage: Damage

    def name(self, folder: Path) -> str:
        """The file that is changed."""
        names = _names(folder)
        return names[self.file % len(names)]

    def __call__(self, folder: Path, name: str) -> None:
        path, names = folder / name, _names(folder)
        if self.kind == "damage":
            damage = self.damage
            with suppress(ValueError, RecursionError):
                path.write_bytes(damage(path.read_bytes()))
                return
            damage = replace(damage, kind="flip", value=1)
            path.write_bytes(damage(path.read_bytes()))
            return
        other = folder / names[int(self.damage.where * len(names))]
        content = other.read_bytes()
        path.unlink()
        if self.kind == "folder":
            path.mkdir()
        elif self.kind == "link":
            path.symlink_to(other if other != path else "nowhere")
        elif self.kind == "swap":
            path.write_bytes(content)


def _names(folder: Path) -> list[str]:
    found = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    inner = sorted((name for name in found if "/" in name), key=lambda n: (n.split("-")[0], n))
    return [name for name in FIRST if name in found] + inner


@dataclass(frozen=True)
class Case:
    """A folder that a job finished, or stopped in, and what happened to it since."""

    stopped: int | None  # the check at which it was stopped
    changes: tuple[Change, ...]
    restart: bool = False


class StopAt(Watch):
    """Stops a job at its so-manieth check."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._left = number

    def check(self) -> None:
        self._left -= 1
        if self._left < 0:
            self.stop.set()
        super().check()


@dataclass(frozen=True)
class Job:
    spec: dict[str, Any]
    finished: Path

    def run(self, folder: Path, watch: Watch | None = None, **options: Any) -> dict[str, Any]:
        fields = {**self.spec, "output": {"folder": str(folder)}}
        return run_job(spec_from_dict(fields, JobSpec), watch, **options)


@pytest.fixture
def job(bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """Two stages over six queries in three shards, one candidate of which is set aside."""
    monkeypatch.setattr(plan, "LEAST_SHARD_BYTES", 8000)
    monkeypatch.setattr(plan, "SHARD_BYTES", 8000)
    monkeypatch.setattr(planning, "LEAST_QUERIES", 3)
    install(monkeypatch)
    rows = [{**row, "candidates": row["candidates"][:6]} for row in _rows()[:6]]
    rows[2]["candidates"][3] = {**rows[2]["candidates"][3], "text": None}
    spec = {
        "input": {"paths": [nested(tmp_path / "in.parquet", rows)], "max_bad": 1},
        "pointwise": {"bundle": str(bundle("llama31"))},
        "listwise": {
            "bundle": str(listwise_bundle(tmp_path / "generator")),
            "depth": 4,
            "window": 3,
        },
    }
    found = Job(spec, tmp_path / "finished")
    found.run(found.finished)
    return found


def _cases() -> st.SearchStrategy[Case]:
    kinds = st.sampled_from([*KINDS, "damage", "damage", "damage"])
    change = st.builds(Change, st.integers(0, 40), kinds, damages())
    return st.builds(
        Case,
        st.none() | st.integers(1, 60),
        st.lists(change, min_size=1, max_size=3).map(tuple),
        st.sampled_from([False, False, True]),
    )


PLAN, REPORT, MANIFEST, METRICS, LOCK = 0, 1, 2, 4, 5
NOTHING = Damage("empty", 0.0)
KNOWN = (
    *(
        Case(None, (Change(PLAN, "damage", Damage("json shift", n / 40, 1)),))
        for n in range(0, 40, 8)
    ),
    Case(None, (Change(REPORT, "damage", Damage("flip", 0.0, 1)),)),
    Case(None, (Change(REPORT, "damage", Damage("json replace", 0.01, [])),)),
    Case(None, (Change(MANIFEST, "damage", Damage("json remove", 0.99)),), restart=True),
    Case(None, (Change(MANIFEST, "folder", NOTHING),)),
    Case(None, (Change(METRICS, "folder", NOTHING), Change(MANIFEST, "remove", NOTHING))),
    Case(None, (Change(LOCK, "folder", NOTHING),)),
    Case(None, (Change(LOCK, "link", NOTHING),)),
    Case(None, (Change(LOCK, "damage", Damage("nested", 0.0)),)),
)


def test_a_damaged_folder_is_run_again_or_refused(
    effort: Effort, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(case: Case) -> None:
        with TemporaryDirectory(dir=tmp_path) as name:
            folder = Path(name) / "out"
            changed = _prepared(job, case, folder)
            _look(folder)
            if case.stopped is None and _is_changed(job, folder):
                assert not _is_verified(folder)
            with suppress(DearBatchError):
                report = job.run(folder, restart=case.restart)
                if "already_done" not in report:
                    assert _is_verified(folder)
                if not set(changed) & set(UNSEEN) or case.restart:
                    for file in ("run.trec", "results.parquet", "transcripts.parquet"):
                        assert (folder / file).read_bytes() == (job.finished / file).read_bytes()
            _look(folder)
            capsys.readouterr()

    effort.run(check, _cases(), known=KNOWN, few=10, share=0.2)


def _prepared(job: Job, case: Case, folder: Path) -> list[str]:
    """Make the folder, and damage it; the first parts of the names that were changed."""
    if case.stopped is None:
        shutil.copytree(job.finished, folder)
    else:
        with suppress(StoppedError):
            job.run(folder, StopAt(case.stopped))
    found: dict[str, Change] = {}
    for change in case.changes:  # each file once, so that no change undoes another's marks
        found.setdefault(change.name(folder), change)
    for name, change in found.items():
        change(folder, name)
    return [name.split("/")[0] for name in found]


def _is_changed(job: Job, folder: Path) -> bool:
    """Whether a published file is not what it was."""
    names = json.loads((job.finished / "manifest.json").read_bytes())["files"]
    try:
        return any(
            (folder / name).is_symlink()
            or (folder / name).read_bytes() != (job.finished / name).read_bytes()
            for name in (*names, "manifest.json", "_SUCCESS")
        )
    except OSError:
        return True


def _is_verified(folder: Path) -> bool:
    try:
        return verify(folder).ok
    except TryAgainError:
        return False


def _look(folder: Path) -> None:
    """What people do with a folder, whatever is in it."""
    with suppress(DearBatchError):
        show(status_table(status_of(folder).to_json()))
    with suppress(DearBatchError):
        show(inspect_path(folder))
    with suppress(DearBatchError):
        verify(folder)
    with suppress(DearBatchError):
        list(collect([folder.parent], older_than_s=0, dry_run=True))
