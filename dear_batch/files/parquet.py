"""Candidate lists in Parquet files: opened with checks, streamed in bounded memory, written whole.

Knows nothing of models or jobs, and nothing of what a column may hold: that is `columns`.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Self, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dear_batch.data import CandidateList
from dear_batch.files.columns import (
    NESTED_SCHEMA,
    PLACE,
    Layout,
    flat_batch,
    layout_of,
    lists_from_flat,
    lists_from_nested,
    nested_batch,
)
from dear_batch.files.durable import replacing
from dear_batch.files.pages import (
    batch_rows,
    chunk_sizes,
    decoded,
    group_rows,
    open_parquet,
    unreadable,
)

Item = TypeVar("Item")
Beat = Callable[[], None]  # told that work goes on; raises to end it

SCHEMA_VERSION = "1"
_QID_ROWS = 1 << 16
_GROUP_BYTES = 8 << 20  # of text: what one row group holds
_GROUP_QUERIES = 4096


@dataclass(frozen=True, slots=True)
class InputFile:
    """A Parquet file whose footer and schema were found valid.

    `row_bytes` is the average size of a row, uncompressed, from the footer (at least 1);
    `columns` are the leaf columns that a reader decodes, `batch_rows` how many rows at a time.
    """

    path: str
    layout: Layout
    n_rows: int
    row_group_rows: tuple[int, ...]
    row_bytes: int
    has_score: bool
    columns: tuple[str, ...]
    batch_rows: int


def open_input(path: str | Path, *, regrouped: bool = False) -> InputFile:
    """Check a file of candidate lists by its footer, without reading its data.

    Args:
        path: the file.
        regrouped: `regroup` wrote it, and its rows know their places in the user's files; a
            user's own column of that name is not read.

    Raises:
        InputError: the file is missing, a folder, empty, cut, not Parquet, without rows, or
            its columns are not those of candidate lists.
    """
    with open_parquet(path) as source:
        layout, optional = layout_of(source.schema_arrow, str(path))
        columns = _leaves(source, layout, optional) + ((PLACE.name,) if regrouped else ())
        n_rows = source.metadata.num_rows
        sizes = chunk_sizes(source.metadata, columns)
        row_bytes = max(1, sum(size for _, size in sizes) // n_rows)
        return InputFile(
            path=str(path),
            layout=layout,
            n_rows=n_rows,
            row_group_rows=group_rows(source),
            row_bytes=row_bytes,
            has_score="score" in optional,
            columns=columns,
            batch_rows=batch_rows(source, columns),
        )


def _leaves(source: pq.ParquetFile, layout: Layout, optional: frozenset[str]) -> tuple[str, ...]:
    """Paths of the leaf columns to decode: an embedding beside the text is not read."""
    paths = [source.schema.column(i).path for i in range(len(source.schema))]
    document = {"docid", "text"} | optional
    if layout == "flat":
        return tuple(path for path in paths if path in {"qid", "query"} | document)
    inner = [path.split(".") for path in paths if path.startswith("candidates.")]
    # Writers differ in the names between (list.element, bag.array_element); fields of structs
    # in the struct lie deeper.
    depth = min(len(parts) for parts in inner)
    fields = [".".join(p) for p in inner if len(p) == depth and p[-1] in document]
    return ("qid", "query", *fields)


class RowReader:
    """Reads ranges of rows of one file as candidate lists; a context manager.

    One range at a time: a range that starts where the last one ended goes on with the open
    stream, any other starts again at its row group.
    """

    def __init__(self, file: InputFile) -> None:
        self._file = file
        self._source = open_parquet(file.path)
        self._starts = [0, *accumulate(group_rows(self._source))]
        self._stream: Iterator[pa.RecordBatch] = iter(())
        self._pending: pa.RecordBatch | None = None
        self._next_row = -1

    def __enter__(self) -> Self:
        """The reader itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._source.close()

    def read(self, first_row: int, n_rows: int) -> Iterator[CandidateList]:
        """The lists of rows `first_row` to `first_row + n_rows - 1`, in file order.

        Raises:
            InputError: the data cannot be decoded, or the file ends before the range does.
        """
        batches = self._batches(first_row, n_rows)
        if self._file.layout == "nested":
            return lists_from_nested(batches, first_row)
        return lists_from_flat(map(flat_batch, batches), first_row)

    def _batches(self, first_row: int, n_rows: int) -> Iterator[pa.RecordBatch]:
        if first_row != self._next_row:
            self._seek(first_row)
        while n_rows > 0:
            batch = self._take(n_rows)
            n_rows -= batch.num_rows
            yield batch

    def _seek(self, row: int) -> None:
        group = bisect_right(self._starts, row) - 1
        file = self._file
        self._stream = decoded(self._source, file.path, file.columns, file.batch_rows, group)
        self._pending, self._next_row = None, self._starts[group]
        while self._next_row < row:
            self._take(row - self._next_row)

    def _take(self, n_rows: int) -> pa.RecordBatch:
        """At most `n_rows` rows from where the stream stands."""
        batch = next(self._stream, None) if self._pending is None else self._pending
        if batch is None:
            raise unreadable(self._file.path, f"changed: it ends at row {self._next_row}")
        taken, rest = batch.slice(0, n_rows), batch.slice(n_rows)
        self._pending = rest if rest.num_rows else None
        self._next_row += taken.num_rows
        return taken


def read_qids(file: InputFile, beat: Beat = lambda: None) -> "Iterator[pa.Array[Any]]":
    """The qid column as strings, in batches; `beat` is called before each, and may raise."""
    with open_parquet(file.path) as source:
        for batch in decoded(source, file.path, ["qid"], _QID_ROWS):
            beat()
            yield batch.column("qid").cast(pa.string())


def read_flat(file: InputFile) -> Iterator[pa.RecordBatch]:
    """All rows of a flat file, in batches of `FLAT_SCHEMA`."""
    with open_parquet(file.path) as source:
        yield from map(flat_batch, decoded(source, file.path, file.columns, file.batch_rows))


def qid_runs(file: InputFile, beat: Beat = lambda: None) -> Iterator[tuple[str | None, int, int]]:
    """(qid, first row, number of rows) of each run of equal qids; nested, each row is a run.

    `beat` is called once a batch, and may raise.

    Raises:
        InputError: the qid column cannot be decoded.
    """
    if file.layout == "nested":
        rows = (qid for qids in read_qids(file, beat) for qid in qids.to_pylist())
        yield from ((qid, row, 1) for row, qid in enumerate(rows))
        return
    # A run that crosses batches arrives in pieces.
    for qid, group in groupby(_pieces(file, beat), key=itemgetter(0)):
        pieces = list(group)
        yield qid, pieces[0][1], sum(length for _, _, length in pieces)


def _pieces(file: InputFile, beat: Beat) -> Iterator[tuple[str | None, int, int]]:
    first_row = 0
    for qids in read_qids(file, beat):
        runs = pc.call_function("run_end_encode", [qids])
        start = 0
        for qid, end in zip(runs.values.to_pylist(), runs.run_ends.to_pylist(), strict=True):
            yield qid, first_row + start, end - start
            start = end
        first_row += len(qids)


def write_batches(batches: Iterable[pa.RecordBatch], schema: pa.Schema, path: Path) -> None:
    """Write one row group a batch, zstd, complete or not at all.

    Raises:
        OutputError: the folder is missing, read-only or full.
    """
    described = schema.with_metadata({"schema_version": SCHEMA_VERSION})
    with (
        replacing(path) as temporary,
        pq.ParquetWriter(
            temporary, described, compression="zstd", write_page_checksum=True
        ) as writer,
    ):
        for batch in batches:
            writer.write_table(pa.Table.from_batches([batch]))


def write_lists(lists: Iterable[CandidateList], path: Path) -> None:
    """Write candidate lists in the nested layout, all four candidate fields always there.

    Raises:
        OutputError: the folder is missing, read-only or full.
    """
    groups = grouped(lists, _text_size, most=_GROUP_QUERIES, limit=_GROUP_BYTES)
    write_batches(map(nested_batch, groups), NESTED_SCHEMA, path)


def _text_size(item: CandidateList) -> int:
    return sum(len(candidate.text or "") for candidate in item.candidates)


def grouped(
    items: Iterable[Item], size: Callable[[Item], int], *, most: int, limit: int
) -> Iterator[list[Item]]:
    """Items in order, at most `most` together, and no more once their sizes reach `limit`."""
    group, total = list[Item](), 0
    for item in items:
        group.append(item)
        total += size(item)
        if total >= limit or len(group) >= most:
            yield group
            group, total = [], 0
    if group:
        yield group
