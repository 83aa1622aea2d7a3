"""Inputs and jobs of two stages for tests of the command line."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.cli.commands import Make, rows, run_here
from tests.run.fake_ranker import listwise_bundle


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(rows()), tmp_path / "in.parquet")
    return tmp_path / "in.parquet"


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dear_batch.run.supervisor.supervise", run_here)


@pytest.fixture
def generator(tmp_path: Path) -> Path:
    return listwise_bundle(tmp_path / "listwise")


@pytest.fixture
def two_stages(bundle: Make, generator: Path, lists: Path, tmp_path: Path) -> tuple[object, ...]:
    first = ("--input", lists, "--bundle", bundle("llama31"), "--output", tmp_path / "out")
    second = ("--listwise", generator, "--listwise-depth", 5, "--window", 3, "--step", 2)
    return "run", *first, *second
