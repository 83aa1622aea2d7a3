"""Scattered queries brought together: equal to a plain Python reference, in bounded memory."""

import os
import random
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dear_batch.data import Candidate, CandidateList
from dear_batch.errors import InputError, OutputError
from dear_batch.files.parquet import RowReader, open_input, qid_runs, write_lists
from dear_batch.files.places import FILE_ROWS, Places
from dear_batch.files.regroup import (
    by_first_appearance,
    connect,
    distinct_qids,
    execute,
    regroup,
    repeated_qids,
)
from dear_batch.files.reorder import in_rank_order

Row = dict[str, Any]


def write_rows(path: Path, rows: list[Row], schema: dict[str, pa.DataType], group: int) -> Path:
    columns = {name: pa.array([row.get(name) for row in rows], schema[name]) for name in schema}
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


TEXTS = {"query": pa.string(), "text": pa.string()}
INTEGER_IDS = TEXTS | {"qid": pa.int64(), "docid": pa.int16()}
STRING_IDS = TEXTS | {"qid": pa.large_string(), "docid": pa.string(), "title": pa.string()}
SCORED = STRING_IDS | {"score": pa.float32()}


def reference(*files: list[Row]) -> list[CandidateList]:
    """Grouped by qid in a dictionary; a row without qid stands alone, where it was."""
    groups: dict[object, list[Row]] = {}
    for file, rows in enumerate(files):
        for number, row in enumerate(rows):
            place = file * FILE_ROWS + number
            key = ("no qid", place) if row["qid"] is None else str(row["qid"])
            groups.setdefault(key, []).append(row | {"place": place})
    lists, start = [], 0
    for members in groups.values():
        qid, query = members[0]["qid"], members[0]["query"]
        candidates = tuple(
            Candidate(str(row["docid"]), row.get("title") or "", row["text"], row.get("score"))
            for row in members
        )
        places = array("q", [row["place"] for row in members])
        qid = None if qid is None else str(qid)
        lists.append(CandidateList(qid, query, candidates, start, places))
        start += len(members)
    return lists


def read_all(path: Path) -> list[CandidateList]:
    file = open_input(path, regrouped=True)
    with RowReader(file) as reader:
        return list(reader.read(0, file.n_rows))


def scattered(n: int, seed: int) -> list[Row]:
    chooser = random.Random(seed)
    qids = [chooser.randrange(40) for _ in range(n)]
    return [
        {"qid": qid, "query": f"query {qid}", "docid": row, "text": f"text {seed} {row}"}
        for row, qid in enumerate(qids)
    ]


def strings(rows: list[Row], **more: object) -> list[Row]:
    return [row | {"qid": str(row["qid"]), "docid": str(row["docid"])} | more for row in rows]


def docid_at(path: Path, group: int, row: int) -> str:
    """The docid of a row of the user's, found by its row group alone and its row alone."""
    source = pq.ParquetFile(path)
    before = sum(source.metadata.row_group(i).num_rows for i in range(group))
    by_group = source.read_row_group(group, ["docid"]).column("docid")[row - before]
    by_row = pq.read_table(path, columns=["docid"]).column("docid")[row]
    assert by_group == by_row
    return str(by_row)


def test_over_row_groups_and_files_with_drifting_ids(tmp_path: Path) -> None:
    first = scattered(500, 1)
    second = strings(scattered(300, 2), title="a title")
    third = strings(scattered(200, 3), score=0.5)
    files = [
        write_rows(tmp_path / "1.parquet", first, INTEGER_IDS, 7),
        write_rows(tmp_path / "2.parquet", second, STRING_IDS, 300),
        write_rows(tmp_path / "3.parquet", third, SCORED, 11),
    ]
    out = tmp_path / "out.parquet"
    regroup(files, out)
    expected = reference(first, second, third)
    assert len(expected) == 40
    assert read_all(out) == expected
    lists = read_all(out)
    places = Places([open_input(path) for path in files])
    for item in lists:
        for candidate, place in zip(item.candidates, item.places, strict=True):
            path, group, row = places.position(place)
            assert candidate.docid == docid_at(Path(path), group, row)
    assert [qid for qid, _, _ in qid_runs(open_input(out))] == [item.qid for item in expected]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "1.parquet",
        "2.parquet",
        "3.parquet",
        "out.parquet",
    ]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.integers(0, 4)), min_size=1, max_size=40),
    st.integers(1, 9),
    st.integers(1, 5),
)
def test_any_scatter(qids: list[int | None], group: int, chunk_rows: int) -> None:
    rows = [
        # The query's text tells rows without qid apart, as the reader's runs do.
        {"qid": q, "query": f"{q}" if q is not None else f"row {n}", "docid": n, "text": "x" * n}
        for n, q in enumerate(qids)
    ]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("dear_batch.files.reorder._BUCKET_RANKS", chunk_rows)
        source = write_rows(Path(folder) / "in.parquet", rows, INTEGER_IDS, group)
        regroup([source], Path(folder) / "out.parquet")
        assert read_all(Path(folder) / "out.parquet") == reference(rows)


def test_nested_and_broken_files_are_refused(tmp_path: Path) -> None:
    write_lists([CandidateList("1", "q", (), 0)], tmp_path / "n.parquet")
    with pytest.raises(InputError, match="Only flat files") as caught:
        regroup([tmp_path / "n.parquet"], tmp_path / "out.parquet")
    assert str(tmp_path / "n.parquet") in caught.value.where
    rows = strings(scattered(300, 1))
    source = write_rows(tmp_path / "f.parquet", rows, STRING_IDS, 50)
    content = source.read_bytes()
    source.write_bytes(content[:200] + bytes(80) + content[280:])
    with pytest.raises(InputError, match=r"Cannot decode f\.parquet"):
        regroup([source], tmp_path / "out.parquet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.parquet", "n.parquet"]


class StoppedHereError(Exception):
    pass


def stopping_at(number: int) -> Callable[[], None]:
    beats = iter(range(1, number + 1))

    def beat() -> None:
        if next(beats) == number:
            raise StoppedHereError

    return beat


def test_regrouping_beats_and_can_be_stopped_at_any_beat(tmp_path: Path) -> None:
    sources = [
        write_rows(tmp_path / f"{n}.parquet", scattered(60, n), INTEGER_IDS, 20) for n in range(2)
    ]
    out, beats = tmp_path / "out.parquet", list[None]()
    regroup(sources, out, beat=lambda: beats.append(None))
    # Six batches of keys, six of rows, and what comes out.
    assert len(beats) > 12
    out.unlink()
    for number in range(1, len(beats) + 1):
        with pytest.raises(StoppedHereError):
            regroup(sources, out, beat=stopping_at(number))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["0.parquet", "1.parquet"]


@pytest.mark.parametrize("count", [distinct_qids, repeated_qids])
def test_counting_qids_beats_and_can_be_stopped(
    tmp_path: Path, count: Callable[..., object]
) -> None:
    file = write_rows(tmp_path / "f.parquet", scattered(60, 1), INTEGER_IDS, 20)
    beats = list[None]()
    count([file], beside=tmp_path / "qids", beat=lambda: beats.append(None))
    assert len(beats) == 3
    with pytest.raises(StoppedHereError):
        count([file], beside=tmp_path / "qids", beat=stopping_at(2))
    assert [path.name for path in tmp_path.iterdir()] == ["f.parquet"]


def test_missing_output_folder(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "f.parquet", scattered(3, 1), INTEGER_IDS, 50)
    with pytest.raises(OutputError, match="folder does not exist"):
        regroup([source], tmp_path / "none" / "out.parquet")


def nested(path: Path, qids: list[str | None]) -> Path:
    write_lists([CandidateList(qid, "q", (), row) for row, qid in enumerate(qids)], path)
    return path


def test_counting_qids(tmp_path: Path) -> None:
    files = [
        nested(tmp_path / "1.parquet", ["a", "b", None, "a"]),
        nested(tmp_path / "2.parquet", [None, "c", "1"]),
        nested(tmp_path / "3.parquet", ["c", "c", "d"]),
    ]
    assert distinct_qids(files) == 5
    assert repeated_qids(files) == {"a": (0, 0), "c": (1, 1)}
    assert repeated_qids(files[:1], beside=tmp_path / "out") == {"a": (0, 0)}
    assert repeated_qids(files[1:2]) == {}
    assert len(list(tmp_path.iterdir())) == 3


def test_counting_without_any_qid(tmp_path: Path) -> None:
    files = [nested(tmp_path / "1.parquet", [None, None])]
    assert (distinct_qids(files), repeated_qids(files)) == (0, {})


def test_counting_runs_of_flat_files_with_drifting_ids(tmp_path: Path) -> None:
    rows = [{"qid": q, "query": "q", "docid": 1, "text": "t"} for q in (1, 1, 2, 2, 1, 3)]
    files = [
        write_rows(tmp_path / "1.parquet", rows, INTEGER_IDS, 3),
        write_rows(tmp_path / "2.parquet", strings(rows[5:]), STRING_IDS, 3),
    ]
    assert distinct_qids(files) == 3
    assert repeated_qids(files) == {"1": (0, 0), "3": (0, 5)}


# --- the parts ---


def slots_file(path: Path, pairs: list[tuple[int, int]]) -> Path:
    position, rank = zip(*sorted(pairs), strict=True)
    pq.write_table(pa.table({"position": position, "rank": rank}), path, row_group_size=3)
    return path


def test_rows_may_have_several_ranks_or_none(tmp_path: Path) -> None:
    pairs = [(0, 5), (2, 0), (2, 3), (2, 4), (6, 1), (7, 2)]
    slots = slots_file(tmp_path / "slots.parquet", pairs)
    batches = (pa.record_batch({"x": [n, n + 1, n + 2]}) for n in range(0, 9, 3))
    ordered = in_rank_order(batches, slots, tmp_path, chunk_bytes=20)
    assert pa.Table.from_batches(ordered).to_pydict() == {"x": [2, 6, 7, 2, 2, 0]}


def test_chunks_and_buckets_of_any_size(tmp_path: Path) -> None:
    n = 1000
    ranks = random.Random(5).sample(range(n), n)
    slots = slots_file(tmp_path / "slots.parquet", list(enumerate(ranks)))
    for chunk_bytes in (1, 100, 3000, 1 << 30):
        batches = (pa.record_batch({"x": list(range(i, i + 10))}) for i in range(0, n, 10))
        ordered = in_rank_order(batches, slots, tmp_path, chunk_bytes=chunk_bytes)
        moved = [x for batch in ordered for x in batch.column("x").to_pylist()]
        assert moved == sorted(range(n), key=ranks.__getitem__)


def test_nothing_to_order(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"position": pa.array([], pa.int64()), "rank": pa.array([], pa.int64())}),
        tmp_path / "slots.parquet",
    )
    assert list(in_rank_order(iter(()), tmp_path / "slots.parquet", tmp_path)) == []


def test_keys_too_large_for_memory_and_disk_are_an_output_error(tmp_path: Path) -> None:
    with connect(tmp_path, "10MB") as connection:
        execute(connection, "SET max_temp_directory_size = '1MB'")
        statement = "CREATE TEMP TABLE t AS SELECT uuid()::VARCHAR AS a FROM range(1_000_000)"
        with pytest.raises(OutputError, match="ran out of disk or memory") as caught:
            execute(connection, statement)
    assert caught.value.exit_code == 73


KEYS = 3_000_000


def scattered_keys() -> Iterator[pa.Array]:
    step = 100_000
    for start in range(0, KEYS, step):
        # A permutation: every qid is another one, the most that grouping can meet.
        yield pa.array([f"a query named {n * 7919 % KEYS}" for n in range(start, start + step)])


@pytest.mark.slow
def test_keys_spill_to_disk(tmp_path: Path) -> None:
    assert (
        list(by_first_appearance(scattered_keys(), iter(()), tmp_path, memory_limit="100MB")) == []
    )
    assert pq.read_metadata(tmp_path / "slots.parquet").num_rows == KEYS


@pytest.mark.slow
def test_keys_without_room_to_spill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same keys under the same limit need the disk: the test above did spill."""

    @contextmanager
    def without_disk(scratch: Path, limit: str) -> Iterator[duckdb.DuckDBPyConnection]:
        with connect(scratch, limit) as connection:
            execute(connection, "SET max_temp_directory_size = '0KB'")
            yield connection

    monkeypatch.setattr("dear_batch.files.regroup.connect", without_disk)
    ordered = by_first_appearance(scattered_keys(), iter(()), tmp_path, memory_limit="100MB")
    with pytest.raises(OutputError, match="ran out of disk or memory"):
        list(ordered)


REGROUP_AND_PRINT_PEAK = """
import sys
from pathlib import Path
from dear_batch.files.regroup import regroup
def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) // 1024
base = status("VmRSS")
regroup(sys.argv[2:], Path(sys.argv[1]), memory_limit="50MB")
print(status("VmHWM") - base)
"""


@pytest.mark.slow
def test_more_passages_than_memory(tmp_path: Path) -> None:
    """800 MB of passages, every query in every row group of both files."""
    files, n, step = [], 400_000, 20_000
    for index in range(2):
        path = tmp_path / f"{index}.parquet"
        schema = pa.schema(
            [
                ("qid", pa.int64()),
                ("query", pa.string()),
                ("docid", pa.int64()),
                ("text", pa.string()),
            ]
        )
        with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
            for start in range(0, n, step):
                numbers = range(start, start + step)
                text = os.urandom(step * 500).hex()
                columns = {
                    "qid": [number % 4001 for number in numbers],
                    "query": [f"query {number % 4001}" for number in numbers],
                    "docid": list(numbers),
                    "text": [text[i * 1000 : i * 1000 + 1000] for i in range(step)],
                }
                writer.write_table(pa.table(columns, schema))
        files.append(str(path))
    out = tmp_path / "out.parquet"
    command = [sys.executable, "-c", REGROUP_AND_PRINT_PEAK, str(out), *files]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    peak_mb = int(done.stdout)
    print(f"peak above baseline: {peak_mb} MB")  # noqa: T201 (shown with -s)
    assert peak_mb < 400
    runs = list(qid_runs(open_input(out)))
    assert [qid for qid, _, _ in runs] == [str(qid) for qid in range(4001)]
    with RowReader(open_input(out)) as reader:
        first = next(reader.read(0, 400))
    expected = [str(docid) for _ in files for docid in range(0, n, 4001)]
    assert [candidate.docid for candidate in first.candidates] == expected


def test_duckdb_stays_offline(tmp_path: Path) -> None:
    with (
        connect(tmp_path) as connection,
        pytest.raises(duckdb.Error, match=r"(?i)extension|not exist"),
    ):
        execute(connection, "SELECT * FROM 's3://bucket/x.parquet'")
