"""Foreign formats as columns: JSON Lines, JSON arrays, TREC runs, Parquet with other names.

Each reader streams and names the file and line (or item) of what it cannot read. Knows
nothing of what the columns are for: a `Field` says under which names one may be found.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from dear_batch.errors import InputError
from dear_batch.files.columns import IDENTIFIER, SCORE, TEXT, Kind, check_type, missing_columns
from dear_batch.files.json_files import Record, json_lines, opened
from dear_batch.files.pages import batch_rows, decoded, open_parquet

_BATCH_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Field:
    """A column, the names under which sources have it, and whether they must."""

    name: str
    kind: Kind
    keys: tuple[str, ...]
    required: bool = True

    @property
    def type(self) -> Any:
        """The Arrow type of the column."""
        return pa.float64() if self.kind is SCORE else pa.string()


def schema_of(fields: Sequence[Field]) -> pa.Schema:
    """The Arrow schema of a batch with these columns."""
    return pa.schema([(field.name, field.type) for field in fields])


def field_batches(path: Path, fields: Sequence[Field]) -> Iterator[pa.RecordBatch]:
    """The columns of a `.parquet`, `.jsonl` or `.jsonl.gz` file.

    Raises:
        InputError: the file cannot be read, or a line lacks a key or has one of a wrong type.
    """
    if path.suffix == ".parquet":
        yield from _parquet_batches(path, fields)
        return
    rows = (
        tuple(value(record, field, f"{path}, line {line}") for field in fields)
        for line, record in json_lines(path)
    )
    yield from _batches(rows, schema_of(fields))


def _batches(rows: Iterator[tuple[Any, ...]], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    while held := list(islice(rows, _BATCH_ROWS)):
        columns = zip(*held, strict=True)
        arrays = [
            pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)
        ]
        yield pa.record_batch(arrays, schema=schema)


def _parquet_batches(path: Path, fields: Sequence[Field]) -> Iterator[pa.RecordBatch]:
    with open_parquet(path) as source:
        found = source.schema_arrow
        names = {f.name: next((k for k in f.keys if k in found.names), None) for f in fields}
        missing = ["/".join(f.keys) for f in fields if f.required and names[f.name] is None]
        if missing:
            raise missing_columns(missing, found.names, str(path), valid=_keys_of(fields))
        present = [(field, name) for field in fields if (name := names[field.name])]
        for field, name in present:
            check_type(found.field(name), field.kind, str(path))
        columns = [name for _, name in present]
        for batch in decoded(source, str(path), columns, batch_rows(source, columns)):
            yield _renamed(batch, fields, {f.name: n for f, n in present})


def _renamed(
    batch: pa.RecordBatch, fields: Sequence[Field], names: dict[str, str]
) -> pa.RecordBatch:
    arrays = [
        batch.column(names[field.name]).cast(field.type, safe=False)
        if field.name in names
        else pa.nulls(batch.num_rows, field.type)
        for field in fields
    ]
    return pa.record_batch(arrays, schema=schema_of(fields))


def _keys_of(fields: Iterable[Field]) -> str:
    return ", ".join("/".join(f.keys) + ("" if f.required else "?") for f in fields)


def value(record: Record, field: Field, where: str) -> str | float | None:
    """One value of a JSON record: a string (integers of identifiers included), number or null.

    Raises:
        InputError: the key is missing or its value has another type.
    """
    key = next((key for key in field.keys if key in record), None)
    if key is None:
        if not field.required:
            return None
        raise InputError(
            f"Missing key {'/'.join(field.keys)!r}.",
            where=f"{where}, which has: {', '.join(record) or 'no keys'}",
            next_step="rename the keys, or convert from the format that the file is in",
        )
    found = record[key]
    if isinstance(found, str) and field.kind is not SCORE:
        return _encodable(found)
    if isinstance(found, int) and not isinstance(found, bool) and field.kind is IDENTIFIER:
        return str(found)
    if isinstance(found, int | float) and not isinstance(found, bool) and field.kind is SCORE:
        with contextlib.suppress(OverflowError):  # an integer of hundreds of digits
            return float(found)
    if found is None:
        return None
    raise InputError(
        f"Key {key!r} holds a JSON {type(found).__name__}.",
        where=where,
        valid={SCORE: "a number", TEXT: "a string"}.get(field.kind, "a string or an integer"),
    )


def _encodable(text: str) -> str:
    """JSON may escape half a surrogate pair (cut emoji), which is no text: U+FFFD instead."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


_RUN_COLUMNS: list[tuple[str, Any]] = [
    ("qid", pa.string()),
    ("docid", pa.string()),
    ("rank", pa.int64()),
    ("score", pa.float64()),
]
RUN_SCHEMA = pa.schema(_RUN_COLUMNS)
_MAX_RANK = 2**63 - 1


def run_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The lines of a TREC run in file order, in batches of `RUN_SCHEMA`.

    Raises:
        InputError: the file cannot be read, or a line is no run line.
    """
    with opened(path) as file:
        lines = ((n, line) for n, line in enumerate(file, 1) if line.strip())
        parsed = (_run_line(line, f"{path}, line {n}") for n, line in lines)
        yield from _batches(parsed, RUN_SCHEMA)


def _run_line(line: bytes, where: str) -> tuple[str, str, int, float]:
    try:
        # Of bytes, split() knows ASCII white space alone: an id may hold other spaces.
        qid, _, docid, rank, score, _ = line.split()
        parsed = qid.decode(), docid.decode(), int(rank), float(score)
    except ValueError as error:
        raise _malformed(where, line) from error
    if not math.isfinite(parsed[3]) or abs(parsed[2]) > _MAX_RANK:
        raise _malformed(where, line)
    return parsed


def _malformed(where: str, line: bytes) -> InputError:
    return InputError(
        f"Not a line of a TREC run: {line[:200].decode(errors='replace').rstrip()!r}.",
        where=where,
        valid="six fields: qid Q0 docid rank score tag; rank an integer, score finite",
    )
