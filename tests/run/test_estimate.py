"""A dry run beside the run itself: the same counts, tokens near enough, the same refusals."""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dear_batch.bundle import open_bundle
from dear_batch.errors import ConfigurationError, InputError, OutputError, UsageError
from dear_batch.files.parquet import open_input
from dear_batch.run import space
from dear_batch.run.estimate import Price, estimate
from dear_batch.run.local import run_job
from dear_batch.run.rates import remember
from dear_batch.run.sample import Spread
from dear_batch.specs import InputSpec, JobSpec, ListwiseSpec, OutputSpec, PointwiseSpec
from tests.conftest import collection_queries, collection_texts

Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def candidates(path: Path, queries: int = 40) -> Path:
    """Lists of 30, with a text missing here and there, one list empty, one query blank."""
    texts, texts_of_queries = collection_texts(), collection_queries()
    rows: list[dict[str, Any]] = [
        {
            "qid": f"q{i}",
            # Equal pairs are scored once, so each query has words of its own.
            "query": f"{texts_of_queries[i % len(texts_of_queries)]} {i}",
            "candidates": [
                {"docid": f"document-{k:08d}", "text": texts[(7 * i + k) % len(texts)]}
                for k in range(30)
            ],
        }
        for i in range(queries)
    ]
    rows[3]["candidates"][4]["text"] = None
    rows[4]["candidates"] = []
    rows[5]["query"] = " "
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    return path


@pytest.fixture
def spec(bundle: Make, tmp_path: Path) -> JobSpec:
    path, folder = str(candidates(tmp_path / "in.parquet")), str(tmp_path / "out")
    pointwise = PointwiseSpec(str(bundle("llama31")))
    return JobSpec(InputSpec((path,), "5%"), pointwise, OutputSpec(folder))


@pytest.mark.model
@pytest.mark.parametrize("depth", [None, 10])
def test_it_counts_what_a_run_counts(depth: int | None, spec: JobSpec, tmp_path: Path) -> None:
    spec = replace(spec, pointwise=replace(spec.pointwise, depth=depth))
    found = estimate(spec)
    assert {path.name for path in tmp_path.iterdir()} <= {"in.parquet", "cache"}
    assert (found["status"], found["exit_code"], found["already_done"]) == ("dry-run", 0, False)
    report = run_job(spec)
    for name in ("queries", "candidates", "quarantine_reasons", "skipped_reasons", "inputs"):
        assert found[name] == report[name], name
    assert found["outputs"] == report["outputs"]
    assert found["scored_pairs"] == report["scored_pairs"] == found["sampled_pairs"]
    assert found["tokens"] == pytest.approx(report["tokens"], rel=0.05)
    assert found["truncated_share"] == pytest.approx(
        report["truncated_pairs"] / report["scored_pairs"], abs=1e-3
    )
    assert (found["seconds"], found["total_seconds"], found["cost"]) == (None, None, None)
    assert found["rate_from"] == "unknown"
    assert estimate(spec)["already_done"]


@pytest.mark.model
def test_a_sample_is_near_the_whole(spec: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = estimate(spec)
    monkeypatch.setattr("dear_batch.run.estimate.SAMPLE_PAIRS", 100)
    sampled = estimate(spec)
    assert 100 <= sampled["sampled_pairs"] < 200
    assert sampled["tokens"] == pytest.approx(whole["tokens"], rel=0.05)
    assert estimate(spec)["tokens"] == sampled["tokens"]


@pytest.mark.model
def test_time_and_cost(spec: JobSpec, bundle: Make) -> None:
    found = estimate(spec, price=Price(1000, 7.2))
    assert (found["tokens_per_second"], found["rate_from"]) == (1000, "given")
    assert found["total_seconds"] == found["seconds"] == round(found["tokens"] / 1000, 1)
    assert found["cost"] == pytest.approx(7.2 * found["seconds"] / 3600, abs=0.01)
    remember(open_bundle(bundle("llama31")).sha256, "onnxruntime", "cpu", 500)
    found = estimate(spec, price=Price(per_hour=7.2))
    assert (found["tokens_per_second"], found["rate_from"]) == (500, "earlier runs")
    assert found["seconds"] == round(found["tokens"] / 500, 1)


@pytest.mark.model
def test_too_many_bad_candidates_are_told_beforehand(spec: JobSpec) -> None:
    found = estimate(replace(spec, input=replace(spec.input, max_bad=30)))
    assert (found["status"], found["exit_code"]) == ("too-many-bad", 3)
    assert run_job(replace(spec, input=replace(spec.input, max_bad=30)))["exit_code"] == 3
    assert estimate(replace(spec, input=replace(spec.input, max_bad=31)))["exit_code"] == 0


@pytest.mark.model
def test_what_a_run_refuses_is_refused(spec: JobSpec, tmp_path: Path) -> None:
    path = Path(spec.input.paths[0])
    raw = path.read_bytes()
    path.write_bytes(raw[:-50])
    with pytest.raises(InputError, match="is cut"):
        estimate(spec)
    flipped = bytearray(raw)
    flipped[200] ^= 0xFF
    path.write_bytes(flipped)
    with pytest.raises(InputError, match="Cannot decode"):
        estimate(spec)
    path.write_bytes(raw)
    with pytest.raises(InputError, match="Interpolation"):
        estimate(replace(spec, pointwise=replace(spec.pointwise, interpolate=0.5)))
    with pytest.raises(ConfigurationError, match="is not a bundle"):
        estimate(replace(spec, pointwise=replace(spec.pointwise, bundle=str(tmp_path))))
    with pytest.raises(UsageError, match="second stage alone"):
        estimate(spec, stage="listwise")
    run_job(spec)
    with pytest.raises(ConfigurationError, match="another job"):
        estimate(replace(spec, pointwise=replace(spec.pointwise, depth=3)))
    other = replace(spec, pointwise=replace(spec.pointwise, depth=3))
    assert estimate(other, restart=True)["already_done"] is False
    assert estimate(spec, restart=True)["already_done"] is False
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(OutputError, match="not ours"):
        estimate(replace(spec, output=replace(spec.output, folder=str(tmp_path))))


@pytest.mark.model
def test_a_full_disk_is_told_beforehand(spec: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = estimate(spec)["space"]["needed_bytes"]
    usage = type("Usage", (), {"free": needed - 1})
    monkeypatch.setattr(space.shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(OutputError, match="has not enough space") as caught:
        estimate(spec)
    assert "GB are free" in caught.value.where
    usage.free = needed  # type: ignore[attr-defined]
    assert estimate(spec)["space"]["free_bytes"] == needed


@pytest.mark.model
@pytest.mark.parametrize("queries", [40, 400])
def test_the_space_that_is_said_is_enough(queries: int, spec: JobSpec, tmp_path: Path) -> None:
    candidates(Path(spec.input.paths[0]), queries)
    spec = replace(spec, pointwise=replace(spec.pointwise, depth=1))
    said = estimate(spec)["space"]["needed_bytes"]
    run_job(spec)
    taken = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert taken < said + 20_000  # plan, report, commits
    assert said < 4 * taken


@pytest.mark.model
def test_the_parts_of_an_earlier_attempt_are_there(spec: JobSpec, tmp_path: Path) -> None:
    run_job(spec)
    there = estimate(spec)["space"]["there_bytes"]
    assert there == sum(path.stat().st_size for path in (tmp_path / "out" / "parts").iterdir()) > 0


def test_candidates_are_counted_by_footers(tmp_path: Path) -> None:
    nested = candidates(tmp_path / "nested.parquet", 40)
    flat = tmp_path / "flat.parquet"
    columns = {name: ["x"] * 9 for name in ("qid", "query", "docid", "text")}
    pq.write_table(pa.table(columns), flat)
    # An empty list has one value that says so.
    assert space.candidates_of([open_input(nested)]) == 39 * 30 + 1
    assert space.candidates_of([open_input(flat)]) == 9


@pytest.fixture
def two_stages(spec: JobSpec, checkpoint: Make, bundle: Make) -> JobSpec:
    folder = bundle("llama31", task="listwise", model=str(checkpoint("llama31", causal=True)))
    return replace(spec, listwise=ListwiseSpec(str(folder), depth=10, window=4, step=2))


@pytest.mark.model
def test_windows_of_a_second_stage(two_stages: JobSpec) -> None:
    found = estimate(two_stages)
    assert found["listwise"]["windows"] == found["queries"]["written"] * 4
    assert found["listwise"]["sampled_windows"] == found["listwise"]["windows"]
    report = run_job(two_stages)
    assert found["listwise"]["windows"] == report["listwise"]["windows"]["total"]
    assert found["listwise"]["prompt_tokens"] == pytest.approx(
        report["listwise"]["prompt_tokens"], rel=0.1
    )
    assert "listwise" not in estimate(two_stages, stage="pointwise")


LOADED = """
import json, sys
from dear_batch.run.estimate import estimate
from dear_batch.specs import *
values = json.loads(sys.argv[1])
listwise, pointwise = ListwiseSpec(**values["listwise"]), PointwiseSpec(**values["pointwise"])
paths = InputSpec(tuple(values["input"]["paths"]))
estimate(JobSpec(paths, pointwise, OutputSpec(**values["output"]), listwise=listwise))
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


@pytest.mark.model
def test_no_engine_is_loaded(two_stages: JobSpec) -> None:
    command = [sys.executable, "-c", LOADED, json.dumps(asdict(two_stages))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout))
    assert {"tokenizers", "pyarrow"} <= loaded
    assert not loaded & {"torch", "transformers", "onnxruntime"}


def test_a_spread_sample() -> None:
    for total in (0, 1, 9, 10, 19, 20, 21, 1000, 12345):
        spread: Spread[int] = Spread(10)
        for number in range(total):
            spread.offer(lambda number=number: number)
        items = spread.items
        assert len(items) == total if total < 20 else 10 <= len(items) < 20
        steps = {b - a for a, b in itertools.pairwise(items)}
        assert len(steps) <= 1
        assert not items or total - items[-1] <= max(steps, default=1)
