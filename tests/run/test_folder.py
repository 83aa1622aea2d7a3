"""Whose output folder it is, who works in it, and whether it is done; no model loads."""

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dear_batch.errors import ConfigurationError, OutputError, TryAgainError
from dear_batch.run.folder import (
    SCHEMA_VERSION,
    OtherJobError,
    check_folder,
    clear,
    finished,
    locked,
    names_in,
    read_json,
    read_plan,
    refuse_other_job,
    write_json,
    write_plan,
)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# Folders that are ours.


def test_new_and_empty_folders_are_taken(tmp_path: Path) -> None:
    check_folder(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    check_folder(tmp_path / "empty")
    assert not (tmp_path / "new").exists()


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(OutputError, match=r"no plan\.json") as caught:
        check_folder(tmp_path)
    assert caught.value.exit_code == 73
    assert caught.value.where == "thesis.tex"
    assert caught.value.next_step


def test_what_a_run_without_a_plan_left_is_ours(tmp_path: Path) -> None:
    temporary = f".plan.json.{'0' * 32}.tmp"
    for name in ("LOCK", "report.json", "metrics.prom", temporary):
        (tmp_path / name).touch()
    for name in ("parts", "commits", "quarantine", ".plan.ab12_xyz.tmp"):
        (tmp_path / name).mkdir()
    check_folder(tmp_path)
    (tmp_path / "manifest.json").touch()
    with pytest.raises(OutputError, match="not ours") as caught:
        check_folder(tmp_path)
    assert caught.value.where == "manifest.json"


@pytest.mark.parametrize("damaged", [False, True])
def test_a_folder_with_a_plan_is_ours_whatever_else_is_in_it(damaged: bool, tmp_path: Path) -> None:
    """A damaged plan is ours beside a LOCK of ours."""
    with locked(tmp_path):
        pass
    text = json.dumps({"schema_version": 2, "outputs": []})
    (tmp_path / "plan.json").write_text(text[:9] if damaged else text)
    (tmp_path / "notes.txt").touch()
    check_folder(tmp_path)


def test_a_plan_of_somebody_else_makes_no_folder_ours(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"format_version": "1.2"}')
    (tmp_path / ".precious.tmp").mkdir()
    with pytest.raises(OutputError, match="not ours") as caught:
        check_folder(tmp_path)
    assert caught.value.where == ".precious.tmp, plan.json"


@pytest.mark.parametrize("kind", ["file", "link to nothing"])
def test_what_is_no_folder_is_refused(kind: str, tmp_path: Path) -> None:
    if kind == "file":
        (tmp_path / "out").touch()
    else:
        (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="is not a folder") as caught:
        check_folder(tmp_path / "out")
    assert caught.value.exit_code == 73


@pytest.mark.parametrize("name", ["file/out", "n" * 300])
def test_a_folder_that_cannot_be_made_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be made") as caught:
        check_folder(tmp_path / name)
    assert caught.value.exit_code == 73


# The lock.


def test_the_lock_says_who_holds_it_and_stays(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    with locked(out):
        holder = json.loads((out / "LOCK").read_text())
        assert set(holder) == {"host", "pid", "start"}
        assert holder["pid"] == os.getpid()
    inode = (out / "LOCK").stat().st_ino
    (out / "LOCK").write_text("x" * 500)  # of a longer host name
    with locked(out):
        assert json.loads((out / "LOCK").read_text())["pid"] == os.getpid()
    assert (out / "LOCK").stat().st_ino == inode
    assert names(out) == {"LOCK"}


HOLD = """
import pathlib, sys, time
from dear_batch.run.folder import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_another_process_keeps_us_out_until_it_dies(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout
        assert other.stdout.readline() == "held\n"
        held = (out / "LOCK").read_text()
        with pytest.raises(TryAgainError, match="Another run") as caught, locked(out):
            pass
        assert caught.value.exit_code == 75
        assert f'"pid": {other.pid}' in caught.value.where
        assert (out / "LOCK").read_text() == held
        other.send_signal(signal.SIGKILL)
    with locked(out):
        assert f'"pid": {os.getpid()}' in (out / "LOCK").read_text()


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "LOCK").symlink_to(tmp_path / "precious")
    with pytest.raises(OutputError, match="LOCK"), locked(tmp_path / "out"):
        pass
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_failure_inside_frees_the_lock(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path / "out"):
        raise KeyError
    with (tmp_path / "out" / "LOCK").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


# JSON files.


@pytest.mark.parametrize("text", ["", "[1]", "{", "null", "\udc80"])
def test_what_is_no_json_object_is_nothing(text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert read_json(path) is None
    assert read_plan(tmp_path) is None
    assert read_json(tmp_path / "missing.json") is None


def test_a_plan_is_one_of_this_version(tmp_path: Path) -> None:
    plan = {"schema_version": SCHEMA_VERSION, "job": {"name": "søk"}}
    write_plan(tmp_path, plan)
    assert read_plan(tmp_path) == plan
    assert names(tmp_path) == {"plan.json"}
    write_plan(tmp_path, {**plan, "schema_version": 1})
    assert read_plan(tmp_path) is None


# Done or not.


def publish_by_hand(folder: Path) -> dict[str, Any]:
    (folder / "run.trec").write_text("line\n")
    (folder / "report.json").write_text("{}\n")
    told = hashlib.sha256(b"{}\n").hexdigest()
    files = {
        "run.trec": {"bytes": 5, "sha256": "0" * 64},
        "report.json": {"bytes": 3, "sha256": told},
    }
    manifest: dict[str, Any] = {"files": files, "job": {}}
    write_json(folder / "manifest.json", manifest)
    sha256 = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    (folder / "_SUCCESS").write_text(sha256 + "\n")
    return manifest


def test_a_folder_is_done_when_its_manifest_says_so(tmp_path: Path) -> None:
    assert finished(tmp_path) is None
    manifest = publish_by_hand(tmp_path)
    assert finished(tmp_path) == manifest


@pytest.mark.parametrize(
    "fault",
    ["no success", "no manifest", "changed manifest", "no file", "longer file", "report", "binary"],
)
def test_a_folder_is_not_done_where_anything_is_missing(fault: str, tmp_path: Path) -> None:
    publish_by_hand(tmp_path)
    match fault:
        case "no success":
            (tmp_path / "_SUCCESS").unlink()
        case "no manifest":
            (tmp_path / "manifest.json").unlink()
        case "changed manifest":
            (tmp_path / "manifest.json").write_text("{}")
        case "no file":
            (tmp_path / "run.trec").unlink()
        case "longer file":
            (tmp_path / "run.trec").write_text("line\n\n")
        case "report":
            (tmp_path / "report.json").write_text("{ }")
        case "binary":
            (tmp_path / "_SUCCESS").write_bytes(b"\xff\xfe")
    assert finished(tmp_path) is None


# Another job's folder.

JOB = {"bundle_sha256": "0", "inputs": [{"path": "a", "bytes": 1}], "pointwise": {"depth": 3}}


def test_the_same_job_is_let_in(tmp_path: Path) -> None:
    found = {"job": JOB, "listwise": None, "more": 1}
    refuse_other_job(tmp_path, found, {"job": {**JOB}, "listwise": None})
    refuse_other_job(tmp_path, {"job": {"depth": [1, 2]}}, {"job": {"depth": (1, 2)}})


@pytest.mark.parametrize(
    ("wanted", "where"),
    [
        ({"job": {**JOB, "bundle_sha256": "1"}}, "job.bundle_sha256"),
        ({"job": {**JOB, "pointwise": {}, "inputs": []}}, "job.inputs, job.pointwise"),
        ({"job": {**JOB, "new": 1}}, "job.new"),
        ({"job": JOB, "listwise": {"depth": 3}}, "listwise"),
        ({"runtime": {"engine": "torch"}}, "runtime"),
    ],
)
def test_another_job_is_refused_by_what_differs(
    wanted: dict[str, Any], where: str, tmp_path: Path
) -> None:
    found = {"job": JOB, "listwise": None}
    with pytest.raises(OtherJobError, match="another job") as caught:
        refuse_other_job(tmp_path, found, wanted)
    assert isinstance(caught.value, ConfigurationError)
    assert caught.value.exit_code == 78
    assert caught.value.where == f"{tmp_path / 'plan.json'}: {where}"
    assert "--restart" in caught.value.next_step
    assert "--stage" not in caught.value.next_step


def test_another_listwise_stage_is_pointed_to_its_own_run(tmp_path: Path) -> None:
    found = {"job": JOB, "listwise": {"depth": 30}}
    for wanted, offered in (
        ({"job": JOB, "listwise": {"depth": 20}}, True),
        ({"job": {**JOB, "pointwise": {}}, "listwise": {"depth": 20}}, False),
    ):
        with pytest.raises(OtherJobError) as caught:
            refuse_other_job(tmp_path, found, wanted, again=True)
        assert ("--stage listwise" in caught.value.next_step) == offered


# Beginning anew.


def test_clearing_takes_our_files_and_leaves_the_rest(tmp_path: Path) -> None:
    publish_by_hand(tmp_path)
    part, shard = f"00000-{'0' * 12}-{'0' * 32}.parquet", f"00000-{'0' * 12}"
    ours = ["plan.json", "report.json", f"parts/{part}", f"parts/.{part}.{'0' * 32}.tmp"]
    ours += [f"commits/pointwise/{shard}.json", f"quarantine/{part}"]
    theirs = ["LOCK", "notes.txt", "parts/notes.txt", "parts/a.parquet", "monday.trec"]
    for name in ours + theirs:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    clear(tmp_path, ["run.trec", "results.parquet"])
    left = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert left == set(theirs)


def test_clearing_follows_no_links(tmp_path: Path) -> None:
    """Nor where a folder of ours is one."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "data.parquet").touch()
    out = tmp_path / "out"
    (out / "commits").mkdir(parents=True)
    (out / "parts").symlink_to(precious)
    (out / "commits" / "pointwise").symlink_to(precious)
    (out / "run.trec").symlink_to(precious / "data.parquet")
    clear(out, ["run.trec"])
    assert names(precious) == {"data.parquet"}
    assert not (out / "run.trec").is_symlink()


def test_clearing_begins_with_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed anywhere in between, the folder is not taken for done, and still ours."""
    publish_by_hand(tmp_path)
    (tmp_path / "plan.json").touch()
    order: list[str] = []
    real = Path.unlink

    def unlink(path: Path, **options: Any) -> None:
        order.append(path.name)
        real(path, **options)

    monkeypatch.setattr(Path, "unlink", unlink)
    clear(tmp_path, ["run.trec"])
    assert order == ["_SUCCESS", "manifest.json", "run.trec", "report.json", "plan.json"]


def test_a_plan_tells_of_any_change(tmp_path: Path) -> None:
    plan = {"schema_version": 2, "outputs": [{"queries": 3}]}
    write_plan(tmp_path, plan)
    assert read_plan(tmp_path) == plan
    path = tmp_path / "plan.json"
    path.write_text(path.read_text().replace('"queries": 3', '"queries": 4'))
    assert read_plan(tmp_path) is None


def test_a_damaged_manifest_names_only_files_that_a_job_publishes() -> None:
    names = ["run.trec", "plan.json", "LOCK", "../x.json", "..", "a\0.json", "results.parquet"]
    assert names_in({"files": dict.fromkeys(names)}) == ["run.trec", "results.parquet"]
    assert names_in({"files": names}) == names_in({}) == names_in(None) == []


def test_a_folder_whose_report_was_changed_is_not_done(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_text('{"status": "ok"}')
    sha256 = hashlib.sha256(report.read_bytes()).hexdigest()
    write_json(
        tmp_path / "manifest.json", {"files": {report.name: {"bytes": 16, "sha256": sha256}}}
    )
    sha256 = hashlib.sha256((tmp_path / "manifest.json").read_bytes()).hexdigest()
    (tmp_path / "_SUCCESS").write_text(sha256 + "\n")
    assert finished(tmp_path) is not None
    report.write_text('{"status": "no"}')
    assert finished(tmp_path) is None
