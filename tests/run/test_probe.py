"""Probes work through a part of one shard, and leave no trace."""

import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from dear_batch.errors import ConfigurationError
from dear_batch.pointwise.rows import Batch
from dear_batch.pointwise.scorer import OneAtATime, Scorer, open_scorer
from dear_batch.run import loading, planning
from dear_batch.run.folder import read_plan
from dear_batch.run.local import run_job
from dear_batch.run.planning import outline
from dear_batch.run.probe import probe
from dear_batch.run.watch import StoppedError
from dear_batch.specs import JobSpec, ListwiseSpec
from tests.conftest import tokenizer_of
from tests.run.fake_ranker import Fake, install, listwise_bundle
from tests.run.test_local import (
    SIZE,
    FailingAfter,
    Recorder,
    _rows,
    changed,
    flat,
    flattened,
    job,
    nested,
    small_shards,
    states,
)

pytestmark = pytest.mark.model
Make = Callable[..., Path]
Row = dict[str, Any]
FIRST = "00000-000000000000"
SHARD = 18_000  # three lists and more


@pytest.fixture
def rows() -> list[Row]:
    """Nine lists, among them one without a query, and one with a candidate without text."""
    rows = [dict(row) for row in _rows()[:9]]
    rows[1]["query"] = None
    rows[2]["candidates"] = changed(rows[2], 4, text=None)
    return rows


class Listening(OneAtATime):
    """A scorer that remembers the documents that it is shown."""

    def __init__(self, inner: Scorer, seen: list[str]) -> None:
        self._inner, self._seen = inner, seen
        self._tokenizer = tokenizer_of("llama31")
        self.layout, self.engine, self.device = inner.layout, inner.engine, inner.device
        self.precision = inner.precision

    def score(self, batch: Batch) -> NDArray[np.float32]:
        pairs = (batch.pairs[d] for d in batch.documents)
        self._seen += [self._tokenizer.decode(pair.document_ids.tolist()) for pair in pairs]
        return self._inner.start(batch)()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the scorers of this test are shown."""
    found: list[str] = []
    monkeypatch.setattr(
        loading, "open_scorer", lambda *a, **k: Listening(open_scorer(*a, **k), found)
    )
    return found


def died(spec: JobSpec, shards: int, size: int = SHARD) -> JobSpec:
    """The job has died after so many shards."""
    folder = Path(spec.output.folder)
    with small_shards(size), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            loading,
            "open_scorer",
            lambda *a, **k: FailingAfter(open_scorer(*a, **k), folder, shards),
        )
        with pytest.raises(RuntimeError, match="the device is gone"):
            run_job(spec)
    return spec


@pytest.fixture
def begun(bundle: Make, tmp_path: Path, rows: list[Row]) -> JobSpec:
    """A job of one stage with several shards, one of them committed."""
    path = nested(tmp_path / "in.parquet", rows, row_group_size=2)
    return died(job(bundle("llama31"), tmp_path / "out", path), 1)


def pointwise(spec: JobSpec, **options: Any) -> int:
    return probe(spec, stage="pointwise", shard=FIRST, **options)


def scored(rows: list[Row], lists: int) -> list[str]:
    """The texts that the first lists of `rows` give a scorer, in order."""
    return [
        c["text"]
        for row in rows[:lists]
        if row["query"]
        for c in row["candidates"]
        if c["text"] is not None
    ]


def assert_shown(seen: list[str], texts: list[str]) -> None:
    """The scorer saw these documents and no other; titles come first, ends may be cut."""
    distinct = {text[:25] for text in texts}
    assert len(seen) == len(texts)
    for text in distinct:
        assert any(text in document for document in seen), text


# Stage 1.


def test_the_scored_candidates_of_a_shard_are_counted(
    begun: JobSpec, rows: list[Row], seen: list[str]
) -> None:
    queries = len([row for row in rows if row["query"]])
    counts = [probe(begun, stage="pointwise", shard=key) for key in planned_keys(begun)]
    assert sum(counts) == queries * SIZE - 1
    assert len(counts) > 2
    assert seen == []  # counting needs no model


def planned_keys(spec: JobSpec) -> list[str]:
    plan = read_plan(Path(spec.output.folder))
    assert plan
    return [shard.key for output in outline(plan) for shard in output.shards]


def test_a_range_is_worked_through_and_nothing_else(
    begun: JobSpec, rows: list[Row], seen: list[str]
) -> None:
    total = pointwise(begun)
    assert total > SIZE + 3
    for first, end in ((0, 1), (2, 5), (SIZE - 2, SIZE + 3), (total - 1, total)):
        seen.clear()
        assert pointwise(begun, first=first, end=end) == total
        texts = scored(rows, len(rows))[first:end]
        assert_shown(seen, texts)


def test_every_ordinal_is_one_candidate_of_the_run(begun: JobSpec, seen: list[str]) -> None:
    """The halves of a range are the range: what a search for a killer rests on."""
    total = pointwise(begun)
    pointwise(begun, first=0, end=total)
    whole = sorted(seen)
    seen.clear()
    pointwise(begun, first=0, end=total // 2)
    pointwise(begun, first=total // 2, end=total)
    assert {*seen} == {*whole}


@pytest.mark.parametrize(("first", "end"), [(0, 0), (5, 5), (10**6, 10**6 + 1)])
def test_an_empty_range_shows_the_model_nothing(
    first: int, end: int, begun: JobSpec, seen: list[str]
) -> None:
    assert pointwise(begun, first=first, end=end) == pointwise(begun)
    assert seen == []


def test_only_what_is_scored_is_counted(
    bundle: Make, tmp_path: Path, rows: list[Row], seen: list[str]
) -> None:
    spec = job(bundle("llama31"), tmp_path / "out", nested(tmp_path / "in.parquet", rows[:3]))
    spec = died(replace(spec, pointwise=replace(spec.pointwise, depth=5)), 0)
    assert sum(probe(spec, stage="pointwise", shard=key) for key in planned_keys(spec)) == 10
    assert pointwise(spec, first=3, end=4)
    assert_shown(seen, [rows[0]["candidates"][3]["text"]])


def test_the_poison_that_a_probe_finds_is_that_of_the_run(
    begun: JobSpec, rows: list[Row], seen: list[str]
) -> None:
    """The same ordinals in both: the document that a probe shows is the one that is set aside."""
    ordinal = SIZE + 6  # behind the list without a query, and the candidate without text
    pointwise(begun, first=ordinal, end=ordinal + 1)
    (document,) = seen
    other = replace(begun, output=replace(begun.output, folder=f"{begun.output.folder}-2"))
    with small_shards(SHARD):
        run_job(other, poison={f"pointwise/{FIRST}": frozenset({ordinal})})
    refusals = pq.read_table(Path(other.output.folder) / "quarantine.parquet").to_pylist()
    (refusal,) = [r for r in refusals if r["reason"] == "kills_process"]
    (row,) = [row for row in rows if row["qid"] == refusal["qid"]]
    (candidate,) = [c for c in row["candidates"] if c["docid"] == refusal["docid"]]
    assert candidate["text"][:25] in document


def test_a_probe_writes_nothing_and_takes_no_lock(begun: JobSpec, seen: list[str]) -> None:
    before = states(Path(begun.output.folder))
    pointwise(begun)
    pointwise(begun, first=0, end=3)
    assert states(Path(begun.output.folder)) == before
    assert len(seen) == 3


@pytest.fixture
def scattered(bundle: Make, tmp_path: Path, rows: list[Row]) -> JobSpec:
    """A job over four lists whose rows are scattered; it died after a shard."""
    candidates = flattened(rows[3:7])
    mixed = [row for k in range(SIZE) for row in candidates[k::SIZE]]
    path = flat(tmp_path / "in.parquet", mixed)
    return died(job(bundle("llama31"), tmp_path / "out", path), 1, 3000)


def test_a_probe_of_scattered_rows_reads_the_regrouped_ones(
    scattered: JobSpec, tmp_path: Path, rows: list[Row], seen: list[str]
) -> None:
    before = states(tmp_path / "out")
    assert pointwise(scattered, first=1, end=2) >= SIZE
    assert_shown(seen, [rows[3]["candidates"][1]["text"]])
    assert states(tmp_path / "out") == before


def test_regrouped_rows_outlive_a_death_before_any_shard(
    scattered: JobSpec, tmp_path: Path, seen: list[str]
) -> None:
    """The process died of an early row: the probes, and the next run, find them regrouped."""
    shutil.rmtree(tmp_path / "out" / "commits" / "pointwise")
    assert {p.name for p in (tmp_path / "out" / "commits" / "input").iterdir()} == {"00000.json"}
    before = states(tmp_path / "out")
    assert pointwise(scattered) >= SIZE
    assert states(tmp_path / "out") == before
    assert seen == []


def test_a_probe_beats_and_can_be_stopped(begun: JobSpec, seen: list[str]) -> None:
    watch = Recorder()
    pointwise(begun, first=0, end=3, watch=watch)
    assert watch.checks > 0
    with pytest.raises(StoppedError):
        pointwise(begun, first=0, end=3, watch=Recorder(stop_at=1))
    assert seen


@pytest.mark.parametrize("stage", ["pointwise", "listwise"])
def test_a_folder_without_a_plan_has_no_shards(stage: str, begun: JobSpec, tmp_path: Path) -> None:
    nowhere = replace(begun, output=replace(begun.output, folder=str(tmp_path / "none")))
    with pytest.raises(ConfigurationError):
        probe(nowhere, stage=stage, shard=FIRST)
    assert not (tmp_path / "none").exists()


def test_another_shard_is_none_of_the_plan(begun: JobSpec) -> None:
    with pytest.raises(ConfigurationError, match="no shard 00009-000000000000"):
        probe(begun, stage="pointwise", shard="00009-000000000000")


# Stage 2.


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return install(monkeypatch)


@pytest.fixture
def two(bundle: Make, tmp_path: Path, rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> JobSpec:
    """A job of two stages whose first is done, in several groups of shards."""
    monkeypatch.setattr(planning, "LEAST_QUERIES", 3)
    path = nested(tmp_path / "in.parquet", rows, row_group_size=2)
    spec = job(bundle("llama31"), tmp_path / "out", path)
    generator = listwise_bundle(tmp_path / "listwise")
    spec = replace(spec, listwise=ListwiseSpec(str(generator), depth=5, window=4, step=2))
    with small_shards(4000):
        run_job(spec, stage="pointwise")
    return spec


def groups(spec: JobSpec) -> dict[str, int]:
    """The lists of each shard of stage 2, by its key; the others are no shards of it."""
    found = {}
    for key in planned_keys(spec):
        with suppress(ConfigurationError):
            found[key] = probe(spec, stage="listwise", shard=key)
    return found


def test_the_lists_of_a_group_are_counted(fake: Fake, two: JobSpec, rows: list[Row]) -> None:
    found = groups(two)
    assert FIRST in found
    assert 1 < len(found) < len(planned_keys(two))
    assert sum(found.values()) == len([row for row in rows if row["query"]])
    assert fake.opened == []


def test_a_range_of_lists_is_asked_about(fake: Fake, two: JobSpec, rows: list[Row]) -> None:
    before = states(Path(two.output.folder))
    sizes = groups(two)
    asked: list[str] = []
    for key, size in sizes.items():
        for at in range(size):
            fake.ranker.requests.clear()
            assert probe(two, stage="listwise", shard=key, first=at, end=at + 1) == size
            qids = {request.window.qid for wave in fake.ranker.requests for request in wave}
            assert len(qids) == 1
            asked += qids
    assert asked == [row["qid"] for row in rows if row["query"]]
    fake.ranker.requests.clear()
    probe(two, stage="listwise", shard=FIRST, first=1, end=100)
    qids = {request.window.qid for wave in fake.ranker.requests for request in wave}
    assert qids == set(asked[1 : sizes[FIRST]])
    assert states(Path(two.output.folder)) == before


def test_waves_are_as_large_as_the_model_takes(fake: Fake, two: JobSpec) -> None:
    fake.ranker.wave_queries = 2
    size = probe(two, stage="listwise", shard=FIRST)
    probe(two, stage="listwise", shard=FIRST, first=0, end=size)
    assert {len({r.window.qid for r in wave}) for wave in fake.ranker.requests} <= {1, 2}


def test_the_second_stage_has_no_shards_before_the_first_is_done(
    fake: Fake, two: JobSpec, tmp_path: Path
) -> None:
    commits = sorted((tmp_path / "out" / "commits" / "pointwise").iterdir())
    commits[-1].unlink()
    with pytest.raises(ConfigurationError, match="no finished stage 1"):
        probe(two, stage="listwise", shard=FIRST)
    assert fake.opened == []
