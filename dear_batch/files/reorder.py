"""Wide rows into a new order, out of core, with one temporary file.

Knows nothing of what the rows hold or why they move: it is told, for each place in the new
order, which row of the old one stands there. Deciding that needs narrow keys alone and is the
work of `regroup`. The text is moved here, by distribution, because DuckDB's external sort and
its list() aggregate do not bound it: sorting 440 MB of passages under a 200 MB limit ended
out of memory, and a sorted result read as Arrow stood in memory whole (duckdb 2.0, measured).
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CHUNK_BYTES = 32 << 20
_TAKE_ROWS = 4096
_BUCKET_RANKS = 1 << 15


def in_rank_order(
    rows: Iterator[pa.RecordBatch], slots: Path, scratch: Path, *, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[pa.RecordBatch]:
    """The rows in the order of their ranks.

    Chunks of about `chunk_bytes` are sorted, cut at the bounds of rank buckets and written to
    one temporary file; then one bucket at a time is read back and sorted. The number of pieces
    grows with the square of the size: about 100,000 for 10 GB, which is nothing, and 10 million
    for 100 GB, where their list takes some hundred MB and a larger chunk is better.

    Args:
        rows: batches whose rows are numbered from 0 on.
        slots: Parquet file of `position` (number of a row) and `rank` (its place), int64, in
            the order of `position`. A row may have several ranks, or none.
        scratch: folder for the temporary file, which needs the space of the rows.
        chunk_bytes: bytes of rows held at a time; the peak is about four times that.
    """
    spilled = scratch / "rows.arrow"
    buckets: dict[int, list[int]] = {}
    schema = _spill(_placed(rows, slots), spilled, buckets, chunk_bytes)
    if schema is None:
        return
    with pa.OSFile(str(spilled), "rb") as file, pa.ipc.open_file(file) as pieces:
        for bucket in sorted(buckets):
            table = pa.Table.from_batches(
                [pieces.get_batch(index) for index in buckets[bucket]], schema
            )
            ranked, _ = _sorted(table)
            yield from ranked.drop_columns(["rank"]).to_batches(max_chunksize=_TAKE_ROWS)


def _placed(rows: Iterator[pa.RecordBatch], slots: Path) -> Iterator[pa.RecordBatch]:
    """The rows once for each of their ranks, with a column `rank`."""
    with pq.ParquetFile(slots) as source:
        batches = source.iter_batches(columns=["position", "rank"])
        held = np.empty((2, 0), np.int64)
        start = 0
        for batch in rows:
            end = start + batch.num_rows
            while held.shape[1] == 0 or held[0, -1] < end:
                more = next(batches, None)
                if more is None:
                    break
                held = np.concatenate([held, _pairs(more)], axis=1)
            here = int(np.searchsorted(held[0], end))
            yield from _taken(batch, held[0, :here] - start, held[1, :here])
            held, start = held[:, here:], end


def _pairs(slots: pa.RecordBatch) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    return np.stack([slots.column(name).to_numpy() for name in ("position", "rank")])


def _taken(
    batch: pa.RecordBatch, indices_S: np.ndarray, ranks_S: np.ndarray
) -> Iterator[pa.RecordBatch]:
    # In steps, because one row may stand in very many places.
    for start in range(0, len(indices_S), _TAKE_ROWS):
        step = slice(start, start + _TAKE_ROWS)
        taken = batch.take(pa.array(indices_S[step]))
        yield taken.append_column("rank", pa.array(ranks_S[step]))


def _spill(
    placed: Iterator[pa.RecordBatch], path: Path, buckets: dict[int, list[int]], chunk_bytes: int
) -> pa.Schema | None:
    """Write sorted chunks cut at bucket bounds; `buckets` gets the pieces of each bucket.

    A bucket spans as many ranks as the first chunk has rows, so it has about its size; the
    bound holds where the first rows are much shorter than the rest.
    """
    writer, span, written = None, 0, 0
    for chunk in _chunks(placed, chunk_bytes):
        if writer is None:
            options = pa.ipc.IpcWriteOptions(compression="lz4")
            writer = pa.ipc.new_file(str(path), chunk.schema, options=options)
            span = min(chunk.num_rows, _BUCKET_RANKS)
        for bucket, piece in _pieces(chunk, span):
            writer.write_batch(piece)
            buckets.setdefault(bucket, []).append(written)
            written += 1
    if writer is None:
        return None
    writer.close()
    return chunk.schema


def _chunks(batches: Iterator[pa.RecordBatch], chunk_bytes: int) -> Iterator[pa.Table]:
    held, size = list[pa.RecordBatch](), 0
    for batch in batches:
        held.append(batch)
        size += batch.nbytes
        if size >= chunk_bytes:
            yield pa.Table.from_batches(held)
            held, size = [], 0
    if held:
        yield pa.Table.from_batches(held)


def _sorted(table: pa.Table) -> tuple[pa.Table, np.ndarray]:
    """The table in the order of its ranks, and the ranks."""
    ranks_R = table.column("rank").to_numpy()
    order_R = np.argsort(ranks_R, kind="stable")
    return table.take(order_R), ranks_R[order_R]


def _pieces(chunk: pa.Table, span: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    ranked, ranks_R = _sorted(chunk)
    buckets_R = ranks_R // span
    cuts = [0, *(np.flatnonzero(np.diff(buckets_R)) + 1).tolist(), len(ranks_R)]
    for start, end in pairwise(cuts):
        for piece in ranked.slice(start, end - start).combine_chunks().to_batches():
            yield int(buckets_R[start]), piece
