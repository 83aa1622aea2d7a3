"""Counts: of shards, of jobs, and those that do not add up."""

from dataclasses import replace
from typing import Any

import pytest

from dear_batch.data import Permutation, Ranked, Ranking, Refusal, Window
from dear_batch.run.blocks import Work
from dear_batch.run.report import (
    AMOUNTS,
    Count,
    ListwiseTally,
    Tally,
    add_up,
    listwise_figures,
    pointwise_figures,
)
from dear_batch.run.stopwatch import Stopwatch


def refusal(reason: str, docid: str | None = None, candidates: int = 1) -> Refusal:
    return Refusal(reason, "why", "in.parquet", 0, 0, "q", docid, candidates)


def ranking(size: int) -> Ranking:
    return Ranking("q", tuple(Ranked(f"d{k}", k + 1, -k, -k, None, k + 1) for k in range(size)))


# Adding up.


def test_sums_go_to_every_depth() -> None:
    one = {"a": 1, "b": {"x": 1, "y": {"z": 0.5}}}
    other = {"a": 2, "b": {"x": 3, "w": 4}, "c": 5}
    assert add_up([one, other]) == {"a": 3, "b": {"x": 4, "y": {"z": 0.5}, "w": 4}, "c": 5}
    assert add_up([]) == {}
    assert add_up([one]) == one
    assert (one, other["b"]) == ({"a": 1, "b": {"x": 1, "y": {"z": 0.5}}}, {"x": 3, "w": 4})


# Nothing is lost or invented.


@pytest.mark.parametrize("field", ["read", "written", "quarantined", "skipped"])
def test_counts_that_do_not_add_up_are_a_bug(field: str) -> None:
    count = Count(read=6, written=3, quarantined=2, skipped=1)
    count.check()
    with pytest.raises(AssertionError, match="do not add up"):
        replace(count, **{field: 7}).check()


@pytest.mark.parametrize("what", ["queries", "candidates"])
@pytest.mark.parametrize("by", [-1, 1])
def test_a_shard_that_loses_or_invents_is_not_committed(what: str, by: int) -> None:
    tally = Tally()
    tally.ranked(ranking(3))
    tally.queries.read, tally.candidates.read = 1, 3
    assert tally.to_json()["candidates"]["written"] == 3
    getattr(tally, what).read += by
    with pytest.raises(AssertionError, match="do not add up"):
        tally.to_json()


# A shard of the first stage.


def test_refusals_are_counted_by_what_left_the_job() -> None:
    tally = Tally()
    tally.ranked(ranking(4))
    tally.refused(refusal("null_text", "d9"))
    tally.refused(refusal("empty_query", None, candidates=5))
    tally.refused(refusal("empty_query", None, candidates=2))
    tally.refused(refusal("empty_list", None, candidates=0))
    tally.queries.read, tally.candidates.read = 4, 12
    found = tally.to_json()
    assert found["queries"] == {"read": 4, "written": 1, "quarantined": 2, "skipped": 1}
    assert found["candidates"] == {"read": 12, "written": 4, "quarantined": 8, "skipped": 0}
    assert found["quarantine_reasons"] == {"empty_query": 2, "null_text": 1}
    assert found["skipped_reasons"] == {"empty_list": 1}


def shard(queries: int, **work: int) -> dict[str, Any]:
    tally = Tally(work=Work(**work))
    for _ in range(queries):
        tally.ranked(ranking(2))
    tally.queries.read, tally.candidates.read = queries, 2 * queries
    tally.seconds["score"] = 0.5 * queries
    return tally.to_json()


def test_a_job_is_the_sum_of_its_shards() -> None:
    shards = [
        shard(2, pairs=4, tokens=60, computed_tokens=80),
        shard(1, pairs=2, tokens=30, computed_tokens=40, truncated_pairs=1, memory_backoffs=2),
    ]
    found = pointwise_figures(shards)
    assert found["queries"] == {"read": 3, "written": 3, "quarantined": 0, "skipped": 0}
    assert found["candidates"]["written"] == 6
    assert (found["scored_pairs"], found["truncated_pairs"]) == (6, 1)
    assert (found["tokens"], found["memory_backoffs"]) == (90, 2)
    assert found["tokens_per_second"] == 90 / 1.5
    assert found["padding_share"] == 0.25
    assert found["seconds"] == {"score": 1.5}
    assert {"pairs", "computed_tokens"} & found.keys() == set()


def test_a_job_without_shards_has_all_figures() -> None:
    found = pointwise_figures([])
    assert found.keys() == pointwise_figures([shard(1)]).keys()
    assert found["queries"] == {"read": 0, "written": 0, "quarantined": 0, "skipped": 0}
    assert (found["tokens_per_second"], found["padding_share"]) == (None, 0.0)


# A shard of the second.


def test_windows_are_counted_by_status() -> None:
    tally = ListwiseTally()
    tally.ranked(ranking(3))
    answer = Permutation(Window("q", 0, 2), (1, 0), "ok", (0.0, 0.0), forwards=3, overruled=1)
    tally.answered(answer)
    tally.answered(replace(answer, status="failed", detail="too long"))
    found = tally.to_json()
    assert (found["queries"], found["candidates"]) == (1, 3)
    statuses = {"ok": 1, "truncated": 0, "kept": 0, "failed": 1}
    assert found["windows"] == {"total": 2, **statuses}
    assert found["failed_reasons"] == {"too long": 1}
    assert (found["forwards"], found["overruled"]) == (6, 2)
    assert set(AMOUNTS) < found.keys()
    both = listwise_figures([found, found])
    assert both["windows"] == {"total": 4, **{name: 2 * n for name, n in statuses.items()}}
    assert both["failed_reasons"] == {"too long": 2}
    assert listwise_figures([]).keys() == found.keys()


def test_time_is_taken_also_where_the_block_raises() -> None:
    clock = Stopwatch()
    for _ in range(2):
        with pytest.raises(KeyError), clock.timed("work"):
            raise KeyError
    assert clock.seconds["work"] > 0
    assert set(clock.rounded()) == {"work"}
