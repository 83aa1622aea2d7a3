"""Parts come back as they were written, whole or not at all, a little at a time."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dear_batch.data import Ranked, RankedList, Ranking, Reranked
from dear_batch.errors import InputError
from dear_batch.files import parts
from dear_batch.files.parts import (
    CANDIDATE_BYTES,
    GROUP_BYTES,
    GROUP_ROWS,
    RANKED_SCHEMA,
    RERANKED_SCHEMA,
    TEXT_SCHEMA,
    list_size,
    part_writer,
    read_batches,
    read_part,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
FLOAT = st.floats(width=32, allow_nan=False, allow_infinity=False)


def ranked_list(number: int, size: int, depth: int, text: str = "text") -> RankedList:
    entries = tuple(
        Ranked(f"d{k}", k + 1, -float(k), 0.5 if k else None, None if k else 2.5, size - k)
        for k in range(size)
    )
    passages = [(f"title {k}" if k % 2 else "", f"{text} {k}") for k in range(size)]
    return RankedList(f"query {number}", Ranking(f"q{number}", entries), tuple(passages[:depth]))


def written(path: Path, items: Iterable[RankedList]) -> Path:
    with part_writer(path, TEXT_SCHEMA) as write:
        for item in items:
            write(item.ranking, item.query, item.passages)
    return path


def test_lists_come_back_as_they_were(tmp_path: Path) -> None:
    items = [ranked_list(i, size, depth=3) for i, size in enumerate([1, 5, 3, 2])]
    path = written(tmp_path / "part.parquet", items)
    assert list(read_part(path)) == items
    assert pq.read_schema(path).equals(TEXT_SCHEMA, check_metadata=True)
    rows = [row for row in pq.read_table(path).to_pylist() if row["qid"] == "q1"]
    assert [row["text"] for row in rows] == ["text 0", "text 1", "text 2", None, None]
    assert [row["query"] for row in rows] == ["query 1", None, None, None, None]
    assert [row["rank"] for row in rows] == [1, 2, 3, 4, 5]


def test_rankings_without_text_come_back_as_columns(tmp_path: Path) -> None:
    items = [ranked_list(i, size, depth=0) for i, size in enumerate([2, 1])]
    path = tmp_path / "part.parquet"
    with part_writer(path) as write:
        for item in items:
            write(item.ranking)
    assert pq.read_schema(path).equals(RANKED_SCHEMA, check_metadata=True)
    expected = [
        {"qid": item.ranking.qid, **asdict(entry)}
        for item in items
        for entry in item.ranking.entries
    ]
    found = [row for batch in read_batches(path) for row in batch.to_pylist()]
    assert found == expected


def test_reranked_lists_come_back_as_columns(tmp_path: Path) -> None:
    entries = (
        Reranked("d1", 1, 2.5, 1.5, 9.0, 2, 2, 1, "ok", -0.25),
        Reranked("d0", 2, 1.5, None, None, 1, 1, None, None, None),
    )
    path = tmp_path / "part.parquet"
    with part_writer(path, RERANKED_SCHEMA) as write:
        write(Ranking("q", entries))
    assert pq.read_schema(path).equals(RERANKED_SCHEMA, check_metadata=True)
    (batch,) = read_batches(path)
    assert batch.to_pylist() == [{"qid": "q", **asdict(entry)} for entry in entries]


@given(candidates=st.lists(st.tuples(TEXT, TEXT, FLOAT), min_size=1, max_size=6), query=TEXT)
def test_any_text_and_any_float32_comes_back(
    tmp_path_factory: pytest.TempPathFactory, candidates: list[tuple[str, str, float]], query: str
) -> None:
    entries = tuple(
        Ranked(f"d{k}", k + 1, score, score, score, k + 1)
        for k, (_, _, score) in enumerate(candidates)
    )
    passages = tuple((title, text) for title, text, _ in candidates)
    item = RankedList(query, Ranking("q", entries), passages)
    folder = tmp_path_factory.mktemp("part")
    assert list(read_part(written(folder / "part.parquet", [item]))) == [item]


def test_a_part_without_lists_is_a_part(tmp_path: Path) -> None:
    """Every query may have been set aside."""
    path = written(tmp_path / "part.parquet", [])
    assert list(read_part(path)) == []
    assert list(read_batches(path)) == []
    assert pq.read_schema(path).equals(TEXT_SCHEMA)


def test_lists_go_on_over_row_groups_and_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row group is cut at a list's end; what one batch holds is not."""
    monkeypatch.setattr(parts, "GROUP_BYTES", 40)
    monkeypatch.setattr(parts, "batch_rows", lambda *_: 3)
    items = [ranked_list(i, size, depth=4) for i, size in enumerate([7, 1, 12, 2, 5])]
    path = written(tmp_path / "part.parquet", items)
    assert pq.read_metadata(path).num_row_groups > 1
    assert len(list(read_batches(path))) > 9
    assert list(read_part(path)) == items


def test_a_part_appears_whole_or_not_at_all(tmp_path: Path) -> None:

    def scored() -> Iterator[RankedList]:
        yield ranked_list(0, 3, 3)
        raise RuntimeError("the scorer is gone")

    with pytest.raises(RuntimeError, match="the scorer is gone"):
        written(tmp_path / "part.parquet", scored())
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_part_is_one_clear_error(tmp_path: Path) -> None:
    path = written(tmp_path / "part.parquet", [ranked_list(0, 50, 50)])
    raw = bytearray(path.read_bytes())
    raw[200] ^= 0xFF
    path.write_bytes(raw)
    with pytest.raises(InputError):
        list(read_part(path))


def test_a_large_part_is_read_and_written_a_little_at_a_time(tmp_path: Path) -> None:
    text = "".join(chr(33 + (7 * k) % 90) for k in range(20_000))
    total, before = 120, pa.total_allocated_bytes()
    path, peaks = tmp_path / "part.parquet", [0]
    with part_writer(path, TEXT_SCHEMA) as write:
        for i in range(total):
            item = ranked_list(i, 40, 30, text=f"{i} {text}")
            write(item.ranking, item.query, item.passages)
            peaks.append(pa.total_allocated_bytes() - before)
    metadata = pq.read_metadata(path)
    assert metadata.num_row_groups >= 8
    sizes = [metadata.row_group(g).total_byte_size for g in range(metadata.num_row_groups)]
    assert max(sizes) < 1.2 * GROUP_BYTES
    assert sum(sizes) > 70_000_000
    count = 0
    for _ in read_part(path):
        count += 1
        peaks.append(pa.total_allocated_bytes() - before)
    assert count == total
    assert max(peaks) < 40_000_000


def test_deep_lists_with_little_text_make_small_groups(tmp_path: Path) -> None:
    items = [ranked_list(i, 1000, depth=2) for i in range(70)]
    text = sum(map(len, ("text 0", "title 1", "text 1")))
    assert list_size(items[0]) == text + 1000 * CANDIDATE_BYTES
    metadata = pq.read_metadata(written(tmp_path / "part.parquet", items))
    groups = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
    assert groups == [66_000, 4000]  # whole lists, the first that reach GROUP_ROWS
    assert GROUP_ROWS <= groups[0] < GROUP_ROWS + 1000
