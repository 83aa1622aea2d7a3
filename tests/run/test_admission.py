from array import array

import pytest

from dear_batch.data import Candidate, CandidateList, Refusal
from dear_batch.errors import InputError
from dear_batch.files.parquet import InputFile
from dear_batch.files.places import FILE_ROWS, Places
from dear_batch.run.admission import REASONS, SKIPPED, Admission, Admitted


def file(path: str, *row_group_rows: int) -> InputFile:
    return InputFile(path, "flat", sum(row_group_rows), row_group_rows, 1, False, (), 1)


PLACES = Places([file("in.parquet", 2, 0, 5, 100), file("more.parquet", 4, 4)])


def candidate(
    docid: str, text: str | None = "text", title: str = "", score: float | None = 1.0
) -> Candidate:
    return Candidate(docid, title, text, score)


def admit(
    *lists: CandidateList, kept_rows: dict[str, int | None] | None = None, **settings: bool
) -> list[Admitted | Refusal]:
    return list(Admission(PLACES, kept_rows, **settings).admit(lists))


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
        reason, REASONS[reason], "in.parquet", 2, 3, item.qid, None, len(item.candidates)
    )
    assert (reason in SKIPPED) == (not item.candidates)


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
    assert (refusal.row_group, refusal.row) == (2, 3)  # of the list: it is a nested one
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
    found = list(Admission(PLACES).admit_flat(lists))
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
    found = list(Admission(PLACES).admit_flat(lists))
    assert [r.docid is None for r in found if isinstance(r, Refusal)].count(True) == 1
    assert sum(r.candidates for r in found if isinstance(r, Refusal)) == 3


@pytest.mark.parametrize("score", [None, float("nan"), float("inf")])
def test_interpolation_needs_every_first_stage_score(score: float | None) -> None:
    item = one("q", "query", candidate("d", score=score))
    assert isinstance(admit(item)[0], Admitted)
    with pytest.raises(InputError, match=r"in\.parquet, row group 2, row 3, qid q, docid d"):
        admit(item, need_first_scores=True)


def flat(query: str | None, docids: str, rows: list[int], file: int = 0) -> CandidateList:
    """A list of qid q with a row a candidate; a docid of `-` is a bad one."""
    candidates = tuple(candidate("" if docid == "-" else docid) for docid in docids)
    places = array("q", [file * FILE_ROWS + row for row in rows])
    return CandidateList("q", query, candidates, 77, places)


def positions(refused: list[Admitted | Refusal]) -> list[tuple[str, str | None, str, int, int]]:
    return [
        (r.reason, r.docid, r.path, r.row_group, r.row) for r in refused if isinstance(r, Refusal)
    ]


def test_flat_candidates_have_rows_of_their_own() -> None:
    # Interleaved: rows 1, 3 and 7 ask one thing, rows 2 and 6 another.
    lists = [flat("this", "a-a", [1, 3, 7]), flat("that", "bc", [2, 6])]
    found = list(Admission(PLACES).admit_flat(lists))
    assert positions(found) == [
        ("conflicting_query", "b", "in.parquet", 2, 2),
        ("conflicting_query", "c", "in.parquet", 2, 6),
        ("bad_docid", "", "in.parquet", 2, 3),
        ("duplicate_docid", "a", "in.parquet", 3, 7),
    ]


def test_rows_that_were_regrouped_keep_the_file_they_came_from() -> None:
    item = flat("query", "a-", [5, 6], file=1)
    assert positions(admit(item)) == [("bad_docid", "", "more.parquet", 1, 6)]
    refused = admit(flat(" ", "ab", [6, 2], file=1))
    assert positions(refused) == [("empty_query", None, "more.parquet", 1, 6)]


def test_an_admitted_list_can_be_refused_with_its_place() -> None:
    admitted = next(
        i
        for i in admit(flat("query", "-ab-c", [0, 2, 4, 6, 8]))
        if i.qid == "q" and isinstance(i, Admitted)
    )
    assert admitted.refuse_candidate("non_finite_score", "c") == Refusal(
        "non_finite_score", REASONS["non_finite_score"], "in.parquet", 3, 8, "q", "c", 1
    )
    assert admitted.refuse_candidate("kills_process", "a").row == 2
    assert admitted.refuse("no_valid_candidates", 2) == Refusal(
        "no_valid_candidates", REASONS["no_valid_candidates"], "in.parquet", 0, 0, "q", None, 2
    )
