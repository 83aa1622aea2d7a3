"""Lists to blocks to scores, with a scorer that any misplaced token or score gives away."""

import threading
import time
from collections.abc import Iterator
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dear_batch.data import Candidate, CandidateList, Refusal
from dear_batch.files.places import Places
from dear_batch.pointwise.recipe import PairEncoder, recipe_from_tokenizer
from dear_batch.pointwise.rows import Batch, Layout, packed_arrays, padded_arrays
from dear_batch.pointwise.scorer import OneAtATime
from dear_batch.run import blocks as blocks_module
from dear_batch.run.admission import Admitted
from dear_batch.run.blocks import Work, ahead, blocks, score_block
from tests.conftest import collection_texts, tokenizer_of

READER = "dear-batch-reader"
TOKENIZER = tokenizer_of("llama31")
RECIPE = recipe_from_tokenizer(TOKENIZER, "readme", "last-token", bos_id=1, pad_id=2)
ENCODER = PairEncoder(TOKENIZER, RECIPE)
LAYOUTS = [
    Layout(packed=True, row_tokens=512, batch_tokens=512),
    Layout(packed=True, row_tokens=300, batch_tokens=1500),
    Layout(packed=False, row_tokens=228, batch_tokens=1000),
    Layout(packed=False, row_tokens=228, batch_tokens=1000, fixed_length=228),
]


def score_of(ids: NDArray[np.integer]) -> float:
    """A pure function of a pair's ids, exact in float32."""
    return float(crc32(ids.astype(np.int64).tobytes()) % (1 << 24))


class FakeScorer(OneAtATime):
    """Reads the arrays that a graph would get, and scores the ids that it finds there."""

    engine = "fake"
    device = "cpu"
    precision = "fp32"

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def score(self, batch: Batch) -> NDArray[np.float32]:
        read = self._packed if self.layout.packed else self._padded
        return np.array([score_of(ids) for ids in read(batch)], np.float32)

    def _packed(self, batch: Batch) -> Iterator[NDArray[np.integer]]:
        arrays = packed_arrays(batch, RECIPE.pad_id)
        places = (
            (r, int(arrays.pooled_RP[r, p])) for r, n in enumerate(batch.counts) for p in range(n)
        )
        for r, t in places:
            groups_T, segments_T = arrays.groups_RT[r], arrays.segments_RT[r]
            seen_T = (groups_T == groups_T[t]) & np.isin(segments_T, (0, segments_T[t]))
            order = np.argsort(arrays.positions_RT[r][seen_T])
            yield arrays.tokens_RT[r][seen_T][order]

    def _padded(self, batch: Batch) -> Iterator[NDArray[np.integer]]:
        input_ids_RT, attention_mask_RT = padded_arrays(batch, RECIPE.pad_id)
        for ids_T, mask_T in zip(input_ids_RT, attention_mask_RT, strict=True):
            yield ids_T[mask_T == 1]


def admitted(i: int, size: int) -> Admitted:
    texts = collection_texts()
    candidates = tuple(
        Candidate(f"d{i}-{k}", f"title {k}" if k % 2 else "", texts[(7 * i + k) % len(texts)], None)
        for k in range(size)
    )
    ranks = tuple(2 * k + 1 for k in range(size))  # as if every other candidate was set aside
    return admitted_list(f"q{i}", f"query number {i}", candidates, ranks)


def admitted_list(
    qid: str, query: str, candidates: tuple[Candidate, ...], ranks: tuple[int, ...]
) -> Admitted:
    read = CandidateList(qid, query, candidates, 0)
    return Admitted(qid, query, candidates, ranks, read, Places([]))


def refusal(i: int) -> Refusal:
    return Refusal("empty_query", "detail", "in.parquet", 0, i, f"bad{i}", None, 3)


def expected(item: Admitted, depth: int | None) -> list[float]:
    documents = [(c.title, c.text or "") for c in item.candidates[:depth]]
    (pairs,) = ENCODER.encode([(item.query, documents)])
    return [score_of(pair.input_ids()) for pair in pairs]


# Blocks.


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 6), max_size=20),
    st.integers(1, 12),
    st.integers(1, 5),
    st.sampled_from([None, 1, 3]),
)
def test_blocks_gather_whole_lists_in_order(
    sizes: list[int], block_pairs: int, lists_a_call: int, depth: int | None
) -> None:
    items = [admitted(i, size) if size else refusal(i) for i, size in enumerate(sizes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks_module, "BLOCK_PAIRS", block_pairs)
        patch.setattr(blocks_module, "ENCODE_LISTS", lists_a_call)
        found = list(blocks(items, ENCODER, depth))
    assert [a for b in found for a in b.lists] == [a for a in items if isinstance(a, Admitted)]
    assert [r for b in found for r in b.refusals] == [r for r in items if isinstance(r, Refusal)]
    for block in found:
        for item, pairs in zip(block.lists, block.pairs, strict=True):
            assert len(pairs) == len(item.candidates[:depth])
    counts = [sum(map(len, block.pairs)) for block in found]
    assert all(count >= block_pairs for count in counts[:-1])
    # Bounded: a block goes over by what one tokenizer call adds, at most.
    assert all(count < block_pairs + 6 * lists_a_call for count in counts)


def test_without_items_there_is_no_block() -> None:
    assert list(blocks([], ENCODER, None)) == []


def test_refusals_alone_still_reach_the_writer() -> None:
    (block,) = blocks([refusal(1), refusal(2)], ENCODER, None)
    assert (block.lists, block.refusals) == ((), (refusal(1), refusal(2)))
    assert score_block(block, FakeScorer(LAYOUTS[0]), Work()) == []


# Scores.


@pytest.mark.parametrize("layout", LAYOUTS, ids=["one row", "rows", "padded", "fixed"])
@pytest.mark.parametrize("depth", [None, 4])
def test_scores_land_on_their_documents(layout: Layout, depth: int | None) -> None:
    items = [admitted(i, size) for i, size in enumerate((9, 1, 4, 30, 2))]
    (block,) = blocks(items, ENCODER, depth)
    found = score_block(block, FakeScorer(layout), Work())
    assert [scored.qid for scored in found] == [item.qid for item in items]
    for scored, item in zip(found, items, strict=True):
        logits = [c.logit for c in scored.candidates]
        head = expected(item, depth)
        assert logits == [*head, *[None] * (len(item.candidates) - len(head))]
        assert [c.docid for c in scored.candidates] == [c.docid for c in item.candidates]
        assert tuple(c.first_rank for c in scored.candidates) == item.first_ranks
    assert len({c.logit for scored in found for c in scored.candidates if c.logit}) > 14


def test_the_work_is_counted() -> None:
    texts = (" ".join(collection_texts()[k : k + 9]) for k in range(2))
    long = tuple(Candidate(f"long{k}", "", text, None) for k, text in enumerate(texts))
    items = [admitted(0, 3), admitted_list("q", "who?", long, (1, 2))]
    (block,) = blocks(items, ENCODER, None)
    assert [pair.truncated for pair in block.pairs[1]] == [True, True]
    padded, packed = Work(), Work()
    score_block(block, FakeScorer(LAYOUTS[3]), padded)
    score_block(block, FakeScorer(LAYOUTS[0]), packed)
    pairs = [pair for pairs in block.pairs for pair in pairs]
    assert padded.pairs == packed.pairs == 5
    assert padded.truncated_pairs == sum(pair.truncated for pair in pairs)
    assert padded.truncated_pairs >= 2
    assert padded.tokens == sum(map(len, pairs))
    assert padded.computed_tokens == 5 * 228
    assert packed.tokens < padded.tokens  # a shared prefix is counted once
    assert packed.tokens <= packed.computed_tokens


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=["rows", "padded", "fixed"])
def test_where_memory_runs_out_the_backoffs_are_counted(layout: Layout) -> None:
    class Small(FakeScorer):
        def score(self, batch: Batch) -> NDArray[np.float32]:
            if len(batch.rows) * batch.length > 400:
                raise MemoryError
            return super().score(batch)

    items = [admitted(i, 6) for i in range(5)]
    (block,) = blocks(items, ENCODER, None)
    work, shares = Work(), list[float]()
    found = score_block(block, Small(layout), work, shares.append)
    assert [[c.logit for c in scored.candidates] for scored in found] == [
        expected(item, None) for item in items
    ]
    assert work.memory_backoffs > 0
    assert work.pairs == 30
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_copies_are_scored_once_and_counted_each() -> None:
    text = collection_texts()[0]
    copies = tuple(Candidate(f"d{k}", "", text if k % 2 else f"{text} {k}", None) for k in range(8))
    item = admitted_list("q", "who?", copies, tuple(range(1, 9)))
    (block,) = blocks([item], ENCODER, None)
    work, shares = Work(), list[float]()
    (scored,) = score_block(block, FakeScorer(LAYOUTS[3]), work, shares.append)
    assert [c.logit for c in scored.candidates] == expected(item, None)
    assert (work.pairs, work.computed_tokens) == (8, 5 * 228)
    assert shares == sorted(shares)
    assert 0 < shares[-1] <= 1


def test_copies_are_scored_once_and_tie_exactly() -> None:
    text = Candidate("a", "", collection_texts()[0], None)
    copies = tuple(Candidate(f"d{i}", "", text.text, None) for i in range(4))
    (block,) = blocks(
        [admitted_list("q", "who?", (*copies, *admitted(0, 3).candidates), tuple(range(1, 8)))],
        ENCODER,
        None,
    )
    work = Work()
    shares: list[float] = []
    (scored,) = score_block(block, FakeScorer(LAYOUTS[3]), work, shares.append)
    assert len({c.logit for c in scored.candidates[:4]}) == 1
    distinct = {pair.input_ids().tobytes(): len(pair) for pair in block.pairs[0]}
    assert work.pairs == 7
    assert work.tokens == sum(distinct.values())
    assert len(distinct) < 7


# Reading ahead.


def readers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(READER)]


def test_ahead_keeps_order_and_ends() -> None:
    assert list(ahead(iter(range(100)))) == list(range(100))
    assert list(ahead([])) == []
    assert list(ahead([None, False, 0])) == [None, False, 0]  # nothing is taken for the end
    assert readers() == []


def test_ahead_works_while_the_consumer_does() -> None:
    reached = threading.Event()

    def produce() -> Iterator[int]:
        for i in range(5):
            if i == 2:
                reached.set()
            yield i

    stream = ahead(produce())
    assert next(stream) == 0
    assert reached.wait(10)  # nobody asked for item 2 yet
    assert list(stream) == [1, 2, 3, 4]


def test_ahead_holds_no_more_than_its_depth() -> None:
    produced: list[int] = []
    stream = ahead((produced.append(i) or i for i in range(50)), depth=3)
    for consumed, _ in enumerate(stream, start=1):
        time.sleep(0.001)
        assert len(produced) <= consumed + 3


def test_ahead_raises_what_the_producer_raised_after_the_items_before_it() -> None:
    def produce() -> Iterator[int]:
        yield 1
        yield 2
        raise KeyError("row 7")

    got: list[int] = []
    with pytest.raises(KeyError, match="row 7"):
        got.extend(ahead(produce()))
    assert got == [1, 2]
    assert readers() == []


@pytest.mark.parametrize("how", ["close", "raise"])
def test_ahead_leaves_no_thread_when_the_consumer_stops(how: str) -> None:
    closed = threading.Event()

    def produce() -> Iterator[int]:
        try:
            yield from range(1000)
        finally:
            closed.set()

    def consume() -> None:
        stream = ahead(produce())
        assert next(stream) == 0
        assert readers()
        if how == "raise":
            raise RuntimeError("the consumer failed")
        stream.close()

    if how == "raise":
        with pytest.raises(RuntimeError, match="consumer"):
            consume()
    else:
        consume()
    assert readers() == []
    assert closed.wait(10)  # and the producer let go of its file
