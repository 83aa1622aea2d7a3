"""What a shard leaves on the way to the outputs: its rankings, a row a candidate.

Columns are those of the published results, the score of the run file, and for a second stage
the query (on the first row of a list) and the text of the list's top. A part is written whole
or not at all, and read back in bounded memory. Knows nothing of models or of the job around it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dear_batch.data import Ranked, RankedList, Ranking
from dear_batch.files.durable import replacing
from dear_batch.files.pages import batch_rows, decoded, open_parquet

SCHEMA_VERSION = "2"
GROUP_BYTES = 8 << 20  # of text
GROUP_ROWS = 1 << 16
CANDIDATE_BYTES = 200  # beside its text: ids and numbers, roughly
_RANKED: dict[str, Any] = {
    "qid": pa.string(),
    "docid": pa.string(),
    "rank": pa.int32(),
    "score": pa.float32(),
    "logit": pa.float32(),
    "first_score": pa.float64(),
    "first_rank": pa.int32(),
}
_TEXTS: dict[str, Any] = {"query": pa.string(), "title": pa.string(), "text": pa.string()}
_RERANKED: dict[str, Any] = {
    "pointwise_rank": pa.int32(),
    "listwise_rank": pa.int32(),
    "window_status": pa.string(),
    "choice_logprob": pa.float32(),
}
_METADATA: dict[bytes | str, bytes | str] = {"schema_version": SCHEMA_VERSION}
RANKED_SCHEMA = pa.schema(_RANKED, metadata=_METADATA)
TEXT_SCHEMA = pa.schema({**_RANKED, **_TEXTS}, metadata=_METADATA)
RERANKED_SCHEMA = pa.schema({**_RANKED, **_RERANKED}, metadata=_METADATA)


@contextmanager
def table_writer(
    path: Path, schema: pa.Schema, group_rows: int = GROUP_ROWS
) -> Iterator[Callable[..., None]]:
    """Write a table that appears when the block ends, columns of rows at a time.

    The function that it yields takes a list of values for each column; no more than a row
    group is in memory.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    with (
        replacing(path) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd", write_page_checksum=True) as table,
    ):
        columns: list[list[Any]] = [[] for _ in schema.names]
        texts = [i for i, name in enumerate(schema.names) if name in {"query", "title", "text"}]
        size = 0

        def flush() -> None:
            nonlocal size
            table.write_table(pa.table(dict(zip(schema.names, columns, strict=True)), schema))
            for column in columns:
                column.clear()
            size = 0

        def add(*values: list[Any]) -> None:
            nonlocal size
            for column, more in zip(columns, values, strict=True):
                column.extend(more)
            size += sum(len(text or "") for i in texts for text in values[i])
            if size >= GROUP_BYTES or len(columns[0]) >= group_rows:
                flush()

        yield add
        flush()


@contextmanager
def part_writer(path: Path, schema: pa.Schema = RANKED_SCHEMA) -> Iterator[Callable[..., None]]:
    """Write a part of rankings: `write(ranking)`, or `write(ranking, query, passages)`.

    `passages` are (title, text) of the list's top, for `TEXT_SCHEMA`.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    names = [name for name in schema.names[1:] if name not in _TEXTS]
    with table_writer(path, schema) as add:

        def write(
            ranking: Ranking, query: str = "", passages: tuple[tuple[str, str], ...] = ()
        ) -> None:
            entries = ranking.entries
            columns = [[getattr(entry, name) for entry in entries] for name in names]
            if "text" in schema.names:
                below = [None] * (len(entries) - len(passages))
                columns += [
                    [query, *[None] * (len(entries) - 1)],
                    [*(title for title, _ in passages), *below],
                    [*(text for _, text in passages), *below],
                ]
            add([ranking.qid] * len(entries), *columns)

        yield write


def list_size(item: RankedList) -> int:
    """Roughly the bytes of a list; candidates below the passages count too."""
    text = sum(len(title) + len(text) for title, text in item.passages)
    return text + CANDIDATE_BYTES * len(item.ranking.entries)


def read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """All rows of a part in order, a few megabytes at a time.

    Raises:
        InputError: the part cannot be read.
    """
    with pq.ParquetFile(path) as file:
        if file.metadata.num_rows == 0:  # every query was set aside
            return
    with open_parquet(path) as source:
        leaves = [source.schema.column(i).path for i in range(len(source.schema))]
        yield from decoded(source, str(path), leaves, batch_rows(source, leaves))


def read_part(path: Path) -> Iterator[RankedList]:
    """The lists of a part with text in order.

    Raises:
        InputError: the part cannot be read.
    """
    rows = (row for batch in read_batches(path) for row in _rows(batch))
    for qid, members in groupby(rows, key=itemgetter(0)):
        found = list(members)
        entries = tuple(Ranked(*row[1:7]) for row in found)
        passages = tuple((title, text) for *_, title, text in found if text is not None)
        yield RankedList(found[0][7], Ranking(qid, entries), passages)


def _rows(batch: pa.RecordBatch) -> Iterator[tuple[Any, ...]]:
    return zip(*(column.to_pylist() for column in batch.columns), strict=True)
