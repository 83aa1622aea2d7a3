"""Writes what a job publishes: the TREC run, `results.parquet` and the quarantine.

Files appear under their names complete or not at all. Knows nothing of models.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dear_batch.data import Ranking, Refusal, RunLine
from dear_batch.files.durable import replacing

SCHEMA_VERSION = "1"
_RESULTS: dict[str, Any] = {
    "qid": pa.string(),
    "docid": pa.string(),
    "rank": pa.int32(),
    "logit": pa.float32(),
    "first_score": pa.float64(),
    "first_rank": pa.int32(),
}
_QUARANTINE: dict[str, Any] = {
    "reason": pa.string(),
    "detail": pa.string(),
    "path": pa.string(),
    "row": pa.int64(),
    "qid": pa.string(),
    "docid": pa.string(),
    "candidates": pa.int64(),
}
RESULTS_SCHEMA = pa.schema(_RESULTS, metadata={"schema_version": SCHEMA_VERSION})
QUARANTINE_SCHEMA = pa.schema(_QUARANTINE, metadata={"schema_version": SCHEMA_VERSION})
RESULT_ROWS = 1 << 16
REFUSAL_ROWS = 1 << 12

Write = Callable[[Ranking], None]


@contextmanager
def run_writer(folder: Path, stem: str, tag: str) -> Iterator[Write]:
    """Publish `<stem>.trec` and its results when the block ends; the run file comes last.

    The results of `run` are `results.parquet`, those of any other stem `<stem>.results.parquet`.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    results = "results.parquet" if stem == "run" else f"{stem}.results.parquet"
    with (
        replacing(folder / f"{stem}.trec") as trec_path,
        replacing(folder / results) as results_path,
        trec_path.open("w", encoding="utf-8", newline="\n") as trec,
        pq.ParquetWriter(results_path, RESULTS_SCHEMA, compression="zstd") as table,
    ):
        rows: dict[str, list[object]] = {name: [] for name in RESULTS_SCHEMA.names}

        def flush() -> None:
            table.write_table(pa.table(rows, schema=RESULTS_SCHEMA))
            for column in rows.values():
                column.clear()

        def write(ranking: Ranking) -> None:
            for entry in ranking.entries:
                line = RunLine(ranking.qid, entry.docid, entry.rank, entry.score, tag)
                trec.write(f"{line}\n")
                rows["qid"].append(ranking.qid)
                for name in RESULTS_SCHEMA.names[1:]:
                    rows[name].append(getattr(entry, name))
            if len(rows["qid"]) >= RESULT_ROWS:
                flush()

        yield write
        flush()


@contextmanager
def quarantine_writer(folder: Path) -> Iterator[Callable[[Refusal], None]]:
    """Publish `quarantine.parquet` when the block ends; without refusals there is none.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    path = folder / "quarantine.parquet"
    count = 0
    with (
        replacing(path) as temporary,
        pq.ParquetWriter(temporary, QUARANTINE_SCHEMA, compression="zstd") as table,
    ):
        waiting: list[Refusal] = []

        def flush() -> None:
            columns = {
                name: [getattr(refusal, name) for refusal in waiting]
                for name in QUARANTINE_SCHEMA.names
            }
            table.write_table(pa.table(columns, schema=QUARANTINE_SCHEMA))
            waiting.clear()

        def write(refusal: Refusal) -> None:
            nonlocal count
            count += 1
            waiting.append(refusal)
            if len(waiting) >= REFUSAL_ROWS:
                flush()

        yield write
        flush()
    if count == 0:
        path.unlink()
