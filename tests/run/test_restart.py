"""Beginning anew, going on after odd ends, and what a job notices while it runs."""

import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from dear_batch.errors import ConfigurationError, InputError, TrustError, UsageError
from dear_batch.files.parquet import open_input
from dear_batch.pointwise.onnx_scorer import PackedOnnxScorer
from dear_batch.pointwise.rows import Batch
from dear_batch.run import inputs
from dear_batch.run.folder import finished
from dear_batch.run.inputs import Hashes, opened
from dear_batch.run.ledger import Ledger
from dear_batch.run.local import run_job
from dear_batch.specs import ExecutionSpec, InputSpec, JobSpec, ListwiseSpec, OutputSpec
from tests.run.fake_ranker import install, listwise_bundle
from tests.run.test_local import (
    SIZE,
    Make,
    Row,
    _rows,
    flat,
    flattened,
    job,
    names,
    nested,
    small_shards,
    states,
    without_lock,
)

pytestmark = pytest.mark.model
SAME = ("run.trec", "results.parquet")


@pytest.fixture
def rows() -> list[Row]:
    return [{**row, "candidates": [*row["candidates"]]} for row in _rows()[:6]]


@pytest.fixture
def spec(bundle: Make, tmp_path: Path, rows: list[Row]) -> JobSpec:
    rows[1]["candidates"][2] = {**rows[1]["candidates"][2], "text": None}
    path = nested(tmp_path / "in.parquet", rows)
    return job(bundle("llama31"), tmp_path / "out", path)


def published(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in SAME}


@pytest.mark.parametrize("fault", ["input", "bundle"])
def test_a_job_that_cannot_begin_anew_leaves_what_there_was(
    spec: JobSpec, tmp_path: Path, fault: str
) -> None:
    run_job(spec)
    before = without_lock(states(tmp_path / "out"))
    wrong = replace(spec, input=InputSpec((str(tmp_path / "typo.parquet"),)))
    if fault == "bundle":
        broken = tmp_path / "broken"
        shutil.copytree(spec.pointwise.bundle, broken)
        (broken / "config.json").write_text("{}")
        wrong = replace(spec, pointwise=replace(spec.pointwise, bundle=str(broken)))
    with pytest.raises((InputError, TrustError)):
        run_job(wrong, restart=True)
    assert without_lock(states(tmp_path / "out")) == before


def test_a_job_that_died_while_it_began_anew_is_still_ours(spec: JobSpec, tmp_path: Path) -> None:
    """Its plan was gone, and folders of the old one were left, with what was set aside."""
    run_job(spec)
    whole = published(tmp_path / "out")
    for name in [p for p in names(tmp_path / "out") if p not in {"LOCK", "quarantine", "parts"}]:
        path = tmp_path / "out" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert run_job(spec)["status"] == "too-many-bad"
    assert published(tmp_path / "out") == whole


def test_a_second_stage_that_is_begun_anew_keeps_the_first(
    spec: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = install(monkeypatch)
    listwise = ListwiseSpec(str(listwise_bundle(tmp_path / "generator")), depth=4, window=3)
    spec = replace(spec, listwise=listwise, execution=ExecutionSpec(device="cpu"))
    run_job(spec)
    whole, asked = published(tmp_path / "out"), len(fake.ranker.requests)
    report = run_job(spec, stage="listwise", restart=True)
    assert len(fake.ranker.requests) == 2 * asked
    assert report["shards"] == {
        "pointwise": {"done": 1, "kept": 1},
        "listwise": {"done": 1, "kept": 0},
    }
    assert published(tmp_path / "out") == whole


def test_a_first_stage_that_lost_a_part_is_done_again(
    spec: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For another second stage over it: it says so, and the next command helps."""
    install(monkeypatch)
    listwise = ListwiseSpec(str(listwise_bundle(tmp_path / "generator")), depth=4, window=3)
    spec = replace(spec, listwise=listwise, execution=ExecutionSpec(device="cpu"))
    run_job(spec)
    for part in (tmp_path / "out" / "parts").glob("*"):
        part.unlink()
    other = replace(spec, listwise=replace(listwise, window=2))
    with pytest.raises(ConfigurationError, match="no finished stage 1"):
        run_job(other, stage="listwise")
    assert "already_done" not in run_job(other, stage="pointwise")
    assert run_job(other, stage="listwise")["listwise"]["window"] == 2


def test_a_regrouped_copy_is_gone_when_the_job_is_done(
    bundle: Make, tmp_path: Path, rows: list[Row]
) -> None:
    candidates = flattened(rows)
    mixed = [row for k in range(SIZE) for row in candidates[k::SIZE]]
    spec = job(bundle("llama31"), tmp_path / "out", flat(tmp_path / "in.parquet", mixed))
    run_job(spec)
    assert finished(tmp_path / "out")
    assert [p.name for p in (tmp_path / "out" / "parts").glob("*regrouped*")] == []


def test_notes_for_a_plan_that_never_was_are_forgotten(
    bundle: Make, tmp_path: Path, rows: list[Row]
) -> None:
    """The model could not be loaded, and the next run has another input."""
    candidates = flattened(rows)
    mixed = [row for k in range(SIZE) for row in candidates[k::SIZE]]
    spec = job(bundle("llama31"), tmp_path / "out", flat(tmp_path / "in.parquet", mixed))
    wrong = replace(spec, execution=ExecutionSpec(row_tokens=8))
    with pytest.raises(ConfigurationError, match="cannot hold a pair"):
        run_job(wrong)
    assert names(tmp_path / "out" / "commits" / "input") == {"00000.json"}
    other = replace(spec, input=InputSpec((flat(tmp_path / "two.parquet", mixed[::-1]),)))
    assert run_job(other)["status"] == "ok"


def test_metrics_that_a_death_kept_back_are_written_by_the_next_run(
    spec: JobSpec, tmp_path: Path
) -> None:
    run_job(spec)
    (tmp_path / "out" / "metrics.prom").unlink()
    before = without_lock(states(tmp_path / "out"))
    assert run_job(spec)["already_done"]
    text = (tmp_path / "out" / "metrics.prom").read_text()
    assert "dear_batch_last_success_timestamp_seconds" in text
    after = without_lock(states(tmp_path / "out"))
    assert {name: after[name] for name in before} == before


def test_a_bundle_that_changes_meanwhile_spoils_no_commit(
    spec: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "bundle"
    shutil.copytree(spec.pointwise.bundle, own)
    spec = replace(spec, pointwise=replace(spec.pointwise, bundle=str(own)))
    score = PackedOnnxScorer.score

    def touching(scorer: PackedOnnxScorer, batch: Batch) -> Any:
        weights = own / "onnx" / "weights.safetensors"
        weights.write_bytes(weights.read_bytes())
        return score(scorer, batch)

    monkeypatch.setattr(PackedOnnxScorer, "score", touching)
    with small_shards(), pytest.raises(TrustError):
        run_job(spec)
    assert not (tmp_path / "out" / "commits" / "pointwise").exists()


def test_a_hash_that_takes_long_is_waited_for_with_signs_of_life(
    tmp_path: Path, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "BEAT_S", 0.01)
    monkeypatch.setattr(inputs, "hash_blocks", _slowly(go := threading.Event()))
    (tmp_path / "out").mkdir()
    beats = 0

    def beat() -> None:
        nonlocal beats
        beats += 1
        if beats == 5:
            go.set()

    _, pin = opened(nested(tmp_path / "in.parquet", rows))
    with Hashes([pin], Ledger(tmp_path / "out"), beat) as hashes:
        hashes.sha256(0)
    assert beats >= 5


def _slowly(go: threading.Event) -> Callable[..., str]:
    hash_blocks = inputs.hash_blocks

    def slow(path: str, check: Callable[[], None]) -> str:
        go.wait(10)
        return hash_blocks(path, check)

    return slow


def test_an_input_that_is_replaced_while_it_is_opened_is_refused(
    tmp_path: Path, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = nested(tmp_path / "in.parquet", rows[:2])

    def swapping(name: str) -> Any:
        found = open_input(name)
        pq.write_table(pq.read_table(nested(tmp_path / "new.parquet", rows)), path)
        return found

    monkeypatch.setattr(inputs, "open_input", swapping)
    with pytest.raises(InputError, match="changed"):
        opened(path)


def test_names_that_could_not_be_given_in_the_end_are_refused(
    spec: JobSpec, tmp_path: Path
) -> None:
    long = tmp_path / f"{'n' * 210}.parquet"
    shutil.copy(spec.input.paths[0], long)
    output = OutputSpec(spec.output.folder, run_per_input=True)
    with pytest.raises(UsageError, match="too long"):
        run_job(replace(spec, input=InputSpec((str(long),)), output=output))


def test_a_failure_is_reported_without_secrets(
    spec: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "hunter2hunter2")
    wrong = replace(spec, input=InputSpec((str(tmp_path / "hunter2hunter2.parquet"),)))
    with pytest.raises(InputError):
        run_job(wrong)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["exit_code"] == 65
    assert "hunter2" not in json.dumps(report)


def test_another_unfinished_jobs_report_is_left_alone(spec: JobSpec, tmp_path: Path) -> None:
    run_job(spec)
    (tmp_path / "out" / "_SUCCESS").unlink()
    before = (tmp_path / "out" / "report.json").read_bytes()
    missing = InputSpec((str(tmp_path / "typo.parquet"),))
    with pytest.raises(InputError):
        run_job(replace(spec, input=missing, output=OutputSpec(spec.output.folder, tag="other")))
    assert (tmp_path / "out" / "report.json").read_bytes() == before
