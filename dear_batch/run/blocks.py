"""One shard, scored: a pure function of its rows, so that the same engine gives the same bytes.

Candidate lists are admitted, tokenised, gathered into blocks and laid out as batches; all of that
is done when the engine comes to a block. What it scored becomes lists again.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dear_batch.data import Refusal, ScoredCandidate, ScoredList
from dear_batch.files.parquet import grouped
from dear_batch.pointwise.planned import Planned, planned
from dear_batch.pointwise.recipe import EncodedPair, PairEncoder, Tokens
from dear_batch.pointwise.rows import Batch, Layout
from dear_batch.pointwise.scorer import Scorer, score_planned
from dear_batch.run.admission import Admitted
from dear_batch.run.stopwatch import Stopwatch

BLOCK_PAIRS = 2048  # enough for best fit to leave little room, few enough to keep in memory
BLOCK_CANDIDATES = 8192  # those below the scored depth are kept in memory, too
ENCODE_LISTS = 16  # lists that a tokenizer call takes at most; it ends with the list that
ENCODE_PAIRS = 256  # brings it to so many pairs, which give its threads work
KNOWN_TEXTS = 1 << 16  # whose tokens are remembered within a shard


@dataclass(frozen=True, slots=True)
class Block:
    """Whole lists of one shard, the encoded pairs of their scored part, and these as batches."""

    lists: tuple[Admitted, ...]
    pairs: tuple[list[EncodedPair], ...]
    refusals: tuple[Refusal, ...]
    plan: Planned


@dataclass(slots=True)
class Work:
    """What was scored: pairs, and the tokens of the distinct ones; computed ones with padding.

    `memory_backoffs` is how often a batch was halved because memory ran out.
    """

    pairs: int = 0
    truncated_pairs: int = 0
    tokens: int = 0
    computed_tokens: int = 0
    memory_backoffs: int = 0


def blocks(
    items: Iterable[Admitted | Refusal],
    encoder: PairEncoder,
    depth: int | None,
    layout: Layout,
    clock: Stopwatch | None = None,
) -> Iterator[Block]:
    """Gather the items of one shard into blocks of about `BLOCK_PAIRS` pairs, and plan them.

    A text that occurs more than once in a shard is tokenised once. `clock` is told what took how
    long: read, tokenise, plan.
    """
    clock = clock or Stopwatch()
    gathered, known = _Gathered(depth), dict[str, Tokens]()
    chunks = grouped(items, gathered.scored, most=ENCODE_LISTS, limit=ENCODE_PAIRS)
    while True:
        with clock.timed("read"):
            chunk = next(chunks, None)
        if chunk is None:
            break
        with clock.timed("tokenise"):
            gathered.add(chunk, encoder, known)
        if len(known) > KNOWN_TEXTS:
            known.clear()
        if gathered.size >= BLOCK_PAIRS or gathered.candidates >= BLOCK_CANDIDATES:
            yield gathered.block(layout, clock)
            gathered = _Gathered(depth)
    if gathered.lists or gathered.refusals:
        yield gathered.block(layout, clock)


class _Gathered:
    """What is to become a block: `size` pairs of `candidates`, those that are not scored too."""

    def __init__(self, depth: int | None) -> None:
        self._depth = depth
        self.lists, self.refusals = list[Admitted](), list[Refusal]()
        self.pairs = list[list[EncodedPair]]()
        self.size = self.candidates = 0

    def scored(self, item: Admitted | Refusal) -> int:
        """How many pairs an item gives."""
        return 0 if isinstance(item, Refusal) else len(item.candidates[: self._depth])

    def add(
        self, chunk: list[Admitted | Refusal], encoder: PairEncoder, known: dict[str, Tokens]
    ) -> None:
        """Tokenise and keep."""
        self.refusals += [item for item in chunk if isinstance(item, Refusal)]
        admitted = [item for item in chunk if isinstance(item, Admitted)]
        texts = (
            (a.query, [(c.title, c.text or "") for c in a.candidates[: self._depth]])
            for a in admitted
        )
        encoded = encoder.encode(texts, known)
        self.lists += admitted
        self.pairs += encoded
        self.size += sum(map(len, encoded))
        self.candidates += sum(len(item.candidates) for item in admitted)

    def block(self, layout: Layout, clock: Stopwatch) -> Block:
        """Lay all pairs out as batches."""
        with clock.timed("plan_batches"):
            plan = planned([pair for pairs in self.pairs for pair in pairs], layout)
        return Block(tuple(self.lists), tuple(self.pairs), tuple(self.refusals), plan)


def score_block(
    block: Block, scorer: Scorer, work: Work, advance: Callable[[float], None] = lambda _share: None
) -> NDArray[np.float32]:
    """Score a block's pairs, scores_N in the order of its lists.

    `advance` is told the share of the block's pairs that is done, after each batch.
    """
    n_pairs = sum(map(len, block.pairs))
    scored = 0

    def count(batch: Batch) -> None:
        nonlocal scored
        scored += len(batch.documents)
        work.tokens += batch.tokens
        work.computed_tokens += len(batch.rows) * batch.length
        advance(scored / n_pairs)

    def backed_off(_tokens: int) -> None:
        work.memory_backoffs += 1

    scores_N = score_planned(scorer, block.plan, count, backed_off)
    work.pairs += n_pairs
    work.truncated_pairs += sum(pair.truncated for pairs in block.pairs for pair in pairs)
    return scores_N


def scored_lists(block: Block, scores_N: NDArray[np.float32]) -> Iterator[ScoredList]:
    """The lists of a block with their scores, in order; logits are None below the depth."""
    values = iter(scores_N.tolist())
    for item, encoded in zip(block.lists, block.pairs, strict=True):
        yield _scored(item, [next(values) for _ in encoded])


def _scored(item: Admitted, logits: list[float]) -> ScoredList:
    unscored = [None] * (len(item.candidates) - len(logits))
    candidates = zip(item.candidates, item.first_ranks, [*logits, *unscored], strict=True)
    return ScoredList(
        item.qid,
        tuple(ScoredCandidate(c.docid, r, c.first_score, logit) for c, r, logit in candidates),
    )
