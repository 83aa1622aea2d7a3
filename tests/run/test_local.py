"""Whole jobs on a tiny real bundle: what is published, and what never is."""

import json
import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from dear_batch import Reranker
from dear_batch.bundle import open_bundle
from dear_batch.errors import (
    ConfigurationError,
    DearBatchError,
    InputError,
    OutputError,
    TryAgainError,
    UsageError,
)
from dear_batch.files.results import QUARANTINE_SCHEMA, RESULTS_SCHEMA
from dear_batch.machine import gpus
from dear_batch.pointwise.rows import Batch
from dear_batch.pointwise.scorer import OneAtATime, Scorer, open_scorer
from dear_batch.run import blocks, loading, plan, planning
from dear_batch.run.folder import locked
from dear_batch.run.local import run_job
from dear_batch.run.watch import StoppedError, Watch
from dear_batch.specs import ExecutionSpec, InputSpec, JobSpec, OutputSpec, PointwiseSpec
from tests.conftest import collection_queries, collection_texts, tokenizer_of

pytestmark = pytest.mark.model
Make = Callable[..., Path]
Row = dict[str, Any]
WORK = {"LOCK", "plan.json", "parts", "commits", "report.json", "metrics.prom"}
END = {"manifest.json", "_SUCCESS"}
PUBLISHED = WORK | END | {"results.parquet", "run.trec"}
QUARANTINE = {"quarantine", "quarantine.parquet"}
SAME = ("run.trec", "results.parquet")
SIZE = 12


@cache
def _rows() -> tuple[Row, ...]:
    texts = collection_texts()
    return tuple(
        {
            "qid": f"q{i}",
            "query": query,
            "candidates": [
                {
                    "docid": f"p{(5 * i + k) % len(texts)}",
                    "title": f"Passage {k}" if k % 3 else None,
                    "text": texts[(5 * i + k) % len(texts)],
                    "score": 20.0 - 0.5 * k,
                }
                for k in range(SIZE)
            ],
        }
        for i, query in enumerate(collection_queries())
    )


@pytest.fixture
def rows() -> list[Row]:
    """A list of `SIZE` real passages for each query of the example collection."""
    return [{**row, "candidates": [*row["candidates"]]} for row in _rows()]


CANDIDATE = pa.struct(
    [("docid", pa.string()), ("title", pa.string()), ("text", pa.string()), ("score", pa.float64())]
)
SCHEMA = pa.schema(
    [("qid", pa.string()), ("query", pa.string()), ("candidates", pa.list_(CANDIDATE))]
)


def nested(path: Path, rows: list[Row], **options: Any) -> str:
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path, **options)
    return str(path)


def flattened(rows: list[Row]) -> list[Row]:
    return [
        {"qid": row["qid"], "query": row["query"], **candidate}
        for row in rows
        for candidate in row["candidates"]
    ]


def flat(path: Path, rows: list[Row], **options: Any) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return str(path)


def job(bundle: Path, folder: Path, *paths: str) -> JobSpec:
    return JobSpec(InputSpec(paths), PointwiseSpec(str(bundle)), OutputSpec(str(folder)))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def counts(read: int, written: int, quarantined: int = 0, skipped: int = 0) -> dict[str, int]:
    assert read == written + quarantined + skipped
    return {"read": read, "written": written, "quarantined": quarantined, "skipped": skipped}


def states(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Every file below a folder, and whatever changes when it is written."""
    found = {path.relative_to(folder).as_posix(): path.stat() for path in folder.rglob("*")}
    return {name: (s.st_ino, s.st_mtime_ns, s.st_size) for name, s in found.items()}


def without_lock(found: dict[str, tuple[int, int, int]]) -> dict[str, tuple[int, int, int]]:
    """The lock says who came last."""
    return {name: state for name, state in found.items() if name != "LOCK"}


def report_of(folder: Path) -> dict[str, Any]:
    fields = json.loads((folder / "report.json").read_text())
    assert isinstance(fields, dict)
    return fields


class Recorder(Watch):
    """Keeps what it is told, and asks the job to stop after some checks."""

    def __init__(self, stop_at: float = math.inf) -> None:
        super().__init__()
        self.calls: list[tuple[str, float, int]] = []
        self.phases: list[str] = []
        self.shards: list[str] = []
        self.checks, self._stop_at = 0, stop_at

    def advance(self, stage: str, done: float, total: int) -> None:
        self.calls.append((stage, done, total))

    def phase(self, name: str) -> None:
        self.phases.append(name)

    def shard(self, stage: str, key: str) -> None:
        self.shards.append(f"{stage}/{key}")

    def check(self) -> None:
        self.checks += 1
        if self.checks >= self._stop_at:
            self.stop.set()
        super().check()


@contextmanager
def small_shards(size: int = 8000) -> Iterator[None]:
    """Jobs inside are cut into shards of a few lists, and scored a list at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "SHARD_BYTES", size)
        patch.setattr(blocks, "ENCODE_LISTS", 1)
        patch.setattr(blocks, "BLOCK_PAIRS", SIZE)
        yield


def run_lines(path: Path) -> dict[str, list[tuple[str, float]]]:
    """A TREC run, checked: (docid, score) of each query in the order that trec_eval recovers."""
    lists: dict[str, list[tuple[str, float]]] = {}
    text = path.read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    for line in text.splitlines():
        qid, q0, docid, rank, score, tag = line.split(" ")
        assert (q0, tag) == ("Q0", "dear-batch")
        lists.setdefault(qid, []).append((docid, float(score)))
        assert int(rank) == len(lists[qid])
    for entries in lists.values():
        scores = np.array([score for _, score in entries], np.float32)
        assert np.isfinite(scores).all()
        assert (np.diff(scores) < 0).all()
        assert len({docid for docid, _ in entries}) == len(entries)
    return lists


def order(folder: Path, stem: str = "run") -> dict[str, list[str]]:
    lists = run_lines(folder / f"{stem}.trec")
    return {qid: [docid for docid, _ in entries] for qid, entries in lists.items()}


def logits(folder: Path, name: str = "results.parquet") -> dict[tuple[str, str], float | None]:
    results = pq.read_table(folder / name).to_pylist()
    return {(row["qid"], row["docid"]): row["logit"] for row in results}


def assert_same_ranking(one: Path, other: Path) -> None:
    assert order(one) == order(other)
    first, second = logits(one), logits(other)
    assert first.keys() == second.keys()
    for key, logit in first.items():
        assert logit == pytest.approx(second[key], abs=1e-5)


@pytest.fixture(scope="module")
def published(bundle: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a plain run over all queries."""
    folder = tmp_path_factory.mktemp("published")
    spec = job(bundle("llama31"), folder / "out", nested(folder / "in.parquet", list(_rows())))
    run_job(spec)
    return folder / "out"


class Fixed(OneAtATime):
    """A scorer that gives one value to every pair whose document holds a text."""

    def __init__(self, inner: Scorer, text: str, value: float) -> None:
        self._inner, self._value = inner, value
        self._text = text[:40]  # the rest may have been cut
        self._tokenizer = tokenizer_of("llama31")
        self.layout, self.engine, self.device = inner.layout, inner.engine, inner.device
        self.precision = inner.precision

    def score(self, batch: Batch) -> NDArray[np.float32]:
        scores_N = self._inner.start(batch)()
        for n, d in enumerate(batch.documents):
            if self._text in self._tokenizer.decode(batch.pairs[d].document_ids.tolist()):
                scores_N[n] = self._value
        return scores_N


class Failing(OneAtATime):
    """A scorer that works for some calls and then raises."""

    def __init__(self, inner: Scorer, calls: int) -> None:
        self._inner, self._left = inner, calls
        self.layout, self.engine, self.device = inner.layout, inner.engine, inner.device
        self.precision = inner.precision

    def score(self, batch: Batch) -> NDArray[np.float32]:
        self._left -= 1
        if self._left < 0:
            raise RuntimeError("the device is gone")
        return self._inner.start(batch)()


@contextmanager
def scorer_wrapped(wrap: Callable[[Scorer], Scorer]) -> Iterator[None]:
    """Jobs inside score with what `wrap` makes of the real scorer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "open_scorer", lambda *a, **k: wrap(open_scorer(*a, **k)))
        yield


# What is published.


def test_the_run_holds_every_candidate_once(published: Path, rows: list[Row]) -> None:
    lists = run_lines(published / "run.trec")
    assert list(lists) == [row["qid"] for row in rows]
    for row in rows:
        found = {docid for docid, _ in lists[row["qid"]]}
        assert found == {c["docid"] for c in row["candidates"]}
    assert names(published) == PUBLISHED
    assert names(published.parent) == {"in.parquet", "out"}  # no scratch folder


def test_results_hold_the_logits_of_the_api(published: Path, bundle: Make, rows: list[Row]) -> None:
    table = pq.read_table(published / "results.parquet")
    assert table.schema.equals(RESULTS_SCHEMA)
    assert table.schema.metadata[b"schema_version"] == b"1"
    reranker = Reranker.load(bundle("llama31"))
    found = logits(published)
    for row in rows:
        documents = [(c["title"] or "", c["text"]) for c in row["candidates"]]
        scores = reranker.score(row["query"], documents)
        assert np.std(scores) > 0.1
        for candidate, score in zip(row["candidates"], scores, strict=True):
            assert found[row["qid"], candidate["docid"]] == pytest.approx(score, abs=1e-4)


def test_results_say_where_a_document_came_from(published: Path, rows: list[Row]) -> None:
    results = pq.read_table(published / "results.parquet").to_pylist()
    first = {
        (row["qid"], c["docid"]): (k, c["score"])
        for row in rows
        for k, c in enumerate(row["candidates"], start=1)
    }
    assert {(r["qid"], r["docid"]): (r["first_rank"], r["first_score"]) for r in results} == first
    lists = run_lines(published / "run.trec")
    for r in results:
        docid, score = lists[r["qid"]][r["rank"] - 1]
        assert (docid, score) == (r["docid"], pytest.approx(r["logit"], rel=1e-6))
    by_rank = [r["logit"] for r in results if r["qid"] == "q0"]
    assert by_rank == sorted(by_rank, reverse=True)


def test_the_report_counts_everything(published: Path, bundle: Make, rows: list[Row]) -> None:
    report = json.loads((published / "report.json").read_text())
    n, m = len(rows), len(rows) * SIZE
    assert report["schema_version"] == 2
    assert (report["status"], report["exit_code"]) == ("ok", 0)
    assert report["queries"] == counts(n, n)
    assert report["candidates"] == counts(m, m)
    assert (report["quarantine_reasons"], report["skipped_reasons"]) == ({}, {})
    assert report["shards"] == {"pointwise": {"done": 1, "kept": 0}}
    assert report["scored_pairs"] == m
    assert report["outputs"] == ["run.trec"]
    assert report["bundle_sha256"] == open_bundle(bundle("llama31")).sha256
    assert (report["engine"], report["precision"]) == ("onnxruntime", "fp32")
    assert report["tokens"] > 50 * m
    assert report["tokens_per_second"] > 0
    assert 0 <= report["padding_share"] < 1
    seconds = report["seconds"]
    ahead, engine = {"read", "tokenise", "plan_batches"}, {"score", "idle"}
    assert set(seconds) == {"plan", "load", "write", "total"} | ahead | engine
    for thread in (ahead, engine | {"plan", "load"}, {"write"}):
        assert 0 < sum(seconds[stage] for stage in thread) <= seconds["total"] + 0.01
    assert report["idle_share"] == pytest.approx(
        seconds["idle"] / (seconds["idle"] + seconds["score"]), abs=0.01
    )


def test_progress_grows_and_ends_at_the_number_of_queries(
    bundle: Make, tmp_path: Path, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "ENCODE_LISTS", 2)
    monkeypatch.setattr(blocks, "BLOCK_PAIRS", 2 * SIZE)
    rows[1]["query"] = rows[4]["query"] = rows[5]["query"] = ""
    spec = job(bundle("llama31"), tmp_path / "out", nested(tmp_path / "in.parquet", rows[:6]))
    watch = Recorder()
    run_job(spec, watch)
    done = [call[1] for call in watch.calls]
    assert {(stage, total) for stage, _, total in watch.calls} == {("pointwise", 6)}
    assert done == sorted(done)
    assert done[0] == 0
    assert 0 < done[1] < 2  # within the first block already
    assert watch.phases == ["check", "plan", "load", "pointwise", "publish"]
    assert watch.shards == ["pointwise/00000-000000000000"]


def test_progress_ends_with_what_could_not_be_scored(
    bundle: Make, tmp_path: Path, rows: list[Row]
) -> None:
    rows[5]["query"] = ""
    spec = job(bundle("llama31"), tmp_path / "out", nested(tmp_path / "in.parquet", rows[:6]))
    watch = Recorder()
    run_job(spec, watch)
    assert watch.calls[-1] == ("pointwise", 6, 6)


def test_equal_scores_keep_first_stage_order_and_are_written_apart(
    bundle: Make, tmp_path: Path, rows: list[Row]
) -> None:
    """Traps 4 and 17: trec_eval would order tied documents by docid, descending."""
    spec = job(bundle("llama31"), tmp_path / "out", nested(tmp_path / "in.parquet", rows[:2]))
    with scorer_wrapped(lambda inner: Fixed(inner, "", 1.5)):
        run_job(spec)
    assert order(tmp_path / "out") == {
        row["qid"]: [c["docid"] for c in row["candidates"]] for row in rows[:2]
    }
    assert set(logits(tmp_path / "out").values()) == {1.5}


def test_copies_of_a_passage_keep_first_stage_order(
    bundle: Make, tmp_path: Path, rows: list[Row]
) -> None:
    """Packed at different places of a row, the same tokens score apart in the last bits."""
    copies = [{**rows[0]["candidates"][2], "docid": f"d{k:02}"} for k in reversed(range(30))]
    row = {**rows[0], "candidates": copies}
    run_job(job(bundle("llama31"), tmp_path / "out", nested(tmp_path / "in.parquet", [row])))
    assert order(tmp_path / "out") == {"q0": [c["docid"] for c in copies]}


def test_the_tag_is_the_last_column(bundle: Make, tmp_path: Path, rows: list[Row]) -> None:
    spec = job(bundle("llama31"), tmp_path / "out", nested(tmp_path / "in.parquet", rows[:1]))
    run_job(replace(spec, output=replace(spec.output, tag="mine-2")))
    lines = (tmp_path / "out" / "run.trec").read_text().splitlines()
    assert {line.split()[-1] for line in lines} == {"mine-2"}


# The same bytes, or the same ranking.


def test_the_same_job_gives_the_same_bytes(
    published: Path, bundle: Make, tmp_path: Path, rows: list[Row]
) -> None:
    run_job(job(bundle("llama31"), tmp_path / "out", nested(tmp_path / "in.parquet", rows)))
    for name in SAME:
        assert (tmp_path / "out" / name).read_bytes() == (published / name).read_bytes()


def test_row_groups_do_not_matter(
    published: Path, bundle: Make, tmp_path: Path, rows: list[Row]
) -> None:
    path = nested(tmp_path / "in.parquet", rows, row_group_size=3, compression="none")
    run_job(job(bundle("llama31"), tmp_path / "out", path))
    assert (tmp_path / "out" / "run.trec").read_bytes() == (published / "run.trec").read_bytes()


def test_shards_and_blocks_move_scores_by_rounding_only(
    published: Path, bundle: Make, tmp_path: Path, rows: list[Row]
) -> None:
    path = nested(tmp_path / "in.parquet", rows, row_group_size=2)
    with small_shards():
        report = run_job(job(bundle("llama31"), tmp_path / "out", path))
    assert report["shards"]["pointwise"]["done"] > 3
    assert len(names(tmp_path / "out" / "parts")) == report["shards"]["pointwise"]["done"]
    assert_same_ranking(tmp_path / "out", published)


def test_nested_flat_and_scattered_inputs_give_the_same_ranking(
    published: Path, bundle: Make, tmp_path: Path, rows: list[Row]
) -> None:
    contiguous = flattened(rows)
    # All first candidates, then all second ones …
    scattered = [row for k in range(SIZE) for row in contiguous[k::SIZE]]
    paths = {
        "flat": [flat(tmp_path / "flat.parquet", contiguous, row_group_size=50)],
        "scattered": [flat(tmp_path / "s.parquet", scattered, row_group_size=50)],
        "files": [
            flat(tmp_path / "1.parquet", scattered[:60]),
            flat(tmp_path / "2.parquet", scattered[60:]),
        ],
    }
    for name, inputs in paths.items():
        run_job(job(bundle("llama31"), tmp_path / name, *inputs))
        assert names(tmp_path / name) == PUBLISHED
        assert_same_ranking(tmp_path / name, published)
    planned = {n: json.loads((tmp_path / n / "plan.json").read_text()) for n in paths}
    regrouped = {
        n: fields["outputs"][0]["sources"][0]["regrouped"] for n, fields in planned.items()
    }
    assert regrouped == {"flat": False, "scattered": True, "files": True}
    hidden = [path.name for path in tmp_path.rglob(".*")]
    assert hidden == []


def test_integer_ids_are_written_as_text(bundle: Make, tmp_path: Path, rows: list[Row]) -> None:
    table = pa.Table.from_pylist(flattened(rows[:1])).drop_columns(["qid", "docid"])
    numbered = table.append_column("qid", pa.array([7] * SIZE))
    numbered = numbered.append_column("docid", pa.array(range(SIZE), pa.int32()))
    pq.write_table(numbered, tmp_path / "in.parquet")
    run_job(job(bundle("llama31"), tmp_path / "out", str(tmp_path / "in.parquet")))
    (docids,) = order(tmp_path / "out").values()
    assert sorted(docids, key=int) == [str(i) for i in range(SIZE)]


# Several inputs.


def test_two_inputs_make_one_run(
    published: Path, bundle: Make, tmp_path: Path, rows: list[Row]
) -> None:
    paths = [nested(tmp_path / "1.parquet", rows[:5]), nested(tmp_path / "2.parquet", rows[5:])]
    report = run_job(job(bundle("llama31"), tmp_path / "out", *paths))
    assert_same_ranking(tmp_path / "out", published)
    assert list(order(tmp_path / "out")) == [row["qid"] for row in rows]
    assert report["inputs"] == paths
    assert names(tmp_path / "out") == PUBLISHED


def test_one_run_an_input(published: Path, bundle: Make, tmp_path: Path, rows: list[Row]) -> None:
    paths = [nested(tmp_path / "1.parquet", rows[:5]), nested(tmp_path / "2.parquet", rows[3:])]
    spec = job(bundle("llama31"), tmp_path / "out", *paths)
    report = run_job(replace(spec, output=replace(spec.output, run_per_input=True)))
    results = {"1.trec", "1.results.parquet", "2.trec", "2.results.parquet"}
    assert names(tmp_path / "out") == WORK | END | results
    assert report["outputs"] == ["1.trec", "2.trec"]
    # A qid in both is no repeat here.
    assert report["queries"] == counts(len(rows) + 2, len(rows) + 2)
    whole = order(published)
    assert order(tmp_path / "out", "1") == {row["qid"]: whole[row["qid"]] for row in rows[:5]}
    assert order(tmp_path / "out", "2") == {row["qid"]: whole[row["qid"]] for row in rows[3:]}
    assert len(logits(tmp_path / "out", "1.results.parquet")) == 5 * SIZE


# Depth and interpolation.


def test_below_the_depth_first_stage_order_stays(
    published: Path, bundle: Make, tmp_path: Path, rows: list[Row]
) -> None:
    spec = job(bundle("llama31"), tmp_path / "out", nested(tmp_path / "in.parquet", rows))
    report = run_job(replace(spec, pointwise=replace(spec.pointwise, depth=4)))
    assert report["scored_pairs"] == 4 * len(rows)
    assert report["candidates"]["written"] == SIZE * len(rows)
    found, whole, scores = order(tmp_path / "out"), logits(published), logits(tmp_path / "out")
    for row in rows:
        qid, docids = row["qid"], [c["docid"] for c in row["candidates"]]
        head = sorted(docids[:4], key=lambda docid, qid=qid: -whole[qid, docid])
        assert found[qid] == head + docids[4:]
        assert [scores[qid, docid] for docid in docids[4:]] == [None] * (SIZE - 4)
        for docid in head:
            assert scores[qid, docid] == pytest.approx(whole[qid, docid], abs=1e-5)


def test_interpolation_mixes_z_scores(
    published: Path, bundle: Make, tmp_path: Path, rows: list[Row]
) -> None:
    spec = job(bundle("llama31"), tmp_path / "out", nested(tmp_path / "in.parquet", rows))
    run_job(replace(spec, pointwise=replace(spec.pointwise, interpolate=0.5)))
    whole, found = logits(published), run_lines(tmp_path / "out" / "run.trec")
    for row in rows:
        docids = [c["docid"] for c in row["candidates"]]
        mixed = 0.5 * z([whole[row["qid"], docid] for docid in docids])
        mixed += 0.5 * z([c["score"] for c in row["candidates"]])
        written = dict(found[row["qid"]])
        np.testing.assert_allclose([written[docid] for docid in docids], mixed, atol=1e-5)
    assert logits(tmp_path / "out") == whole


def z(values: list[Any]) -> NDArray[np.float64]:
    array = np.array(values, np.float64)
    return (array - array.mean()) / array.std()


def test_with_no_weight_on_the_logits_the_first_stage_stays(
    bundle: Make, tmp_path: Path, rows: list[Row]
) -> None:
    spec = job(bundle("llama31"), tmp_path / "out", nested(tmp_path / "in.parquet", rows[:4]))
    run_job(replace(spec, pointwise=replace(spec.pointwise, interpolate=0.0)))
    expected = {row["qid"]: [c["docid"] for c in row["candidates"]] for row in rows[:4]}
    assert order(tmp_path / "out") == expected


def test_interpolation_refuses_a_missing_first_stage_score(
    bundle: Make, tmp_path: Path, rows: list[Row]
) -> None:
    rows[3]["candidates"][5] = {**rows[3]["candidates"][5], "score": None}
    path = nested(tmp_path / "in.parquet", rows)
    spec = job(bundle("llama31"), tmp_path / "out", path)
    weighted = replace(spec, pointwise=replace(spec.pointwise, interpolate=0.5))
    assert_nothing_published(weighted, InputError, r"row 3, qid q3, docid p20")


# Quarantine.


def bad_rows(rows: list[Row]) -> list[Row]:
    """Row 1 and on, one fault of the issue each; rows 0 and 12 are whole."""
    bad = [dict(row) for row in rows[:13]]
    bad[1]["candidates"] = []
    bad[2]["query"] = None
    bad[3]["query"] = " "
    bad[4]["qid"] = "white space"
    bad[5]["qid"] = None
    bad[6]["candidates"] = [{**c, "text": None} for c in rows[6]["candidates"]]
    bad[7]["candidates"] = changed(rows[7], 3, text=None)
    bad[8]["candidates"] = changed(rows[8], 4, docid=rows[8]["candidates"][0]["docid"])
    bad[9]["candidates"] = changed(rows[9], 5, docid="white\tspace")
    bad[10]["candidates"] = changed(rows[10], 6, text="", title=None)
    bad[11]["candidates"] = changed(rows[11], 7, text="", title="A title alone")
    return bad


def changed(row: Row, at: int, **fields: Any) -> list[Row]:
    return [{**c, **fields} if k == at else c for k, c in enumerate(row["candidates"])]


def test_bad_rows_are_set_aside_and_the_rest_is_reranked(
    published: Path, bundle: Make, tmp_path: Path, rows: list[Row]
) -> None:
    first = nested(tmp_path / "1.parquet", bad_rows(rows), row_group_size=4)
    second = nested(tmp_path / "2.parquet", [{**rows[13], "qid": "q0"}, rows[13]])
    report = run_job(job(bundle("llama31"), tmp_path / "out", first, second))
    assert (report["status"], report["exit_code"]) == ("too-many-bad", 3)

    table = pq.read_table(tmp_path / "out" / "quarantine.parquet")
    assert table.schema.equals(QUARANTINE_SCHEMA)
    assert table.schema.metadata[b"schema_version"] == b"1"
    ids = [[c["docid"] for c in row["candidates"]] for row in rows]
    kinds = ("path", "row_group", "row", "reason", "qid", "docid", "candidates")
    assert [tuple(r[kind] for kind in kinds) for r in table.to_pylist()] == [
        (first, 0, 2, "empty_query", "q2", None, SIZE),
        (first, 0, 3, "empty_query", "q3", None, SIZE),
        (first, 1, 4, "bad_qid", "white space", None, SIZE),
        (first, 1, 5, "bad_qid", None, None, SIZE),
        *((first, 1, 6, "null_text", "q6", docid, 1) for docid in ids[6]),
        (first, 1, 6, "no_valid_candidates", "q6", None, 0),
        (first, 1, 7, "null_text", "q7", ids[7][3], 1),
        (first, 2, 8, "duplicate_docid", "q8", ids[8][0], 1),
        (first, 2, 9, "bad_docid", "q9", "white\tspace", 1),
        (first, 2, 10, "empty_text", "q10", ids[10][6], 1),
        (second, 0, 0, "duplicate_qid", "q0", None, SIZE),
    ]
    assert all(table.column("detail").to_pylist())

    whole, found = order(published), order(tmp_path / "out")
    assert list(found) == ["q0", "q7", "q8", "q9", "q10", "q11", "q12", "q13"]
    for qid, at in (("q7", 3), ("q8", 4), ("q9", 5), ("q10", 6)):
        gone = ids[int(qid[1:])][at]
        assert found[qid] == [docid for docid in whole[qid] if docid != gone]
    assert set(found["q11"]) == set(whole["q11"])  # an empty text with a title is scored
    for qid in ("q0", "q12", "q13"):
        assert found[qid] == whole[qid]
    # Ranks and scores of the first stage are those of the input, gaps included.
    results = pq.read_table(tmp_path / "out" / "results.parquet").to_pylist()
    assert sorted(r["first_rank"] for r in results if r["qid"] == "q7") == [1, 2, 3, *range(5, 13)]

    assert report["queries"] == counts(15, 8, quarantined=6, skipped=1)
    written = 8 * SIZE - 4
    set_aside = 6 * SIZE + 4
    assert report["candidates"] == counts(written + set_aside, written, set_aside)
    assert written + set_aside == sum(len(r["candidates"]) for r in bad_rows(rows)) + 2 * SIZE
    assert report["quarantine_reasons"] == {
        "bad_docid": 1,
        "bad_qid": 2,
        "duplicate_docid": 1,
        "duplicate_qid": 1,
        "empty_query": 2,
        "empty_text": 1,
        "no_valid_candidates": 1,
        "null_text": SIZE + 1,
    }
    assert report["skipped_reasons"] == {"empty_list": 1}
    assert names(tmp_path / "out") == PUBLISHED | QUARANTINE


def test_lists_without_candidates_are_nothing_bad(
    bundle: Make, tmp_path: Path, rows: list[Row]
) -> None:
    path = nested(tmp_path / "in.parquet", [rows[0], {**rows[1], "candidates": []}])
    report = run_job(job(bundle("llama31"), tmp_path / "out", path))
    assert (report["status"], report["exit_code"]) == ("ok", 0)
    assert report["queries"] == counts(2, 1, skipped=1)
    assert names(tmp_path / "out") == PUBLISHED


@pytest.mark.parametrize(
    ("allowed", "status"),
    [(0, "too-many-bad"), (1, "too-many-bad"), (2, "ok"), ("5%", "too-many-bad"), ("6%", "ok")],
)
def test_so_many_bad_candidates_are_allowed(
    allowed: int | str, status: str, bundle: Make, tmp_path: Path, rows: list[Row]
) -> None:
    """Two of 36; the job is published in any case, and asked again with another limit."""
    for row in rows[:2]:
        row["candidates"] = changed(row, 3, text=None)
    spec = job(bundle("llama31"), tmp_path / "out", nested(tmp_path / "in.parquet", rows[:3]))
    limited = replace(spec, input=replace(spec.input, max_bad=allowed))
    report = run_job(limited)
    assert (report["status"], report["exit_code"]) == (status, 0 if status == "ok" else 3)
    assert report_of(tmp_path / "out")["status"] == status
    assert names(tmp_path / "out") == PUBLISHED | QUARANTINE
    before = states(tmp_path / "out")
    again = run_job(replace(limited, input=replace(limited.input, max_bad="100%")))
    assert (again["status"], again["exit_code"], again["already_done"]) == ("ok", 0, True)
    assert without_lock(states(tmp_path / "out")) == without_lock(before)


def test_a_flat_query_under_two_texts_keeps_the_first(
    bundle: Make, tmp_path: Path, rows: list[Row]
) -> None:
    candidates = flattened(rows[:2])
    candidates[4]["query"] = "another text"
    path = flat(tmp_path / "in.parquet", candidates)
    report = run_job(job(bundle("llama31"), tmp_path / "out", path))
    (refusal,) = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    kinds = ("reason", "row", "qid", "docid", "candidates")
    expected = ("conflicting_query", 4, "q0", candidates[4]["docid"], 1)
    assert tuple(refusal[kind] for kind in kinds) == expected
    assert report["queries"] == counts(2, 2)
    assert report["candidates"] == counts(2 * SIZE, 2 * SIZE - 1, 1)


def test_of_repeated_lists_the_first_that_can_be_scored_is_kept(
    published: Path, bundle: Make, tmp_path: Path, rows: list[Row]
) -> None:
    other = {**rows[0], "candidates": rows[1]["candidates"]}
    inputs = [{**rows[0], "query": None}, rows[2], rows[0]], [other, rows[3]]
    paths = [nested(tmp_path / f"{i}.parquet", lists) for i, lists in enumerate(inputs)]
    report = run_job(job(bundle("llama31"), tmp_path / "out", *paths))
    refusals = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    assert [(r["path"], r["row"], r["reason"]) for r in refusals] == [
        (paths[0], 0, "empty_query"),
        (paths[1], 0, "duplicate_qid"),
    ]
    whole = order(published)
    assert order(tmp_path / "out") == {qid: whole[qid] for qid in ("q0", "q2", "q3")}
    assert report["queries"] == counts(5, 3, 2)


def test_regrouped_refusals_name_the_very_row_of_the_input(
    bundle: Make, tmp_path: Path, rows: list[Row]
) -> None:
    candidates = flattened(rows[:2])[::-1]
    candidates[3]["text"] = None
    scattered = candidates[::2] + candidates[1::2]
    paths = [
        flat(tmp_path / "1.parquet", scattered[:11]),
        flat(tmp_path / "2.parquet", scattered[11:], row_group_size=2),
    ]
    run_job(job(bundle("llama31"), tmp_path / "out", *paths))
    (refusal,) = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    assert (refusal["reason"], refusal["docid"]) == ("null_text", candidates[3]["docid"])
    row = scattered.index(candidates[3]) - 11
    found = (refusal["path"], refusal["row_group"], refusal["row"])
    assert found == (paths[1], row // 2, row)
    source = pq.ParquetFile(paths[1]).read_row_group(row // 2).to_pylist()[row % 2]
    assert source == candidates[3]


def test_beginning_anew_removes_an_old_quarantine(
    bundle: Make, tmp_path: Path, rows: list[Row]
) -> None:
    spec = job(bundle("llama31"), tmp_path / "out", nested(tmp_path / "in.parquet", rows[:2]))
    target = rows[1]["candidates"][2]["text"]
    with scorer_wrapped(lambda inner: Fixed(inner, target, math.nan)):
        run_job(spec)
    assert names(tmp_path / "out") >= QUARANTINE
    run_job(spec, restart=True)
    assert names(tmp_path / "out") - {"quarantine"} == PUBLISHED
    assert [*(tmp_path / "out" / "quarantine").iterdir()] == []


def test_a_job_of_which_nothing_is_left_ends_well(
    bundle: Make, tmp_path: Path, rows: list[Row]
) -> None:
    path = nested(tmp_path / "in.parquet", [{**rows[0], "query": ""}])
    report = run_job(job(bundle("llama31"), tmp_path / "out", path))
    assert report["queries"] == counts(1, 0, 1)
    assert report["status"] == "too-many-bad"
    assert report["tokens_per_second"] is None or report["tokens"] == 0
    assert (tmp_path / "out" / "run.trec").read_text() == ""
    assert pq.read_table(tmp_path / "out" / "results.parquet").schema.equals(RESULTS_SCHEMA)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_no_numbers_are_set_aside_and_never_written(
    value: float, published: Path, bundle: Make, tmp_path: Path, rows: list[Row]
) -> None:
    """Trap 10: NaN mis-ranks silently in every evaluator."""
    target = rows[2]["candidates"][5]
    path = nested(tmp_path / "in.parquet", rows)
    with scorer_wrapped(lambda inner: Fixed(inner, target["text"], value)):
        report = run_job(job(bundle("llama31"), tmp_path / "out", path))
    holders = [r["qid"] for r in rows if target["docid"] in {c["docid"] for c in r["candidates"]}]
    refusals = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    kinds = ("reason", "path", "qid", "docid", "candidates")
    assert [tuple(r[kind] for kind in kinds) for r in refusals] == [
        ("non_finite_score", path, qid, target["docid"], 1) for qid in holders
    ]
    assert "q2" in holders
    gone = {(qid, target["docid"]) for qid in holders}
    whole = order(published)
    assert order(tmp_path / "out") == {
        qid: [docid for docid in docids if (qid, docid) not in gone]
        for qid, docids in whole.items()
    }
    assert report["candidates"]["quarantined"] == len(holders)
    assert report["candidates"]["read"] == SIZE * len(rows)
    assert report["queries"]["written"] == len(rows)


def test_a_list_of_nan_alone_is_set_aside_as_a_whole(
    bundle: Make, tmp_path: Path, rows: list[Row]
) -> None:
    spec = job(bundle("llama31"), tmp_path / "out", nested(tmp_path / "in.parquet", rows[:2]))
    with scorer_wrapped(lambda inner: Fixed(inner, "", math.nan)):
        report = run_job(replace(spec, pointwise=replace(spec.pointwise, depth=3)))
    assert report["queries"] == counts(2, 0, 2)
    assert report["candidates"] == counts(2 * SIZE, 0, 2 * SIZE)
    assert report["quarantine_reasons"] == {"no_valid_candidates": 2, "non_finite_score": 6}
    assert (tmp_path / "out" / "run.trec").read_text() == ""


def test_long_passages_are_cut_and_counted(bundle: Make, tmp_path: Path, rows: list[Row]) -> None:
    short = [{"docid": f"s{k}", "title": "", "text": f"text {k}", "score": 1.0} for k in range(3)]
    long = [
        {**short[0], "docid": f"l{k}", "text": " ".join(collection_texts()[k : k + 9])}
        for k in range(6)
    ]
    row = {**rows[0], "query": "who?", "candidates": short + long}
    spec = job(bundle("llama31"), tmp_path / "out", nested(tmp_path / "in.parquet", [row]))
    report = run_job(spec)
    assert report["truncated_pairs"] == len(long)
    assert report["candidates"]["written"] == len(short) + len(long)


# What kills the process is set aside.


def test_candidates_that_kill_are_set_aside_and_never_scored(
    published: Path, bundle: Make, tmp_path: Path, rows: list[Row]
) -> None:
    """Ordinals count what is scored: not what was refused before, nor below the depth."""
    rows[1]["candidates"] = changed(rows[1], 0, text=None)
    spec = job(bundle("llama31"), tmp_path / "out", nested(tmp_path / "in.parquet", rows[:4]))
    key = "pointwise/00000-000000000000"
    depth = 5
    spec = replace(spec, pointwise=replace(spec.pointwise, depth=depth))
    last = frozenset(range(3 * depth, 4 * depth))
    report = run_job(spec, poison={key: frozenset({1, depth}) | last})
    refusals = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    ids = [[c["docid"] for c in row["candidates"]] for row in rows]
    assert [(r["reason"], r["qid"], r["docid"]) for r in refusals] == [
        ("kills_process", "q0", ids[0][1]),
        ("null_text", "q1", ids[1][0]),
        ("kills_process", "q1", ids[1][1]),
        *(("kills_process", "q3", docid) for docid in ids[3][:depth]),
    ]
    assert report["quarantine_reasons"] == {"kills_process": 2 + depth, "null_text": 1}
    found = order(tmp_path / "out")
    assert set(ids[0]) - set(found["q0"]) == {ids[0][1]}
    assert set(found["q1"]) == set(ids[1][2:])
    assert set(found["q2"]) == set(ids[2])
    assert report["queries"] == counts(4, 4)
    assert published


def test_a_list_of_candidates_that_kill_is_set_aside_as_a_whole(
    bundle: Make, tmp_path: Path, rows: list[Row]
) -> None:
    spec = job(bundle("llama31"), tmp_path / "out", nested(tmp_path / "in.parquet", rows[:2]))
    poison = {"pointwise/00000-000000000000": frozenset(range(SIZE))}
    report = run_job(spec, poison=poison)
    assert report["queries"] == counts(2, 1, 1)
    assert report["candidates"] == counts(2 * SIZE, SIZE, SIZE)
    assert report["quarantine_reasons"] == {"kills_process": SIZE, "no_valid_candidates": 1}
    assert list(order(tmp_path / "out")) == ["q1"]


# A job that runs again.


def test_a_finished_job_again_changes_nothing(
    bundle: Make, tmp_path: Path, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = job(bundle("llama31"), tmp_path / "out", nested(tmp_path / "in.parquet", rows[:3]))
    report = run_job(spec)
    before = states(tmp_path / "out")
    monkeypatch.setattr(loading, "open_scorer", None)
    again = run_job(spec)
    assert again == {**report, "already_done": True}
    after = states(tmp_path / "out")
    assert without_lock(after) == without_lock(before)
    assert after["LOCK"][0] == before["LOCK"][0]


class FailingAfter(Failing):
    """A scorer that raises once so many shards are committed."""

    def __init__(self, inner: Scorer, folder: Path, shards: int) -> None:
        super().__init__(inner, 10**6)
        self._folder, self._shards = folder / "commits" / "pointwise", shards

    def score(self, batch: Batch) -> NDArray[np.float32]:
        if len([*self._folder.glob("*.json")]) >= self._shards:
            raise RuntimeError("the device is gone")
        return super().score(batch)


@pytest.mark.parametrize("done", [0, 2])
def test_a_job_goes_on_from_what_is_committed(
    done: int, bundle: Make, tmp_path: Path, rows: list[Row]
) -> None:
    path = nested(tmp_path / "in.parquet", rows, row_group_size=2)
    spec = job(bundle("llama31"), tmp_path / "out", path)
    with small_shards():
        whole = run_job(job(bundle("llama31"), tmp_path / "whole", path))
        with (
            scorer_wrapped(lambda inner: FailingAfter(inner, tmp_path / "out", done)),
            pytest.raises(RuntimeError, match="the device is gone"),
        ):
            run_job(spec)
    kept = names(tmp_path / "out" / "commits/pointwise") if done else set()
    # While a shard was committed behind it, the engine was ahead.
    assert done <= len(kept) <= done + 1
    done = len(kept)
    assert report_of(tmp_path / "out")["shards"]["pointwise"]["done"] == done
    # What a shard is stays as it was planned, whatever a newer version would make of it.
    report, watch = run_job(spec), Recorder()
    total = whole["shards"]["pointwise"]["done"]
    assert report["shards"] == {"pointwise": {"done": total, "kept": done}}
    for name in SAME:
        one, other = (tmp_path / folder / name for folder in ("out", "whole"))
        assert one.read_bytes() == other.read_bytes()
    for name in ("queries", "candidates", "scored_pairs", "tokens", "padding_share"):
        assert report[name] == whole[name]
    left = names(tmp_path / "out" / "parts")
    assert len(left) == total  # what the failure left behind is gone
    assert len([name for name in left if f"{name[:18]}.json" in kept]) == done
    run_job(spec, watch)
    assert watch.shards == []


def test_only_what_is_lost_is_done_again(bundle: Make, tmp_path: Path, rows: list[Row]) -> None:
    path = nested(tmp_path / "in.parquet", rows, row_group_size=2)
    spec = job(bundle("llama31"), tmp_path / "out", path)
    with small_shards():
        run_job(spec)
        before = {name: (tmp_path / "out" / name).read_bytes() for name in SAME}
        parts = sorted((tmp_path / "out" / "parts").iterdir())
        raw = bytearray(parts[1].read_bytes())
        raw[99] ^= 1
        parts[1].write_bytes(raw)
        parts[2].unlink()
        (tmp_path / "out" / "_SUCCESS").unlink()
        watch = Recorder()
        report = run_job(spec, watch)
    assert watch.shards == [f"pointwise/{part.name[:18]}" for part in parts[1:3]]
    assert report["shards"]["pointwise"] == {"done": len(parts), "kept": len(parts) - 2}
    assert watch.calls[0][1] > 0  # progress begins with what is done
    assert watch.calls[-1][1] == watch.calls[-1][2] == len(rows)
    assert {name: (tmp_path / "out" / name).read_bytes() for name in SAME} == before


@pytest.mark.parametrize("stop_at", [1, 2, 12])
def test_a_job_that_is_asked_to_stop_stops_and_goes_on(
    stop_at: int, published: Path, bundle: Make, tmp_path: Path, rows: list[Row]
) -> None:
    path = nested(tmp_path / "in.parquet", rows, row_group_size=2)
    spec = job(bundle("llama31"), tmp_path / "out", path)
    with small_shards():
        with pytest.raises(StoppedError) as caught:
            run_job(spec, Recorder(stop_at))
        assert caught.value.exit_code == 75
        report = report_of(tmp_path / "out")
        assert (report["status"], report["exit_code"]) == ("stopped", 75)
        assert names(tmp_path / "out") <= WORK
        assert not [t for t in threading.enumerate() if t.name.startswith("dear-batch")]
        run_job(spec)
    assert_same_ranking(tmp_path / "out", published)
    assert names(tmp_path / "out") == PUBLISHED


def test_another_job_is_refused_before_any_model_loads(
    bundle: Make, tmp_path: Path, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = job(bundle("llama31"), tmp_path / "out", nested(tmp_path / "in.parquet", rows[:3]))
    run_job(spec)
    before = states(tmp_path / "out")
    monkeypatch.setattr(loading, "open_scorer", None)
    deeper = replace(spec, pointwise=replace(spec.pointwise, depth=3))
    torch = replace(spec, execution=ExecutionSpec(engine="torch"))
    for other, where in ((deeper, "job.pointwise"), (torch, "runtime.engine")):
        with pytest.raises(ConfigurationError, match="another job") as caught:
            run_job(other)
        assert caught.value.where.endswith(f"plan.json: {where}")
        assert caught.value.exit_code == 78
    assert without_lock(states(tmp_path / "out")) == without_lock(before)


def test_a_job_goes_on_with_the_engine_that_began_it(
    bundle: Make, tmp_path: Path, rows: list[Row]
) -> None:
    path = nested(tmp_path / "in.parquet", rows[:6], row_group_size=2)
    spec = job(bundle("llama31"), tmp_path / "out", path)
    torch = replace(spec, execution=ExecutionSpec(engine="torch", device="cpu"))
    with small_shards():
        with (
            scorer_wrapped(lambda inner: FailingAfter(inner, tmp_path / "out", 1)),
            pytest.raises(RuntimeError, match="the device is gone"),
        ):
            run_job(torch)
        plan = states(tmp_path / "out")["plan.json"]
        with pytest.raises(ConfigurationError, match="begun with torch on cpu") as caught:
            run_job(spec)
        assert "onnxruntime on cpu" in caught.value.what
        assert "--engine torch --device cpu" in caught.value.next_step
        assert "--restart" in caught.value.next_step
        assert states(tmp_path / "out")["plan.json"] == plan
        report = run_job(torch)
    assert (report["engine"], report["status"]) == ("torch", "ok")


@pytest.mark.skipif(bool(gpus()), reason="this machine has a GPU")
def test_the_choice_and_what_was_passed_over_are_told(
    bundle: Make, tmp_path: Path, rows: list[Row]
) -> None:
    told = list[tuple[str, dict[str, Any]]]()

    class Listening(Watch):
        def log(self, event: str, **fields: object) -> None:
            told.append((event, fields))

    spec = job(bundle("llama31"), tmp_path / "out", nested(tmp_path / "in.parquet", rows[:3]))
    report = run_job(spec, Listening())
    (fields,) = (fields for event, fields in told if event == "engine")
    assert (fields["engine"], fields["device"], fields["plan"]) == ("onnxruntime", "cpu", None)
    over = [(item["engine"], item["device"]) for item in fields["passed_over"]]
    assert over == [("tensorrt", "cuda"), ("onnxruntime", "cuda"), ("torch", "cuda")]
    assert all(item["why"] and item["next_step"] for item in fields["passed_over"])
    assert report["passed_over"] == fields["passed_over"]
    assert report_of(tmp_path / "out")["passed_over"] == fields["passed_over"]
    assert report["plan"] is None
    cpu = replace(spec, execution=ExecutionSpec(engine="onnxruntime", device="cpu"))
    named = run_job(replace(cpu, output=replace(spec.output, folder=str(tmp_path / "named"))))
    assert [item["why"] for item in named["passed_over"]] == ["--device cpu was asked for"]


def test_beginning_anew_forgets_another_job(bundle: Make, tmp_path: Path, rows: list[Row]) -> None:
    paths = [nested(tmp_path / "1.parquet", rows[:2]), nested(tmp_path / "2.parquet", rows[2:3])]
    spec = job(bundle("llama31"), tmp_path / "out", *paths)
    apart = replace(spec, output=replace(spec.output, run_per_input=True))
    run_job(apart)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    report = run_job(spec, restart=True)
    assert names(tmp_path / "out") == PUBLISHED | {"notes.txt"}
    assert "already_done" not in report
    run_job(job(bundle("llama31"), tmp_path / "fresh", *paths))
    for name in SAME:
        one, other = (tmp_path / folder / name for folder in ("out", "fresh"))
        assert one.read_bytes() == other.read_bytes()


def test_a_run_beside_another_is_told_to_come_again(
    bundle: Make, tmp_path: Path, rows: list[Row]
) -> None:
    spec = job(bundle("llama31"), tmp_path / "out", nested(tmp_path / "in.parquet", rows[:1]))
    with locked(tmp_path / "out"):
        with pytest.raises(TryAgainError, match="Another run"):
            run_job(spec)
        assert names(tmp_path / "out") == {"LOCK"}  # no report: that is the other one's
    run_job(spec)


def test_an_input_that_changes_during_the_run_publishes_nothing(
    bundle: Make, tmp_path: Path, rows: list[Row]
) -> None:
    path = nested(tmp_path / "in.parquet", rows, row_group_size=2)
    spec = job(bundle("llama31"), tmp_path / "out", path)
    stat = Path(path).stat()

    def appended(_scorer: Scorer) -> Scorer:
        with Path(path).open("ab") as file:
            file.write(b"more")
        os.utime(path, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
        return _scorer

    with small_shards(), scorer_wrapped(appended), pytest.raises(InputError) as caught:
        run_job(spec)
    assert caught.value.exit_code == 65
    assert names(tmp_path / "out") <= WORK
    assert report_of(tmp_path / "out")["exit_code"] == 65


# Failures leave nothing but what is done.


def assert_nothing_published(spec: JobSpec, kind: type[Exception], match: str) -> None:
    folder = Path(spec.output.folder)
    before = names(folder.parent)
    with pytest.raises(kind, match=match) as caught:
        run_job(spec)
    assert names(folder.parent) <= before | {folder.name}
    assert names(folder) <= WORK
    assert not [t for t in threading.enumerate() if t.name.startswith("dear-batch")]
    report = report_of(folder)
    error = caught.value
    assert report["status"] == "failed"
    assert report["outputs"] == []
    assert f"exit_code {report['exit_code']}" in (folder / "metrics.prom").read_text()
    if isinstance(error, DearBatchError):
        assert error.where
        assert report["exit_code"] == error.exit_code
        assert report["error"] == {
            "what": error.what, "where": error.where, "valid": error.valid,
            "next": error.next_step,
        }  # fmt: skip
    else:
        assert report["exit_code"] == 1
        assert str(error) in report["error"]["what"]


@pytest.mark.parametrize("calls", [0, 7])
def test_a_failure_while_scoring_publishes_nothing(
    calls: int, bundle: Make, tmp_path: Path, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "ENCODE_LISTS", 1)
    monkeypatch.setattr(blocks, "BLOCK_PAIRS", 1)  # earlier blocks are written before it fails
    rows[0]["candidates"][0] = {**rows[0]["candidates"][0], "text": None}
    spec = job(bundle("llama31"), tmp_path / "out", nested(tmp_path / "in.parquet", rows))
    with scorer_wrapped(lambda inner: Failing(inner, calls)):
        assert_nothing_published(spec, RuntimeError, "the device is gone")
    assert report_of(tmp_path / "out")["phase"] == "pointwise"
    assert report_of(tmp_path / "out")["shards"] == {"pointwise": {"total": 1, "done": 0}}
    run_job(spec)  # and the same command works once the device is back
    assert names(tmp_path / "out") == PUBLISHED | QUARANTINE


def test_a_damaged_page_in_the_middle_publishes_nothing(
    bundle: Make, tmp_path: Path, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 20: found by the reader thread while the first rows are being scored."""
    monkeypatch.setattr(blocks, "ENCODE_LISTS", 1)
    monkeypatch.setattr(blocks, "BLOCK_PAIRS", 1)
    options = {"row_group_size": 1, "write_page_checksum": True, "use_dictionary": False}
    path = nested(tmp_path / "in.parquet", rows, **options)
    raw = bytearray(Path(path).read_bytes())
    chunk = pq.ParquetFile(path).metadata.row_group(9).column(4)
    assert chunk.path_in_schema.endswith("text")
    raw[chunk.data_page_offset + chunk.total_compressed_size - 20] ^= 1
    Path(path).write_bytes(raw)
    spec = job(bundle("llama31"), tmp_path / "out", path)
    assert_nothing_published(spec, InputError, r"row group 9")


def test_a_foreign_folder_is_refused_before_any_work(
    bundle: Make, tmp_path: Path, rows: list[Row]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    spec = job(bundle("llama31"), tmp_path / "out", nested(tmp_path / "in.parquet", rows))
    with pytest.raises(OutputError, match="not ours"):
        run_job(spec)
    assert names(tmp_path / "out") == {"notes.txt"}


def test_an_output_below_a_file_is_refused(bundle: Make, tmp_path: Path, rows: list[Row]) -> None:
    path = nested(tmp_path / "in.parquet", rows)
    with pytest.raises(OutputError):
        run_job(job(bundle("llama31"), Path(path) / "out", path))


def test_a_refused_job_leaves_why_and_the_folder_free(
    bundle: Make, tmp_path: Path, rows: list[Row]
) -> None:
    spec = job(bundle("llama31"), tmp_path / "out", str(tmp_path / "in.parquet"))
    assert_nothing_published(spec, InputError, "in.parquet")
    assert names(tmp_path / "out") == {"LOCK", "report.json", "metrics.prom"}
    report = report_of(tmp_path / "out")
    assert (report["exit_code"], report["phase"]) == (65, "check")
    nested(tmp_path / "in.parquet", rows[:1])
    assert run_job(spec)["status"] == "ok"
    assert names(tmp_path / "out") == PUBLISHED


def test_what_the_spec_gets_wrong_makes_no_folder(tmp_path: Path) -> None:
    spec = job(tmp_path / "no-bundle", tmp_path / "out", str(tmp_path / "no.parquet"))
    with pytest.raises(UsageError):
        run_job(spec, stage="pointwise")
    assert names(tmp_path) == set()


def test_a_job_makes_its_folder_and_those_above(
    bundle: Make, tmp_path: Path, rows: list[Row]
) -> None:
    path = nested(tmp_path / "in.parquet", rows[:1])
    run_job(job(bundle("llama31"), tmp_path / "a" / "b", path))
    assert names(tmp_path / "a" / "b") == PUBLISHED
    assert names(tmp_path) == {"a", "in.parquet"}
    assert names(tmp_path / "a") == {"b"}


def test_the_working_folder_may_be_the_output(
    bundle: Make, tmp_path: Path, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--output .`: its scratch lies in it, so on its disk."""
    path = nested(tmp_path / "in.parquet", rows[:1])
    beside: list[Path] = []
    real = planning.scratch_folder

    def seen(place: Path) -> AbstractContextManager[Path]:
        beside.append(place.absolute())
        return real(place)

    monkeypatch.setattr(planning, "scratch_folder", seen)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    run_job(job(bundle("llama31"), Path(), path))
    assert names(tmp_path / "out") == PUBLISHED
    assert [place.parent for place in beside] == [tmp_path / "out"]
    assert names(tmp_path) == {"in.parquet", "out"}


# Engines and recipes.


def test_pytorch_gives_the_same_ranking(
    published: Path, bundle: Make, tmp_path: Path, rows: list[Row]
) -> None:
    spec = job(bundle("llama31"), tmp_path / "out", nested(tmp_path / "in.parquet", rows))
    report = run_job(replace(spec, execution=ExecutionSpec(engine="torch")))
    assert (report["engine"], report["row_tokens"]) == ("torch", None)
    assert order(tmp_path / "out") == order(published)
    first, second = logits(tmp_path / "out"), logits(published)
    assert max(abs(first[key] - second[key]) for key in first) <= 1e-4


def test_budgets_of_the_spec_are_used(
    published: Path, bundle: Make, tmp_path: Path, rows: list[Row]
) -> None:
    spec = job(bundle("llama31"), tmp_path / "out", nested(tmp_path / "in.parquet", rows))
    budgets = ExecutionSpec(row_tokens=256, batch_tokens=1024)
    report = run_job(replace(spec, execution=budgets))
    assert (report["row_tokens"], report["batch_tokens"]) == (256, 1024)
    assert 0 < report["padding_share"] < 0.5
    assert_same_ranking(tmp_path / "out", published)


def test_final_position_pooling_runs_unpacked(
    bundle: Make, tmp_path: Path, rows: list[Row]
) -> None:
    folder = bundle("llama31", recipe="paper-script", pooling="final-position")
    report = run_job(job(folder, tmp_path / "out", nested(tmp_path / "in.parquet", rows[:3])))
    assert report["row_tokens"] is None
    lengths = report["tokens"] / (1 - report["padding_share"])
    assert lengths == pytest.approx(228 * 3 * SIZE)
    scores = Reranker.load(folder).score(
        rows[0]["query"], [(c["title"] or "", c["text"]) for c in rows[0]["candidates"]]
    )
    found = logits(tmp_path / "out")
    for candidate, score in zip(rows[0]["candidates"], scores, strict=True):
        assert found["q0", candidate["docid"]] == pytest.approx(score, abs=1e-4)
    run_lines(tmp_path / "out" / "run.trec")
