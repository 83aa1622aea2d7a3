"""A sample of a file: all of a small one, and of a large one something from everywhere."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dear_batch.data import Candidate, CandidateList
from dear_batch.files import sample
from dear_batch.files.parquet import open_input, write_lists
from dear_batch.files.sample import sample_lists


def write(path: Path, lists: int, candidates: int) -> Path:
    write_lists(
        (
            CandidateList(
                f"q{n}",
                "who?",
                tuple(Candidate(f"d{k}", "", "text", None) for k in range(candidates)),
                n,
            )
            for n in range(lists)
        ),
        path,
    )
    return path


def test_a_small_file_is_taken_whole(tmp_path: Path) -> None:
    found = list(sample_lists(open_input(write(tmp_path / "c.parquet", 43, 100))))
    assert [(item.qid, item.row) for item in found] == [(f"q{n}", n) for n in range(43)]
    assert {len(item.candidates) for item in found} == {100}


def test_a_large_one_is_bounded_and_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dear_batch.files.parquet._GROUP_QUERIES", 10)
    monkeypatch.setattr(sample, "SAMPLE_LISTS", 18)
    monkeypatch.setattr(sample, "SAMPLE_PAIRS", 180)
    found = list(sample_lists(open_input(write(tmp_path / "c.parquet", 90, 50))))
    assert [item.row for item in found] == [
        n for group in range(9) for n in (10 * group, 10 * group + 1)
    ]
    assert [len(item.candidates) for item in found] == [10] * 18
    monkeypatch.setattr(sample, "SAMPLE_PLACES", 3)
    found = list(sample_lists(open_input(tmp_path / "c.parquet")))
    assert {item.row // 10 for item in found} == {0, 3, 6}


def test_a_flat_list_may_lie_in_several_row_groups(tmp_path: Path) -> None:
    rows = [
        {"qid": f"q{n // 7}", "query": "who?", "docid": f"d{n}", "text": "x"} for n in range(28)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet", row_group_size=3)
    found = list(sample_lists(open_input(tmp_path / "c.parquet")))
    assert [(item.qid, len(item.candidates)) for item in found] == [(f"q{n}", 7) for n in range(4)]
