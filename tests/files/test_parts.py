"""Parts come back as they were written, whole or not at all, a little at a time."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dear_batch.data import Ranked, RankedList, Ranking
from dear_batch.errors import InputError
from dear_batch.files import parts
from dear_batch.files.parts import (
    CANDIDATE_BYTES,
    GROUP_BYTES,
    PART_SCHEMA,
    list_size,
    part_writer,
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
    with part_writer(path) as write:
        for item in items:
            write(item)
    return path


def test_lists_come_back_as_they_were(tmp_path: Path) -> None:
    items = [ranked_list(i, size, depth=3) for i, size in enumerate([1, 5, 3, 2])]
    path = written(tmp_path / "part.parquet", items)
    assert list(read_part(path)) == items
    assert pq.read_schema(path).equals(PART_SCHEMA)
    rows = pq.read_table(path).to_pylist()
    assert [c["text"] for c in rows[1]["candidates"]] == ["text 0", "text 1", "text 2", None, None]
    assert [c["rank"] for c in rows[1]["candidates"]] == [1, 2, 3, 4, 5]


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
    assert list(read_part(written(tmp_path / "part.parquet", []))) == []


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
    with part_writer(path) as write:
        for i in range(total):
            write(ranked_list(i, 40, 30, text=f"{i} {text}"))
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


def test_deep_lists_with_little_text_make_small_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "GROUP_BYTES", 1 << 20)
    items = [ranked_list(i, 1000, depth=2) for i in range(14)]
    text = sum(map(len, ("text 0", "title 1", "text 1")))
    assert list_size(items[0]) == text + 1000 * CANDIDATE_BYTES
    path = written(tmp_path / "part.parquet", items)
    metadata = pq.read_metadata(path)
    assert [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)] == [6, 6, 2]
    assert list(read_part(path)) == items
