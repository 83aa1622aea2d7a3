"""Jobs of two stages, both with a tiny real model: the run is what windows make of stage 1's order.

What it is compared with takes one list at a time, without a job around it.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

pytest.importorskip("torch", reason="the listwise stage needs PyTorch")

from dear_batch.bundle import open_bundle
from dear_batch.data import Ranked, RankedList, Ranking, Reranked
from dear_batch.listwise.ranker import ListwiseRanker
from dear_batch.run.local import run_job
from dear_batch.run.waves import Course, rerank
from dear_batch.specs import ExecutionSpec, JobSpec, ListwiseSpec
from tests.run.test_local import _rows, job, nested, run_lines

pytestmark = pytest.mark.model
Row = dict[str, Any]
SAME = ("run.trec", "results.parquet", "transcripts.parquet")
STAGES: dict[str, dict[str, Any]] = {
    "readme": {"batch_tokens": 3000},  # several batches a wave
    "chat": {"prompt": "rankllm-chat"},
    "reasoning": {"reasoning_tokens": 5},
}


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """Lists of one candidate, of fewer than a window, and of several windows."""
    return [
        {**row, "candidates": row["candidates"][:size]}
        for row, size in zip(_rows(), (12, 1, 3, 9, 12), strict=False)
    ]


@pytest.fixture(scope="module")
def first(
    bundle: Callable[..., Path], rows: list[Row], tmp_path_factory: pytest.TempPathFactory
) -> JobSpec:
    """A job of stage 1 alone, done."""
    folder = tmp_path_factory.mktemp("first")
    path = nested(folder / "in.parquet", rows)
    spec = job(bundle("llama31"), folder / "out", path)
    spec = replace(spec, execution=ExecutionSpec(device="cpu"))
    run_job(spec)
    return spec


def ranked_lists(first: JobSpec, rows: list[Row]) -> list[RankedList]:
    """Stage 1's order as its run file has it, with the texts of the input."""
    run = run_lines(Path(first.output.folder) / "run.trec")
    return [_ranked_list(row, run[row["qid"]]) for row in rows]


def _ranked_list(row: Row, lines: list[tuple[str, float]]) -> RankedList:
    entries = (Ranked(d, i, score, None, None, i) for i, (d, score) in enumerate(lines, start=1))
    texts = {c["docid"]: (c["title"] or "", c["text"]) for c in row["candidates"]}
    passages = tuple(texts[docid] for docid, _ in lines)
    return RankedList(row["query"], Ranking(row["qid"], tuple(entries)), passages)


def results_of(course: Course) -> list[Row]:
    qid, found = course.item.ranking.qid, course.ranking().entries
    names = ("docid", "rank", "pointwise_rank", "listwise_rank", "window_status")
    assert all(isinstance(entry, Reranked) for entry in found)
    return [{"qid": qid, **{name: getattr(entry, name) for name in names}} for entry in found]


def transcripts_of(course: Course) -> list[Row]:
    names = ("status", "detail", "text", "prompt_sha256", "answer_tokens", "overruled")
    return [
        {
            "qid": course.item.ranking.qid,
            "window": t.number,
            "order": list(t.docids),
            **{name: getattr(t.permutation, name) for name in names},
        }
        for t in course.transcripts
    ]


def table(path: Path, like: list[Row]) -> list[Row]:
    return pq.read_table(path, columns=[*like[0]]).to_pylist()


@pytest.mark.parametrize("stage", STAGES)
def test_the_run_is_what_windows_make_of_the_first_order(
    stage: str, first: JobSpec, generator: Path, rows: list[Row], tmp_path: Path
) -> None:
    listwise = ListwiseSpec(str(generator), depth=8, window=5, step=3, **STAGES[stage])
    out = tmp_path / "out"
    spec = replace(first, output=replace(first.output, folder=str(out)), listwise=listwise)
    report = run_job(spec)
    ranker = ListwiseRanker.open(open_bundle(generator), listwise, "cpu")
    courses = [rerank([item], listwise, ranker)[0] for item in ranked_lists(first, rows)]

    run = run_lines(out / "run.trec")
    assert run == {
        c.item.ranking.qid: [(e.docid, e.score) for e in c.ranking().entries] for c in courses
    }
    for row in rows:
        assert sorted(docid for docid, _ in run[row["qid"]]) == sorted(
            c["docid"] for c in row["candidates"]
        )
    results = [line for course in courses for line in results_of(course)]
    assert table(out / "results.parquet", results) == results
    transcripts = [line for course in courses for line in transcripts_of(course)]
    assert table(out / "transcripts.parquet", transcripts) == transcripts

    answered = "truncated" if stage == "reasoning" else "ok"
    assert {line["status"] for line in transcripts} == {answered, "kept"}
    assert any(line["rank"] != line["pointwise_rank"] for line in results)
    assert report["listwise"]["windows"][answered] == len(transcripts) - 1

    apart = replace(spec, output=replace(spec.output, folder=str(tmp_path / "apart")))
    run_job(apart, stage="pointwise")
    run_job(apart, stage="listwise")
    for name in SAME:
        assert (tmp_path / "apart" / name).read_bytes() == (out / name).read_bytes()
