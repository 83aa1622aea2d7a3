"""What stage 1 leaves for stage 2: the ranking of every query, with the text of its top.

One row a query in the order of the run. A part is written whole or not at all, and read back
in bounded memory. Knows nothing of models or of the job around it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dear_batch.data import Ranked, RankedList, Ranking
from dear_batch.files.durable import replacing
from dear_batch.files.pages import batch_rows, decoded, open_parquet

SCHEMA_VERSION = "1"
GROUP_BYTES = 8 << 20  # as `list_size` counts
GROUP_LISTS = 4096
CANDIDATE_BYTES = 200  # beside its text: ids and numbers, roughly
_RANKED: dict[str, Any] = {
    "docid": pa.string(),
    "rank": pa.int32(),
    "score": pa.float32(),
    "logit": pa.float32(),
    "first_score": pa.float64(),
    "first_rank": pa.int32(),
}
_CANDIDATE: dict[str, Any] = {**_RANKED, "title": pa.string(), "text": pa.string()}
PART_SCHEMA = pa.schema(
    {
        "qid": pa.string(),
        "query": pa.string(),
        "candidates": pa.list_(pa.struct(list(_CANDIDATE.items()))),
    },
    metadata={"schema_version": SCHEMA_VERSION},
)


@contextmanager
def part_writer(path: Path) -> Iterator[Callable[[RankedList], None]]:
    """Write a part that appears when the block ends, in row groups of about 8 MB.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    with (
        replacing(path) as temporary,
        pq.ParquetWriter(
            temporary, PART_SCHEMA, compression="zstd", write_page_checksum=True
        ) as table,
    ):
        group, size = list[RankedList](), 0

        def flush() -> None:
            nonlocal size
            rows = [_row(item) for item in group]
            table.write_table(pa.Table.from_pylist(rows, schema=PART_SCHEMA))
            group.clear()
            size = 0

        def write(item: RankedList) -> None:
            nonlocal size
            group.append(item)
            size += list_size(item)
            if size >= GROUP_BYTES or len(group) >= GROUP_LISTS:
                flush()

        yield write
        flush()


def list_size(item: RankedList) -> int:
    """Roughly the bytes of a list; candidates below the passages count too."""
    text = sum(len(title) + len(text) for title, text in item.passages)
    return text + CANDIDATE_BYTES * len(item.ranking.entries)


def _row(item: RankedList) -> dict[str, object]:
    entries = item.ranking.entries
    below = [(None, None)] * (len(entries) - len(item.passages))
    candidates = [
        {**{name: getattr(entry, name) for name in _RANKED}, "title": title, "text": text}
        for entry, (title, text) in zip(entries, [*item.passages, *below], strict=True)
    ]
    return {"qid": item.ranking.qid, "query": item.query, "candidates": candidates}


def read_part(path: Path) -> Iterator[RankedList]:
    """The lists of a part in order.

    Raises:
        InputError: the part cannot be read.
    """
    with pq.ParquetFile(path) as file:
        if file.metadata.num_rows == 0:  # every query was set aside
            return
    with open_parquet(path) as source:
        leaves = [source.schema.column(i).path for i in range(len(source.schema))]
        for batch in decoded(source, str(path), leaves, batch_rows(source, leaves)):
            yield from _lists(batch)


def _lists(batch: pa.RecordBatch) -> Iterator[RankedList]:
    qids, queries = (cast("list[str]", batch.column(name).to_pylist()) for name in ("qid", "query"))
    column: Any = batch.column("candidates")
    lengths = pc.list_value_length(column).to_pylist()
    inner = column.flatten()
    fields = (pc.struct_field(inner, name).to_pylist() for name in _CANDIDATE)
    candidates = zip(*fields, strict=True)
    for qid, query, length in zip(qids, queries, lengths, strict=True):
        members = list(islice(candidates, length))
        entries = tuple(Ranked(*member[:-2]) for member in members)
        passages = tuple((title, text) for *_, title, text in members if text is not None)
        yield RankedList(query, Ranking(qid, entries), passages)
