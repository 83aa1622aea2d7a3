"""Lists go through their windows together, and nothing of one touches another."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dear_batch.data import Ranked, RankedList, Ranking, Reranked
from dear_batch.listwise.windows import WindowRequest
from dear_batch.run.waves import KILLS, Course, rerank
from dear_batch.specs import ListwiseSpec
from tests.run.fake_ranker import FakeRanker, slid

SPEC = ListwiseSpec("bundle", depth=6, window=4, step=2)


def ranked_list(qid: str, size: int, depth: int = 6) -> RankedList:
    entries = tuple(
        Ranked(f"d{k}", k + 1, 10.5 - k, 10.5 - k if k < 8 else None, 1.0, size - k)
        for k in range(size)
    )
    passages = tuple((f"title {k}" if k % 2 else "", f"{qid} {k}") for k in range(min(size, depth)))
    return RankedList(f"query of {qid}", Ranking(qid, entries), passages)


def entries_of(course: Course) -> list[Reranked]:
    return [e for e in course.ranking().entries if isinstance(e, Reranked)]


def texts(item: RankedList) -> list[str]:
    return [f"{title} {text}" if title else text for title, text in item.passages]


def test_the_ith_windows_of_all_lists_are_asked_together() -> None:
    ranker = FakeRanker()
    items = [ranked_list("a", 10), ranked_list("b", 3), ranked_list("c", 1), ranked_list("d", 5)]
    rerank(items, SPEC, ranker)
    windows = [[(r.window.qid, r.window.start, r.window.end) for r in w] for w in ranker.requests]
    assert windows == [
        [("a", 2, 6), ("b", 0, 3), ("d", 1, 5)],
        [("a", 0, 4), ("d", 0, 3)],
    ]
    first = ranker.requests[0][0]
    assert first.query == "query of a"
    assert first.passages == tuple(texts(items[0])[2:6])


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5))
def test_every_list_gets_the_order_it_would_get_alone(sizes: list[int]) -> None:
    items = [ranked_list(f"q{i}", size) for i, size in enumerate(sizes)]
    for item, course in zip(items, rerank(items, SPEC, FakeRanker()), strict=True):
        entries = entries_of(course)
        n, depth = len(item.ranking.entries), min(6, len(item.ranking.entries))
        order = [*slid(texts(item), 6, 4, 2), *range(depth, n)]
        assert [e.docid for e in entries] == [f"d{place}" for place in order]
        assert [e.pointwise_rank for e in entries] == [place + 1 for place in order]
        assert [e.first_rank for e in entries] == [n - place for place in order]
        assert [e.rank for e in entries] == list(range(1, n + 1))
        assert [e.score for e in entries] == [e.score for e in item.ranking.entries]
        assert [e.listwise_rank for e in entries] == [*range(1, depth + 1), *[None] * (n - depth)]


def test_status_and_choice_are_those_of_the_window_that_placed_it() -> None:
    ranker = FakeRanker(fails=lambda request: request.window.start > 0)
    (course,) = rerank([ranked_list("a", 9)], SPEC, ranker)
    entries = entries_of(course)
    statuses = [e.window_status for e in entries]
    assert statuses == ["ok"] * 4 + ["failed"] * 2 + [None] * 3
    assert [e.choice_logprob for e in entries] == [-0.75, -0.5, -0.25, 0.0, *[None] * 5]
    assert [e.docid for e in entries[4:]] == ["d4", "d5", "d6", "d7", "d8"]
    below, top = course.transcripts
    assert (below.number, below.permutation.status, below.docids) == (
        0,
        "failed",
        ("d2", "d3", "d4", "d5"),
    )
    assert (top.number, top.docids) == (1, tuple(e.docid for e in entries[:4]))


def test_a_list_of_one_is_kept_and_not_asked_about() -> None:
    ranker = FakeRanker()
    (course,) = rerank([ranked_list("a", 1)], SPEC, ranker)
    assert ranker.requests == []
    (entry,) = entries_of(course)
    assert (entry.listwise_rank, entry.window_status, entry.choice_logprob) == (1, "kept", None)
    (transcript,) = course.transcripts
    assert transcript.permutation.status == "kept"
    assert math.isnan(transcript.permutation.logprobs[0])


def test_progress_grows_to_one() -> None:
    shares: list[float] = []
    rerank([ranked_list("a", 10), ranked_list("b", 1)], SPEC, FakeRanker(), shares.append)
    assert shares == sorted(shares)
    assert shares[0] == pytest.approx(1 / 3)
    assert shares[-1] == 1
    assert rerank([], SPEC, FakeRanker(), shares.append) == []


def test_lists_that_kill_are_not_shown_to_the_model() -> None:
    ranker, shares = FakeRanker(), list[float]()
    items = [ranked_list("a", 10), ranked_list("b", 3), ranked_list("c", 7)]
    alone = [rerank([item], SPEC, FakeRanker())[0].ranking() for item in items]
    courses = rerank(items, SPEC, ranker, shares.append, frozenset({0, 1}))
    assert {r.window.qid for wave in ranker.requests for r in wave} == {"c"}
    assert courses[2].ranking() == alone[2]
    for item, course in zip(items[:2], courses, strict=False):
        entries = entries_of(course)
        assert [e.docid for e in entries] == [e.docid for e in item.ranking.entries]
        assert {e.window_status for e in entries[:6]} == {"failed"}
        assert {t.permutation.detail for t in course.transcripts} == {KILLS}
        assert [t.permutation.status for t in course.transcripts] == ["failed"] * len(
            course.windows
        )
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_answers_that_are_too_many_are_a_bug() -> None:
    class Talkative(FakeRanker):
        def rank(self, requests: list[WindowRequest], *_: object) -> list:  # type: ignore[type-arg,override]
            return super().rank([*requests, *requests])

    with pytest.raises(AssertionError, match="more answers"):
        rerank([ranked_list("a", 3)], SPEC, Talkative())
