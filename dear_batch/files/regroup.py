"""Queries scattered over row groups and files, brought together out of core.

DuckDB orders narrow keys, on disk where they do not fit; `reorder` moves the text. Knows
nothing of models or jobs.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from dear_batch.errors import InputError, OutputError
from dear_batch.files.columns import FLAT_FORM, FLAT_SCHEMA, PLACE
from dear_batch.files.durable import scratch_folder
from dear_batch.files.parquet import (
    Beat,
    InputFile,
    open_input,
    qid_runs,
    read_flat,
    read_qids,
    write_batches,
)
from dear_batch.files.places import FILE_ROWS
from dear_batch.files.reorder import in_rank_order

MEMORY_LIMIT = "1GB"
_KEY_ROWS = 1 << 16
_QID = pa.schema({"qid": pa.string()})
_PLACES = _QID.append(PLACE)
Batches = Iterator[pa.RecordBatch]


def regroup(
    files: Sequence[str | Path],
    out: Path,
    *,
    memory_limit: str = MEMORY_LIMIT,
    beat: Beat = lambda: None,
) -> None:
    """Write flat files as one flat file in which the rows of a query are contiguous.

    Queries stand in the order of their first rows, candidates in the order of the files and
    their rows. Rows without a qid belong to no query and keep their place among first rows.
    Every row takes its place in `files` along; `open_input(out, regrouped=True)` reads them.
    Needs disk beside `out` for the rows once more, lz4-compressed, and for their keys.

    Args:
        files: flat files; ids may be integers in one and strings in another.
        out: the file to write, complete or not at all.
        memory_limit: for DuckDB's keys; moving text takes about 300 MB beside it.
        beat: called once a batch, and may raise: then nothing is left.

    Raises:
        InputError: a file cannot be read or is not flat.
        OutputError: `out` cannot be written, or disk or memory do not suffice.
    """
    inputs = [open_input(path) for path in files]
    nested = [file.path for file in inputs if file.layout == "nested"]
    if nested:
        raise InputError("Only flat files are regrouped.", where=", ".join(nested), valid=FLAT_FORM)
    with scratch_folder(out) as scratch:
        keys = (qids for file in inputs for qids in read_qids(file))
        rows = (batch for at, file in enumerate(inputs) for batch in _with_places(file, at))
        ordered = by_first_appearance(keys, rows, scratch, memory_limit=memory_limit, beat=beat)
        write_batches(_whole_groups(ordered), FLAT_SCHEMA.append(PLACE), out)


def _with_places(file: InputFile, index: int) -> Batches:
    place = index * FILE_ROWS
    for batch in read_flat(file):
        yield batch.append_column(PLACE, pa.array(np.arange(place, place + batch.num_rows)))
        place += batch.num_rows


def _whole_groups(batches: Batches) -> Batches:
    """Several batches in one, so that row groups are not too small to compress."""
    while held := list(islice(batches, 4)):
        yield from pa.Table.from_batches(held).combine_chunks().to_batches()


def by_first_appearance(
    qids: "Iterable[pa.Array[Any]]",
    rows: Batches,
    scratch: Path,
    *,
    memory_limit: str = MEMORY_LIMIT,
    beat: Beat = lambda: None,
) -> Batches:
    """The rows with those of one qid together, in the order of the first row of each qid.

    Args:
        qids: the qid of every row, as strings; read to the end before `rows`.
        rows: batches of the same rows.
        scratch: folder for temporary files.
        memory_limit: for DuckDB's keys.
        beat: called once a batch that is read or yielded, and may raise.

    Raises:
        OutputError: disk or memory do not suffice.
    """
    slots = scratch / "slots.parquet"
    with connect(scratch, memory_limit) as connection:
        keys = (pa.record_batch([array], schema=_QID) for array in qids)
        load(connection, "key", _QID, _beating(keys, beat))
        # Step by step, because operators of one query share the memory limit: as one query,
        # 3 million keys of 21 bytes did not fit into 100 MB even with a disk to spill to.
        execute(
            connection,
            """CREATE TABLE first AS
            SELECT qid, min(position) AS first FROM key GROUP BY qid""",
        )
        # Without a qid nothing joins, and a row is its own first.
        execute(
            connection,
            """CREATE TABLE placed AS
            SELECT position, coalesce(first, position) AS first
            FROM key LEFT JOIN first USING (qid)""",
        )
        query = """SELECT position, row_number() OVER (ORDER BY first, position) - 1 AS rank
            FROM placed ORDER BY position"""
        save(connection, query, slots)
    yield from _beating(in_rank_order(_beating(rows, beat), slots, scratch), beat)


def _beating(batches: Iterable[pa.RecordBatch], beat: Beat) -> Batches:
    for batch in batches:
        beat()
        yield batch


def distinct_qids(
    files: Sequence[str | Path], *, beside: Path | None = None, beat: Beat = lambda: None
) -> int:
    """How many qids the files have together; null is none.

    Args:
        files: nested or flat files.
        beside: temporary files go to the folder of this path; by default to the system's.
        beat: called once a batch, and may raise.

    Raises:
        InputError: a file cannot be read.
        OutputError: disk or memory do not suffice.
    """
    with _runs(files, beside, beat) as connection:
        return int(execute(connection, "SELECT count(*) FROM (SELECT DISTINCT qid FROM run)")[0][0])


def repeated_qids(
    files: Sequence[str | Path], *, beside: Path | None = None, beat: Beat = lambda: None
) -> dict[str, tuple[int, int]]:
    """Each qid that begins more than one run of rows, with (file index, row) of its first.

    In a nested file every row is a run, so these are the qids that occur in several rows.
    Arguments and errors are those of `distinct_qids`; memory grows with the answer.
    """
    with _runs(files, beside, beat) as connection:
        query = "SELECT qid, min(place) FROM run GROUP BY qid HAVING count(*) > 1"
        return {qid: divmod(place, FILE_ROWS) for qid, place in execute(connection, query)}


@contextlib.contextmanager
def _runs(
    files: Sequence[str | Path], beside: Path | None, beat: Beat
) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection with the runs of all files that have a qid, in the table `run`."""
    # A name for the folder where a caller has no output yet.
    place = beside or Path(tempfile.gettempdir()) / "dear-batch"
    inputs = [open_input(path) for path in files]
    with scratch_folder(place) as scratch, connect(scratch, MEMORY_LIMIT) as connection:
        starts = (
            (qid, index * FILE_ROWS + row)
            for index, file in enumerate(inputs)
            for qid, row, _ in qid_runs(file, beat)
            if qid is not None
        )
        load(connection, "run", _PLACES, _places(starts))
        yield connection


def _places(starts: Iterator[tuple[str, int]]) -> Batches:
    while pairs := list(islice(starts, _KEY_ROWS)):
        qids, places = zip(*pairs, strict=True)
        yield pa.record_batch([pa.array(qids), pa.array(places)], schema=_PLACES)


@contextlib.contextmanager
def connect(scratch: Path, memory_limit: str = MEMORY_LIMIT) -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB database in the folder `scratch` that spills there too.

    Every statement orders what it needs ordered, so DuckDB need not keep insertion order,
    which costs memory. Its operators need memory a thread, hence at most four.
    """
    settings: dict[str, Any] = {
        "memory_limit": memory_limit,
        "temp_directory": str(scratch / "spill"),
        "threads": min(4, os.cpu_count() or 1),
        "preserve_insertion_order": False,
        # Nothing is fetched from the network.
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
    }
    with _room():
        connection = duckdb.connect(str(scratch / "keys.duckdb"), config=settings)
    try:
        yield connection
    finally:
        connection.close()


@contextlib.contextmanager
def _room() -> Iterator[None]:
    """DuckDB reads and writes nothing but its temporary files here: its faults are theirs."""
    try:
        yield
    except (
        duckdb.IOException,
        duckdb.OutOfMemoryException,
        duckdb.TransactionException,
        duckdb.FatalException,
    ) as error:
        raise OutputError(
            "Ordering the keys ran out of disk or memory.",
            where=str(error),
            next_step="free space on the disk of the output, or run where there is more memory",
        ) from error


def load(
    connection: duckdb.DuckDBPyConnection,
    table: str,
    schema: pa.Schema,
    batches: Iterable[pa.RecordBatch],
) -> None:
    """Create a table of `schema` with one more column, `position`: the row's number from 0 on.

    Batch by batch, so that an `InputError` of the reader arrives as it is, and without one
    transaction over all: that kept 540 MB of 20 million keys in memory under a 100 MB limit.

    Raises:
        OutputError: disk or memory do not suffice.
    """
    numbered = schema.append(pa.field("position", pa.int64()))
    execute(connection, f"CREATE TABLE {table} AS FROM batch", numbered.empty_table())
    start = 0
    for batch in batches:
        positions = pa.array(np.arange(start, start + batch.num_rows))
        rows = batch.append_column("position", positions)
        execute(connection, f"INSERT INTO {table} FROM batch", rows)
        start += batch.num_rows


def save(connection: duckdb.DuckDBPyConnection, query: str, path: Path) -> None:
    """Write the result of a query to a Parquet file: a result read as Arrow is held whole.

    Raises:
        OutputError: disk or memory do not suffice.
    """
    quoted = str(path).replace("'", "''")
    execute(connection, f"COPY ({query}) TO '{quoted}' (FORMAT parquet)")


def execute(
    connection: duckdb.DuckDBPyConnection,
    statement: str,
    batch: pa.RecordBatch | pa.Table | None = None,
) -> list[tuple[Any, ...]]:
    """The rows that a statement gives; `batch` is a table of that name in it.

    Raises:
        OutputError: disk or memory do not suffice.
    """
    with _room():
        if batch is not None:
            connection.register("batch", batch)
        return connection.execute(statement).fetchall()
