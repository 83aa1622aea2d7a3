"""Arrow columns to candidate lists and back: which schemas are valid, and what they mean.

Two layouts carry the same thing. Nested: one row a query, `qid, query, candidates:
list<struct<docid, title?, text, score?>>`. Flat: one row a candidate, `qid, query, docid,
title?, text, score?`, the candidates of a query in contiguous rows. Knows nothing of files:
it is handed schemas and record batches.
"""

import difflib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter
from typing import Any, Literal, cast

import pyarrow as pa
import pyarrow.compute as pc

from dear_batch.data import Candidate, CandidateList
from dear_batch.errors import InputError

type_of = pa.types
Layout = Literal["nested", "flat"]

NESTED_FORM = "qid, query, candidates: list<struct<docid, title?, text, score?>>"
FLAT_FORM = "qid, query, docid, title?, text, score?"

FLAT_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("qid", "query", "docid", "title", "text")]
    + [("score", pa.float64())]
)
# Where a row stands in the user's files; only files that the job regrouped have it.
PLACE: "pa.Field[Any]" = pa.field("place", pa.int64())
_CANDIDATE_FIELDS = tuple(FLAT_SCHEMA.field(name) for name in ("docid", "title", "text", "score"))
NESTED_SCHEMA = pa.schema(
    [
        ("qid", pa.string()),
        ("query", pa.string()),
        ("candidates", pa.list_(pa.struct(_CANDIDATE_FIELDS))),
    ]
)


def _is_text(found: Any) -> bool:
    if isinstance(found, pa.DictionaryType):
        return _is_text(cast("Any", found).value_type)
    # A column of nulls alone has the type null in files written from data frames.
    return found in {pa.string(), pa.large_string(), pa.string_view(), pa.null()}


def _is_identifier(found: pa.DataType) -> bool:
    return _is_text(found) or bool(type_of.is_integer(found))


def _is_score(found: pa.DataType) -> bool:
    return bool(type_of.is_integer(found) or type_of.is_floating(found) or type_of.is_null(found))


def _is_struct_list(found: Any) -> bool:
    lists = (type_of.is_list, type_of.is_large_list, type_of.is_fixed_size_list)
    return any(test(found) for test in lists) and bool(type_of.is_struct(found.value_type))


@dataclass(frozen=True, slots=True)
class Kind:
    """What a column may hold: a test of the Arrow type, and the same in words."""

    accepts: Callable[[pa.DataType], bool]
    valid: str


IDENTIFIER = Kind(_is_identifier, "string (plain, large, view or dictionary) or integer")
TEXT = Kind(_is_text, "string (plain, large, view or dictionary)")
SCORE = Kind(_is_score, "integer or floating point")
_CANDIDATES = Kind(_is_struct_list, "list<struct<docid, title?, text, score?>>")

_QUERY_COLUMNS = {"qid": IDENTIFIER, "query": TEXT}
_DOCUMENT_COLUMNS = {"docid": IDENTIFIER, "text": TEXT}
_OPTIONAL = {"title": TEXT, "score": SCORE}


def layout_of(schema: pa.Schema, path: str) -> tuple[Layout, frozenset[str]]:
    """Which layout a schema is, and which of the optional `title` and `score` it has.

    Raises:
        InputError: a column is missing, occurs twice or has a type that cannot be read.
    """
    if "candidates" not in schema.names:
        _check(schema, _QUERY_COLUMNS | _DOCUMENT_COLUMNS, path)
        return "flat", _check(schema, _OPTIONAL, path, required=False)
    _check(schema, _QUERY_COLUMNS | {"candidates": _CANDIDATES}, path)
    _check_paths(schema.names, path)
    struct = schema.field("candidates").type.value_type
    _check(struct, _DOCUMENT_COLUMNS, path, within="candidates.")
    return "nested", _check(struct, _OPTIONAL, path, within="candidates.", required=False)


def _check_paths(names: list[str], path: str) -> None:
    """Parquet's own names of leaves do not tell a column with a dot from a field."""
    for name in names:
        if name.startswith("candidates."):
            raise InputError(
                f"Column {name!r} cannot be told from a field of 'candidates'.",
                where=path,
                valid=NESTED_FORM,
                next_step="drop or rename the column",
            )


def _check(
    fields: "Iterable[pa.Field[Any]]",
    kinds: dict[str, Kind],
    path: str,
    *,
    within: str = "",
    required: bool = True,
) -> frozenset[str]:
    """The columns of `kinds` that are there, all of them well typed."""
    found = list(fields)
    names = [field.name for field in found]
    missing = [name for name in kinds if name not in names]
    if required and missing:
        raise missing_columns(missing, names, path, within=within)
    for field in found:
        if field.name in kinds:
            check_type(field, kinds[field.name], path, within=within)
            _check_single(field.name, names, path)
    return frozenset(kinds).intersection(names)


def _check_single(name: str, names: list[str], path: str) -> None:
    if names.count(name) > 1:
        raise InputError(
            f"Column {name!r} occurs {names.count(name)} times.",
            where=path,
            valid="every column once",
            next_step="drop or rename the repeated columns",
        )


def check_type(field: "pa.Field[Any]", kind: Kind, path: str, *, within: str = "") -> None:
    """Refuse a column of another type.

    Raises:
        InputError: names the file, the column, its type and the valid ones.
    """
    if not kind.accepts(field.type):
        raise InputError(
            f"Column {within + field.name!r} has type {field.type}.",
            where=path,
            valid=kind.valid,
            next_step=f"cast {within + field.name!r} and write the file again",
        )


def missing_columns(
    missing: list[str], present: list[str], path: str, *, within: str = "", valid: str = ""
) -> InputError:
    """The error for columns that are not there, with the nearest names that are."""
    guesses = [guess for name in missing if (guess := _nearest(name, present))]
    hint = f" ({'; '.join(guesses)})" if guesses else ""
    wanted = ", ".join(within + name for name in missing)
    return InputError(
        f"Missing column{'s' if len(missing) > 1 else ''}: {wanted}{hint}.",
        where=f"{path}, which has: {', '.join(present) or 'no columns'}",
        valid=valid or f"{NESTED_FORM}; or, one row a candidate, {FLAT_FORM}",
        next_step=f"rename the columns, or dear-batch convert rankgpt|tevatron|beir {path} "
        "-o OUT.parquet",
    )


def _nearest(name: str, present: list[str]) -> str:
    lowered = {other.lower(): other for other in present}
    close = difflib.get_close_matches(name, lowered, n=1, cutoff=0.5)
    return f"is {lowered[close[0]]!r} meant as {name!r}?" if close else ""


def flat_batch(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The columns of `FLAT_SCHEMA` cast from a flat batch; optional ones missing become null.

    A column of places stays beside them.
    """
    columns = [_cast(batch, name) for name in FLAT_SCHEMA.names]
    flat = pa.record_batch(columns, schema=FLAT_SCHEMA)
    if PLACE.name not in batch.schema.names:
        return flat
    return flat.append_column(PLACE, batch.column(PLACE.name))


def _cast(columns: pa.RecordBatch | pa.StructArray, name: str) -> "pa.Array[Any]":
    wanted = FLAT_SCHEMA.field(name).type
    if isinstance(columns, pa.RecordBatch):
        found = columns.column(name) if name in columns.schema.names else None
    else:
        # struct_field, unlike StructArray.field, carries a null struct over to its fields.
        there = columns.type.get_field_index(name) >= 0
        found = pc.struct_field(columns, name) if there else None
    # Unsafe, because an integer score above 2^53 is rounded, not an error.
    return pa.nulls(len(columns), wanted) if found is None else found.cast(wanted, safe=False)


def lists_from_nested(batches: Iterable[pa.RecordBatch], first_row: int) -> Iterator[CandidateList]:
    """One list a row of nested batches, of which the first row is row `first_row`."""
    for batch in batches:
        qids, queries = (_cast(batch, name).to_pylist() for name in ("qid", "query"))
        column: Any = batch.column("candidates")
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_pylist()
        candidates = iter(_candidates(column.flatten()))
        rows = enumerate(zip(qids, queries, lengths, strict=True), first_row)
        for row, (qid, query, length) in rows:
            yield CandidateList(qid, query, tuple(islice(candidates, length)), row)
        first_row += batch.num_rows


def lists_from_flat(batches: Iterable[pa.RecordBatch], first_row: int) -> Iterator[CandidateList]:
    """One list a run of equal qids, over batches of `FLAT_SCHEMA`.

    Rows of a run whose query text differs from that of its first row become lists of their
    own, directly after it and with the same qid, so that whoever checks for repeated qids
    sees the conflict. Batches without places have those of their rows.
    """
    for qid, run in groupby(_flat_rows(batches, first_row), key=itemgetter(0)):
        by_query: dict[str | None, tuple[int, list[Candidate], array[int]]] = {}
        for _, query, candidate, row, place in run:
            if query not in by_query:
                by_query[query] = (row, [], array("q"))
            by_query[query][1].append(candidate)
            by_query[query][2].append(place)
        for query, (row, candidates, places) in by_query.items():
            yield CandidateList(qid, query, tuple(candidates), row, places)


def _flat_rows(
    batches: Iterable[pa.RecordBatch], first_row: int
) -> Iterator[tuple[str | None, str | None, Candidate, int, int]]:
    for batch in batches:
        qids, queries = (batch.column(name).to_pylist() for name in ("qid", "query"))
        rows = range(first_row, first_row + batch.num_rows)
        has_places = PLACE.name in batch.schema.names
        places = batch.column(PLACE.name).to_pylist() if has_places else rows
        yield from zip(qids, queries, _candidates(batch), rows, places, strict=True)
        first_row += batch.num_rows


def _candidates(columns: pa.RecordBatch | pa.StructArray) -> Iterator[Candidate]:
    fields = (_cast(columns, name).to_pylist() for name in ("docid", "title", "text", "score"))
    for docid, title, text, score in zip(*fields, strict=True):
        yield Candidate(docid or "", title or "", text, score)


def nested_batch(lists: list[CandidateList]) -> pa.RecordBatch:
    """One batch of `NESTED_SCHEMA`, a row a list."""
    offsets, members = [0], [c for item in lists for c in item.candidates]
    for item in lists:
        offsets.append(offsets[-1] + len(item.candidates))
    values: tuple[list[Any], ...] = (
        [c.docid for c in members],
        [c.title for c in members],
        [c.text for c in members],
        [c.first_score for c in members],
    )
    arrays = [pa.array(v, f.type) for v, f in zip(values, _CANDIDATE_FIELDS, strict=True)]
    struct = pa.StructArray.from_arrays(arrays, fields=list(_CANDIDATE_FIELDS))
    candidates = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), struct)
    qids = pa.array([item.qid for item in lists], pa.string())
    queries = pa.array([item.query for item in lists], pa.string())
    return pa.record_batch([qids, queries, candidates], schema=NESTED_SCHEMA)
