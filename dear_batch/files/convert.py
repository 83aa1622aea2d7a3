"""Candidate lists of other projects, converted to the nested layout in Parquet.

Bad values never cost good ones: a query without an id or text and a candidate without text
are written with nulls, which `run` sets aside with a reason, and are counted here. What
breaks the format itself (malformed JSON, missing keys) ends the conversion, and nothing is
written. Knows nothing of models or jobs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dear_batch.data import Candidate, CandidateList
from dear_batch.errors import InputError, UsageError
from dear_batch.files.columns import (
    IDENTIFIER,
    SCORE,
    TEXT,
    flat_batch,
    lists_from_flat,
)
from dear_batch.files.durable import scratch_folder
from dear_batch.files.json_files import Record, json_items
from dear_batch.files.parquet import write_lists
from dear_batch.files.regroup import by_first_appearance, connect, execute, load, save
from dear_batch.files.reorder import in_rank_order
from dear_batch.files.sources import RUN_SCHEMA, Field, field_batches, run_batches, schema_of, value

_BATCH_ROWS = 4096

_RANKGPT_QUERY = Field("query", TEXT, ("query",))
_RANKGPT_HIT = (
    Field("qid", IDENTIFIER, ("qid",)),
    Field("docid", IDENTIFIER, ("docid",)),
    Field("text", TEXT, ("content",)),
    Field("score", SCORE, ("score",), required=False),
)
_TEVATRON = (
    Field("qid", IDENTIFIER, ("query_id",)),
    Field("query", TEXT, ("query",)),
    Field("docid", IDENTIFIER, ("docid",)),
    Field("title", TEXT, ("title",), required=False),
    Field("text", TEXT, ("text",)),
    Field("score", SCORE, ("score",), required=False),
)
_QUERIES = (
    Field("qid", IDENTIFIER, ("_id", "qid", "query_id")),
    Field("query", TEXT, ("text", "query")),
)
_CORPUS = (
    Field("docid", IDENTIFIER, ("_id", "docid")),
    Field("title", TEXT, ("title",), required=False),
    Field("text", TEXT, ("text",)),
)


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written, and how much of it `run` will set aside.

    Attributes:
        queries: rows of `out`.
        candidates: candidates in all of them.
        missing_queries: queries without an id or without text.
        missing_documents: candidates without text.
        out: the file.
    """

    queries: int
    candidates: int
    missing_queries: int
    missing_documents: int
    out: Path


def convert_rankgpt(paths: Sequence[Path], out: Path) -> Converted:
    """Convert JSON arrays of {query, hits: [{content, qid, docid, score?}]}.

    The order is that of the hits, whatever their `rank` says. In this format the query's id
    stands in its hits: a query without hits has none, and is written with a null qid.

    Raises:
        InputError: a file cannot be read, is malformed, lacks keys, or holds nothing.
        OutputError: `out` cannot be written.
    """
    items = ((f"{path}, line {line}", item) for path in paths for line, item in json_items(path))
    lists = (_rankgpt_list(item, where, row) for row, (where, item) in enumerate(items))
    return _write(lists, paths, out)


def _rankgpt_list(item: Record, where: str, row: int) -> CandidateList:
    query: Any = value(item, _RANKGPT_QUERY, where)
    hits = item.get("hits")
    if not isinstance(hits, list) or not all(isinstance(hit, dict) for hit in hits):
        raise InputError(
            "A query has no list of hits.",
            where=f"{where}, which has: {', '.join(item) or 'no keys'}",
            valid='"hits": a list of objects, which may be empty',
        )
    read: list[list[Any]] = [
        [value(hit, field, f"{where}, hit {n}") for field in _RANKGPT_HIT]
        for n, hit in enumerate(hits, 1)
    ]
    qids = {qid for qid, *_ in read}
    if len(qids) > 1:
        raise InputError(
            f"The hits of one query have several qids: {sorted(map(str, qids))[:5]}.", where=where
        )
    candidates = (Candidate(docid or "", "", text, score) for _, docid, text, score in read)
    return CandidateList(next(iter(qids), None), query, tuple(candidates), row)


def convert_tevatron(paths: Sequence[Path], out: Path) -> Converted:
    """Convert JSON Lines, one a candidate: query_id, query, docid, title?, text, score?.

    The lines of a query may be scattered; they are brought together on disk. Candidates keep
    the order of their lines. Files may be `.jsonl`, `.jsonl.gz`, or `.parquet` with the same
    columns, and are read twice.

    Raises:
        InputError: a file cannot be read, is malformed, lacks keys, or holds nothing.
        OutputError: `out` cannot be written, or disk or memory do not suffice.
    """
    with scratch_folder(out) as scratch:
        qids = (batch.column("qid") for batch in _read(paths, _TEVATRON))
        rows = by_first_appearance(qids, _read(paths, _TEVATRON), scratch)
        return _write(lists_from_flat(rows, 0), paths, out)


def _read(paths: Sequence[Path], fields: Sequence[Field]) -> Iterator[pa.RecordBatch]:
    return chain.from_iterable(field_batches(path, fields) for path in paths)


def convert_beir(paths: Sequence[Path], out: Path) -> Converted:
    """Convert queries and a corpus in files of their own, joined to a TREC run.

    The first-stage order is that of evaluators: score descending, then the run's rank, then
    its line. A line whose document is not in the corpus stays, with a null text; one whose
    query is not there stays with a null query. Of an id that occurs twice in queries or
    corpus, the first counts.

    Args:
        paths: [folder, run] with `queries.jsonl` and `corpus.jsonl` in the folder; or
            [queries, corpus, run], the first two `.jsonl`, `.jsonl.gz` or `.parquet`.
        out: the file to write.

    Raises:
        UsageError: other paths than these.
        InputError: a file cannot be read, is malformed, lacks keys, or holds nothing.
        OutputError: `out` cannot be written, or disk or memory do not suffice.
    """
    queries, corpus, run = _beir_files(paths)
    with scratch_folder(out) as scratch:
        entries, slots = scratch / "entries.parquet", scratch / "slots.parquet"
        with connect(scratch) as connection:
            load(connection, "run", RUN_SCHEMA, run_batches(run))
            load(connection, "asked", schema_of(_QUERIES), field_batches(queries, _QUERIES))
            load(connection, "document", schema_of(_CORPUS[:1]), field_batches(corpus, _CORPUS[:1]))
            _save_order(connection, entries, slots)
        texts = in_rank_order(field_batches(corpus, _CORPUS), slots, scratch)
        return _write(lists_from_flat(_with_texts(entries, texts), 0), paths, out)


def _beir_files(paths: Sequence[Path]) -> tuple[Path, Path, Path]:
    if len(paths) == 2 and paths[0].is_dir():  # noqa: PLR2004
        return paths[0] / "queries.jsonl", paths[0] / "corpus.jsonl", paths[1]
    if len(paths) == 3:  # noqa: PLR2004
        return paths[0], paths[1], paths[2]
    raise UsageError(
        "convert beir takes FOLDER RUN, or QUERIES CORPUS RUN.",
        where=" ".join(map(str, paths)),
        valid="a folder with queries.jsonl and corpus.jsonl, and a TREC run; or the three files",
    )


# In steps, because operators of one query share the memory limit. Of repeated ids the first
# counts; positions stand for the texts, which DuckDB need not group.
_JOIN_STEPS = (
    "CREATE TABLE first AS SELECT qid, min(position) AS first FROM run GROUP BY qid",
    "CREATE TABLE chosen AS SELECT min(position) AS position FROM asked GROUP BY qid",
    "CREATE TABLE question AS SELECT qid, query FROM asked SEMI JOIN chosen USING (position)",
    "CREATE TABLE wanted AS SELECT DISTINCT docid FROM run",
    """CREATE TABLE source AS SELECT docid, min(position) AS source
    FROM document SEMI JOIN wanted USING (docid) GROUP BY docid""",
    "CREATE TABLE placed AS SELECT run.*, first FROM run JOIN first USING (qid)",
    """CREATE TABLE ranked AS SELECT qid, docid, score,
    row_number() OVER (ORDER BY first, score DESC, rank, position) - 1 AS rank FROM placed""",
    "CREATE TABLE found AS SELECT ranked.*, source FROM ranked LEFT JOIN source USING (docid)",
    "CREATE TABLE entry AS SELECT found.*, query FROM found LEFT JOIN question USING (qid)",
)


def _save_order(connection: duckdb.DuckDBPyConnection, entries: Path, slots: Path) -> None:
    """`entries`: the run in its final order; `slots`: which document goes to which entry."""
    for step in _JOIN_STEPS:
        execute(connection, step)
    save(connection, "SELECT * FROM entry ORDER BY rank", entries)
    found = "SELECT source AS position, rank FROM found WHERE source IS NOT NULL"
    save(connection, f"{found} ORDER BY position, rank", slots)


def _with_texts(entries: Path, texts: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The entries with title and text, which arrive in their order for those that have one."""
    held = pa.Table.from_batches([], pa.schema([("title", pa.string()), ("text", pa.string())]))
    with pq.ParquetFile(entries) as source:
        for batch in source.iter_batches(batch_size=_BATCH_ROWS):
            found_R = batch.column("source").is_valid().to_numpy(zero_copy_only=False)
            while held.num_rows < found_R.sum():
                held = pa.concat_tables([held, pa.table(next(texts).select(held.column_names))])
            at = pa.array(np.cumsum(found_R) - 1, mask=~found_R)
            joined = pa.table(batch.select(["qid", "query", "docid", "score"]))
            for name in held.column_names:
                joined = joined.append_column(name, held.column(name).take(at))
            held = held.slice(int(found_R.sum()))
            yield from map(flat_batch, joined.combine_chunks().to_batches())


@dataclass(slots=True)
class _Counts:
    queries: int = 0
    candidates: int = 0
    missing_queries: int = 0
    missing_documents: int = 0

    def counting(self, lists: Iterator[CandidateList]) -> Iterator[CandidateList]:
        for item in lists:
            self.queries += 1
            self.candidates += len(item.candidates)
            self.missing_queries += item.qid is None or item.query is None
            self.missing_documents += sum(c.text is None for c in item.candidates)
            yield item


def _write(lists: Iterator[CandidateList], paths: Sequence[Path], out: Path) -> Converted:
    counts = _Counts()
    first = next(lists, None)
    if first is None:
        raise InputError(
            "There is nothing to convert.",
            where=", ".join(map(str, paths)),
            valid="files with at least one query",
        )
    write_lists(counts.counting(chain([first], lists)), out)
    return Converted(
        queries=counts.queries,
        candidates=counts.candidates,
        missing_queries=counts.missing_queries,
        missing_documents=counts.missing_documents,
        out=out,
    )
