"""How far a job is, seen from its files while it is planned, runs, is killed, or is done."""

import fcntl
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dear_batch.errors import ConfigurationError, InputError, UsageError
from dear_batch.run import published
from dear_batch.run.published import Holder
from dear_batch.run.status import Progress, status_of
from tests.run.folders import Folder, dump

HOLD = """
import fcntl, json, os, socket, sys
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
json.dump({"host": socket.gethostname(), "pid": os.getpid(), "start": "2026-11-23T02:00:00Z"}, lock)
lock.flush()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    (tmp_path / "out").mkdir()
    return Folder(tmp_path / "out")


@pytest.fixture
def holding(folder: Folder) -> Iterator[int]:
    """Another process that holds the lock; its pid."""
    command = [sys.executable, "-c", HOLD, str(folder.path / "LOCK")]
    with subprocess.Popen(command, stdin=-1, stdout=-1) as process:
        assert process.stdout
        assert process.stdout.readline() == b"held\n"
        yield process.pid
        process.communicate()


def test_an_empty_folder(folder: Folder) -> None:
    found = status_of(folder.path)
    assert (found.state, found.lock, found.stages) == ("empty", None, {})
    assert f"--output {folder.path}" in found.next


def test_a_folder_that_is_not_there_or_not_ours_is_refused(folder: Folder) -> None:
    with pytest.raises(UsageError, match="is not a folder"):
        status_of(folder.path / "deeper")
    (folder.path / "thesis.tex").touch()
    with pytest.raises(InputError, match="holds no output of this version"):
        status_of(folder.path)


def test_a_plan_of_another_version_is_refused(folder: Folder) -> None:
    folder.plan()
    plan = folder.path / "plan.json"
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"schema_version": 1}))
    for text in (plan.read_text(), "[]", "{"):
        plan.write_text(text)
        with pytest.raises(InputError, match="of this version"):
            status_of(folder.path)


@pytest.mark.parametrize("key", ["outputs", "listwise", "fingerprints"])
def test_a_plan_of_another_form_is_refused(key: str, folder: Folder) -> None:
    folder.plan()
    folder.commit(0)
    plan = json.loads((folder.path / "plan.json").read_text())
    del plan[key]
    dump(folder.path / "plan.json", plan)
    with pytest.raises(ConfigurationError, match="not what dear-batch run writes") as caught:
        status_of(folder.path)
    assert key in caught.value.where


def test_a_planned_job(folder: Folder) -> None:
    folder.plan()
    found = status_of(folder.path)
    assert (found.state, found.queries_planned) == ("planned", 4)
    assert found.stages == {"pointwise": Progress(0, 2)}


def test_a_killed_job_is_stopped_and_says_how_far_it_came(folder: Folder) -> None:
    folder.listwise = True
    folder.plan()
    folder.lock(socket.gethostname(), os.getpid())
    folder.commit(0)
    found = status_of(folder.path)
    assert found.state == "stopped"
    assert found.stages == {"pointwise": Progress(1, 2), "listwise": Progress(0, 1)}
    assert found.queries == {"read": 2, "written": 2, "quarantined": 0, "skipped": 0}
    assert found.candidates == {"read": 6, "written": 5, "quarantined": 1, "skipped": 0}
    assert found.lock
    assert found.lock.held is False
    assert "run again" in found.next
    folder.commit(1)
    folder.commit(0, "listwise")
    again = status_of(folder.path)
    assert again.stages == {"pointwise": Progress(2, 2), "listwise": Progress(1, 1)}
    assert again.candidates["read"] == 9


def test_commits_of_other_settings_or_shards_do_not_count(folder: Folder) -> None:
    folder.plan()
    folder.commit(0, fingerprint="99" * 32)
    folder.commit(1).rename(folder.path / "commits" / "pointwise" / "another.json")
    (folder.path / "commits" / "pointwise" / "broken.json").write_text("{")
    assert status_of(folder.path).stages == {"pointwise": Progress(0, 2)}


def test_a_running_job_says_who_runs_it(folder: Folder, holding: int) -> None:
    folder.plan()
    folder.commit(0)
    found = status_of(folder.path)
    assert found.state == "running"
    assert found.lock == Holder(True, socket.gethostname(), holding, "2026-11-23T02:00:00Z")
    assert found.stages == {"pointwise": Progress(1, 2)}


def test_a_finished_folder_that_is_run_again_is_running(folder: Folder, holding: int) -> None:
    lock = (folder.path / "LOCK").read_text()
    folder.write()
    (folder.path / "LOCK").write_text(lock)
    found = status_of(folder.path)
    assert (found.state, found.result) == ("running", None)
    assert found.lock
    assert found.lock.pid == holding


def test_asking_never_takes_the_lock(folder: Folder) -> None:
    """flock is of the open file: were LOCK locked, however briefly, this would be seen."""
    folder.write()
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", lambda *arguments: seen.append(arguments[1]))
        patch.setattr(fcntl, "lockf", lambda *arguments: seen.append(arguments[1]))
        status_of(folder.path)
    assert seen == []


def test_the_pid_decides_where_devices_are_told_apart_differently(
    folder: Folder, holding: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On btrfs /proc/locks names the device of the whole file system, stat that of the volume."""
    folder.plan()
    inode = (folder.path / "LOCK").stat().st_ino
    table = tmp_path / "locks"
    monkeypatch.setattr(published, "LOCKS", table)
    line = "1: FLOCK  ADVISORY  WRITE {} 00:2f:{} 0 EOF\n"
    for text, state in (
        (line.format(holding, inode), "running"),
        (line.format(holding + 1, inode), "planned"),
        (line.format(holding, inode + 1), "planned"),
        (line.format(holding, inode).replace("1: ", "1: -> "), "planned"),
        ("", "planned"),
    ):
        table.write_text(text)
        assert status_of(folder.path).state == state


def test_of_another_host_it_cannot_be_known(folder: Folder) -> None:
    folder.plan()
    folder.lock("another.example", 77)
    found = status_of(folder.path)
    assert found.lock == Holder(None, "another.example", 77, "2026-11-23T00:00:00+00:00")
    assert found.state == "planned"


def test_a_failed_job_tells_its_error(folder: Folder) -> None:
    folder.plan()
    error = {"what": "It is damaged.", "where": "in.parquet", "valid": "", "next": "copy it"}
    folder.report("failed", error=error)
    found = status_of(folder.path)
    assert (found.state, found.result, found.error, found.next) == (
        "failed",
        "failed",
        error,
        "copy it",
    )
    folder.report("stopped", error=error)
    assert status_of(folder.path).state == "stopped"


def test_an_outstanding_second_stage(folder: Folder) -> None:
    folder.listwise = True
    folder.plan()
    folder.commit(0)
    folder.commit(1)
    folder.report("listwise-outstanding")
    found = status_of(folder.path)
    assert found.state == "listwise-outstanding"
    assert "--stage listwise" in found.next


def test_a_finished_job(folder: Folder) -> None:
    folder.write()
    folder.report("too-many-bad")
    folder.seal()
    found = status_of(folder.path)
    assert (found.state, found.result) == ("done", "too-many-bad")
    assert found.stages == {"pointwise": Progress(2, 2)}
    assert found.queries == {"read": 4, "written": 3, "quarantined": 0, "skipped": 1}
    assert found.updated
    assert found.to_json()["stages"]["pointwise"] == {"done": 2, "total": 2}


def test_a_seal_of_another_manifest_is_damage(folder: Folder) -> None:
    folder.write()
    (folder.path / "_SUCCESS").write_text("0" * 64 + "\n")
    found = status_of(folder.path)
    assert found.state == "damaged"
    assert found.error
    assert "_SUCCESS" in found.error["what"]
    assert "verify" in found.next
