"""What a job publishes: the TREC run, its results, transcripts and the quarantine.

Shards write transcripts and quarantine in parts of their own; at the end the parts of all
shards become one file each. Knows nothing of models.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dear_batch.data import Refusal, RunLine, Transcript
from dear_batch.files.parts import RANKED_SCHEMA, RERANKED_SCHEMA, read_batches, table_writer

SCHEMA_VERSION = "1"
_METADATA: dict[bytes | str, bytes | str] = {"schema_version": SCHEMA_VERSION}
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
TRANSCRIPTS_SCHEMA = pa.schema(_TRANSCRIPTS, metadata=_METADATA)
QUARANTINE_SCHEMA = pa.schema(_QUARANTINE, metadata=_METADATA)
RESULT_ROWS = 1 << 16
TRANSCRIPT_ROWS = 1 << 10
REFUSAL_ROWS = 1 << 12
_FORMAT_ROWS = 1 << 12  # lines of a run that are made at once


def _results_schema(schema: pa.Schema) -> pa.Schema:
    """The columns of a part that are published: its score is the run file's alone."""
    columns = [item for item in schema if item.name != "score"]
    return pa.schema(columns, metadata=_METADATA)


RESULTS_SCHEMA = _results_schema(RANKED_SCHEMA)
RERANKED_RESULTS_SCHEMA = _results_schema(RERANKED_SCHEMA)


def published_names(stem: str) -> dict[str, str]:
    """What the run, results and transcripts of an output are called: those of `run` are bare."""
    prefix = "" if stem == "run" else f"{stem}."
    return {
        "run": f"{stem}.trec",
        "results": f"{prefix}results.parquet",
        "transcripts": f"{prefix}transcripts.parquet",
    }


def merge_runs(
    parts: Iterable[Path], trec: Path, results: Path, schema: pa.Schema, tag: str
) -> Iterator[int]:
    """Write the run and the results of an output from its parts; yields the rows of each batch.

    Args:
        parts: in the order of the run.
        trec: the run file to write.
        results: the Parquet file to write.
        schema: of the results: `RESULTS_SCHEMA` or `RERANKED_RESULTS_SCHEMA`.
        tag: the last column of the run file.

    Raises:
        InputError: a part cannot be read.
    """
    with (
        trec.open("w", encoding="utf-8", newline="\n") as lines,
        _grouped_writer(results, schema, RESULT_ROWS) as add,
    ):
        for part in parts:
            for batch in read_batches(part):
                for start in range(0, batch.num_rows, _FORMAT_ROWS):
                    lines.writelines(_lines(batch.slice(start, _FORMAT_ROWS), tag))
                add(batch.select(schema.names))
                yield batch.num_rows


def _lines(batch: pa.RecordBatch, tag: str) -> Iterator[str]:
    columns = (batch.column(name).to_pylist() for name in ("qid", "docid", "rank", "score"))
    for qid, docid, rank, score in zip(*columns, strict=True):
        yield f"{RunLine(qid, docid, rank, score, tag)}\n"


def merge_tables(
    parts: Iterable[Path], path: Path, schema: pa.Schema, group_rows: int
) -> Iterator[int]:
    """Write one table from the tables of shards; yields the rows of each batch.

    Row groups hold `group_rows` rows, however the parts were cut.

    Raises:
        InputError: a part cannot be read.
    """
    with _grouped_writer(path, schema, group_rows) as add:
        for part in parts:
            for batch in read_batches(part):
                add(batch)
                yield batch.num_rows


@contextmanager
def _grouped_writer(
    path: Path, schema: pa.Schema, rows: int
) -> Iterator[Callable[[pa.RecordBatch], None]]:
    """Write batches in row groups of `rows` rows, whatever rows the batches have."""
    with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as table:
        held, count = list[pa.RecordBatch](), 0

        def add(batch: pa.RecordBatch) -> None:
            nonlocal count
            held.append(batch.cast(schema))
            count += batch.num_rows
            if count >= rows:
                flush(count // rows * rows)

        def flush(whole: int) -> None:
            nonlocal count
            both = pa.Table.from_batches(held, schema)
            table.write_table(both.slice(0, whole), row_group_size=rows)
            held[:] = both.slice(whole).to_batches()
            count -= whole

        yield add
        flush(count)


@contextmanager
def transcript_writer(path: Path) -> Iterator[Callable[[Transcript], None]]:
    """Write the transcripts of a shard; they appear when the block ends.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    with table_writer(path, TRANSCRIPTS_SCHEMA, TRANSCRIPT_ROWS) as add:

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
            names = TRANSCRIPTS_SCHEMA.names
            add(*([own[n] if n in own else getattr(answer, n)] for n in names))

        yield write


def write_quarantine(path: Path, refusals: Sequence[Refusal]) -> None:
    """Write the refusals of a shard.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    with table_writer(path, QUARANTINE_SCHEMA, REFUSAL_ROWS) as add:
        for start in range(0, len(refusals), REFUSAL_ROWS):
            some = refusals[start : start + REFUSAL_ROWS]
            add(*([getattr(refusal, n) for refusal in some] for n in QUARANTINE_SCHEMA.names))
