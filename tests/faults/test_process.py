"""What can happen to the process of a job, for real, seen from its command line."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from tests.conftest import ROOT
from tests.run.test_local import _rows, nested

pytestmark = pytest.mark.model
Row = dict[str, Any]
PUBLISHED = ("run.trec", "results.parquet")
SHARD_BYTES = 8000  # two lists


class Command:
    """`dear-batch run` on a small job, in processes of their own."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        self.bundle, self.folder = bundle, folder
        self.input = folder / "in.parquet"

    def start(self, output: str, *options: str, **sabotage: Any) -> "subprocess.Popen[str]":
        """The running command."""
        python = f"{ROOT / 'tests/faults/saboteur'}{os.pathsep}{ROOT}"
        sabotage["shard_bytes"] = SHARD_BYTES
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "dear_batch", "run"),
                *("--input", str(self.input), "--bundle", str(self.bundle)),
                *("--output", str(self.folder / output), *options),
            ],
            env={**os.environ, "PYTHONPATH": python, "SABOTAGE": json.dumps(sabotage)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
        )

    def run(self, output: str, *options: str, **sabotage: Any) -> dict[str, Any]:
        """Its outcome."""
        return ended(self.start(output, *options, **sabotage))

    def published(self, output: str) -> dict[str, bytes]:
        return {name: (self.folder / output / name).read_bytes() for name in PUBLISHED}


def ended(process: "subprocess.Popen[str]", within_s: float = 120) -> dict[str, Any]:
    """The outcome of a command; its exit code is the one that the outcome names."""
    out, log = process.communicate(timeout=within_s)
    lines = [json.loads(line) for line in log.splitlines()]
    assert all({"time", "level", "event"} <= line.keys() for line in lines), log
    outcome: dict[str, Any] = json.loads(out)  # one line, and nothing else
    assert process.returncode == outcome["exit_code"], outcome
    return {**outcome, "log": lines}


def until(condition: Callable[[], Any], within_s: float = 60) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return [{**row, "candidates": [*row["candidates"]]} for row in _rows()[:8]]


@pytest.fixture
def command(bundle: Callable[..., Path], tmp_path: Path, rows: list[Row]) -> Command:
    command = Command(bundle("llama31"), tmp_path)
    nested(command.input, rows)
    return command


def commits(command: Command, output: str) -> int:
    return len([*(command.folder / output / "commits/pointwise").glob("[!.]*.json")])


def marked(rows: list[Row], *places: tuple[int, int]) -> list[Row]:
    """Rows with the word zebrafish in some candidates."""
    rows = [{**row, "candidates": [dict(c) for c in row["candidates"]]} for row in rows]
    for q, c in places:
        rows[q]["candidates"][c]["text"] = f"zebrafish {rows[q]['candidates'][c]['text']}"
    return rows


def order(path: Path) -> dict[str, list[tuple[str, float]]]:
    found: dict[str, list[tuple[str, float]]] = {}
    for line in path.read_text().splitlines():
        qid, _, docid, _, score, _ = line.split()
        found.setdefault(qid, []).append((docid, float(score)))
    return found


def same_order_without(command: Command, one: str, other: str, gone: set[tuple[str, str]]) -> None:
    """The other run has the order of the one without the documents that are gone."""
    whole, rest = (order(command.folder / name / "run.trec") for name in (one, other))
    for qid, entries in whole.items():
        kept = [(docid, score) for docid, score in entries if (qid, docid) not in gone]
        assert [docid for docid, _ in rest[qid]] == [docid for docid, _ in kept]
        assert [s for _, s in rest[qid]] == pytest.approx([s for _, s in kept], abs=1e-4)


@pytest.mark.parametrize("where", ["scored", pytest.param("encoded", marks=pytest.mark.slow)])
def test_documents_that_kill_the_process_are_found_and_the_rest_goes_on(
    command: Command, rows: list[Row], where: str
) -> None:
    places = [(2, 5), (5, 0)]
    nested(command.input, marked(rows, *places))
    assert command.run("whole")["exit_code"] == 0
    outcome = command.run("out", "--max-bad", "2", kind="poison", word="zebrafish", where=where)
    assert (outcome["exit_code"], outcome["status"]) == (0, "ok")
    gone = {(rows[q]["qid"], rows[q]["candidates"][c]["docid"]) for q, c in places}
    table = pq.read_table(command.folder / "out/quarantine.parquet").to_pylist()
    assert {(row["qid"], row["docid"]) for row in table} == gone
    assert {row["reason"] for row in table} == {"kills_process"}
    assert sorted(row["row"] for row in table) == [2, 5]
    same_order_without(command, "whole", "out", gone)
    accounts = outcome["candidates"]
    assert accounts["read"] == accounts["written"] + 2 == 8 * len(rows[0]["candidates"])


def test_nan_scores_are_set_aside(command: Command, rows: list[Row]) -> None:
    nested(command.input, marked(rows, (3, 3)))
    command.run("whole")
    outcome = command.run("out", kind="nan", word="zebrafish")
    assert (outcome["exit_code"], outcome["status"]) == (3, "too-many-bad")
    assert outcome["quarantine_reasons"] == {"non_finite_score": 1}
    gone = {(rows[3]["qid"], rows[3]["candidates"][3]["docid"])}
    same_order_without(command, "whole", "out", gone)
    again = command.run("out", "--max-bad", "1%")
    assert (again["exit_code"], again["already_done"]) == (3, True)
    again = command.run("out", "--max-bad", "5%")
    assert (again["exit_code"], again["already_done"]) == (0, True)


def test_batches_are_halved_when_memory_runs_out(command: Command) -> None:
    spec = command.folder / "job.toml"
    spec.write_text("[execution]\nrow_tokens = 512\nbatch_tokens = 512\n")  # of two pairs
    command.run("whole", str(spec))
    outcome = command.run("out", str(spec), kind="memory", tokens=300)
    assert outcome["exit_code"] == 0
    assert outcome["memory_backoffs"] > 0
    same_order_without(command, "whole", "out", set())


def test_memory_for_not_even_one_document_ends_with_75(command: Command) -> None:
    assert command.run("out", kind="memory", tokens=3)["exit_code"] == 75


@pytest.mark.parametrize("gil", [False, True])
def test_an_engine_that_hangs_ends_with_75_and_its_stacks(command: Command, gil: bool) -> None:
    start = time.monotonic()
    outcome = command.run("out", "--stall-timeout", "2", kind="hang", call=3, gil=gil)
    assert outcome["exit_code"] == 75
    assert time.monotonic() - start < 30
    stacks = [line["line"] for line in outcome["log"] if line["event"] == "stderr"]
    assert any("sabotaged_score" in line for line in stacks)
    report = json.loads((command.folder / "out/report.json").read_text())
    assert (report["status"], report["exit_code"]) == ("failed", 75)
    assert command.run("out")["exit_code"] == 0


@pytest.mark.parametrize(
    ("number", "at"),
    [
        (signal.SIGTERM, 0),
        (signal.SIGTERM, 2),
        (signal.SIGINT, 1),
        pytest.param(signal.SIGTERM, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 3, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 3, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_a_job_with_75_and_it_goes_on(
    command: Command, number: signal.Signals, at: int
) -> None:
    command.run("whole")
    process = command.start("out", kind="slow", seconds=0.3)
    until(lambda: (command.folder / "out/LOCK").exists() and commits(command, "out") >= at)
    start = time.monotonic()
    process.send_signal(number)
    outcome = ended(process)
    assert (outcome["exit_code"], outcome["status"]) == (75, "stopped")
    assert time.monotonic() - start < 20
    kept = commits(command, "out")
    again = command.run("out")
    assert again["exit_code"] == 0
    assert again["shards"]["pointwise"]["kept"] == kept >= at
    assert command.published("out") == command.published("whole")


def test_a_parent_that_is_killed_leaves_no_child_and_loses_a_shard(command: Command) -> None:
    command.run("whole")
    process = command.start("out", kind="slow", seconds=0.3)
    until(lambda: commits(command, "out") >= 2)
    (child,) = psutil.Process(process.pid).children()
    process.kill()
    process.communicate()
    until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, 5)
    kept = commits(command, "out")
    again = command.run("out")
    assert again["shards"]["pointwise"]["kept"] == kept
    assert command.published("out") == command.published("whole")


def test_a_child_that_is_killed_is_started_again(command: Command) -> None:
    command.run("whole")
    process = command.start("out", kind="slow", seconds=0.2)
    until(lambda: commits(command, "out") >= 1)
    (child,) = psutil.Process(process.pid).children()
    child.kill()
    outcome = ended(process)
    assert outcome["exit_code"] == 0
    assert [line["event"] for line in outcome["log"]].count("died") == 1
    assert command.published("out") == command.published("whole")


@pytest.mark.slow
def test_a_query_that_kills_the_second_stage_keeps_its_order(
    command: Command, rows: list[Row], generator: Path
) -> None:
    rows = [{**row, "query": row["query"]} for row in rows]
    rows[5]["query"] = f"zebrafish {rows[5]['query']}"
    nested(command.input, rows)
    command.run("first")
    stage_two = ("--listwise", str(generator), "--listwise-depth", "6", "--window", "4")
    outcome = command.run("out", *stage_two, kind="queries", word="zebrafish")
    assert (outcome["exit_code"], outcome["status"]) == (3, "too-many-failed-windows")
    assert outcome["listwise"]["windows"]["failed"] == 2
    table = pq.read_table(command.folder / "out/transcripts.parquet").to_pylist()
    failed = [row for row in table if row["status"] == "failed"]
    assert {row["qid"] for row in failed} == {rows[5]["qid"]}
    one, two = (order(command.folder / name / "run.trec") for name in ("first", "out"))
    assert two[rows[5]["qid"]] == one[rows[5]["qid"]]
    assert two != one


@pytest.mark.slow
def test_a_job_of_two_real_models_is_killed_everywhere(command: Command, generator: Path) -> None:
    """kill -9 of parent or child, at random moments of the real command, until it is done."""
    options = ("--listwise", str(generator), "--listwise-depth", "6", "--window", "4")
    start = time.monotonic()
    command.run("whole", *options)
    seconds, chance = time.monotonic() - start, random.Random(11)
    for number in range(20):
        process = command.start(f"out-{number}", *options)
        time.sleep(chance.uniform(0.3, seconds))
        process.kill()
        process.communicate()
        assert command.run(f"out-{number}", *options)["exit_code"] == 0
        assert command.published(f"out-{number}") == command.published("whole")


@pytest.mark.parametrize("rename", [False, True])
def test_an_input_that_is_swapped_meanwhile_ends_with_65(
    command: Command, rows: list[Row], rename: bool
) -> None:
    new = command.folder / "new.parquet"
    nested(new, marked(rows, (7, 1)))
    swap = {"kind": "swap", "call": 2, "old": str(command.input), "rename": rename}
    outcome = command.run("out", new=str(new), **swap)
    assert outcome["exit_code"] == 65, outcome
    assert "changed" in outcome["error"] or "decode" in outcome["error"]
    assert not (command.folder / "out/_SUCCESS").exists()
    assert not (command.folder / "out/run.trec").exists()
    assert command.run("out")["exit_code"] == 78  # it is another job now
    assert command.run("out", "--restart")["exit_code"] == 0


def test_an_input_of_other_bytes_in_the_same_size_and_time_is_noticed(command: Command) -> None:
    process = command.start("out", kind="slow", seconds=0.3)
    until(lambda: commits(command, "out") >= 1)
    process.terminate()
    ended(process)
    state = command.input.stat()
    raw = bytearray(command.input.read_bytes())
    raw[len(raw) // 3] ^= 1
    command.input.write_bytes(raw)
    os.utime(command.input, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert command.run("out")["exit_code"] == 65
    assert not (command.folder / "out/_SUCCESS").exists()


@pytest.mark.parametrize("fault", ["truncated", "empty", "flipped", "missing"])
def test_a_damaged_input_ends_with_65(command: Command, fault: str) -> None:
    raw = bytearray(command.input.read_bytes())
    if fault == "missing":
        command.input.unlink()
    else:
        raw[len(raw) // 2] ^= 0xFF
        damaged = {"truncated": raw[: len(raw) // 2], "empty": b"", "flipped": raw}[fault]
        command.input.write_bytes(damaged)
    outcome = command.run("out")
    assert outcome["exit_code"] == 65, outcome
    report = json.loads((command.folder / "out/report.json").read_text())
    assert (report["status"], report["exit_code"]) == ("failed", 65)
    assert not (command.folder / "out/run.trec").exists()


@pytest.mark.parametrize("pairs", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_overlapping_runs_publish_once(command: Command, pairs: int) -> None:
    command.run("whole")
    chance = random.Random(4)
    codes: list[int] = []
    for number in range(pairs):
        first = command.start(f"out-{number}", kind="slow", seconds=0.05)
        time.sleep(chance.uniform(0, 1.5))
        second = command.start(f"out-{number}", kind="slow", seconds=0.05)
        both = [ended(first), ended(second)]
        codes += [outcome["exit_code"] for outcome in both]
        assert 0 in {outcome["exit_code"] for outcome in both}
        assert {outcome["exit_code"] for outcome in both} <= {0, 75}
        assert command.published(f"out-{number}") == command.published("whole")
    assert 75 in codes
