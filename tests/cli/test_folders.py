"""`status`, `verify` and `gc` as people and schedulers meet them."""

import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from tests.cli.commands import invoke, outcome
from tests.run.folders import Folder, dump


def error(result: Result) -> dict[str, Any]:
    """The one error on stderr."""
    (line,) = [json.loads(line) for line in result.stderr.splitlines()]
    assert isinstance(line, dict)
    return line


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "out").write()


def test_status_as_a_table_and_as_a_line(folder: Folder) -> None:
    result = invoke("status", folder.path)
    assert result.exit_code == 0, result.output
    for text in ("done (ok)", "2 of 2 shards", "4 read, 3 written", "dear-batch verify"):
        assert text in result.stdout
    result = invoke("status", folder.path, "--json")
    (line,) = result.stdout.splitlines()
    found = json.loads(line)
    assert (found["state"], found["result"]) == ("done", "ok")
    assert found["stages"] == {"pointwise": {"done": 2, "total": 2}}
    assert found["lock"] == {
        "held": None,
        "host": "elsewhere",
        "pid": 1,
        "start": "2026-11-23T00:00:00+00:00",
    }


def test_status_of_a_job_that_failed(folder: Folder) -> None:
    (folder.path / "_SUCCESS").unlink()
    why = {"what": "It is [damaged].", "where": "in.parquet", "valid": "", "next": "copy it"}
    folder.report("failed", error=why)
    shown = invoke("status", folder.path).stdout
    for text in ("failed (failed)", "It is [damaged].", "in.parquet", "copy it"):
        assert text in shown


def test_status_of_an_empty_folder(tmp_path: Path) -> None:
    shown = invoke("status", tmp_path)
    assert shown.exit_code == 0
    assert "empty" in shown.stdout
    assert outcome(invoke("status", tmp_path, "--json"))["state"] == "empty"


@pytest.mark.parametrize(("name", "code"), [("gone", 2), ("out/run.trec", 2), ("other", 65)])
def test_status_of_what_is_no_output(name: str, code: int, tmp_path: Path) -> None:
    Folder(tmp_path / "out").write()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    result = invoke("status", tmp_path / name)
    assert result.exit_code == code
    assert error(result)["exit_code"] == code
    assert result.stdout == ""


def test_verify(folder: Folder) -> None:
    result = invoke("verify", folder.path)
    assert result.exit_code == 0, result.output
    first, last = result.stdout.splitlines()
    assert "5 files" in first
    assert "8 lines of 3 queries" in first
    (found,) = json.loads(last)["folders"]
    assert (found["status"], found["lines"], found["parts"]) == ("ok", 8, 2)


def test_verify_names_the_first_faults(folder: Folder, tmp_path: Path) -> None:
    whole = Folder(tmp_path / "whole").write()
    (folder.path / "results.parquet").write_bytes(b"x")
    result = invoke("verify", folder.path, whole.path)
    assert result.exit_code == 77
    assert "results.parquet: 1 bytes, not" in error(result)["where"]
    ended = outcome(result)
    assert (ended["status"], ended["exit_code"]) == ("failed", 77)
    assert [item["status"] for item in ended["folders"]] == ["failed", "ok"]


def test_verify_of_an_unfinished_folder(folder: Folder) -> None:
    (folder.path / "_SUCCESS").unlink()
    result = invoke("verify", folder.path)
    assert result.exit_code == 75
    assert outcome(result)["folders"][0]["status"] == "unfinished"
    assert "dear-batch status" in error(result)["next"]


WRONG: tuple[Any, ...] = (None, 5, "x", [5], {"a": 5})
VIEWS = (("status",), ("status", "--json"), ("inspect",), ("verify",), ("gc", "--dry-run"))


@pytest.mark.parametrize(
    ("name", "finished"),
    [
        ("plan.json", True),
        ("plan.json", False),
        ("report.json", True),
        ("report.json", False),
        ("manifest.json", True),
    ],
)
def test_files_of_another_form_are_one_clear_error(
    name: str, finished: bool, folder: Folder
) -> None:
    """Whatever a key of theirs holds: what cannot be made sense of is refused as such."""
    plan = json.loads((folder.path / "plan.json").read_text())
    plan["job"] |= {"bundle_sha256": "0" * 64, "pointwise": {"depth": 100}}
    dump(folder.path / "plan.json", plan)
    folder.seal()
    whole = json.loads((folder.path / name).read_text())
    assert viewed(folder, finished) == {0 if finished else 75, 0}
    codes = set[int]()
    for key, value in itertools.product(
        whole.keys() - {"schema_version", "sha256"}, ("gone", *WRONG)
    ):
        fields = {**whole, key: value}
        if value == "gone":
            del fields[key]
        dump(folder.path / name, fields)
        codes |= viewed(folder, finished)
    assert codes == {0, 77 if finished else 75, 78}


def viewed(folder: Folder, finished: bool) -> set[int]:
    """The exit codes of all that looks at a folder; an error is one line, and no bug."""
    folder.success()
    if not finished:
        (folder.path / "_SUCCESS").unlink()
    codes = set[int]()
    for command, *options in VIEWS:
        result = invoke(command, folder.path, *options)
        codes.add(result.exit_code)
        assert "bug" not in result.stderr
        assert len(result.stderr.splitlines()) == (result.exit_code != 0)
    return codes


def test_gc_by_age(folder: Folder) -> None:
    then = time.time() - 3 * 24 * 3600
    os.utime(folder.path / "_SUCCESS", (then, then))
    (folder.path / ("." + "run.trec." + "a" * 32 + ".tmp")).write_text("1234")
    common = ("gc", folder.path.parent, "--older-than")
    dry = invoke(*common, "2d", "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert outcome(dry)["dry_run"] is True
    assert folder.path.is_dir()
    kept = outcome(invoke(*common, "4d"))
    assert (kept["freed_bytes"], kept["folders"][0]["action"]) == (4, "orphans")
    gone = outcome(invoke(*common, "2d"))
    assert gone["freed_bytes"] == outcome(dry)["freed_bytes"] - 4
    assert gone["folders"] == [
        {"folder": str(folder.path), "action": "removed", "files": 12, "bytes": gone["freed_bytes"]}
    ]
    assert not folder.path.exists()


def test_gc_with_a_wrong_age(folder: Folder) -> None:
    result = invoke("gc", folder.path, "--older-than", "30")
    assert result.exit_code == 2
    assert error(result)["where"] == "--older-than"


def test_gc_that_may_not(folder: Folder) -> None:
    """A folder that cannot be locked is told, and the others are tidied up."""
    other = Folder(folder.path.parent / "zz").write()
    (folder.path / "LOCK").unlink()
    (folder.path / "LOCK").mkdir()
    (other.path / ("." + "run.trec." + "a" * 32 + ".tmp")).write_text("1234")
    result = invoke("gc", folder.path.parent)
    assert result.exit_code == 73, result.output
    ended = outcome(result)
    assert [item["action"] for item in ended["folders"]] == ["failed", "orphans"]
    assert ended["freed_bytes"] == 4
