"""Parquet files of candidate lists as fuzz examples: drawn, written, and remembered row by row."""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from tests.fuzz.strategies import MEGABYTE, ids, raw, raw_texts, texts

STRINGS = ("string", "large_string", "string_view", "dictionary")
INTEGERS = ("int64", "int32", "int8", "uint64")
ID_KINDS = (*STRINGS * 3, *INTEGERS)
SCORE_KINDS = ("float64", "float32", "float16", "int64", "null")
WRONG = ("binary", "bool", "timestamp", "list", "decimal", "date", "fixed", "large_binary")
LISTS = ("list", "list", "large_list", "fixed_size_list")
FAULTS = ("drop", "double", "rename", "wrong")
DOCUMENT = ("docid", "title", "text", "score")
EXTRAS = (
    ("embedding", "list"),
    ("place", "int64"),
    ("candidates.text", "string"),
    ("candidates.list.element.docid", "string"),
    ("candidate", "string"),
    ("\u00e9 \0", "string"),
    ("", "string"),
    ("meta", "struct"),
)
Doc = tuple[bytes | None, bytes | None, bytes | None, float | None]  # docid, title, text, score


@dataclass(frozen=True)
class Fault:
    """Something about the columns that is not as it should be."""

    kind: str
    column: str
    wrong: str = "binary"


@dataclass(frozen=True)
class Row:
    """A list; `docs` None is a null list, a doc None a null struct."""

    qid: bytes | None
    query: bytes | None
    docs: tuple[Doc | None, ...] | None


@dataclass(frozen=True)
class Table:
    """One file. `long` makes the text of its first document a megabyte."""

    layout: str
    rows: tuple[Row, ...]
    kinds: dict[str, str] = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()
    extras: tuple[tuple[str, str], ...] = ()
    inner: tuple[tuple[str, str], ...] = ()
    lists: str = "list"
    options: dict[str, Any] = field(default_factory=dict)
    shuffle: int = 0
    long: bool = False

    def kind(self, column: str) -> str:
        return self.kinds.get(column, "float64" if column == "score" else "string")

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong with the file as such."""
        needed = [fault for fault in self.faults if fault.kind not in {"drop", "rename"}]
        needed += [fault for fault in self.faults if fault.column not in {"title", "score"}]
        # Arrow 26 then writes lists that it cannot read.
        small = self.options.get("use_dictionary") and self.options.get("data_page_size", 99) < 99
        odd = small or (
            self.layout == "nested" and any("candidates." in name for name, _ in self.extras)
        )
        return not needed and not odd and bool(self.records()) and self._is_text()

    def _is_text(self) -> bool:
        docs = [doc for record in self.records() for doc in record.docs if doc]
        values = [value for doc in docs for value in doc[:3]]
        values += [value for record in self.records() for value in (record.qid, record.query)]
        try:
            for value in values:
                (value or b"").decode()
        except UnicodeDecodeError:
            return False
        return True

    def lost(self, column: str) -> bool:
        return any(f.column == column and f.kind in {"drop", "rename"} for f in self.faults)

    def members(self, row: Row) -> tuple[Doc | None, ...]:
        """The documents of a row as they are written."""
        docs = row.docs or ()
        if self.layout == "nested" and self.lists == "fixed_size_list":
            docs = (*docs, *[None] * self.size)[: self.size] if row.docs is not None else ()
        return docs

    @property
    def size(self) -> int:
        """The length of lists of a fixed one."""
        return max(1, len(self.rows[0].docs or ())) if self.rows else 1

    def records(self) -> list["Record"]:
        """What the file holds, a record a document, also for a nested list without any."""
        found = list[Record]()
        for number, row in enumerate(self.rows):
            for doc in self.members(row):
                found.append(Record(number, row.qid, row.query, (doc,)))
            if self.layout == "nested" and not self.members(row):
                found.append(Record(number, row.qid, row.query, ()))
        if self.layout == "flat":
            found = [found[(i * (2 * self.shuffle + 1)) % len(found)] for i in _order(self, found)]
            found = [Record(i, r.qid, r.query, r.docs) for i, r in enumerate(found)]
        if self.long and found and found[0].docs and found[0].docs[0]:
            docid, title, text, score = found[0].docs[0]
            found[0].docs = ((docid, title, (text or b"x") * MEGABYTE, score),)
        return found

    def identifier(self, column: str, value: bytes | None) -> str | None:
        """An id as it is read."""
        if value is None or self.kind(column) not in INTEGERS:
            return None if value is None else value.decode()
        return str(_number(value))

    def write(self, path: Path) -> None:
        options = self.options
        if "string_view" in self.kinds.values():  # Arrow cannot cut such columns
            options = {**options, "row_group_size": 1000, "data_page_size": 1 << 20}
        pq.write_table(self._arrow(), path, **options)

    def _arrow(self) -> pa.Table:
        records = self.records()
        if self.layout == "flat":
            docs = [record.docs[0] or (None,) * 4 for record in records]
            columns = self._documents(docs)
            columns = self._queries([(r.qid, r.query) for r in records]) + columns
        else:
            columns = self._queries([(row.qid, row.query) for row in self.rows])
            columns.append(("candidates", self._lists()))
        rows = len(columns[0][1])
        columns += [(name, _extra(kind, rows)) for name, kind in self.extras]
        columns = self._faulty(columns)
        return pa.Table.from_arrays([a for _, a in columns], names=[n for n, _ in columns])

    def _queries(self, pairs: Sequence[tuple[bytes | None, bytes | None]]) -> list[Any]:
        return [
            ("qid", _array([qid for qid, _ in pairs], self.kind("qid"))),
            ("query", _array([query for _, query in pairs], self.kind("query"))),
        ]

    def _documents(self, docs: Sequence[Any]) -> list[Any]:
        return [
            (name, _array([doc[i] for doc in docs], self.kind(name)))
            for i, name in enumerate(DOCUMENT)
        ]

    def _lists(self) -> Any:
        found = [
            [doc for record in self.records() if record.row == n for doc in record.docs]
            for n in range(len(self.rows))
        ]
        if self.lists == "fixed_size_list":  # a null list has its room all the same
            found = [docs or [None] * self.size for docs in found]
        docs = [doc for some in found for doc in some]
        columns = self._faulty(self._documents([doc or (None,) * 4 for doc in docs]))
        columns += [(name, _extra(kind, len(docs))) for name, kind in self.inner]
        struct = pa.StructArray.from_arrays(
            [a for _, a in columns],
            fields=[pa.field(n, a.type) for n, a in columns],
            mask=pa.array([doc is None for doc in docs], pa.bool_()),
        )
        mask = pa.array([row.docs is None for row in self.rows], pa.bool_())
        if self.lists == "fixed_size_list":
            return pa.FixedSizeListArray.from_arrays(struct, self.size, mask=mask)
        offsets = [0]
        for row in self.rows:
            offsets.append(offsets[-1] + len(self.members(row)))
        if self.lists == "large_list":
            return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), struct, mask=mask)
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), struct, mask=mask)

    def _faulty(self, columns: list[Any]) -> list[Any]:
        for fault in self.faults:
            at = next((i for i, (name, _) in enumerate(columns) if name == fault.column), None)
            if at is None:
                continue
            name, array = columns[at]
            if fault.kind == "drop":
                del columns[at]
            elif fault.kind == "double":
                columns.append((name, array))
            elif fault.kind == "rename":
                columns[at] = (name.upper(), array)
            else:
                columns[at] = (name, _extra(fault.wrong, len(array)))
        return columns


@dataclass
class Record:
    """A document (or an empty list) and the row at which it stands."""

    row: int
    qid: bytes | None
    query: bytes | None
    docs: tuple[Doc | None, ...]


def _order(table: Table, found: Sequence[Any]) -> range | list[int]:
    """All rows once, in order unless they are scattered."""
    step = 2 * table.shuffle + 1
    return range(len(found)) if found and math.gcd(step, len(found)) == 1 else []


def _number(value: bytes) -> int:
    return zlib.crc32(value) % 100


def _array(values: Sequence[Any], kind: str) -> Any:
    """Bytes as a column of strings, whatever they are; scores as far as the type holds them."""
    if kind in INTEGERS:
        return pa.array([_whole(value) for value in values], pa.type_for_alias(kind))
    if kind == "null":
        return pa.nulls(len(values))
    if kind.startswith("float"):
        with np.errstate(over="ignore"):
            numbers = [None if v is None else np.dtype(kind).type(v) for v in values]
        return pa.array(numbers, pa.from_numpy_dtype(np.dtype(kind)))
    plain = {"large_string": pa.large_binary(), "string_view": pa.binary_view()}
    found = pa.array(values, plain.get(kind, pa.binary()))
    if kind == "dictionary":
        coded = found.dictionary_encode()
        return pa.DictionaryArray.from_arrays(coded.indices, coded.dictionary.view(pa.string()))
    return found.view(
        {"large_string": pa.large_string(), "string": pa.string()}.get(kind, pa.string_view())
    )


def _whole(value: bytes | float | None) -> int | None:
    if isinstance(value, bytes):
        return _number(value)
    return int(value) if value is not None and abs(value) < 2**62 else None


def _extra(kind: str, rows: int) -> Any:
    """A column of nothing that we read."""
    types: dict[str, Any] = {
        "list": pa.list_(pa.float32()),
        "struct": pa.struct([("docid", pa.string()), ("text", pa.string())]),
        "binary": pa.binary(),
        "large_binary": pa.large_binary(),
        "fixed": pa.binary(4),
        "bool": pa.bool_(),
        "timestamp": pa.timestamp("us"),
        "date": pa.date32(),
        "decimal": pa.decimal128(9, 2),
        "string": pa.string(),
        "int64": pa.int64(),
    }
    values: dict[str, Any] = {"list": [0.5], "struct": {"docid": "x", "text": "y"}}
    return pa.array([values.get(kind)] * rows, types[kind])


def _docs() -> SearchStrategy[Doc]:
    scores = (
        st.none() | st.floats(-1e4, 1e4) | st.sampled_from([math.nan, math.inf, 1e300, 2.0**60])
    )
    docid = ids().map(raw) | st.none() | st.sampled_from([b"d\xff", b""])
    return st.tuples(
        st.one_of(*[ids().map(raw)] * 40, docid),
        st.none() | texts().map(raw),
        st.one_of(*[texts().map(raw)] * 40, st.none(), raw_texts()),
        scores,
    )


def _rows(layout: str) -> SearchStrategy[Row]:
    docs = st.lists(_docs() if layout == "flat" else _docs() | st.none(), max_size=6).map(tuple)
    return st.builds(
        Row,
        st.one_of(*[ids().map(raw)] * 40, st.none(), st.just(b"q\xff")),
        st.one_of(*[texts().map(raw)] * 40, st.none(), raw_texts()),
        docs if layout == "flat" else st.one_of(*[docs] * 9, st.none()),
    )


def _options() -> SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "compression": st.sampled_from(["none", "snappy", "zstd", "gzip", "lz4", "brotli"]),
            "row_group_size": st.sampled_from([1, 2, 3, 7, 1000]),
            "data_page_size": st.sampled_from([1, 64, 1 << 20]),
            "use_dictionary": st.booleans(),
            "data_page_version": st.sampled_from(["1.0", "2.0"]),
            "version": st.sampled_from(["1.0", "2.4", "2.6"]),
            "store_schema": st.booleans(),
            "write_page_checksum": st.booleans(),
            "use_compliant_nested_type": st.booleans(),
            "write_statistics": st.booleans(),
        }
    )


@st.composite
def tables(draw: st.DrawFn, layout: str | None = None) -> Table:
    """A file, most of them sound."""
    layout = layout or draw(st.sampled_from(["nested", "flat"]))
    columns = ["qid", "query", *DOCUMENT, *(["candidates"] if layout == "nested" else [])]
    text = st.sampled_from(STRINGS)
    identifier = st.sampled_from(ID_KINDS)
    faults = st.builds(
        Fault, st.sampled_from(FAULTS), st.sampled_from(columns), st.sampled_from(WRONG)
    )
    some = st.lists(st.sampled_from(EXTRAS), max_size=2, unique=True).map(tuple)
    return Table(
        layout=layout,
        rows=tuple(draw(st.lists(_rows(layout), max_size=8))),
        kinds={
            "qid": draw(identifier),
            "docid": draw(identifier),
            **{name: draw(text) for name in ("query", "title", "text")},
            "score": draw(st.sampled_from(SCORE_KINDS)),
        },
        faults=draw(st.one_of(*[st.just(())] * 20, st.tuples(faults), st.tuples(faults, faults))),
        extras=draw(st.one_of(*[st.just(())] * 3, some)),
        inner=draw(st.one_of(*[st.just(())] * 3, some)) if layout == "nested" else (),
        lists=draw(st.sampled_from(LISTS)),
        options=draw(_options()),
        shuffle=draw(st.integers(0, 3)),
        long=draw(st.integers(0, 40)) == 40,
    )
