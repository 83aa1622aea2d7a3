"""What every engine looks like to a job, and which engine a machine gets.

Knows nothing of text or files beyond the bundle.
"""

import gc
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from dear_batch.errors import ConfigurationError, TryAgainError, too_little_memory
from dear_batch.pointwise.recipe import EncodedPair
from dear_batch.pointwise.rows import Batch, Layout, batches, smaller

if TYPE_CHECKING:
    from dear_batch.bundle import Bundle

DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
DEVICES = "auto, cpu, cuda, or cuda:N with the number of a GPU"
EngineName = Literal["auto", "onnxruntime", "torch"]


class Scorer(Protocol):
    """An engine that scores batches laid out as `layout` says."""

    layout: Layout
    engine: str
    device: str

    def score(self, batch: Batch) -> NDArray[np.float32]:
        """Raw logits of the batch's documents, scores_N in the order of `batch.documents`.

        Raises:
            MemoryError: there is no memory for so large a batch, and the engine is as before.
                Each engine tells that from all other errors, which it raises unchanged.
        """
        ...


def score_pairs(
    scorer: Scorer,
    pairs: Sequence[EncodedPair],
    seen: Callable[[Batch], None] = lambda _batch: None,
    backed_off: Callable[[int], None] = lambda _tokens: None,
) -> NDArray[np.float32]:
    """Plan pairs together and score them, scores_N in their order; `seen` is told each batch.

    Equal pairs are scored once: at two places of a row the same ids differ in the last bits,
    and copies of a passage would not tie. Where memory runs out, batches shrink to half and
    stay small until this call ends; `backed_off` is told their tokens.

    Raises:
        TryAgainError: there is no memory for a single pair.
    """
    ids = [(pair.prefix_ids.tobytes(), pair.document_ids.tobytes()) for pair in pairs]
    first_of = {key: n for n, key in reversed(list(enumerate(ids)))}
    distinct = sorted(first_of.values())
    scores_N = np.full(len(pairs), np.nan, np.float32)
    plan = batches([pairs[n] for n in distinct], scorer.layout)
    for batch, found_N in _scored(scorer, plan, backed_off):
        scores_N[[distinct[d] for d in batch.documents]] = found_N
        seen(batch)
    return scores_N[[first_of[key] for key in ids]]


def _scored(
    scorer: Scorer, plan: Iterable[Batch], backed_off: Callable[[int], None]
) -> Iterator[tuple[Batch, NDArray[np.float32]]]:
    """The planned batches, or parts of them, with their scores."""
    most, fixed = sys.maxsize, scorer.layout.fixed_length
    for planned in plan:
        waiting = smaller(planned, most, fixed)
        while waiting:
            batch = waiting[0]
            found = _attempt(scorer, batch)
            if not isinstance(found, str):
                yield batch, found
                del waiting[0]
                continue
            if len(batch.documents) == 1:
                raise _too_little(scorer, batch, found)
            gc.collect()  # what a cycle still holds
            most = len(batch.rows) * batch.length // 2
            waiting = [part for whole in waiting for part in smaller(whole, most, fixed)]
            backed_off(most)


def _attempt(scorer: Scorer, batch: Batch) -> NDArray[np.float32] | str:
    """The scores, or what the engine said when memory ran out.

    The frames that hold the failed attempt's arrays go with the exception, when this returns.
    """
    try:
        return scorer.score(batch)
    except MemoryError as error:
        return str(error)


def _too_little(scorer: Scorer, batch: Batch, said: str) -> TryAgainError:
    what = f"score a single pair of {batch.tokens} tokens"
    return too_little_memory(what, f"{scorer.engine} on {scorer.device}: {said}")


def open_scorer(
    bundle: "Bundle",
    *,
    engine: EngineName = "auto",
    device: str = "auto",
    row_tokens: int | None = None,
    batch_tokens: int | None = None,
) -> Scorer:
    """Load a pointwise bundle into the best engine that is installed.

    ONNX Runtime comes first; plain PyTorch is the fall-back.

    Raises:
        ConfigurationError: not a pointwise bundle, a budget below the recipe's longest pair,
            or an engine or device that this machine does not have.
        TryAgainError: there is no memory for the model.
    """
    if bundle.manifest.recipe is None:
        raise ConfigurationError(
            f"The bundle {bundle.folder} is a {bundle.manifest.task} model; it has no scores.",
            valid="a pointwise bundle",
        )
    if not DEVICE.fullmatch(device):
        raise ConfigurationError(f"There is no device {device!r}.", valid=DEVICES)
    try:
        scorer = _load(bundle, engine, device)
    except MemoryError as error:
        raise too_little_memory(f"load {bundle.folder}", f"device {device}: {error}") from error
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


def _load(bundle: "Bundle", engine: EngineName, device: str) -> Scorer:
    if engine == "onnxruntime" or (engine == "auto" and find_spec("onnxruntime")):
        from dear_batch.pointwise.onnx_scorer import onnx_scorer

        return onnx_scorer(bundle, device)
    from dear_batch.pointwise.torch_scorer import TorchScorer

    return TorchScorer.from_bundle(bundle, device)
