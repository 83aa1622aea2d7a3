"""Lists to blocks to scores, with a scorer that any misplaced token or score gives away."""

from collections.abc import Callable, Iterator
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from dear_batch.data import Candidate, CandidateList, Refusal, ScoredList
from dear_batch.files.places import Places
from dear_batch.pointwise.recipe import PairEncoder, recipe_from_tokenizer
from dear_batch.pointwise.rows import Batch, Layout, packed_arrays, padded_arrays
from dear_batch.pointwise.scorer import OneAtATime
from dear_batch.run import blocks as blocks_module
from dear_batch.run.admission import Admitted
from dear_batch.run.blocks import Block, Work, blocks, score_block, scored_lists
from dear_batch.run.stopwatch import Stopwatch
from tests.conftest import collection_texts, tokenizer_of

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


def in_one(items: list[Admitted], layout: Layout, depth: int | None = None) -> Block:
    (block,) = blocks(items, ENCODER, depth, layout)
    return block


def scored(
    block: Block,
    scorer: FakeScorer,
    work: Work,
    advance: Callable[[float], None] = lambda _share: None,
) -> list[ScoredList]:
    return list(scored_lists(block, score_block(block, scorer, work, advance)))


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
        found = list(blocks(items, ENCODER, depth, LAYOUTS[0]))
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
    assert list(blocks([], ENCODER, None, LAYOUTS[0])) == []


def test_refusals_alone_still_reach_the_writer() -> None:
    (block,) = blocks([refusal(1), refusal(2)], ENCODER, None, LAYOUTS[0])
    assert (block.lists, block.refusals) == ((), (refusal(1), refusal(2)))
    assert scored(block, FakeScorer(LAYOUTS[0]), Work()) == []


def test_lists_that_are_long_below_the_depth_fill_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_module, "BLOCK_CANDIDATES", 50)
    monkeypatch.setattr(blocks_module, "ENCODE_LISTS", 1)
    found = list(blocks([admitted(i, 20) for i in range(7)], ENCODER, 1, LAYOUTS[0]))
    assert [len(block.lists) for block in found] == [3, 3, 1]


def test_a_text_is_tokenised_once_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[str]()
    monkeypatch.setattr(blocks_module, "ENCODE_LISTS", 1)
    encode = Tokenizer.encode_batch_fast

    class Listening:
        def encode_batch_fast(self, texts: list[str], **options: bool) -> list[Encoding]:
            seen.extend(texts)
            return encode(TOKENIZER, texts, **options)

    encoder = PairEncoder(TOKENIZER, RECIPE)
    encoder._tokenizer = Listening()  # type: ignore[assignment]
    items = [admitted(i, 40) for i in (0, 1, 0, 2, 1)]
    clock = Stopwatch()
    (block,) = blocks(items, encoder, None, LAYOUTS[0], clock)
    assert len(seen) == len(set(seen)) < sum(len(item.candidates) for item in items)
    assert clock.seconds.keys() == {"read", "tokenise", "plan_batches"}
    alone = [in_one([item], LAYOUTS[0]).pairs[0] for item in items]
    for found, wanted in zip(block.pairs, alone, strict=True):
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(one.input_ids(), other.input_ids())
            assert (len(one.prefix_ids), one.truncated) == (len(other.prefix_ids), other.truncated)


# Scores.


@pytest.mark.parametrize("layout", LAYOUTS, ids=["one row", "rows", "padded", "fixed"])
@pytest.mark.parametrize("depth", [None, 4])
def test_scores_land_on_their_documents(layout: Layout, depth: int | None) -> None:
    items = [admitted(i, size) for i, size in enumerate((9, 1, 4, 30, 2))]
    found = scored(in_one(items, layout, depth), FakeScorer(layout), Work())
    assert [ranked.qid for ranked in found] == [item.qid for item in items]
    for ranked, item in zip(found, items, strict=True):
        logits = [c.logit for c in ranked.candidates]
        head = expected(item, depth)
        assert logits == [*head, *[None] * (len(item.candidates) - len(head))]
        assert [c.docid for c in ranked.candidates] == [c.docid for c in item.candidates]
        assert tuple(c.first_rank for c in ranked.candidates) == item.first_ranks
    assert len({c.logit for ranked in found for c in ranked.candidates if c.logit}) > 14


def test_the_work_is_counted() -> None:
    texts = (" ".join(collection_texts()[k : k + 9]) for k in range(2))
    long = tuple(Candidate(f"long{k}", "", text, None) for k, text in enumerate(texts))
    items = [admitted(0, 3), admitted_list("q", "who?", long, (1, 2))]
    block = in_one(items, LAYOUTS[3])
    assert [pair.truncated for pair in block.pairs[1]] == [True, True]
    padded, packed = Work(), Work()
    score_block(block, FakeScorer(LAYOUTS[3]), padded)
    score_block(in_one(items, LAYOUTS[0]), FakeScorer(LAYOUTS[0]), packed)
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
    work, shares = Work(), list[float]()
    found = scored(in_one(items, layout), Small(layout), work, shares.append)
    assert [[c.logit for c in ranked.candidates] for ranked in found] == [
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
    work, shares = Work(), list[float]()
    block = in_one([item], LAYOUTS[3])
    (found,) = scored(block, FakeScorer(LAYOUTS[3]), work, shares.append)
    assert [c.logit for c in found.candidates] == expected(item, None)
    assert (work.pairs, work.computed_tokens) == (8, 5 * 228)
    assert shares == sorted(shares)
    assert 0 < shares[-1] <= 1


def test_copies_are_scored_once_and_tie_exactly() -> None:
    text = Candidate("a", "", collection_texts()[0], None)
    copies = tuple(Candidate(f"d{i}", "", text.text, None) for i in range(4))
    candidates = (*copies, *admitted(0, 3).candidates)
    block = in_one([admitted_list("q", "who?", candidates, tuple(range(1, 8)))], LAYOUTS[3])
    work = Work()
    (found,) = scored(block, FakeScorer(LAYOUTS[3]), work)
    assert len({c.logit for c in found.candidates[:4]}) == 1
    distinct = {pair.input_ids().tobytes(): len(pair) for pair in block.pairs[0]}
    assert work.pairs == 7
    assert work.tokens == sum(distinct.values())
    assert len(distinct) < 7
