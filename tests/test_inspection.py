"""What `inspect` shows of a bundle, a Parquet file and an output folder."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from dear_batch.bundle import open_bundle
from dear_batch.errors import ConfigurationError, InputError
from dear_batch.inspection import inspect_path
from dear_batch.run.local import run_job
from dear_batch.specs import InputSpec, JobSpec, OutputSpec, PointwiseSpec

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


# Bundles and output folders.


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
        "tolerance 0.0001",
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


@pytest.mark.model
def test_an_output_folder_is_shown_finished_or_not(bundle: Make, tmp_path: Path) -> None:
    path = lists(tmp_path / "in.parquet")
    spec = JobSpec(
        InputSpec((str(path),)),
        PointwiseSpec(str(bundle("llama31"))),
        OutputSpec(str(tmp_path / "out")),
    )
    run_job(spec)
    text = shown(tmp_path / "out")
    for expected in (
        str(path),
        "run.trec",
        "onnxruntime",
        "4 read, 2 written, 2 quarantined",
        "empty_query",
        open_bundle(bundle("llama31")).sha256,
    ):
        assert expected in text
    (tmp_path / "out" / "report.json").unlink()
    text = shown(tmp_path / "out")
    assert "not finished" in text
    assert "in.parquet" in text
