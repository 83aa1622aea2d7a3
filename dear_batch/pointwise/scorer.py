"""What every engine looks like to a job, and how a job's batches pass through one.

Knows nothing of text or files beyond the bundle, nor of how an engine is chosen.
"""

import gc
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from dear_batch.errors import (
    ConfigurationError,
    EngineRefusedError,
    TryAgainError,
    too_little_memory,
)
from dear_batch.pointwise.planned import Planned, planned
from dear_batch.pointwise.recipe import EncodedPair
from dear_batch.pointwise.rows import Batch, Layout, smaller

if TYPE_CHECKING:
    from dear_batch.bundle import Bundle, Engine, Precision
    from dear_batch.pointwise.selection import Choice

Finish = Callable[[], NDArray[np.float32]]


class Scorer(Protocol):
    """An engine that scores batches laid out as `layout` says.

    `precision` is what its matrix products are computed in; so many batches as `in_flight` can
    be under way at once.
    """

    layout: Layout
    engine: str
    device: str
    precision: "Precision"
    in_flight: int

    def start(self, batch: Batch) -> Finish:
        """Begin a batch; what is returned waits for its raw logits.

        They are scores_N in the order of `batch.documents`. Batches are waited for in the order
        in which they were begun.

        Raises:
            MemoryError: there is no memory for so large a batch, and the engine is as before.
                Each engine tells that from all other errors, which it raises unchanged. Either
                of the two calls may raise it.
        """
        ...


class OneAtATime:
    """A scorer whose batches are done when they have begun."""

    in_flight = 1

    def start(self, batch: Batch) -> Finish:
        """See `Scorer`."""
        scores_N = self.score(batch)
        return lambda: scores_N

    def score(self, batch: Batch) -> NDArray[np.float32]:
        """Raw logits, scores_N."""
        raise NotImplementedError


def score_pairs(
    scorer: Scorer,
    pairs: Sequence[EncodedPair],
    seen: Callable[[Batch], None] = lambda _batch: None,
    backed_off: Callable[[int], None] = lambda _tokens: None,
) -> NDArray[np.float32]:
    """Plan pairs together and score them; see `score_planned`.

    Raises:
        TryAgainError: there is no memory for a single pair.
    """
    return score_planned(scorer, planned(pairs, scorer.layout), seen, backed_off)


def score_planned(
    scorer: Scorer,
    plan: Planned,
    seen: Callable[[Batch], None] = lambda _batch: None,
    backed_off: Callable[[int], None] = lambda _tokens: None,
) -> NDArray[np.float32]:
    """Score what was planned, scores_N in the order of its pairs; `seen` is told each batch.

    Where memory runs out, batches shrink to half and stay small until this call ends;
    `backed_off` is told their tokens.

    Raises:
        TryAgainError: there is no memory for a single pair.
    """
    n_distinct = int(plan.place_N.max(initial=-1)) + 1
    scores_N = np.full(n_distinct, np.nan, np.float32)
    for batch, found_N in _scored(scorer, plan.batches, backed_off):
        scores_N[batch.documents] = found_N
        seen(batch)
    return scores_N[plan.place_N]


def _scored(
    scorer: Scorer, plan: Iterable[Batch], backed_off: Callable[[int], None]
) -> Iterator[tuple[Batch, NDArray[np.float32]]]:
    """The planned batches, or parts of them, with their scores, in the order of the plan.

    Where memory runs out while several batches are under way, those that were begun before are
    waited for, and the rest go one by one from then on: only what was begun alone is halved. So
    the scores do not depend on how many go at once.
    """
    most, fixed, at_once = sys.maxsize, scorer.layout.fixed_length, scorer.in_flight
    waiting, under_way = deque[Batch](), deque[tuple[Batch, Finish]]()
    planned, together = iter(plan), at_once > 1
    while True:
        # What was begun with others stays under way when all else goes alone.
        together = at_once > 1 or (together and bool(under_way))
        free = len(under_way) < at_once
        if free and not waiting and (following := next(planned, None)):
            waiting.extend(smaller(following, most, fixed))
        if free and waiting:
            said = _begin(scorer, waiting, under_way)
        elif under_way:
            batch = under_way[0][0]
            found = _end(waiting, under_way)
            if not isinstance(found, str):
                yield batch, found
                continue
            said = found
        else:
            return
        if said is None:
            continue
        gc.collect()  # what a cycle still holds
        if together:  # nothing was halved yet: what waits is as it was planned
            at_once, planned = 1, chain(tuple(waiting), planned)
            waiting.clear()
            continue
        if len(waiting[0].documents) == 1:
            raise _too_little(scorer, waiting[0], said)
        most = len(waiting[0].rows) * waiting[0].length // 2
        waiting = deque(part for whole in waiting for part in smaller(whole, most, fixed))
        backed_off(most)


def _begin(
    scorer: Scorer, waiting: deque[Batch], under_way: deque[tuple[Batch, Finish]]
) -> str | None:
    """Begin the batch that waits first, or say what the engine said when memory ran out.

    The frames that hold the failed attempt's arrays go with the exception, when this returns.
    """
    try:
        under_way.append((waiting[0], scorer.start(waiting[0])))
    except MemoryError as error:
        return str(error)
    waiting.popleft()
    return None


def _end(
    waiting: deque[Batch], under_way: deque[tuple[Batch, Finish]]
) -> NDArray[np.float32] | str:
    """The scores of the batch that was begun first, or what was said when memory ran out.

    That batch then waits again, and so do those that were begun after it.
    """
    batch, finish = under_way.popleft()
    try:
        return finish()
    except MemoryError as error:
        again = [batch, *(_abandoned(*later) for later in under_way)]
        under_way.clear()
        waiting.extendleft(reversed(again))
        return str(error)


def _abandoned(batch: Batch, finish: Finish) -> Batch:
    """A batch that was begun, no longer under way."""
    with suppress(MemoryError):
        finish()
    return batch


def _too_little(scorer: Scorer, batch: Batch, said: str) -> TryAgainError:
    what = f"score a single pair of {batch.tokens} tokens"
    return too_little_memory(what, f"{scorer.engine} on {scorer.device}: {said}")


def open_scorer(
    bundle: "Bundle",
    choice: "Choice",
    *,
    row_tokens: int | None = None,
    batch_tokens: int | None = None,
) -> Scorer:
    """Load a pointwise bundle into the engine that was chosen for it.

    Raises:
        ConfigurationError: not a pointwise bundle, or a budget below the recipe's longest pair or
            beyond what an engine was built for.
        EngineRefusedError: the engine cannot be loaded.
        TrustError: what was loaded is not what the manifest names.
        TryAgainError: there is no memory for the model.
    """
    if bundle.manifest.recipe is None:
        raise ConfigurationError(
            f"The bundle {bundle.folder} is a {bundle.manifest.task} model; it has no scores.",
            valid="a pointwise bundle",
        )
    if choice.plan:
        _check_budgets(choice.plan, row_tokens, batch_tokens)
    try:
        scorer = _load(bundle, choice)
    except MemoryError as error:
        where = f"device {choice.device}: {error}"
        raise too_little_memory(f"load {bundle.folder}", where) from error
    except ConfigurationError as error:
        parts = {"where": error.where, "valid": error.valid, "next_step": error.next_step}
        raise EngineRefusedError(error.what, **parts) from error
    layout = scorer.layout
    scorer.layout = replace(
        layout,
        row_tokens=row_tokens or layout.row_tokens,
        batch_tokens=batch_tokens or max(layout.batch_tokens, row_tokens or 0),
    )
    longest = bundle.manifest.recipe.max_length
    if layout.packed and scorer.layout.row_tokens < longest:
        raise ConfigurationError(
            f"Rows of {scorer.layout.row_tokens} tokens cannot hold a pair of {longest}.",
            valid=f"row_tokens of {longest} or more",
        )
    return scorer


def _check_budgets(plan: "Engine", row_tokens: int | None, batch_tokens: int | None) -> None:
    """Find out whether a compiled engine takes what was asked for."""
    asked = (
        ("row_tokens", row_tokens, plan.row_tokens),
        ("batch_tokens", batch_tokens, plan.batch_tokens),
    )
    for name, tokens, most in asked:
        if tokens and tokens > most:
            raise ConfigurationError(
                f"{name} = {tokens} is more than the engine {plan} was built for.",
                valid=f"{name} of {most} or less",
            )


def _load(bundle: "Bundle", choice: "Choice") -> Scorer:
    if choice.plan:
        from dear_batch.pointwise.tensorrt_scorer import TensorrtScorer

        return TensorrtScorer.from_bundle(bundle, choice.plan, choice.device)
    if choice.engine == "onnxruntime":
        from dear_batch.pointwise.onnx_scorer import onnx_scorer

        return onnx_scorer(bundle, choice.device)
    from dear_batch.pointwise.torch_scorer import TorchScorer

    return TorchScorer.from_bundle(bundle, choice.device)
