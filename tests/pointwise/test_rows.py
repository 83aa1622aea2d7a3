import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dear_batch.pointwise.recipe import EncodedPair
from dear_batch.pointwise.rows import (
    Batch,
    Layout,
    PackedArrays,
    batches,
    pack,
    packed_arrays,
    padded_arrays,
    smaller,
)

ROW = 24


def pair(prefix: list[int], document: list[int]) -> EncodedPair:
    return EncodedPair(np.array(prefix, np.int32), np.array(document, np.int32), truncated=False)


PREFIXES = st.sampled_from([[1, 5], [1, 6, 7], [1, 8, 8, 8, 8]])
PAIRS = st.lists(
    st.builds(pair, PREFIXES, st.lists(st.integers(10, 99), min_size=1, max_size=ROW - 5)),
    min_size=1,
    max_size=40,
)


@settings(deadline=None)
@given(PAIRS)
def test_every_document_once_and_never_over_budget(pairs: list[EncodedPair]) -> None:
    rows = pack(pairs, ROW)
    placed = [d for row in rows for group in row.groups for d in group.documents]
    assert sorted(placed) == list(range(len(pairs)))
    for row in rows:
        tokens = 0
        for group in row.groups:
            assert {pairs[d].prefix_ids.tobytes() for d in group.documents} == {group.prefix}
            tokens += len(pairs[group.documents[0]].prefix_ids)
            tokens += sum(len(pairs[d].document_ids) for d in group.documents)
        assert tokens == row.tokens <= ROW
        assert len({group.prefix for group in row.groups}) == len(row.groups)


def ends(batch: Batch, arrays: PackedArrays) -> list[tuple[int, int]]:
    """Row and place of the last token of each document."""
    assert arrays.pooled_RP.shape == (len(batch.rows), max(batch.counts))
    rows = zip(arrays.pooled_RP, batch.counts, strict=True)
    return [(r, int(t)) for r, (ends_P, count) in enumerate(rows) for t in ends_P[:count]]


@settings(deadline=None)
@given(PAIRS, st.sampled_from([ROW, 2 * ROW, 5 * ROW]))
def test_arrays_hold_each_pair_as_if_it_were_alone(pairs: list[EncodedPair], budget: int) -> None:
    """What a pooled token sees through the mask is its pair, in order, at positions 0…n-1."""
    seen: list[int] = []
    for batch in batches(pairs, Layout(True, ROW, budget)):
        assert len(batch.rows) * batch.length <= budget
        arrays = packed_arrays(batch, pad_id=0)
        for document, (r, t) in zip(batch.documents, ends(batch, arrays), strict=True):
            groups, segments = arrays.groups_RT[r], arrays.segments_RT[r]
            visible = (groups == groups[t]) & ((segments == 0) | (segments == segments[t]))
            visible &= np.arange(batch.length) <= t
            expected = pairs[document].input_ids()
            np.testing.assert_array_equal(arrays.tokens_RT[r][visible], expected)
            np.testing.assert_array_equal(arrays.positions_RT[r][visible], range(len(expected)))
        padding = arrays.groups_RT == -1
        assert np.all(arrays.tokens_RT[padding] == 0)
        assert batch.tokens == int((~padding).sum())
        seen += batch.documents
    assert sorted(seen) == list(range(len(pairs)))


@settings(deadline=None)
@given(PAIRS)
def test_the_plan_is_a_pure_function(pairs: list[EncodedPair]) -> None:
    layout = Layout(True, ROW, 2 * ROW)
    assert [b.rows for b in batches(pairs, layout)] == [b.rows for b in batches(pairs, layout)]


@given(PAIRS, st.sampled_from([None, 30]))
@settings(deadline=None)
def test_unpacked_batches_hold_one_pair_a_row(pairs: list[EncodedPair], length: int | None) -> None:
    found: dict[int, list[int]] = {}
    for batch in batches(pairs, Layout(False, ROW, 3 * 30, length)):
        input_ids_RT, attention_mask_RT = padded_arrays(batch, pad_id=0)
        assert input_ids_RT.shape == (len(batch.rows), length or batch.length)
        for n, d in enumerate(batch.documents):
            found[d] = input_ids_RT[n, attention_mask_RT[n] == 1].tolist()
    assert found == {i: p.input_ids().tolist() for i, p in enumerate(pairs)}


def test_best_fit_fills_the_tightest_gap_and_shares_prefixes() -> None:
    a, b = [1, 2], [1, 3, 4]
    pairs = [pair(a, [9] * 15), pair(a, [9] * 10), pair(b, [9] * 4), pair(b, [9] * 9)]
    rows = pack(pairs, ROW)
    # A's documents do not fit together (2 + 15 + 10); each opens a row, with 7 and 12 left.
    # B's longer one (3 + 9) fits the 12 exactly, its shorter one (3 + 4) the 7 exactly.
    assert [[group.documents for group in row.groups] for row in rows] == [[[0], [2]], [[1], [3]]]
    assert [row.tokens for row in rows] == [24, 24]


def test_a_pair_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="25 tokens in rows of 24"):
        pack([pair([1], [9] * 24)], ROW)


LENGTHS: dict[str, Callable[[np.random.Generator, int], Any]] = {
    "passages": lambda rng, n: rng.gamma(4.0, 20.0, n).clip(8, 190),
    "snippets": lambda rng, n: rng.integers(5, 20, n),
    "articles": lambda rng, n: np.where(rng.random(n) < 0.7, 196, rng.integers(20, 196, n)),
}


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(sorted(LENGTHS)),
    st.integers(0, 2**32 - 1),
    st.integers(2, 20),
    st.integers(20, 100),
    st.sampled_from([Layout(True, 1024, 16384), Layout(True, 512, 512)]),
)
def test_padding_of_realistic_lengths_stays_below_2_percent(
    kind: str, seed: int, queries: int, documents: int, layout: Layout
) -> None:
    rng = np.random.default_rng(seed)
    pairs = [
        pair([1] * rng.integers(6, 30) + [q], [9] * int(n))
        for q in range(2, 2 + queries)
        for n in LENGTHS[kind](rng, documents)
    ]
    planned = list(batches(pairs, layout))
    assert sorted(d for b in planned for d in b.documents) == list(range(len(pairs)))
    assert all(len(b.rows) * b.length <= layout.batch_tokens for b in planned)
    computed = sum(len(b.rows) * b.length for b in planned)
    assert sum(b.tokens for b in planned) > 0.98 * computed


def test_rows_are_full() -> None:
    rng = np.random.default_rng(0)
    pairs = [
        pair([1, q, q], [9] * int(n))
        for q in range(2, 22)
        for n in rng.gamma(4.0, 20.0, 100).clip(8, 220)
    ]
    for row_tokens in (512, 1024):
        rows = pack(pairs, row_tokens)
        assert sum(row.tokens for row in rows) / (row_tokens * len(rows)) > 0.98


def test_a_long_list_is_packed_in_a_moment() -> None:
    """Finding a place for a document must not look at all rows of its query."""
    rng = np.random.default_rng(1)
    pairs = [pair([1, 2, 3], [9] * int(n)) for n in rng.integers(20, 200, 50_000)]
    start = time.perf_counter()
    rows = pack(pairs, 512)
    assert time.perf_counter() - start < 5  # half a second; looking at all takes minutes
    assert sum(len(row.groups[0].documents) for row in rows) == len(pairs)


@settings(deadline=None)
@given(PAIRS, st.booleans(), st.integers(1, 6 * ROW), st.sampled_from([None, 30]))
def test_smaller_parts_hold_the_same_documents(
    pairs: list[EncodedPair], packed: bool, most: int, length: int | None
) -> None:
    fixed = None if packed else length
    for batch in batches(pairs, Layout(packed, ROW, 5 * ROW, fixed)):
        parts = smaller(batch, most, fixed)
        found = [d for part in parts for d in part.documents]
        assert sorted(found) == sorted(batch.documents)
        for part in parts:
            assert len(part.rows) * part.length <= most or len(part.documents) == 1
            assert part.length == fixed or part.length == max(row.tokens for row in part.rows)
            for row in part.rows:
                alone = pack([pairs[d] for g in row.groups for d in g.documents], 100 * ROW)
                assert row.tokens == sum(other.tokens for other in alone)
        if len(batch.rows) * batch.length <= most:
            assert parts == [batch]
