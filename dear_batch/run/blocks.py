"""One shard, scored: a pure function of its rows, so that the same engine gives the same bytes.

Candidate lists are admitted, tokenised and gathered into blocks; a block is packed and scored
as one plan. `ahead` runs the first half in a thread: tokenising releases the GIL.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar, cast

from dear_batch.data import Refusal, ScoredCandidate, ScoredList
from dear_batch.pointwise.recipe import EncodedPair, PairEncoder
from dear_batch.pointwise.rows import Batch
from dear_batch.pointwise.scorer import Scorer, score_pairs
from dear_batch.run.admission import Admitted

Item = TypeVar("Item")

BLOCK_PAIRS = 2048  # enough for best fit to leave little room, few enough to keep in memory
ENCODE_LISTS = 16  # lists a tokenizer call takes, so that its threads all have work


@dataclass(frozen=True, slots=True)
class Block:
    """Whole lists of one shard with the encoded pairs of their scored part."""

    lists: tuple[Admitted, ...]
    pairs: tuple[list[EncodedPair], ...]
    refusals: tuple[Refusal, ...]


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
    items: Iterable[Admitted | Refusal], encoder: PairEncoder, depth: int | None
) -> Iterator[Block]:
    """Gather the items of one shard into blocks of about `BLOCK_PAIRS` pairs."""
    lists, pairs, refusals, size = list[Admitted](), list[list[EncodedPair]](), list[Refusal](), 0
    stream = iter(items)
    while chunk := list(islice(stream, ENCODE_LISTS)):
        refusals += [item for item in chunk if isinstance(item, Refusal)]
        admitted = [item for item in chunk if isinstance(item, Admitted)]
        encoded = encoder.encode(
            (a.query, [(c.title, c.text or "") for c in a.candidates[:depth]]) for a in admitted
        )
        lists += admitted
        pairs += encoded
        size += sum(map(len, encoded))
        if size >= BLOCK_PAIRS:
            yield Block(tuple(lists), tuple(pairs), tuple(refusals))
            lists, pairs, refusals, size = [], [], [], 0
    if lists or refusals:
        yield Block(tuple(lists), tuple(pairs), tuple(refusals))


def score_block(
    block: Block, scorer: Scorer, work: Work, advance: Callable[[float], None] = lambda _share: None
) -> list[ScoredList]:
    """Score a block's pairs; lists come back in order, logits None below the depth.

    `advance` is told the share of the block's pairs that is done, after each batch.
    """
    pairs = [pair for pairs in block.pairs for pair in pairs]
    scored = 0

    def count(batch: Batch) -> None:
        nonlocal scored
        scored += len(batch.documents)
        work.tokens += batch.tokens
        work.computed_tokens += len(batch.rows) * batch.length
        advance(scored / len(pairs))

    def backed_off(_tokens: int) -> None:
        work.memory_backoffs += 1

    values = iter(score_pairs(scorer, pairs, count, backed_off).tolist())
    work.pairs += len(pairs)
    work.truncated_pairs += sum(pair.truncated for pair in pairs)
    return [
        _scored(item, [next(values) for _ in encoded])
        for item, encoded in zip(block.lists, block.pairs, strict=True)
    ]


def _scored(item: Admitted, logits: list[float]) -> ScoredList:
    unscored = [None] * (len(item.candidates) - len(logits))
    candidates = zip(item.candidates, item.first_ranks, [*logits, *unscored], strict=True)
    return ScoredList(
        item.qid,
        tuple(ScoredCandidate(c.docid, r, c.first_score, logit) for c, r, logit in candidates),
    )


def ahead(items: Iterable[Item], depth: int = 2) -> Generator[Item, None, None]:
    """Run an iterable in a background thread, `depth` items ahead; its exceptions rise here."""
    stream, end = iter(items), object()
    with ThreadPoolExecutor(1, thread_name_prefix="dear-batch-reader") as pool:
        waiting = deque(pool.submit(next, stream, end) for _ in range(depth))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, stream, end))
            yield cast("Item", item)
