"""`run` with its options, a real job in a process of its own."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from dear_batch.cli import main
from dear_batch.run import estimate
from tests.cli.commands import outcome
from tests.conftest import collection_queries, collection_texts

Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def invoke(*arguments: object, terminal: bool = False) -> Result:
    as_one = {"FORCE_COLOR": "1", "NO_COLOR": "1", "COLUMNS": "120"} if terminal else {}
    return CliRunner(env=as_one).invoke(main, [str(a) for a in arguments])


def write(path: Path, *, null_texts: int = 0) -> Path:
    """Two lists of five."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts: list[str | None] = [*collection_texts()[:10]]
    texts[:null_texts] = [None] * null_texts
    rows = [
        {
            "qid": f"q{i}",
            "query": collection_queries()[i],
            "candidates": [{"docid": f"d{k}", "text": texts[5 * i + k]} for k in range(5)],
        }
        for i in range(2)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def job(bundle: Make, tmp_path: Path) -> tuple[object, ...]:
    return "run", "--bundle", bundle("llama31"), "--output", tmp_path / "out"


@pytest.mark.model
def test_a_dry_run_and_the_run(job: tuple[object, ...], tmp_path: Path) -> None:
    job = (*job, "--input", write(tmp_path / "in.parquet", null_texts=1))
    prices = ("--tokens-per-second", 100, "--price-per-hour", 36)
    dry = invoke(*job, "--dry-run", *prices, "--max-bad", "1", terminal=True)
    assert dry.exit_code == 0, dry.output
    (line,) = dry.stdout.splitlines()
    said = json.loads(line)
    assert said["status"] == "dry-run"
    assert said["total_seconds"] == round(said["tokens"] / 100, 1)
    assert said["cost"] == round(said["total_seconds"] / 100, 2)
    for text in ("dry run", "10 read, 9 written", "1 null_text", "given", "free"):
        assert text in dry.stderr
    assert not (tmp_path / "out").exists()
    assert invoke(*job, "--dry-run").exit_code == 3
    done = invoke(*job, "--max-bad", "1", terminal=True)
    assert done.exit_code == 0, done.output
    for text in ("2 of 2 written", "9 of 10 written", "1 null_text", "onnxruntime on cpu"):
        assert text in done.stderr
    assert outcome(done)["candidates"] == said["candidates"]


@pytest.mark.model
def test_what_is_published_is_verified_and_left_alone(
    job: tuple[object, ...], tmp_path: Path
) -> None:
    """A real job, through every command around its folder."""
    job = (*job, "--input", write(tmp_path / "in.parquet", null_texts=1), "--max-bad", "50%")
    out = tmp_path / "out"
    first = invoke(*job)
    assert first.exit_code == 0, first.output
    assert all(json.loads(line)["event"] for line in first.stderr.splitlines())
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert outcome(invoke(*job))["already_done"]
    after = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert {p.name for p in before if before[p] != after.get(p)} <= {"LOCK", "metrics.prom"}
    status = outcome(invoke("status", out, "--json"))
    assert (status["state"], status["result"]) == ("done", "ok")
    assert status["lock"]["held"] is False
    assert status["candidates"] == {"read": 10, "written": 9, "quarantined": 1, "skipped": 0}
    verified = invoke("verify", out)
    assert verified.exit_code == 0, verified.output
    (found,) = outcome(verified)["folders"]
    assert (found["lines"], found["queries"], found["quarantined"]) == (9, 2, 1)
    assert found["parts"] >= 2  # the part of a shard, and its quarantine
    collected = outcome(invoke("gc", out))
    assert collected["folders"][0]["files"] == 0
    assert invoke("verify", out).exit_code == 0
    again = invoke(*job, "--restart")
    assert again.exit_code == 0
    assert "already_done" not in outcome(again)
    gone = outcome(invoke("gc", out, "--older-than", "0d"))
    assert gone["folders"][0]["action"] == "removed"
    assert "foreign" not in gone["folders"][0]
    assert not out.exists()


@pytest.mark.model
def test_too_many_bad_candidates_end_with_3(job: tuple[object, ...], tmp_path: Path) -> None:
    path = write(tmp_path / "in.parquet", null_texts=3)
    result = invoke(*job, "--input", path, "--max-bad", "20%")
    assert result.exit_code == 3
    ended = outcome(result)
    assert (ended["status"], ended["exit_code"]) == ("too-many-bad", 3)
    (error,) = [line for line in map(json.loads, result.stderr.splitlines()) if "what" in line]
    assert (error["event"], error["exit_code"]) == ("error", 3)
    assert "3 of 10 candidates were set aside" in ended["error"]
    assert (tmp_path / "out" / "run.trec").stat().st_size > 0
    assert invoke("verify", tmp_path / "out").exit_code == 0


@pytest.mark.model
def test_a_dry_run_before_a_restart(job: tuple[object, ...], tmp_path: Path) -> None:
    """It is refused where the run would be, and only there."""
    job = (*job, "--input", write(tmp_path / "in.parquet"))
    assert invoke(*job).exit_code == 0
    assert invoke(*job, "--depth", 3, "--dry-run").exit_code == 78
    dry = invoke(*job, "--depth", 3, "--dry-run", "--restart")
    assert dry.exit_code == 0, dry.output
    assert outcome(dry)["scored_pairs"] == 2 * 3


@pytest.mark.model
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("steps", [("plan_job", "_read"), ("admit", "_counted")])
def test_a_dry_run_heeds_signals(
    steps: tuple[str, str],
    number: int,
    job: tuple[object, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    where, after = steps
    step = getattr(estimate, where)

    def signalled(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), number)
        return step(*arguments, **options)

    monkeypatch.setattr(estimate, where, signalled)
    monkeypatch.delattr(estimate, after)  # it does not get there
    result = invoke(*job, "--input", write(tmp_path / "in.parquet"), "--dry-run")
    assert result.exit_code == 75, result.output
    assert (outcome(result)["status"], outcome(result)["exit_code"]) == ("stopped", 75)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.model
def test_each_partition_of_an_interval(job: tuple[object, ...], tmp_path: Path) -> None:
    for day in (21, 22, 23, 24):
        write(tmp_path / f"in/dt=2026-11-{day}/part-0.parquet", null_texts=day == 23)
    (tmp_path / "in/dt=2026-11-22/part-0.parquet").write_bytes(b"PAR1")
    job = (*job, "--input", f"{tmp_path}/in/dt=*/*.parquet")
    interval = ("--since", "2026-11-22", "--until", "2026-11-25")
    result = invoke(*job, *interval)
    assert result.exit_code == 65, result.output
    ended = outcome(result)
    found = [(item["partition"], item["exit_code"]) for item in ended["partitions"]]
    assert found == [("dt=2026-11-22", 65), ("dt=2026-11-23", 3), ("dt=2026-11-24", 0)]
    folders = [tmp_path / "out" / f"dt=2026-11-{day}" for day in (23, 24)]
    assert invoke("verify", *folders).exit_code == 0
    assert not (tmp_path / "out" / "dt=2026-11-21").exists()
    write(tmp_path / "in/dt=2026-11-22/part-0.parquet")
    again = invoke(*job, *interval, "--max-bad", 1)
    assert again.exit_code == 0, again.output
    assert [bool(p.get("already_done")) for p in outcome(again)["partitions"]] == [
        False,
        True,
        True,
    ]
    dry = outcome(invoke(*job, *interval, "--max-bad", 1, "--dry-run"))
    assert [item["already_done"] for item in dry["partitions"]] == [True] * 3
    assert dry["status"] == "dry-run"


def test_an_interval_with_nothing_in_it(tmp_path: Path) -> None:
    write(tmp_path / "dt=2026-11-22/x.parquet")
    job = ("run", "--bundle", "b", "--output", tmp_path / "out")
    common = (*job, "--input", f"{tmp_path}/dt=*/x.parquet", "--since", "2026-12-01")
    for options, code in (((), 0), (("--empty-exit", "0"), 0), (("--empty-exit", "99"), 99)):
        result = invoke(*common, "--until", "2026-12-02", *options)
        assert result.exit_code == code
        assert outcome(result)["status"] == "nothing-to-do"
        assert outcome(result)["exit_code"] == code
        assert "No partition lies from 2026-12-01 to before 2026-12-02" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (("--since", "2026-11-22"), "go together"),
        (("--until", "2026-11-22"), "go together"),
        (("--since", "yesterday", "--until", "2026-11-22"), "is no date"),
        (("--since", "2026-11-22", "--until", "2026-11-22"), "is empty"),
        (("--since", "2026-11-22", "--until", "2026-11-23"), "in no partition by time"),
        (("--max-bad", "some"), "out of range"),
        (("--stall-timeout", "0"), "out of range"),
        (("--dry-run", "--listwise", "l", "--stage", "listwise"), "second stage alone"),
    ],
)
def test_wrong_options(options: tuple[str, ...], match: str, tmp_path: Path) -> None:
    path = write(tmp_path / "in.parquet")
    result = invoke("run", "--input", path, "--bundle", "b", "--output", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert match in outcome(result)["error"]
    assert not (tmp_path / "out").exists()


@pytest.mark.model
def test_a_full_disk_ends_a_dry_run_with_73(job: tuple[object, ...], tmp_path: Path) -> None:
    """A file system of 4 kB, where this machine lets us make one."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(small)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs a privilege that is not here")
    try:
        path = write(tmp_path / "in.parquet")
        arguments = [*job[:-1], small / "out", "--input", path, "--dry-run"]
        result = invoke(*arguments)
        assert result.exit_code == 73, result.output
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.model
def test_a_dry_run_on_a_pipe_leaves_stdout_to_the_outcome(
    job: tuple[object, ...], tmp_path: Path
) -> None:
    path = write(tmp_path / "in.parquet")
    command = [sys.executable, "-m", "dear_batch", *job, "--input", path, "--dry-run"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["rate_from"] in {"unknown", "earlier runs"}
