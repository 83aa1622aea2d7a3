import pytest

from dear_batch.data import Candidate, CandidateList, Refusal
from dear_batch.errors import InputError
from dear_batch.run.admission import REASONS, Admission, Admitted


def candidate(
    docid: str, text: str | None = "text", title: str = "", score: float | None = 1.0
) -> Candidate:
    return Candidate(docid, title, text, score)


def admit(
    *lists: CandidateList, kept_rows: dict[str, int | None] | None = None, **settings: bool
) -> list[Admitted | Refusal]:
    return list(Admission("in.parquet", kept_rows, **settings).admit(lists))


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


def test_of_repeated_qids_the_planned_row_is_kept() -> None:
    lists = [one("q", "query", candidate("d"), row=row) for row in (3, 8)]
    lists.insert(1, one("other", "query", candidate("d"), row=5))
    refused, _, kept = admit(*lists, kept_rows={"q": 8})
    assert isinstance(kept, Admitted)
    assert isinstance(refused, Refusal)
    assert (refused.reason, refused.row) == ("duplicate_qid", 3)
    elsewhere = admit(lists[0], kept_rows={"q": None})
    assert isinstance(elsewhere[0], Refusal)


def test_a_bad_list_keeps_its_own_reason_under_a_repeated_qid() -> None:
    empty, kept = admit(
        one("q", "query"), one("q", "query", candidate("d"), row=4), kept_rows={"q": 4}
    )
    assert isinstance(empty, Refusal)
    assert empty.reason == "empty_list"
    assert isinstance(kept, Admitted)


@pytest.mark.parametrize("first_query", [None, "another"])
def test_in_flat_files_one_bad_row_does_not_cost_the_query(first_query: str | None) -> None:
    lists = [
        one("q", first_query, candidate("a"), row=0),
        one("q", "query", candidate("b"), candidate("c"), row=1),
        one("next", "query", candidate("d"), row=3),
    ]
    found = list(Admission("in.parquet").admit_flat(lists))
    refused = [item for item in found if isinstance(item, Refusal)]
    kept = [item for item in found if isinstance(item, Admitted)]
    assert [item.qid for item in kept] == ["q", "next"]
    assert {r.reason for r in refused} == {"conflicting_query"}
    assert all(r.docid is not None for r in refused)  # candidates, not queries
    total = sum(len(item.candidates) for item in lists)
    assert total == sum(len(item.candidates) for item in kept) + len(refused)
    assert kept[0].query == ("query" if first_query is None else "another")


def test_flat_rows_without_qid_are_one_query() -> None:
    lists = [one(None, "a", candidate("a")), one(None, "b", candidate("b"), candidate("c"))]
    found = list(Admission("in.parquet").admit_flat(lists))
    assert [r.docid is None for r in found if isinstance(r, Refusal)].count(True) == 1
    assert sum(r.candidates for r in found if isinstance(r, Refusal)) == 3


@pytest.mark.parametrize("score", [None, float("nan"), float("inf")])
def test_interpolation_needs_every_first_stage_score(score: float | None) -> None:
    item = one("q", "query", candidate("d", score=score))
    assert isinstance(admit(item)[0], Admitted)
    with pytest.raises(InputError, match=r"in\.parquet, row 3, qid q, docid d"):
        admit(item, need_first_scores=True)
