"""Every promise of a finished folder, broken by one change at a time."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dear_batch.errors import TryAgainError, UsageError
from dear_batch.files.results import QUARANTINE_SCHEMA, RESULTS_SCHEMA
from dear_batch.run import verify_run
from dear_batch.run.folder import read_plan, write_plan
from dear_batch.run.verify import verify
from dear_batch.run.verify_run import RunCheck
from tests.run.folders import KEYS, Folder, dump


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "out").write()


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    fields = json.loads(path.read_text())
    change(fields)
    dump(path, fields)


def only_fault(folder: Folder) -> str:
    verdict = verify(folder.path)
    assert not verdict.ok
    return "; ".join(verdict.faults)


def test_a_finished_folder(folder: Folder) -> None:
    verdict = verify(folder.path)
    assert verdict.ok, verdict.faults
    assert (verdict.files, verdict.lines, verdict.queries) == (5, 8, 3)
    assert (verdict.quarantined, verdict.parts) == (1, 2)
    names = ["run.trec", "results.parquet", "quarantine.parquet", "plan.json", "report.json"]
    assert verdict.bytes == sum((folder.path / name).stat().st_size for name in names)


def test_a_folder_without_its_parts_and_commits(folder: Folder) -> None:
    for part in (folder.path / "parts").iterdir():
        part.unlink()
    assert verify(folder.path).parts == 0
    assert verify(folder.path).ok
    (folder.path / "commits" / "pointwise" / f"{KEYS[1]}.json").unlink()
    assert verify(folder.path).ok


def test_an_unfinished_folder_is_one_to_come_back_to(folder: Folder) -> None:
    (folder.path / "_SUCCESS").unlink()
    with pytest.raises(TryAgainError, match="is not finished") as caught:
        verify(folder.path)
    assert caught.value.exit_code == 75


def test_a_folder_of_another_version(folder: Folder) -> None:
    edit(folder.path / "plan.json", lambda plan: plan.update(schema_version=1))
    folder.seal()
    assert "not of this version" in only_fault(folder)


@pytest.mark.parametrize("name", ["run.trec", "results.parquet", "plan.json", "report.json"])
@pytest.mark.parametrize("how", ["flipped", "longer", "missing", "link", "folder", "pipe"])
def test_a_changed_file(name: str, how: str, folder: Folder, tmp_path: Path) -> None:
    path = folder.path / name
    raw = path.read_bytes()
    path.unlink()
    match how:
        case "flipped":
            path.write_bytes(bytes([raw[0] ^ 1]) + raw[1:])
        case "longer":
            path.write_bytes(raw + b" ")
        case "link":
            (tmp_path / "elsewhere").write_bytes(raw)
            path.symlink_to(tmp_path / "elsewhere")
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
    assert name in only_fault(folder)


def test_a_changed_manifest(folder: Folder) -> None:
    edit(folder.path / "manifest.json", lambda fields: fields.update(tool="another"))
    assert "_SUCCESS is not of this manifest.json" in only_fault(folder)


@pytest.mark.parametrize("name", ["../elsewhere", "parts/x", "..", "", "/etc/passwd"])
def test_a_manifest_that_names_files_elsewhere(name: str, folder: Folder) -> None:
    record = {"bytes": 0, "sha256": "0" * 64}
    edit(folder.path / "manifest.json", lambda fields: fields["files"].update({name: record}))
    folder.success()
    assert "no name of a file of ours" in only_fault(folder)


RUNS: list[tuple[Callable[[list[str]], list[str]], str]] = [
    (lambda lines: [*lines[:-1], "q3 Q0 a 3\n"], "Expected 6 columns, got 4"),
    (lambda lines: [f"x {line}" for line in lines], "Expected 6 columns, got 7"),
    (lambda lines: [line.replace(" 2 ", " two ") for line in lines], "CSV conversion error"),
    (lambda lines: [lines[0], "\n", *lines[1:]], "not a TREC run"),
    (lambda lines: [line.replace("Q0", "Q1") for line in lines], "its q0 is not Q0"),
    (lambda lines: [line.replace("dear-batch", "mine") for line in lines], "its tag is not"),
    (lambda lines: [lines[0], lines[0], *lines[2:]], "line 2, qid q1, docid a: its docid is not"),
    (lambda lines: [lines[1], lines[0], *lines[2:]], "its rank does not follow"),
    (lambda lines: [line.replace(" 0.5 ", " 1 ") for line in lines], "not below"),
    (lambda lines: [line.replace(" 0.5 ", " 0.99999999 ") for line in lines], "not below"),
    (lambda lines: [line.replace(" 0.5 ", " nan ") for line in lines], "not finite"),
    (lambda lines: [line.replace(" 0.5 ", " -inf ") for line in lines], "not finite"),
    (lambda lines: lines[:-1], "8 rows for 7 lines"),
    (lambda lines: [*lines, "q9 Q0 a 1 1 dear-batch\n"], "8 rows for 9 lines"),
    (lambda lines: lines[:0], "8 rows for 0 lines"),
    (lambda lines: [line.replace("q2", "q\u00a02") for line in lines], "qid would break"),
    (lambda lines: [line.replace(" b ", " b\x1f ") for line in lines], "docid would break"),
]


@pytest.mark.parametrize(("change", "match"), RUNS)
def test_a_run_that_is_sealed_and_wrong(
    change: Callable[[list[str]], list[str]], match: str, folder: Folder
) -> None:
    (folder.path / "run.trec").write_text("".join(change(folder.lines)), encoding="utf-8")
    folder.seal()
    assert match in only_fault(folder)


RANKINGS: list[tuple[dict[str, list[str]], str]] = [
    ({"q1": ["a", "b", "a"], "q2": ["b", "a"], "q3": ["c", "b", "a"]}, "a docid is repeated"),
    ({"q1": ["a", "b", "c"], "q2": ["b", "a"], "q3": ["c", "b"]}, "7 candidates, not 8"),
]


@pytest.mark.parametrize(("rankings", "match"), RANKINGS)
def test_a_run_and_results_that_agree_on_what_is_wrong(
    rankings: dict[str, list[str]], match: str, folder: Folder
) -> None:
    folder.rankings = rankings
    folder.publish()
    folder.seal()
    assert match in only_fault(folder)


def write_run(path: Path, lists: list[tuple[str, list[str]]], group: int = 7) -> RunCheck:
    rows = [(q, d, r) for q, docids in lists for r, d in enumerate(docids, 1)]
    lines = [f"{q} Q0 {d} {r} {-r} t\n" for q, d, r in rows]
    (path / "run.trec").write_text("".join(lines))
    columns = {name: [row[i] for row in rows] for i, name in enumerate(("qid", "docid", "rank"))}
    others: dict[str, Any] = {
        n: [None] * len(rows) for n in RESULTS_SCHEMA.names if n not in columns
    }
    table = pa.table({**columns, **others}).select(RESULTS_SCHEMA.names).cast(RESULTS_SCHEMA)
    pq.write_table(table, path / "results.parquet", row_group_size=group)
    return RunCheck(path / "run.trec", path / "results.parquet", "t")


@pytest.mark.parametrize("block", [64, 100, 1 << 20])
def test_queries_that_go_on_in_the_next_batch(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_run, "BLOCK_BYTES", block)
    docids = [f"d{i}" for i in range(20)]
    check = write_run(tmp_path, [("q1", docids), ("q2", docids), ("q3", ["d1"])])
    assert check.faults() == []
    assert (check.lines, check.queries) == (41, 3)
    (fault,) = write_run(tmp_path, [("q1", docids), ("q2", [*docids, "d0"])]).faults()
    assert "qid q2" in fault
    assert "a docid is repeated" in fault


def test_a_query_in_two_places(tmp_path: Path) -> None:
    check = write_run(tmp_path, [("q1", ["a"]), ("q2", ["a"]), ("q1", ["b"])])
    assert check.faults() == ["run.trec: the lines of qid q1 are not together"]


def test_a_run_of_nothing(tmp_path: Path) -> None:
    assert write_run(tmp_path, []).faults() == []


MEMORY = """
import re, sys
from pathlib import Path
from dear_batch.run.verify_run import RunCheck
check = RunCheck(Path(sys.argv[1]), Path(sys.argv[2]), "t")
assert check.faults() == [], check.faults()
status = Path("/proc/self/status").read_text()
print(check.lines, int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) // 1024)
"""


@pytest.mark.process
def test_memory_does_not_grow_with_the_run(tmp_path: Path) -> None:
    """Four times the lines, nearly the same memory: a run is never held as a whole."""
    peaks, sizes = [], []
    for queries in (10_000, 40_000):
        docids = [f"document-{i:030d}" for i in range(50)]
        lists = [(f"q{i}", docids) for i in range(queries)]
        check = write_run(tmp_path, lists, 1 << 16)
        command = [sys.executable, "-c", MEMORY, str(check.run), str(check.results)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        lines, peak = map(int, done.stdout.split())
        assert lines == 50 * queries
        peaks.append(peak)
        sizes.append(check.run.stat().st_size >> 20)
    assert sizes[1] - sizes[0] > 80
    assert peaks[1] - peaks[0] < (sizes[1] - sizes[0]) / 2


def test_counts_that_do_not_add_up(folder: Folder) -> None:
    edit(
        folder.path / "manifest.json",
        lambda fields: fields["counts"]["candidates"].update(read=10),
    )
    folder.success()
    fault = only_fault(folder)
    assert "of 10 candidates read, 9 are accounted for" in fault
    assert "report.json: its candidates are not those of the manifest" in fault
    assert "the counts of the shards do not add up" in fault


def test_a_report_of_a_job_that_failed(folder: Folder) -> None:
    folder.report("failed")
    folder.seal()
    assert "its status is failed" in only_fault(folder)


def test_a_manifest_of_another_plan(folder: Folder) -> None:
    plan = read_plan(folder.path)
    assert plan
    plan["job"]["depth"] = 3
    write_plan(folder.path, plan)
    folder.seal()
    edit(
        folder.path / "manifest.json",
        lambda fields: fields["job"].pop("depth"),
    )
    folder.success()
    assert "its job is not that of plan.json" in only_fault(folder)


def test_a_manifest_that_lacks_a_field(folder: Folder) -> None:
    edit(folder.path / "manifest.json", lambda fields: fields.pop("counts"))
    folder.success()
    assert "lacks something: KeyError('counts')" in only_fault(folder)
    for text, match in (
        ("[]", "no JSON object"),
        ("{", "no JSON object"),
        ('{"files": 5}', "lacks"),
    ):
        (folder.path / "manifest.json").write_text(text)
        folder.success()
        assert match in only_fault(folder)


def test_quarantined_rows_that_are_not_the_counted_ones(folder: Folder) -> None:
    rows = [{"reason": "null_text", "qid": "q2", "docid": "c", "candidates": 1}] * 2
    table = pa.Table.from_pylist(rows, QUARANTINE_SCHEMA)
    pq.write_table(table, folder.path / "quarantine.parquet")
    folder.seal()
    fault = only_fault(folder)
    assert "{'null_text': 2} by reason" in fault
    assert "2 candidates, and 1 in the manifest" in fault
    (folder.path / "quarantine.parquet").unlink()
    folder.seal()
    assert "0 candidates, and 1 in the manifest" in only_fault(folder)


def test_a_damaged_part(folder: Folder) -> None:
    (part, _) = sorted((folder.path / "parts").iterdir())
    part.write_text("another")
    assert f"parts/{part.name}: 7 bytes, not 19" in only_fault(folder)


def test_a_broken_commit(folder: Folder) -> None:
    path = folder.path / "commits" / "pointwise" / f"{KEYS[0]}.json"
    for change in ("{", '{"files": {}}', '{"files": {"part": {"name": "../../x"}}}'):
        path.write_text(change)
        assert f"commits/pointwise/{path.name}: it cannot be read" in only_fault(folder)


def test_the_first_faults_are_named(folder: Folder) -> None:
    for path in folder.path.glob("*.parquet"):
        path.unlink()
    error = verify(folder.path).error()
    assert error.exit_code == 77
    assert "results.parquet: it is missing" in error.where
    assert "quarantine.parquet: it is missing" in error.where
    assert "--restart" in error.next_step


def test_a_folder_that_is_not_there_is_a_wrong_command_line(tmp_path: Path) -> None:
    """75 would have a scheduler try a mistyped name for ever."""
    with pytest.raises(UsageError):
        verify(tmp_path / "typo")
