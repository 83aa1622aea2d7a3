"""Reading and writing candidate lists: every accepted schema, every refused file, ranges."""

import itertools
import os
import struct
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dear_batch.data import Candidate, CandidateList
from dear_batch.errors import InputError, OutputError
from dear_batch.files.parquet import (
    InputFile,
    RowReader,
    open_input,
    qid_runs,
    write_lists,
)

LISTS = [
    CandidateList(
        "q1", "first?", (Candidate("d1", "T", "one", 2.5), Candidate("d2", "", "", 1)), 0
    ),
    CandidateList(None, None, (Candidate("", "", None, None),), 1),
    CandidateList("q3", "", (), 2),
    CandidateList("q4", "fourth", (Candidate("d1", "", "ünï", None),), 3),
]


def read_all(file: InputFile) -> list[CandidateList]:
    with RowReader(file) as reader:
        return list(reader.read(0, file.n_rows))


def written(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def flat_columns(**replaced: Any) -> dict[str, Any]:
    columns = {
        "qid": ["1", "1", "2"],
        "query": ["a", "a", "b"],
        "docid": ["7", "8", "7"],
        "title": ["t", None, ""],
        "text": ["x", "y", None],
        "score": [3.0, None, 1.0],
    }
    return columns | replaced


FLAT_LISTS = [
    CandidateList(
        "1",
        "a",
        (Candidate("7", "t", "x", 3.0), Candidate("8", "", "y", None)),
        0,
        array("q", [0, 1]),
    ),
    CandidateList("2", "b", (Candidate("7", "", None, 1.0),), 2, array("q", [2])),
]


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "lists.parquet"
    write_lists(LISTS, path)
    file = open_input(path)
    assert (file.layout, file.n_rows, file.has_score) == ("nested", 4, True)
    assert read_all(file) == LISTS
    assert pq.read_metadata(path).metadata[b"schema_version"] == b"1"


def test_written_row_groups_are_small(tmp_path: Path) -> None:
    passage = "x" * 1_000_000
    lists = [CandidateList(str(i), "q", (Candidate("d", "", passage, None),), i) for i in range(20)]
    write_lists(iter(lists), tmp_path / "lists.parquet")
    file = open_input(tmp_path / "lists.parquet")
    assert file.row_group_rows == (9, 9, 2)
    assert read_all(file) == lists


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def lists() -> Iterator[CandidateList]:
        yield LISTS[0]
        raise InputError("upstream")

    with pytest.raises(InputError, match="upstream"):
        write_lists(lists(), tmp_path / "lists.parquet")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OutputError):
        write_lists(LISTS, tmp_path / "none" / "lists.parquet")


def test_flat(tmp_path: Path) -> None:
    file = open_input(written(tmp_path / "f.parquet", flat_columns()))
    assert (file.layout, file.n_rows, file.has_score) == ("flat", 3, True)
    assert read_all(file) == FLAT_LISTS


@pytest.mark.parametrize(
    "kind",
    [
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_string()),
        pa.int8(),
        pa.int64(),
        pa.uint64(),
    ],
    ids=str,
)
def test_identifier_types(tmp_path: Path, kind: pa.DataType) -> None:
    columns = flat_columns()
    columns |= {name: pa.array(columns[name]).cast(kind) for name in ("qid", "docid")}
    assert read_all(open_input(written(tmp_path / "f.parquet", columns))) == FLAT_LISTS


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int16(), pa.string())], ids=str
)
def test_text_types(tmp_path: Path, kind: pa.DataType) -> None:
    columns = flat_columns()
    names = ("query", "title", "text")
    columns |= {name: pa.array(columns[name], pa.string()).cast(kind) for name in names}
    assert read_all(open_input(written(tmp_path / "f.parquet", columns))) == FLAT_LISTS


@pytest.mark.parametrize("kind", [pa.int8(), pa.int64(), pa.float16(), pa.float32()], ids=str)
def test_score_types(tmp_path: Path, kind: pa.DataType) -> None:
    columns = flat_columns(score=pa.array([3.0, None, 1.0]).cast(kind))
    assert read_all(open_input(written(tmp_path / "f.parquet", columns))) == FLAT_LISTS


def test_score_above_exact_floats(tmp_path: Path) -> None:
    columns = flat_columns(score=[2**53 + 1, 2, 1])
    lists = read_all(open_input(written(tmp_path / "f.parquet", columns)))
    assert lists[0].candidates[0].first_score == float(2**53)


def test_columns_of_nulls_alone(tmp_path: Path) -> None:
    columns = flat_columns(title=pa.nulls(3), score=pa.nulls(3), qid=pa.nulls(3))
    (first, second) = read_all(open_input(written(tmp_path / "f.parquet", columns)))
    assert (first.qid, second.qid) == (None, None)
    assert first.candidates[0] == Candidate("7", "", "x", None)


def test_optional_columns_absent_and_others_ignored(tmp_path: Path) -> None:
    columns = flat_columns(embedding=[[1.0], [2.0], [3.0]])
    del columns["title"], columns["score"]
    file = open_input(written(tmp_path / "f.parquet", columns))
    assert not file.has_score
    assert file.columns == ("qid", "query", "docid", "text")
    assert read_all(file)[0].candidates[0] == Candidate("7", "", "x", None)


STRUCT = pa.struct([("text", pa.string()), ("docid", pa.int32()), ("meta", pa.list_(pa.int8()))])
VALUES = [[{"docid": 1, "text": "a", "meta": [1]}, None], None]


@pytest.mark.parametrize(
    "kind", [pa.list_(STRUCT), pa.large_list(STRUCT), pa.list_(STRUCT, 2)], ids=str
)
def test_list_types(tmp_path: Path, kind: pa.DataType) -> None:
    columns = {"qid": [5, 6], "query": ["a", "b"], "candidates": pa.array(VALUES, kind)}
    file = open_input(written(tmp_path / "n.parquet", columns))
    assert not any("meta" in column for column in file.columns)
    expected = (Candidate("1", "", "a", None), Candidate("", "", None, None))
    assert read_all(file) == [CandidateList("5", "a", expected, 0), CandidateList("6", "b", (), 1)]


def test_older_list_encoding(tmp_path: Path) -> None:
    path = tmp_path / "n.parquet"
    columns = {"qid": [5, 6], "query": ["a", "b"], "candidates": pa.array(VALUES, pa.list_(STRUCT))}
    written(path, columns, use_compliant_nested_type=False)
    assert "candidates.list.item.docid" in str(pq.ParquetFile(path).metadata.schema.column(3).path)
    assert [len(item.candidates) for item in read_all(open_input(path))] == [2, 0]


def test_row_bytes_counts_what_is_read(tmp_path: Path) -> None:
    plain = {"use_dictionary": False, "compression": "none"}
    columns = flat_columns(text=["x" * 9000] * 3, embedding=["y" * 90_000] * 3)
    file = open_input(written(tmp_path / "f.parquet", columns, **plain))
    assert 9000 < file.row_bytes < 9200


def test_batches_of_repeated_passages_stay_small(tmp_path: Path) -> None:
    n = 20_000
    columns = {name: [name] * n for name in ("qid", "query", "docid")} | {"text": ["x" * 5000] * n}
    file = open_input(written(tmp_path / "f.parquet", columns))
    assert file.row_bytes < 10, "a dictionary page holds the passage once"
    assert file.batch_rows == 4096


def test_conflicting_query_texts_become_lists_of_their_own(tmp_path: Path) -> None:
    columns = flat_columns(qid=["1", "1", "1"], query=["a", "b", "a"])
    lists = read_all(open_input(written(tmp_path / "f.parquet", columns)))
    assert [(item.qid, item.query, item.row) for item in lists] == [("1", "a", 0), ("1", "b", 1)]
    assert [[c.text for c in item.candidates] for item in lists] == [["x", None], ["y"]]
    assert [list(item.places) for item in lists] == [[0, 2], [1]]
    assert [item.place() for item in lists] == [0, 1]
    assert lists[0].place(2) == 2


def test_a_nested_row_is_the_place_of_all_in_it(tmp_path: Path) -> None:
    write_lists(LISTS, tmp_path / "lists.parquet")
    with RowReader(open_input(tmp_path / "lists.parquet")) as reader:
        (empty, last) = reader.read(2, 2)
    assert (empty.place(), last.place(), last.place(1)) == (2, 3, 3)


def test_a_users_own_column_of_places_is_not_ours(tmp_path: Path) -> None:
    columns = flat_columns(place=pa.array([7, 8, 9], pa.int64()))
    assert read_all(open_input(written(tmp_path / "f.parquet", columns))) == FLAT_LISTS


def test_rows_without_qid_form_one_list(tmp_path: Path) -> None:
    columns = flat_columns(qid=[None, None, "2"], query=["a", "a", "b"])
    file = open_input(written(tmp_path / "f.parquet", columns))
    assert [(item.qid, len(item.candidates)) for item in read_all(file)] == [(None, 2), ("2", 1)]
    assert list(qid_runs(file)) == [(None, 0, 2), ("2", 2, 1)]


# --- refused files ---


def refusal(path: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        open_input(path)
    error = caught.value
    assert error.exit_code == 65
    assert str(path) in error.where
    assert error.valid
    assert error.next_step
    return error


def test_missing_columns_are_named_with_a_guess(tmp_path: Path) -> None:
    columns = flat_columns()
    columns["query_id"], columns["Text"] = columns.pop("qid"), columns.pop("text")
    error = refusal(written(tmp_path / "f.parquet", columns))
    assert error.what == (
        "Missing columns: qid, text (is 'query_id' meant as 'qid'?; is 'Text' meant as 'text'?)."
    )
    assert "query, docid, title, score, query_id, Text" in error.where
    assert "dear-batch convert" in error.next_step


def test_missing_candidate_field(tmp_path: Path) -> None:
    columns = {"qid": ["1"], "query": ["a"], "candidates": [[{"docid": "1", "passage": "x"}]]}
    error = refusal(written(tmp_path / "n.parquet", columns))
    assert error.what.startswith("Missing column: candidates.text")
    assert "docid, passage" in error.where


@pytest.mark.parametrize(
    ("name", "values", "found"),
    [
        ("qid", [1.5, 2.5, 3.5], "double"),
        ("query", [1, 2, 3], "int64"),
        ("docid", [[1], [2], [3]], "list<"),
        ("text", [b"x", b"y", b"z"], "binary"),
        ("title", [True, False, True], "bool"),
        ("score", ["3", "2", "1"], "string"),
        ("candidates", ["[]", "[]", "[]"], "string"),
        ("candidates", [["a"], ["b"], ["c"]], "list<"),
    ],
)
def test_wrong_types(tmp_path: Path, name: str, values: list[Any], found: str) -> None:
    error = refusal(written(tmp_path / "f.parquet", flat_columns(**{name: values})))
    assert error.what.startswith(f"Column {name!r} has type {found}")


def test_wrong_type_inside_candidates(tmp_path: Path) -> None:
    columns = {"qid": ["1"], "query": ["a"], "candidates": [[{"docid": "1", "text": 5}]]}
    error = refusal(written(tmp_path / "n.parquet", columns))
    assert error.what == "Column 'candidates.text' has type int64."


def test_repeated_column(tmp_path: Path) -> None:
    columns = flat_columns()
    arrays = [pa.array(values) for values in columns.values()]
    table = pa.Table.from_arrays([*arrays, arrays[0]], names=[*columns, "qid"])
    pq.write_table(table, tmp_path / "f.parquet")
    assert refusal(tmp_path / "f.parquet").what == "Column 'qid' occurs 2 times."


def test_no_rows(tmp_path: Path) -> None:
    columns = {name: pa.array([], pa.string()) for name in ("qid", "query", "docid", "text")}
    assert "has no rows" in refusal(written(tmp_path / "f.parquet", columns)).what


def test_absent_folder_and_empty(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "none.parquet").what
    assert "is a folder" in refusal(tmp_path).what
    (tmp_path / "empty.parquet").touch()
    assert "is empty (0 bytes)" in refusal(tmp_path / "empty.parquet").what


@pytest.mark.parametrize("content", [b"x", b'{"query": "a"}\n', b"PK\x03\x04" * 50])
def test_not_parquet(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f.parquet").write_bytes(content)
    assert "is not a Parquet file" in refusal(tmp_path / "f.parquet").what


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A flat file of 20 row groups of 50 rows, uncompressed: damage stays where it is put."""
    n = 1000
    columns = {
        "qid": [f"q{i // 10}" for i in range(n)],
        "query": [f"query {i // 10}" for i in range(n)],
        "docid": [f"d{i}" for i in range(n)],
        "text": [f"passage {i} " * 20 for i in range(n)],
    }
    path = tmp_path / "large.parquet"
    options = {"row_group_size": 50, "use_dictionary": False, "compression": "none"}
    return written(path, columns, write_page_checksum=True, **options)


@pytest.mark.parametrize("kept", [4, 5, 12, 100, 0.3, 0.9, -9, -1])
def test_truncated(large: Path, kept: float) -> None:
    content = large.read_bytes()
    large.write_bytes(content[: int(kept * len(content)) if 0 < kept < 1 else int(kept)])
    assert "is cut" in refusal(large).what


def test_damaged_footer(large: Path) -> None:
    content = bytearray(large.read_bytes())
    (footer,) = struct.unpack("<I", content[-8:-4])
    content[-8 - footer : -8] = b"\xff" * footer
    large.write_bytes(content)
    assert "cannot be read" in refusal(large).what
    content[-8:-4] = struct.pack("<I", len(content) * 2)
    large.write_bytes(content)
    assert "cannot be read" in refusal(large).what


@pytest.mark.parametrize("start", [4, 50_000, 200_000])
@pytest.mark.parametrize("missing", [1, 4096])
def test_intact_footer_after_cut_data(large: Path, start: int, missing: int) -> None:
    content = large.read_bytes()
    large.write_bytes(content[:start] + content[start + missing :])
    assert "is cut: row group" in refusal(large).what


def test_flipped_bits_are_found_by_the_checksum(large: Path) -> None:
    content = bytearray(large.read_bytes())
    at = content.index(b"passage 512 ")
    content[at] ^= 1
    large.write_bytes(content)
    with RowReader(open_input(large)) as reader, pytest.raises(InputError) as caught:
        list(reader.read(490, 100))
    assert "row group 10, in rows 500 to 549" in caught.value.where
    assert "Cannot decode large.parquet" in caught.value.what


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    options = {"use_dictionary": False, "compression": "none"}
    path = written(tmp_path / "f.parquet", flat_columns(text=["passage", "y", "z"]), **options)
    path.write_bytes(path.read_bytes().replace(b"passage", b"pass\xffge"))
    with RowReader(open_input(path)) as reader, pytest.raises(InputError, match="UTF8"):
        list(reader.read(0, 3))


def test_file_replaced_by_a_shorter_one(large: Path) -> None:
    file = open_input(large)
    written(large, flat_columns())
    with RowReader(file) as reader, pytest.raises(InputError, match="ends at row 3"):
        list(reader.read(0, file.n_rows))


# --- ranges and runs ---


def test_consecutive_reads_go_on_with_the_open_stream(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[list[int]] = []
    original = pq.ParquetFile.iter_batches

    def spy(self: pq.ParquetFile, **options: Any) -> Iterator[pa.RecordBatch]:
        opened.append(options["row_groups"])
        return original(self, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    file = open_input(large)
    with RowReader(file) as reader:
        for start in range(200, 400, 20):
            assert len(list(reader.read(start, 20))) == 2
        assert opened == [[4], [5], [6], [7]]
        assert next(reader.read(730, 10)).qid == "q73"
        assert next(reader.read(0, 10)).qid == "q0"
    assert opened == [[4], [5], [6], [7], [14], [0]]


def test_abandoned_read_does_not_disturb_the_next(large: Path) -> None:
    with RowReader(open_input(large)) as reader:
        next(reader.read(0, 500))
        assert [item.qid for item in reader.read(500, 20)] == ["q50", "q51"]
        assert [item.qid for item in reader.read(10, 10)] == ["q1"]


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[int | None], int, int]:
    """Qids of the rows of a flat file, its row group size, and the batch size."""
    runs = draw(st.lists(st.tuples(st.one_of(st.none(), st.integers(0, 5)), st.integers(1, 7))))
    qids = [qid for qid, length in runs for _ in range(length)] or [0]
    return qids, draw(st.integers(1, 10)), draw(st.integers(1, 10))


def flat_file(folder: str, qids: list[int | None], group: int) -> InputFile:
    rows = range(len(qids))
    columns = {
        "qid": pa.array(qids, pa.int16()),
        "query": [f"query {qid}" for qid in qids],
        "docid": list(rows),
        "text": [f"text {row}" for row in rows],
    }
    return open_input(written(Path(folder) / "f.parquet", columns, row_group_size=group))


@settings(max_examples=60, deadline=None)
@given(tables(), st.data())
def test_any_split_reads_the_same(
    table: tuple[list[int | None], int, int], data: st.DataObject
) -> None:
    qids, group, batch = table
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("dear_batch.files.pages._BATCH_VALUES", batch)
        file = flat_file(folder, qids, group)
        expected = []
        for qid, rows in itertools.groupby(range(len(qids)), key=qids.__getitem__):
            members = list(rows)
            expected.append((None if qid is None else str(qid), members[0], len(members)))
        assert list(qid_runs(file)) == expected
        docids = [(qid, [str(row + i) for i in range(n)]) for qid, row, n in expected]

        bounds = data.draw(st.sets(st.sampled_from([row for _, row, _ in expected])))
        cuts = sorted(bounds | {0, len(qids)})
        ranges = data.draw(st.permutations(list(itertools.pairwise(cuts))))
        with RowReader(file) as reader:
            read = {start: list(reader.read(start, end - start)) for start, end in ranges}
        lists = [item for start in sorted(read) for item in read[start]]
        assert [(item.qid, [c.docid for c in item.candidates]) for item in lists] == docids
        assert [item.row for item in lists] == [row for _, row, _ in expected]
        assert [place for item in lists for place in item.places] == list(range(len(qids)))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=30),
    st.integers(1, 10),
    st.integers(1, 10),
    st.data(),
)
def test_any_split_of_nested_rows(
    lengths: list[int], group: int, batch: int, data: st.DataObject
) -> None:
    lists = [
        CandidateList(
            f"q{row % 3}", "q", tuple(Candidate(f"{row}-{i}", "", "t", i) for i in range(n)), row
        )
        for row, n in enumerate(lengths)
    ]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("dear_batch.files.pages._BATCH_VALUES", batch)
        patch.setattr("dear_batch.files.parquet._GROUP_QUERIES", group)
        write_lists(lists, Path(folder) / "n.parquet")
        file = open_input(Path(folder) / "n.parquet")
        cuts = sorted(data.draw(st.sets(st.integers(0, len(lists)))) | {0, len(lists)})
        with RowReader(file) as reader:
            ranges = itertools.pairwise(cuts)
            read = [item for start, end in ranges for item in reader.read(start, end - start)]
        assert read == lists
        assert list(qid_runs(file)) == [(item.qid, item.row, 1) for item in lists]


def test_every_batch_of_qids_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dear_batch.files.parquet._QID_ROWS", 2)
    write_lists(LISTS, tmp_path / "n.parquet")
    beats: list[None] = []
    assert len(list(qid_runs(open_input(tmp_path / "n.parquet"), lambda: beats.append(None)))) == 4
    assert len(beats) == 2
    flat = open_input(written(tmp_path / "f.parquet", flat_columns()))
    assert len(list(qid_runs(flat, lambda: beats.append(None)))) == 2
    assert len(beats) == 4


def test_runs_across_batches_are_one(tmp_path: Path) -> None:
    n = 150_000
    columns = {
        "qid": pa.array([0] * n + [1]),
        "query": ["q"] * (n + 1),
        "docid": ["d"] * (n + 1),
        "text": ["t"] * (n + 1),
    }
    file = open_input(written(tmp_path / "f.parquet", columns))
    assert list(qid_runs(file)) == [("0", 0, n), ("1", n, 1)]


# --- memory ---

WRITE_ONE_GROUP = """
import os, sys, pyarrow as pa, pyarrow.parquet as pq
from dear_batch.data import Candidate, CandidateList
from dear_batch.files.columns import nested_batch
def rows(start):
    text = os.urandom(50 * 100 * 500).hex()
    for row in range(50):
        passages = (text[at:at + 1000] for at in range(row * 100_000, (row + 1) * 100_000, 1000))
        candidates = (Candidate(str(i), "", passage, None) for i, passage in enumerate(passages))
        yield CandidateList(str(start + row), "q", tuple(candidates), row)
table = pa.Table.from_batches([nested_batch(list(rows(start))) for start in range(0, 3000, 50)])
pq.write_table(table, sys.argv[1], use_dictionary=False)
"""
READ_AND_PRINT_PEAK = """
import resource, sys
from dear_batch.files.parquet import RowReader, open_input
def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) // 1024
base = status("VmRSS")
file = open_input(sys.argv[1])
with RowReader(file) as reader:
    n = sum(len(item.candidates) for start in range(0, file.n_rows, 500)
            for item in reader.read(start, 500))
print(len(file.row_group_rows), n, status("VmHWM") - base)
"""


@pytest.mark.slow
def test_one_row_group_of_300_mb_is_streamed(tmp_path: Path) -> None:
    path = tmp_path / "one.parquet"
    subprocess.run([sys.executable, "-c", WRITE_ONE_GROUP, str(path)], check=True)
    assert open_input(path).row_bytes * 3000 > 300e6
    done = subprocess.run(
        [sys.executable, "-c", READ_AND_PRINT_PEAK, str(path)],
        check=True,
        capture_output=True,
        text=True,
    )
    groups, candidates, peak_mb = map(int, done.stdout.split())
    print(f"peak above baseline: {peak_mb} MB")  # noqa: T201 (shown with -s, kept by reports)
    assert (groups, candidates) == (1, 300_000)
    assert peak_mb < 200


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.parquet"))
    path.write_bytes(b"PAR1")
    with pytest.raises(InputError, match="not UTF-8") as caught:
        open_input(path)
    str(caught.value).encode()
