"""The layout of a job's batches: planned, asked for, or found out and remembered."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dear_batch.pointwise import calibration
from dear_batch.pointwise.calibration import ROW_TOKENS
from dear_batch.run import budgets, loading
from dear_batch.run.folder import read_plan
from dear_batch.run.local import run_job
from dear_batch.specs import ExecutionSpec, JobSpec
from tests.run.test_local import FailingAfter, Recorder, _rows, job, nested, small_shards

pytestmark = pytest.mark.model
Make = Callable[..., Path]
NAMES = {f"{n}/{n}" for n in ROW_TOKENS}


class Listening(Recorder):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[dict[str, Any]] = []

    def log(self, event: str, **fields: object) -> None:
        if event == "calibrated":
            self.logged.append(fields)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own, and jobs that are large enough."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(budgets, "PAYS", 0)
    monkeypatch.setattr(calibration, "MOST_S", 1000)
    return tmp_path / "cache/dear-batch/calibration.json"


@pytest.fixture
def spec(bundle: Make, tmp_path: Path) -> JobSpec:
    return job(bundle("llama31"), tmp_path / "out", nested(tmp_path / "in.parquet", list(_rows())))


def planned(spec: JobSpec) -> tuple[int, int]:
    plan = read_plan(Path(spec.output.folder))
    assert plan
    runtime = plan["runtime"]["pointwise"]
    return runtime["row_tokens"], runtime["batch_tokens"]


def elsewhere(spec: JobSpec, name: str, **execution: Any) -> JobSpec:
    folder = str(Path(spec.output.folder).with_name(name))
    output = replace(spec.output, folder=folder)
    return replace(spec, output=output, execution=ExecutionSpec(**execution))


def write_rates(cache: Path, rates: dict[str, Any]) -> None:
    fields = json.loads(cache.read_text())
    (entry,) = fields["engines"].values()
    entry["seconds_a_token"] = rates
    cache.write_text(json.dumps(fields))


def test_the_fastest_rows_are_found_once_and_then_remembered(spec: JobSpec, cache: Path) -> None:
    watch = Listening()
    report = run_job(spec, watch)
    (told,) = watch.logged
    assert told["seconds_a_token"].keys() == NAMES
    (entry,) = json.loads(cache.read_text())["engines"].values()
    assert entry["seconds_a_token"] == told["seconds_a_token"]
    assert planned(spec) == (report["row_tokens"], report["batch_tokens"])
    for row in (256, 2048):  # the cache decides, the text being the same
        rates = {name: 1.0 if name == f"{row}/{row}" else 9.0 for name in NAMES}
        write_rates(cache, rates)
        for turn in "ab":
            again = elsewhere(spec, f"{row}{turn}")
            run_job(again, watch)
            assert planned(again) == (row, row)
    assert len(watch.logged) == 1


@pytest.mark.parametrize(
    "rates", [{}, [], dict.fromkeys(NAMES, 0.0), dict.fromkeys(NAMES, "fast"), {"512/512": 1.0}]
)
def test_what_is_wrong_with_the_cache_is_as_if_it_were_none(
    spec: JobSpec, cache: Path, rates: Any
) -> None:
    run_job(spec)
    write_rates(cache, rates)
    watch = Listening()
    run_job(elsewhere(spec, "again"), watch)
    assert len(watch.logged) == 1


def test_a_small_job_takes_the_usual_rows(
    spec: JobSpec, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budgets, "PAYS", 100)
    run_job(spec)
    assert planned(spec) == (256, 256)
    assert not cache.exists()


def test_what_is_asked_for_is_taken(spec: JobSpec, cache: Path) -> None:
    asked = elsewhere(spec, "asked", row_tokens=300, batch_tokens=900)
    run_job(asked)
    assert planned(asked) == (300, 900)
    assert not cache.exists()


def test_a_job_goes_on_as_it_began(spec: JobSpec, cache: Path) -> None:
    run_job(spec)
    write_rates(cache, {name: 1.0 if name == "1024/1024" else 9.0 for name in NAMES})
    whole, begun = elsewhere(spec, "whole"), elsewhere(spec, "begun")
    with small_shards():
        run_job(whole)
        with pytest.MonkeyPatch.context() as patch:
            opened, folder = loading.open_scorer, Path(begun.output.folder)
            patch.setattr(
                loading, "open_scorer", lambda *a, **k: FailingAfter(opened(*a, **k), folder, 1)
            )
            with pytest.raises(RuntimeError, match="the device is gone"):
                run_job(begun)
        write_rates(cache, {name: 1.0 if name == "256/256" else 9.0 for name in NAMES})
        report = run_job(begun)
    assert report["shards"]["pointwise"]["kept"] > 0
    assert planned(begun) == planned(whole) == (1024, 1024)
    one, other = (Path(s.output.folder, "run.trec").read_bytes() for s in (whole, begun))
    assert one == other
