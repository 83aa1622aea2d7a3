"""Any Parquet file with rows: opened with checks, decoded in small batches.

Knows nothing of candidate lists. The checks read the footer alone; damage inside a page shows
when the page is decoded, by its checksum where the writer stored one.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dear_batch.errors import InputError

_MAGIC = b"PAR1"
_TAIL_BYTES = 8  # length of the footer, magic
_BATCH_BYTES = 4 << 20
# The footer counts encoded bytes: a passage that a dictionary page holds once may stand in
# thousands of rows. The second bound keeps such a batch small as well.
_BATCH_VALUES = 4096


def open_parquet(path: str | Path) -> pq.ParquetFile:
    """Open any Parquet file that has rows and whose data is all there.

    Raises:
        InputError: the file is missing, a folder, empty, cut, not Parquet or without rows.
    """
    try:
        size, head, tail = _ends(Path(path))
        if head[:4] == _MAGIC and tail[4:] != _MAGIC:
            raise unreadable(path, f"is cut: {size:,} bytes, and no Parquet footer at the end")
        if head[:4] != _MAGIC:
            raise unreadable(path, "is not a Parquet file")
        source = pq.ParquetFile(
            path, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True
        )
    except (pa.ArrowException, OSError) as error:
        raise unreadable(path, f"cannot be read ({error})") from error
    if source.metadata.num_rows == 0:
        raise unreadable(path, "has no rows")
    _check_whole(source.metadata, path, size - _TAIL_BYTES - int.from_bytes(tail[:4], "little"))
    return source


def _ends(path: Path) -> tuple[int, bytes, bytes]:
    """Size, first 4 bytes and last 8 of a file."""
    if not path.exists():
        raise unreadable(path, "does not exist")
    if path.is_dir():
        raise unreadable(path, "is a folder, not a file")
    size = path.stat().st_size
    if size == 0:
        raise unreadable(path, "is empty (0 bytes)")
    with path.open("rb") as file:
        head = file.read(4)
        file.seek(max(0, size - _TAIL_BYTES))
        return size, head, file.read(8)


def unreadable(path: str | Path, fault: str) -> InputError:
    """The error for a file that is no Parquet file with rows."""
    return InputError(
        f"{Path(path).name} {fault}.",
        where=str(path),
        valid="a complete Parquet file with at least one row",
        next_step="correct the path, copy the file again, or make one: "
        "dear-batch convert rankgpt|tevatron|beir IN -o OUT.parquet",
    )


def _check_whole(metadata: pq.FileMetaData, path: str | Path, footer_start: int) -> None:
    """Refuse an intact footer after cut data: a column chunk would reach into the footer."""
    for group in range(metadata.num_row_groups):
        chunks = metadata.row_group(group)
        for index in range(chunks.num_columns):
            chunk = chunks.column(index)
            offsets = (chunk.dictionary_page_offset, chunk.data_page_offset)
            end = min(o for o in offsets if o) + chunk.total_compressed_size
            if end > footer_start:
                fault = f"is cut: row group {group} should reach byte {end:,}, and data ends at"
                raise unreadable(path, f"{fault} byte {footer_start:,}")


def chunk_sizes(metadata: pq.FileMetaData, columns: Sequence[str]) -> list[tuple[int, int]]:
    """Values and uncompressed bytes of the chunks of `columns`."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    chunks = (group.column(i) for group in groups for i in range(group.num_columns))
    return [
        (chunk.num_values, chunk.total_uncompressed_size)
        for chunk in chunks
        if chunk.path_in_schema in columns
    ]


def batch_rows(source: pq.ParquetFile, columns: Sequence[str]) -> int:
    """Rows of about 4 MB, and of no more than 4,096 values a column on average."""
    n_rows = source.metadata.num_rows
    sizes = chunk_sizes(source.metadata, columns)
    row_bytes = sum(size for _, size in sizes) / n_rows
    row_values = sum(values for values, _ in sizes) / len(columns) / n_rows
    return max(1, int(min(_BATCH_BYTES / max(1, row_bytes), _BATCH_VALUES / row_values)))


def group_rows(source: pq.ParquetFile) -> tuple[int, ...]:
    """How many rows each row group has."""
    metadata = source.metadata
    return tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))


def decoded(
    source: pq.ParquetFile, path: str, columns: Sequence[str], rows: int, first_group: int = 0
) -> Iterator[pa.RecordBatch]:
    """Batches of at most `rows` rows from row group `first_group` on, checked to be well formed.

    Raises:
        InputError: a page cannot be decoded or holds text that is not UTF-8; names the row
            group and its rows.
    """
    starts = [0, *accumulate(group_rows(source))]
    for group in range(first_group, source.num_row_groups):
        left = starts[group + 1] - starts[group]
        try:
            # One group at a time, so that an error can name it.
            for batch in source.iter_batches(
                batch_size=rows, row_groups=[group], columns=list(columns)
            ):
                batch.validate(full=True)
                left -= batch.num_rows
                yield batch
            if left:  # Arrow 26 wrote such files, and reads them without a complaint
                raise pa.ArrowInvalid(f"{left:,} of its rows are not there")
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"Cannot decode {Path(path).name}: {error}.",
                where=f"{path}, row group {group}, "
                f"in rows {starts[group]} to {starts[group + 1] - 1}",
                next_step="the file is damaged: copy or write it again",
            ) from error
