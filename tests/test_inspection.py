"""What `inspect` shows of a bundle, a Parquet file and an output folder."""

import io
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from dear_batch import __version__
from dear_batch.bundle import open_bundle
from dear_batch.errors import ConfigurationError, InputError
from dear_batch.inspection import inspect_path
from dear_batch.run import loading
from dear_batch.run.folder import locked, write_plan
from dear_batch.run.local import run_job
from dear_batch.specs import InputSpec, JobSpec, ListwiseSpec, OutputSpec, PointwiseSpec
from tests.run.fake_ranker import install, listwise_bundle
from tests.run.folders import Folder

Make = Callable[..., Path]
SCREEN = 60  # lines
LISTS = {
    "qid": ["q1", "q2", "q3", "q4"],
    "query": ["who wrote Emma?", None, "third", "fourth"],
    "candidates": [
        [
            {"docid": "d1", "title": "Emma", "text": "A novel.", "score": 2.0},
            {"docid": "d2", "title": None, "text": "Another.", "score": 1.0},
        ],
        [],
        [{"docid": "d3", "title": None, "text": None, "score": 1.0}],
        [{"docid": "d4", "title": None, "text": "x", "score": 1.0}],
    ],
}


def shown(path: Path) -> str:
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(inspect_path(path))
    text = console.export_text()
    assert text.count("\n") < SCREEN
    return text


def lists(path: Path) -> Path:
    pq.write_table(pa.table(LISTS), path)
    return path


# Parquet files.


def test_candidate_lists_are_shown_with_their_first_rows(tmp_path: Path) -> None:
    text = shown(lists(tmp_path / "in.parquet"))
    for expected in ("4 in 1 row groups", "nested", "yes", "who wrote Emma?", "d1: Emma A novel."):
        assert expected in text
    assert "third" in text
    assert "fourth" not in text  # the first three


def test_flat_lists_are_shown_as_lists(tmp_path: Path) -> None:
    columns = {
        "qid": ["q1", "q1", "q2"],
        "query": ["first query", "first query", "second query"],
        "docid": ["d1", "d2", "d1"],
        "text": ["one", "two", "three"],
    }
    pq.write_table(pa.table(columns), tmp_path / "in.parquet", row_group_size=2)
    text = shown(tmp_path / "in.parquet")
    for expected in ("3 in 2 row groups", "flat, a row a candidate", "no", "d1:  one"):
        assert expected in text
    (line,) = [line for line in text.splitlines() if "first query" in line]
    assert " 2 " in line


def test_another_parquet_file_is_shown_with_what_it_lacks(tmp_path: Path) -> None:
    pq.write_table(pa.table({"qid": ["q"], "passage": ["text"]}), tmp_path / "in.parquet")
    text = shown(tmp_path / "in.parquet")
    assert "passage: string" in text
    assert "no. Missing columns" in text


@pytest.mark.parametrize("content", [b"", b"PAR1 and then nothing", b"not Parquet at all"])
def test_a_damaged_parquet_file_is_one_clear_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "in.parquet").write_bytes(content)
    with pytest.raises(InputError) as caught:
        inspect_path(tmp_path / "in.parquet")
    assert caught.value.where


def test_a_cut_parquet_file_is_one_clear_error(tmp_path: Path) -> None:
    path = lists(tmp_path / "in.parquet")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match="is cut"):
        inspect_path(path)


def test_other_files_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not something") as caught:
        inspect_path(tmp_path)
    assert "bundle" in caught.value.valid
    with pytest.raises(InputError, match="not a Parquet file"):
        inspect_path(tmp_path / "notes.txt")


# Bundles.


@pytest.mark.model
def test_a_bundle_is_shown_with_source_recipe_and_parity(bundle: Make) -> None:
    text = shown(bundle("llama31"))
    manifest = open_bundle(bundle("llama31")).manifest
    expected = [
        "pointwise",
        manifest.source.model,
        "local folder",
        "hidden_size 64",
        "readme, last-token, 228 tokens",
        "fp32",
        "packed.onnx",
        "model.onnx",
        "gate: absolute 0.0001",
        f"torch {manifest.versions['torch']}",
        open_bundle(bundle("llama31")).sha256,
    ]
    for item in expected:
        assert item in text


@pytest.mark.model
def test_a_listwise_bundle_is_shown(bundle: Make, checkpoint: Make) -> None:
    text = shown(bundle("llama31", model=str(checkpoint("llama31", causal=True))))
    assert "listwise" in text
    assert "No graphs" in text


def test_a_bundle_of_another_schema_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bundle.json").write_text(json.dumps({"schema_version": 99}))
    with pytest.raises(ConfigurationError, match="99"):
        inspect_path(tmp_path)


# Output folders: of a job that is done, and of every other one.


def job(bundle: Path, folder: Path, path: Path) -> JobSpec:
    return JobSpec(
        InputSpec((str(path),)), PointwiseSpec(str(bundle)), OutputSpec(str(folder / "out"))
    )


@pytest.mark.model
def test_a_finished_job_is_shown(bundle: Make, tmp_path: Path) -> None:
    path = lists(tmp_path / "in.parquet")
    run_job(job(bundle("llama31"), tmp_path, path))
    text = shown(tmp_path / "out")
    for expected in (
        "done (too-many-bad)",
        "too-many-bad, exit code 3",
        "1 of 1 shards",
        str(path),
        "run.trec",
        "onnxruntime on cpu, fp32",
        "4 read, 2 written, 2 quarantined, 0 skipped",
        "1 empty_query",
        "depth all, interpolate 1.0",
        f"tool dear-batch {__version__}",
        open_bundle(bundle("llama31")).sha256,
        "dear-batch verify",
        "seconds",
    ):
        assert expected in text


@pytest.mark.model
def test_a_job_of_two_stages_is_shown_between_them_and_after(
    bundle: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = install(monkeypatch)
    spec = job(bundle("llama31"), tmp_path, lists(tmp_path / "in.parquet"))
    generator = listwise_bundle(tmp_path / "listwise")
    spec = replace(spec, listwise=ListwiseSpec(str(generator), depth=5, window=4))
    run_job(spec, stage="pointwise")
    text = shown(tmp_path / "out")
    for expected in (
        "listwise-outstanding",
        "0 of 1 shards",
        "none yet, the parts of stage 1",
        "depth 5, window 4, step 2, prompt readme",
        open_bundle(generator).sha256,
        "--stage listwise",
    ):
        assert expected in text
    run_job(spec, stage="listwise")
    text = shown(tmp_path / "out")
    for expected in ("run.trec", "first 5 in windows of 4 by 2", "2: 1 ok, 1 kept"):
        assert expected in text
    assert fake.ranker.requests


@pytest.mark.model
def test_a_job_that_failed_is_shown_with_its_error(
    bundle: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lists(tmp_path / "in.parquet")
    spec = job(bundle("llama31"), tmp_path, path)

    def refuse(*_: object, **__: object) -> None:
        raise ConfigurationError("No such engine.", where="engine", next_step="take the other")

    monkeypatch.setattr(loading, "open_scorer", refuse)
    with pytest.raises(ConfigurationError):
        run_job(spec)
    text = shown(tmp_path / "out")
    assert "failed" in text
    for expected in ("No such engine.", "take the other", "the phase load", "exit code 78"):
        assert expected in text


def test_a_job_that_failed_before_it_had_a_plan_is_shown(tmp_path: Path) -> None:
    spec = job(tmp_path / "no-bundle", tmp_path, tmp_path / "in.parquet")
    with pytest.raises(InputError):
        run_job(spec)
    assert not (tmp_path / "out" / "plan.json").exists()
    text = shown(tmp_path / "out")
    for expected in ("failed", "does not exist", "the phase check", "exit code 65"):
        assert expected in text


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder(tmp_path / "out")
    made.plan()
    plan = json.loads((made.path / "plan.json").read_text())
    plan["job"] |= {"bundle_sha256": "0" * 64, "pointwise": {"depth": 100}}
    write_plan(made.path, {k: v for k, v in plan.items() if k != "sha256"})
    return made


def test_a_job_that_was_killed_is_shown_as_far_as_it_got(folder: Folder) -> None:
    folder.commit(0)
    text = shown(folder.path)
    for expected in ("stopped", "1 of 2 shards", "2 read, 2 written", "in.parquet"):
        assert expected in text


def test_a_job_that_runs_now_is_shown_without_the_report_of_an_earlier_attempt(
    folder: Folder,
) -> None:
    folder.report("failed", exit_code=75, error={"what": "memory ran out"}, phase="load")
    folder.path.joinpath("LOCK").unlink(missing_ok=True)
    with locked(folder.path):
        text = shown(folder.path)
    for expected in ("running", f"held by pid {os.getpid()}", "0 of 2 shards"):
        assert expected in text
    assert "memory ran out" not in text
    assert "exit code" not in text
    assert "memory ran out" in shown(folder.path)


def test_many_inputs_fit_on_a_screen(folder: Folder) -> None:
    plan = json.loads((folder.path / "plan.json").read_text())
    pin = plan["job"]["inputs"][0]
    plan["job"]["inputs"] = [{**pin, "path": f"{i}.parquet"} for i in range(1200)]
    plan["outputs"] = [{**plan["outputs"][0], "stem": f"{i}"} for i in range(1200)]
    write_plan(folder.path, {k: v for k, v in plan.items() if k != "sha256"})
    text = shown(folder.path)
    assert "0.parquet, 1.parquet, 2.parquet and 1,197 more" in text
    assert "0.trec, 1.trec, 2.trec and 1,197 more" in text
    assert "4,800" in text  # rows


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"schema_version": 1, "inputs": []}'])
def test_a_plan_of_something_else_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(InputError, match="no output of this version"):
        inspect_path(tmp_path)


@pytest.mark.parametrize(
    "report", [{}, {"status": "ok"}, {"status": "ok", "exit_code": 0, "engine": "x"}]
)
def test_a_report_of_something_else_is_refused(report: object, folder: Folder) -> None:
    (folder.path / "report.json").write_text(json.dumps(report))
    if not report:
        assert "planned" in shown(folder.path)
        return
    with pytest.raises(ConfigurationError, match="not what dear-batch run writes"):
        inspect_path(folder.path)
