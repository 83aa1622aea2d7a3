import pytest

from dear_batch.data import Candidate, CandidateList, Refusal
from dear_batch.errors import InputError
from dear_batch.run.admission import REASONS, Admission, Admitted


def candidate(
    docid: str, text: str | None = "text", title: str = "", score: float | None = 1.0
) -> Candidate:
    return Candidate(docid, title, text, score)


def admit(
    *lists: CandidateList, first_rows: dict[str, int | None] | None = None, **settings: bool
) -> list[Admitted | Refusal]:
    return list(Admission("in.parquet", first_rows or {}, **settings).admit(lists))


def one(
    qid: str | None = "q", query: str | None = "query", *candidates: Candidate, row: int = 3
) -> CandidateList:
    return CandidateList(qid, query, candidates, row)


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (one(None, "query", candidate("d")), "bad_qid"),
        (one("", "query", candidate("d")), "bad_qid"),
        (one("a b", "query", candidate("d")), "bad_qid"),
        (one("a\tb", "query", candidate("d")), "bad_qid"),
        (one("a\u00a0b", "query", candidate("d")), "bad_qid"),
        (one("a\x00b", "query", candidate("d")), "bad_qid"),
        (one("q", None, candidate("d")), "empty_query"),
        (one("q", " \n", candidate("d")), "empty_query"),
        (one("q", "query"), "empty_list"),
    ],
)
def test_queries_set_aside(item: CandidateList, reason: str) -> None:
    (refusal,) = admit(item)
    assert refusal == Refusal(
        reason, REASONS[reason], "in.parquet", 3, item.qid, None, len(item.candidates)
    )


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (candidate(""), "bad_docid"),
        (candidate("a b"), "bad_docid"),
        (candidate("a\u2028b"), "bad_docid"),
        (candidate("good"), "duplicate_docid"),
        (candidate("d", None), "null_text"),
        (candidate("d", None, title="title"), "null_text"),
        (candidate("d", " ", title=" "), "empty_text"),
    ],
)
def test_candidates_set_aside_keep_the_others_and_their_ranks(bad: Candidate, reason: str) -> None:
    refusal, admitted = admit(one("q", "query", candidate("good"), bad, candidate("last")))
    assert isinstance(refusal, Refusal)
    assert (refusal.reason, refusal.docid, refusal.candidates) == (reason, bad.docid, 1)
    assert isinstance(admitted, Admitted)
    assert [c.docid for c in admitted.candidates] == ["good", "last"]
    assert admitted.first_ranks == (1, 3)


def test_an_empty_text_with_a_title_is_scored() -> None:
    (admitted,) = admit(one("q", "query", candidate("d", "", title="Title")))
    assert isinstance(admitted, Admitted)


def test_a_list_without_a_valid_candidate_is_counted_once() -> None:
    *candidates, query = admit(one("q", "query", candidate("d", None), candidate("e", None)))
    assert [r.reason for r in candidates if isinstance(r, Refusal)] == ["null_text"] * 2
    assert isinstance(query, Refusal)
    assert (query.reason, query.docid, query.candidates) == ("no_valid_candidates", None, 0)


def test_of_repeated_qids_the_first_is_kept() -> None:
    lists = [one("q", "query", candidate("d"), row=row) for row in (3, 8)]
    lists.insert(1, one("other", "query", candidate("d"), row=5))
    kept, _, refused = admit(*lists, first_rows={"q": 3})
    assert isinstance(kept, Admitted)
    assert isinstance(refused, Refusal)
    assert (refused.reason, refused.row) == ("duplicate_qid", 8)
    elsewhere = admit(lists[0], first_rows={"q": None})
    assert isinstance(elsewhere[0], Refusal)


def test_a_second_query_text_under_one_qid_is_refused() -> None:
    kept, refused = admit(one("q", "a", candidate("d")), one("q", "b", candidate("e"), row=4))
    assert isinstance(kept, Admitted)
    assert isinstance(refused, Refusal)
    assert refused.reason == "duplicate_qid"


@pytest.mark.parametrize("score", [None, float("nan"), float("inf")])
def test_interpolation_needs_every_first_stage_score(score: float | None) -> None:
    item = one("q", "query", candidate("d", score=score))
    assert isinstance(admit(item)[0], Admitted)
    with pytest.raises(InputError, match=r"in\.parquet, row 3, qid q, docid d"):
        admit(item, need_first_scores=True)
