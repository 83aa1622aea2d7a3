"""What every engine looks like to a job, and which engine a machine gets.

Knows nothing of text or files beyond the bundle.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from dear_batch.errors import ConfigurationError
from dear_batch.pointwise.recipe import EncodedPair
from dear_batch.pointwise.rows import Batch, Layout, batches

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
        """Raw logits of the batch's documents, scores_N in the order of `batch.documents`."""
        ...


def score_pairs(
    scorer: Scorer,
    pairs: Sequence[EncodedPair],
    seen: Callable[[Batch], None] = lambda _batch: None,
) -> NDArray[np.float32]:
    """Plan pairs together and score them, scores_N in their order; `seen` is told each batch.

    Equal pairs are scored once: at two places of a row the same ids differ in the last bits,
    and copies of a passage would not tie.
    """
    ids = [(pair.prefix_ids.tobytes(), pair.document_ids.tobytes()) for pair in pairs]
    first_of = {key: n for n, key in reversed(list(enumerate(ids)))}
    distinct = sorted(first_of.values())
    scores_N = np.full(len(pairs), np.nan, np.float32)
    for batch in batches([pairs[n] for n in distinct], scorer.layout):
        scores_N[[distinct[d] for d in batch.documents]] = scorer.score(batch)
        seen(batch)
    return scores_N[[first_of[key] for key in ids]]


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
    """
    if bundle.manifest.recipe is None:
        raise ConfigurationError(
            f"The bundle {bundle.folder} is a {bundle.manifest.task} model; it has no scores.",
            valid="a pointwise bundle",
        )
    if not DEVICE.fullmatch(device):
        raise ConfigurationError(f"There is no device {device!r}.", valid=DEVICES)
    scorer = _load(bundle, engine, device)
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
