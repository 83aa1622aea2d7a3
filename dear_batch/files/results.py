"""Writes what a job publishes: the TREC run, its results, transcripts and the quarantine.

Files appear under their names complete or not at all. Knows nothing of models.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dear_batch.data import Ranking, Refusal, RunLine, Transcript
from dear_batch.files.durable import replacing

SCHEMA_VERSION = "1"
_METADATA: dict[bytes | str, bytes | str] = {"schema_version": SCHEMA_VERSION}
_RESULTS: dict[str, Any] = {
    "qid": pa.string(),
    "docid": pa.string(),
    "rank": pa.int32(),
    "logit": pa.float32(),
    "first_score": pa.float64(),
    "first_rank": pa.int32(),
}
_RERANKED: dict[str, Any] = {
    **_RESULTS,
    "pointwise_rank": pa.int32(),
    "listwise_rank": pa.int32(),
    "window_status": pa.string(),
    "choice_logprob": pa.float32(),
}
_TRANSCRIPTS: dict[str, Any] = {
    "qid": pa.string(),
    "window": pa.int32(),
    "start": pa.int32(),
    "end": pa.int32(),
    "status": pa.string(),
    "detail": pa.string(),
    "prompt_sha256": pa.string(),
    "text": pa.string(),
    "order": pa.list_(pa.string()),
    "logprobs": pa.list_(pa.float32()),
    "prompt_tokens": pa.int64(),
    "answer_tokens": pa.int64(),
    "forwards": pa.int64(),
    "overruled": pa.int32(),
    "cut_passages": pa.int32(),
    "shortened_passages": pa.int32(),
    "neutralised_texts": pa.int32(),
}
_QUARANTINE: dict[str, Any] = {
    "reason": pa.string(),
    "detail": pa.string(),
    "path": pa.string(),
    "row_group": pa.int32(),
    "row": pa.int64(),
    "qid": pa.string(),
    "docid": pa.string(),
    "candidates": pa.int64(),
}
RESULTS_SCHEMA = pa.schema(_RESULTS, metadata=_METADATA)
RERANKED_SCHEMA = pa.schema(_RERANKED, metadata=_METADATA)
TRANSCRIPTS_SCHEMA = pa.schema(_TRANSCRIPTS, metadata=_METADATA)
QUARANTINE_SCHEMA = pa.schema(_QUARANTINE, metadata=_METADATA)
RESULT_ROWS = 1 << 16
TRANSCRIPT_ROWS = 1 << 10
REFUSAL_ROWS = 1 << 12

Write = Callable[[Ranking], None]


def published_names(stem: str) -> dict[str, str]:
    """What the run, results and transcripts of an output are called: those of `run` are bare."""
    prefix = "" if stem == "run" else f"{stem}."
    return {
        "run": f"{stem}.trec",
        "results": f"{prefix}results.parquet",
        "transcripts": f"{prefix}transcripts.parquet",
    }


@contextmanager
def run_writer(
    folder: Path, stem: str, tag: str, schema: pa.Schema = RESULTS_SCHEMA
) -> Iterator[Write]:
    """Publish a run and its results when the block ends; the run file comes last.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    names = published_names(stem)
    with (
        replacing(folder / names["run"]) as trec_path,
        _rows_writer(folder / names["results"], schema, RESULT_ROWS) as add,
        trec_path.open("w", encoding="utf-8", newline="\n") as trec,
    ):

        def write(ranking: Ranking) -> None:
            for entry in ranking.entries:
                line = RunLine(ranking.qid, entry.docid, entry.rank, entry.score, tag)
                trec.write(f"{line}\n")
                add(ranking.qid, *(getattr(entry, name) for name in schema.names[1:]))

        yield write


@contextmanager
def transcript_writer(folder: Path, stem: str) -> Iterator[Callable[[Transcript], None]]:
    """Publish the transcripts of an output when the block ends.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    path = folder / published_names(stem)["transcripts"]
    with _rows_writer(path, TRANSCRIPTS_SCHEMA, TRANSCRIPT_ROWS) as add:

        def write(transcript: Transcript) -> None:
            answer, window = transcript.permutation, transcript.permutation.window
            own = {
                "qid": window.qid,
                "window": transcript.number,
                "start": window.start,
                "end": window.end,
                "order": transcript.docids,
                "logprobs": [None if math.isnan(value) else value for value in answer.logprobs],
            }
            add(*(own[n] if n in own else getattr(answer, n) for n in TRANSCRIPTS_SCHEMA.names))

        yield write


@contextmanager
def quarantine_writer(folder: Path) -> Iterator[Callable[[Refusal], None]]:
    """Publish `quarantine.parquet` when the block ends; without refusals there is none.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    path = folder / "quarantine.parquet"
    count = 0
    with _rows_writer(path, QUARANTINE_SCHEMA, REFUSAL_ROWS) as add:

        def write(refusal: Refusal) -> None:
            nonlocal count
            count += 1
            add(*(getattr(refusal, name) for name in QUARANTINE_SCHEMA.names))

        yield write
    if count == 0:
        path.unlink()


@contextmanager
def _rows_writer(path: Path, schema: pa.Schema, group_rows: int) -> Iterator[Callable[..., None]]:
    """Publish a table row by row; no more than a row group of it is in memory."""
    with (
        replacing(path) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd") as table,
    ):
        columns: list[list[object]] = [[] for _ in schema.names]

        def flush() -> None:
            table.write_table(pa.table(dict(zip(schema.names, columns, strict=True)), schema))
            for column in columns:
                column.clear()

        def add(*values: object) -> None:
            for column, value in zip(columns, values, strict=True):
                column.append(value)
            if len(columns[0]) >= group_rows:
                flush()

        yield add
        flush()
