"""A sample is spread over the file, and no larger than it should be."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dear_batch.data import Candidate, CandidateList
from dear_batch.files.parquet import open_input, write_lists
from dear_batch.files.sample import sample, sample_lists


def lists(n: int, size: int) -> list[CandidateList]:
    return [
        CandidateList(
            f"q{q}",
            f"query {q}" if q else None,
            tuple(
                Candidate(f"d{d}", "", f"text {q} {d}" if d else None, None) for d in range(size)
            ),
            q,
        )
        for q in range(n)
    ]


def test_a_small_file_is_the_sample_but_for_what_has_no_text(tmp_path: Path) -> None:
    write_lists(lists(5, 4), tmp_path / "c.parquet")
    found = list(sample(open_input(tmp_path / "c.parquet")))
    assert found == [
        (f"query {q}", [("", f"text {q} {d}") for d in range(1, 4)]) for q in range(1, 5)
    ]


def test_a_large_file_is_sampled_all_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dear_batch.files.parquet._GROUP_QUERIES", 10)
    write_lists(lists(90, 50), tmp_path / "c.parquet")
    file = open_input(tmp_path / "c.parquet")
    found = list(sample(file, lists=18, pairs=90))
    assert 40 <= sum(len(texts) for _, texts in found) <= 180
    assert {int(query.split()[1]) // 10 for query, _ in found} == set(range(9))
    assert found == list(sample(file, lists=18, pairs=90))
    assert len({query for query, _ in sample(file, places=3, lists=3)}) == 2  # q0 has no query


def test_rows_of_a_flat_file_are_sampled(tmp_path: Path) -> None:
    n = 1000
    columns = {
        "qid": [str(i // 100) for i in range(n)],
        "query": [f"query {i // 100}" for i in range(n)],
        "docid": [str(i) for i in range(n)],
        "text": [f"text {i}" for i in range(n)],
    }
    pq.write_table(pa.table(columns), tmp_path / "c.parquet", row_group_size=100)
    found = list(sample(open_input(tmp_path / "c.parquet"), pairs=50))
    assert [query for query, _ in found] == [f"query {i}" for i in range(10)]
    assert {len(texts) for _, texts in found} == {5}


def test_lists_of_a_small_file_are_whole(tmp_path: Path) -> None:
    write_lists(lists(43, 100), tmp_path / "c.parquet")
    found = list(sample_lists(open_input(tmp_path / "c.parquet")))
    assert [(item.qid, item.row) for item in found] == [(f"q{n}", n) for n in range(43)]
    assert {len(item.candidates) for item in found} == {100}


def test_a_flat_list_may_lie_in_several_row_groups(tmp_path: Path) -> None:
    common = {"query": "who?", "text": "x"}
    rows = [{"qid": f"q{n // 7}", "docid": f"d{n}", **common} for n in range(28)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet", row_group_size=3)
    found = list(sample_lists(open_input(tmp_path / "c.parquet")))
    assert [(item.qid, len(item.candidates)) for item in found] == [(f"q{n}", 7) for n in range(4)]
