"""Bad input, wrong usage, untrusted parts: one message, its exit code, nothing half-written."""

import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dear_batch.machine import machine
from tests.cli.commands import (
    Make,
    everything,
    fail,
    inputs_only,
    invoke,
    left_by_a_failure,
    manifest_of_a_bundle,
    outcome,
    parts,
    python,
    rows,
    succeed,
    told,
)
from tests.run.folders import Folder

pytestmark = pytest.mark.process
NO_GPU = not Path("/proc/driver/nvidia").exists() and not Path("/dev/nvidia0").exists()


def columns(**changed: Any) -> pa.Table:
    fields: dict[str, Any] = {"qid": ["q"], "query": ["?"], "docid": ["d"], "text": ["x"]}
    return pa.table({k: v for k, v in {**fields, **changed}.items() if v is not None})


def bad_input(kind: str, folder: Path) -> Path:
    path = folder / "in.parquet"
    whole = pa.Table.from_pylist(rows())
    match kind:
        case "missing column":
            pq.write_table(columns(text=None, passage=["x"]), path)
        case "missing candidate field":
            pq.write_table(
                pa.table({"qid": ["q"], "query": ["?"], "candidates": [[{"t": 1}]]}), path
            )
        case "wrong type":
            pq.write_table(columns(text=[1.5]), path)
        case "wrong candidates":
            pq.write_table(pa.table({"qid": ["q"], "query": ["?"], "candidates": ["x"]}), path)
        case "no bytes":
            path.touch()
        case "no rows":
            pq.write_table(columns().slice(0, 0), path)
        case "cut":
            pq.write_table(whole, path)
            path.write_bytes(path.read_bytes()[:-50])
        case "no Parquet":
            path.write_text("qid,query,docid\n" * 9)
        case "folder":
            path.mkdir()
    return path


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("missing column", "Missing column: text"),
        ("missing candidate field", "candidates.docid"),
        ("wrong type", "'text' has type double"),
        ("wrong candidates", "'candidates' has type string"),
        ("no bytes", "is empty"),
        ("no rows", "has no rows"),
        ("cut", "is cut"),
        ("no Parquet", "is not a Parquet file"),
        ("folder", "is a folder"),
        ("nothing", "does not exist"),
    ],
)
def test_bad_input_files_are_refused_before_a_model_loads(
    kind: str, match: str, tmp_path: Path
) -> None:
    path = bad_input(kind, tmp_path)
    arguments = (
        "--bundle",
        manifest_of_a_bundle(tmp_path / "bundle"),
        "--output",
        tmp_path / "out",
    )
    message = fail(65, match, "run", "--input", path, *arguments)
    assert parts(message) == {"where", "valid", "next"}
    assert str(path) in message
    assert inputs_only(tmp_path)


def test_a_glob_without_files_is_refused(tmp_path: Path) -> None:
    pattern = tmp_path / "day-*.parquet"
    arguments = (
        "--bundle",
        manifest_of_a_bundle(tmp_path / "bundle"),
        "--output",
        tmp_path / "out",
    )
    message = fail(65, "No file matches", "run", "--input", pattern, *arguments)
    assert str(pattern) in message
    assert inputs_only(tmp_path)
    for code in (0, 99):
        result = invoke("run", "--input", pattern, *arguments, "--empty-exit", code)
        assert result.exit_code == code
        assert outcome(result)["status"] == "nothing-to-do"
        assert "No file matches" in result.stderr


@pytest.mark.model
def test_a_cut_second_file_is_found_before_the_first_is_scored(
    bundle: Make, lists: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "late.parquet"
    cut.write_bytes(lists.read_bytes()[:-50])
    inputs = ("--input", lists, "--input", cut)
    fail(65, "is cut", "run", *inputs, "--bundle", bundle("llama31"), "--output", tmp_path / "out")
    assert left_by_a_failure(tmp_path / "out")


@pytest.mark.model
def test_interpolation_without_scores_is_refused(bundle: Make, lists: Path, tmp_path: Path) -> None:
    pq.write_table(columns(), lists)
    options = ("--output", tmp_path / "out", "--interpolate", "0.5")
    job = ("run", "--input", lists, "--bundle", bundle("llama31"))
    message = fail(65, "first-stage", *job, *options)
    assert "--interpolate 1" in message
    assert left_by_a_failure(tmp_path / "out")
    assert outcome(succeed(*job, *options[:2]))["candidates"] == {
        "read": 1,
        "written": 1,
        "quarantined": 0,
        "skipped": 0,
    }


@pytest.mark.parametrize("what", ["folder", "file", "below a file"])
def test_an_output_that_is_not_ours_is_refused(what: str, lists: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if what == "folder":
        out.mkdir()
        (out / "thesis.tex").write_text("mine")
    else:
        out.write_text("mine")
    target = out / "deeper" if what == "below a file" else out
    before = everything(tmp_path)
    arguments = ("--input", lists, "--bundle", tmp_path / "no-bundle", "--output", target)
    message = fail(73, "out", "run", *arguments)
    assert str(target) in message
    assert everything(tmp_path) == before


@pytest.mark.parametrize("command", ["run", "score"])
def test_a_missing_bundle_is_refused(command: str, lists: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "no-bundle"
    arguments = {
        "run": ("--input", lists, "--bundle", bundle, "--output", tmp_path / "out"),
        "score": (bundle, "who?", "a text"),
    }
    message = fail(78, "is not a bundle", command, *arguments[command])
    assert "dear-batch export" in message
    assert inputs_only(tmp_path)


@pytest.mark.model
@pytest.mark.parametrize("change", ["weights", "missing", "link", "extra graph"])
def test_a_changed_bundle_is_not_trusted(
    change: str, bundle: Make, lists: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle("llama31"), folder)
    weights = folder / "onnx" / "weights.safetensors"
    match change:
        case "weights":
            raw = bytearray(weights.read_bytes())
            raw[-1] ^= 1
            weights.write_bytes(raw)
        case "missing":
            (folder / "tokenizer.json").unlink()
        case "link":
            weights.rename(tmp_path / "elsewhere")
            weights.symlink_to(tmp_path / "elsewhere")
        case "extra graph":
            (folder / "onnx" / "more.onnx").write_bytes(b"x")
    arguments = ("--input", lists, "--bundle", folder, "--output", tmp_path / "out")
    message = fail(77, "not what its manifest says", "run", *arguments)
    assert parts(message) == {"where", "valid", "next"}
    assert not (tmp_path / "out" / "run.trec").exists()
    assert not (tmp_path / "out" / "commits" / "pointwise").exists()


@pytest.mark.model
def test_another_jobs_folder_is_refused(bundle: Make, lists: Path, tmp_path: Path) -> None:
    common = ("--input", lists, "--bundle", bundle("llama31"), "--output", tmp_path / "out")
    succeed("run", *common)
    before = everything(tmp_path)
    message = fail(78, "belongs to another job", "run", *common, "--depth", "3")
    assert parts(message) == {"where", "valid", "next"}
    after = everything(tmp_path)
    assert before.pop("out/LOCK") != after.pop("out/LOCK")
    assert after == before
    succeed("run", *common, "--depth", "3", "--restart")


@pytest.mark.model
@pytest.mark.skipif(not NO_GPU, reason="this machine has a GPU")
@pytest.mark.parametrize("engine", ["auto", "tensorrt", "onnxruntime", "torch"])
def test_cuda_is_refused_where_there_is_none(
    engine: str, bundle: Make, lists: Path, tmp_path: Path
) -> None:
    common = ("--input", lists, "--bundle", bundle("llama31"), "--output", tmp_path / "out")
    # In a process of its own: libraries write to the terminal past Python's streams.
    options = ("--device", "cuda", "--engine", engine)
    done = python("-m", "dear_batch", "run", *common, *options)
    assert done.returncode == 78, done.stderr
    assert "--device cuda" in told(done.stderr)
    assert "--device cpu" in told(done.stderr)
    assert all(line.startswith("{") for line in done.stderr.splitlines())
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["exit_code"] == 78
    assert left_by_a_failure(tmp_path / "out")
    assert not (tmp_path / "out" / "plan.json").exists()  # before the inputs are read


@pytest.mark.model
@pytest.mark.skipif(not NO_GPU, reason="this machine has a GPU")
def test_tensorrt_is_refused_where_it_cannot_run(bundle: Make, lists: Path, tmp_path: Path) -> None:
    common = ("--input", lists, "--bundle", bundle("llama31"), "--output", tmp_path / "out")
    commands: tuple[tuple[object, ...], ...] = (
        ("run", *common),
        ("run", *common, "--dry-run"),
        ("score", bundle("llama31"), "who?", "a text"),
    )
    for command in commands:
        message = fail(78, "with --engine tensorrt", *command, "--engine", "tensorrt")
        assert machine().driver.fault in message
        assert "--engine onnxruntime --device cpu, which runs here" in message
        assert "dear-batch doctor" in message
    succeed("run", *common)
    before = everything(tmp_path / "out")
    fail(78, "with --engine tensorrt", "run", *common, "--engine", "tensorrt", "--restart")
    after = everything(tmp_path / "out")
    assert before.pop("LOCK") != after.pop("LOCK")
    changed = {name for name in before if before[name] != after.get(name)}
    assert changed <= {"report.json", "metrics.prom"}


def spec_with(line: str, folder: Path) -> Path:
    spec = folder / "job.toml"
    spec.write_text(
        f'input.paths = ["in.parquet"]\n[output]\nfolder = "out"\n'
        f'[pointwise]\nbundle = "b"\n{line}\n'
    )
    return spec


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("dept = 5", "Did you mean 'depth'?"),
        ("depth = 0", "out of range"),
        ('depth = "all"', "a whole number"),
        ("interpolate = 1.5", "a number from 0 to 1"),
        ("depth =", "not valid TOML"),
        ('[listwise]\nbundle = "l\\u0000"', "'l\\x00'"),
    ],
)
def test_a_spec_with_a_fault_is_refused(line: str, match: str, tmp_path: Path) -> None:
    spec = spec_with(line, tmp_path)
    before = everything(tmp_path)
    message = fail(2, match, "run", spec)
    assert str(spec) in message
    assert everything(tmp_path) == before


ONE = ("--input", "in.parquet", "--bundle", "b", "--output", "o")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("run", "no.toml"), "cannot be read"),
        (("run", "--bundle", "b", "--output", "o"), "Missing: --input"),
        (("run", "--input", "in.parquet", "--output", "o"), "Missing: --bundle"),
        (("run", *ONE, "--window", "5"), "'window' is given, but the job has no listwise stage"),
        (("run", *ONE, "--stage", "listwise"), "one stage, so there is no --stage listwise"),
        (("run", *ONE, "--listwise", "l", "--window", "1"), "'window' is out of range"),
        (("run", *ONE, "--listwise", "l", "--max-failed-windows", "few"), "out of range"),
        (("export", "--output", "o"), "Missing: --model or --adapter"),
        (("export", "no.toml"), "cannot be read"),
        (("inspect", "nothing-here"), "does not exist"),
    ],
)
def test_wrong_usage_is_refused(arguments: tuple[str, ...], match: str) -> None:
    fail(2, match, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("rerank",),
        ("convert", "csv", "in.csv", "-o", "out.parquet"),
        ("score", "bundle", "query"),
    ],
)
def test_clicks_own_usage_errors_exit_with_2(arguments: tuple[str, ...]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("--no-such-option",), "--no-such-option"),
        (("--engine", "tensorflow"), "tensorflow"),
        (("--stage", "third"), "third"),
        (("a.toml", "b.toml"), "b.toml"),
    ],
)
def test_clicks_own_usage_errors_of_a_run_are_outcomes(
    arguments: tuple[str, ...], match: str
) -> None:
    message = fail(2, match, "run", *arguments)
    assert parts(message) == {"next"}


def test_clicks_own_usage_errors_of_a_run_on_a_terminal() -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "dear_batch", "run", "--no-such-option"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, check=False)
    os.close(theirs)
    shown = os.read(ours, 4096).decode()
    os.close(ours)
    assert done.returncode == json.loads(done.stdout)["exit_code"] == 2
    assert "Usage: " in shown
    assert "{" not in shown


@pytest.mark.parametrize("option", ["--input", "--bundle", "--output", "--listwise"])
def test_a_path_that_is_not_utf8_is_refused(option: str, tmp_path: Path) -> None:
    given = dict(zip(ONE[::2], ONE[1::2], strict=True)) | {option: b"caf\xe9"}
    command = [sys.executable, "-m", "dear_batch", "run", *(x for kv in given.items() for x in kv)]
    done = subprocess.run(command, capture_output=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "'caf\\udce9'" in json.loads(done.stdout)["error"]
    assert "UTF-8" in told(done.stderr.decode())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["status", "gc", "verify", "inspect"])
def test_a_path_that_cannot_be_is_refused(command: str, tmp_path: Path) -> None:
    message = fail(2, "File name too long", command, tmp_path / ("a" * 300))
    assert parts(message) == {"where", "valid"}


def test_a_bug_is_told_and_an_outcome_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("dear_batch.spec_files.load_spec", broken)
    fail(1, "This is a bug in dear-batch", "run", "job.toml")


def test_nobody_reading_is_no_bug(tmp_path: Path) -> None:
    Folder(tmp_path / "out").write()
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "dear_batch", "gc", tmp_path / "out"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert done.stderr == b""


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("convert", "rankgpt", "no.json", "-o", "out.parquet"), "no.json"),
        (("evaluate", "no-qrels.txt", "no-run.trec"), "no-qrels.txt"),
        (("inspect", "{}/notes.txt"), "not a Parquet file"),
    ],
)
def test_missing_or_foreign_files_are_bad_input(
    arguments: tuple[str, ...], match: str, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    fail(65, match, *(argument.format(tmp_path) for argument in arguments))
