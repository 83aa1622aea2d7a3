"""Packs encoded pairs into rows: best fit, several queries a row, each query's prefix once.

A row `[prefix A | doc | doc | prefix B | doc]` with positions that restart after each prefix,
and a mask by which a token sees, causally, its own document and its prefix, gives the scores
of each pair alone. A padded batch is the special case of one document a row. Pure functions:
the same pairs give the same rows. Knows nothing of text, models or files.

Shapes: R rows of a batch, T tokens of its longest row, N documents of the batch, P of the row
that has the most.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from dear_batch.pointwise.recipe import EncodedPair

Array = NDArray[np.int32]
_ROOM = 32  # bits for the number of a row
# A packed row that is shorter than its batch by more than this share begins another batch: so no
# batch has more padding. Best fit leaves few such rows, but they are many in a small job.
SHORTER = 1 / 50


@dataclass(frozen=True, slots=True)
class Group:
    """Documents that share one prefix within a row; indices into the packed pairs."""

    prefix: bytes
    documents: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Row:
    """Groups side by side, `tokens` long in all (each prefix counted once)."""

    groups: tuple[Group, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class Layout:
    """How a scorer wants its batches laid out.

    `packed` rows hold many documents in at most `row_tokens`; other rows hold one each, all
    padded to `fixed_length` where that is given. A batch, padding included, stays within
    `batch_tokens` (a single row always passes), and has `most_rows` at most.
    """

    packed: bool
    row_tokens: int
    batch_tokens: int
    fixed_length: int | None = None
    most_rows: int | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that one scorer call takes, and the pairs they index.

    `documents` names, for each of the N scores, the pair it belongs to, row by row. `length`
    is T: what rows are padded to. No part of it has more rows than `most_rows`. `packed` is that
    of its layout.
    """

    pairs: Sequence[EncodedPair]
    rows: tuple[Row, ...]
    length: int
    most_rows: int | None = None
    packed: bool = False

    @property
    def documents(self) -> list[int]:
        """Indices of the N pairs in score order."""
        return [d for row in self.rows for group in row.groups for d in group.documents]

    @property
    def counts(self) -> list[int]:
        """How many documents each row has."""
        return [sum(len(group.documents) for group in row.groups) for row in self.rows]

    @property
    def tokens(self) -> int:
        """Real tokens of all rows, padding left out."""
        return sum(row.tokens for row in self.rows)


@dataclass(frozen=True, slots=True)
class PackedArrays:
    """The inputs of the packed graph (int32).

    tokens_RT, positions_RT; groups_RT: which prefix a token belongs to (-1: padding);
    segments_RT: 0 in a prefix, 1… in its documents; pooled_RP: where each document of a row ends,
    0 beyond its last one.
    """

    tokens_RT: Array
    positions_RT: Array
    groups_RT: Array
    segments_RT: Array
    pooled_RP: Array


class _OpenRow:
    """A row being filled; `room` is what is left of it, in tokens."""

    __slots__ = ("groups", "room")

    def __init__(self, room: int) -> None:
        self.room = room
        self.groups: dict[bytes, Group] = {}


class _ByRoom:
    """Numbers of rows ordered by the room that they have left, oldest first among equals."""

    def __init__(self) -> None:
        self._keys: list[int] = []  # the room above the number: half the time of pairs of both

    def tightest(self, need: int) -> int | None:
        """The row with the least room that still takes `need` tokens."""
        at = bisect_left(self._keys, need << _ROOM)
        return self._keys[at] & ((1 << _ROOM) - 1) if at < len(self._keys) else None

    def add(self, room: int, row: int) -> None:
        """Put a row in its place."""
        insort(self._keys, room << _ROOM | row)

    def remove(self, room: int, row: int) -> None:
        """Take a row out."""
        del self._keys[bisect_left(self._keys, room << _ROOM | row)]


def pack(pairs: Sequence[EncodedPair], row_tokens: int) -> list[Row]:
    """Lay all pairs into rows of at most `row_tokens`, longest document first.

    A document goes to the fullest row that already holds its prefix and takes it, else to
    the fullest row that takes prefix and document, else to a new row.

    Raises:
        ValueError: a pair is longer than `row_tokens`.
    """
    rows, everywhere = list[_OpenRow](), _ByRoom()
    for prefix, documents in _by_prefix(pairs).items():
        holding, prefix_tokens = _ByRoom(), len(pairs[documents[0]].prefix_ids)
        for index in sorted(documents, key=lambda d: (-len(pairs[d].document_ids), d)):
            need = len(pairs[index].document_ids)
            if need + prefix_tokens > row_tokens:
                raise ValueError(f"a pair of {need + prefix_tokens} tokens in rows of {row_tokens}")
            at = holding.tightest(need)
            if at is None:
                need += prefix_tokens
                at = everywhere.tightest(need)
                if at is None:
                    at = len(rows)
                    rows.append(_OpenRow(row_tokens))
                    everywhere.add(row_tokens, at)
                rows[at].groups[prefix] = Group(prefix)
            else:
                holding.remove(rows[at].room, at)
            everywhere.remove(rows[at].room, at)
            rows[at].room -= need
            rows[at].groups[prefix].documents.append(index)
            holding.add(rows[at].room, at)
            everywhere.add(rows[at].room, at)
    return [Row(tuple(row.groups.values()), row_tokens - row.room) for row in rows]


def _by_prefix(pairs: Sequence[EncodedPair]) -> dict[bytes, list[int]]:
    documents: dict[bytes, list[int]] = {}
    for index, pair in enumerate(pairs):
        documents.setdefault(pair.prefix_ids.tobytes(), []).append(index)
    return documents


def one_document_a_row(pairs: Sequence[EncodedPair]) -> list[Row]:
    """The unpacked form: a row for each pair."""
    return [
        Row((Group(pair.prefix_ids.tobytes(), [index]),), len(pair))
        for index, pair in enumerate(pairs)
    ]


def batches(pairs: Sequence[EncodedPair], layout: Layout) -> Iterator[Batch]:
    """Lay pairs into rows and group rows of like length into batches.

    Longest rows come first, so that memory peaks early.

    Raises:
        ValueError: a pair is longer than a packed row.
    """
    rows = pack(pairs, layout.row_tokens) if layout.packed else one_document_a_row(pairs)
    yield from _together(pairs, rows, layout)


def smaller(batch: Batch, most: int, fixed_length: int | None = None) -> list[Batch]:
    """A batch in parts of at most `most` tokens, padding included; one document always passes.

    Rows that are longer are split between their documents. A batch that is within it is the
    only part.
    """
    if len(batch.rows) * batch.length <= most:
        return [batch]
    rows = [part for row in batch.rows for part in _split(batch.pairs, row, most)]
    layout = Layout(batch.packed, most, most, fixed_length, batch.most_rows)
    return list(_together(batch.pairs, rows, layout))


def _split(pairs: Sequence[EncodedPair], row: Row, most: int) -> list[Row]:
    places = [(group.prefix, document) for group in row.groups for document in group.documents]
    if row.tokens <= most or len(places) == 1:
        return [row]
    middle = len(places) // 2
    halves = (_row(pairs, half) for half in (places[:middle], places[middle:]))
    return [part for half in halves for part in _split(pairs, half, most)]


def _row(pairs: Sequence[EncodedPair], places: list[tuple[bytes, int]]) -> Row:
    groups = tuple(
        Group(prefix, [document for _, document in members])
        for prefix, members in groupby(places, key=itemgetter(0))
    )
    prefixes = sum(len(pairs[group.documents[0]].prefix_ids) for group in groups)
    return Row(groups, prefixes + sum(len(pairs[d].document_ids) for _, d in places))


def _shortest_last(row: Row) -> int:
    return -row.tokens


def _together(pairs: Sequence[EncodedPair], rows: list[Row], layout: Layout) -> Iterator[Batch]:
    rows.sort(key=_shortest_last)
    start = 0
    while start < len(rows):
        length = layout.fixed_length or rows[start].tokens
        end = start + max(1, min(layout.batch_tokens // length, layout.most_rows or len(rows)))
        if layout.packed:
            least = (1 - SHORTER) * length
            end = bisect_right(rows, -least, start, min(end, len(rows)), key=_shortest_last)
        yield Batch(pairs, tuple(rows[start:end]), length, layout.most_rows, layout.packed)
        start = end


def packed_arrays(batch: Batch, pad_id: int) -> PackedArrays:
    """Lay a batch out for the packed graph."""
    shape = (len(batch.rows), batch.length)
    tokens_RT = np.full(shape, pad_id, np.int32)
    positions_RT = np.zeros(shape, np.int32)
    groups_RT = np.full(shape, -1, np.int32)
    segments_RT = np.zeros(shape, np.int32)
    pooled_RP = np.zeros((len(batch.rows), max(batch.counts)), np.int32)
    for r, row in enumerate(batch.rows):
        t = p = 0
        for g, group in enumerate(row.groups):
            prefix_ids = batch.pairs[group.documents[0]].prefix_ids
            pieces = [prefix_ids, *(batch.pairs[d].document_ids for d in group.documents)]
            for s, ids in enumerate(pieces):
                end = t + len(ids)
                first = 0 if s == 0 else len(prefix_ids)
                tokens_RT[r, t:end] = ids
                positions_RT[r, t:end] = np.arange(first, first + len(ids))
                groups_RT[r, t:end] = g
                segments_RT[r, t:end] = s
                if s > 0:
                    pooled_RP[r, p] = end - 1
                    p += 1
                t = end
    return PackedArrays(tokens_RT, positions_RT, groups_RT, segments_RT, pooled_RP)


def scores_of_documents(scores_RP: NDArray[np.float32], batch: Batch) -> NDArray[np.float32]:
    """What a packed graph found at pooled positions, as scores_N in the order of `documents`."""
    is_document_RP = np.arange(scores_RP.shape[1]) < np.array(batch.counts)[:, None]
    return scores_RP[: len(batch.rows)][is_document_RP]


def padded_arrays(batch: Batch, pad_id: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Lay an unpacked batch out, right padded: input_ids_RT, attention_mask_RT."""
    pairs = [batch.pairs[d] for d in batch.documents]
    input_ids_RT = np.full((len(pairs), batch.length), pad_id, np.int64)
    attention_mask_RT = np.zeros((len(pairs), batch.length), np.int64)
    for n, pair in enumerate(pairs):
        input_ids_RT[n, : len(pair)] = pair.input_ids()
        attention_mask_RT[n, : len(pair)] = 1
    return input_ids_RT, attention_mask_RT
