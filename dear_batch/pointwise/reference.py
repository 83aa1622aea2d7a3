"""The five-document example of the DeAR README, and the scores printed there.

Source: github.com/DataScienceUIBK/DeAR-Reranking, README, "Pointwise reranking" (bf16). A
user with hub access runs it through `dear-batch verify-reference`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

ReferenceName = Literal["8b-ce", "8b-ranknet", "3b-ce", "3b-ranknet"]

QUERY = "When did Thomas Edison invent the light bulb?"
DOCUMENTS = (
    "Lightning strike at Seoul National University",
    "Thomas Edison tried to invent a device for car but failed",
    "Coffee is good for diet",
    "KEPCO fixes light problems",
    "Thomas Edison invented the light bulb in 1879",
)
SCORES: dict[ReferenceName, tuple[float, ...]] = {
    "8b-ce": (-6.5, -5.6875, -6.375, -6.78125, -2.015625),
    "8b-ranknet": (-7.75, -6.375, -8.125, -7.4375, -2.984375),
    "3b-ce": (-11.125, -10.1875, -12.0625, -11.625, -6.0625),
    "3b-ranknet": (-6.4375, -5.125, -6.96875, -6.3125, -1.3046875),
}
# Printed scores are bf16 (steps of 1/32 to 1/16 here) out of a bf16 forward pass, whose own
# error is of the same size. Not measured on the checkpoints: no hub was within reach.
TOLERANCE = 0.25


@dataclass(frozen=True, slots=True)
class Verdict:
    """How this machine's scores compare with the printed ones, in document order."""

    name: ReferenceName
    scores: tuple[float, ...]
    expected: tuple[float, ...]
    max_abs_difference: float
    same_best: bool
    ok: bool


def name_from_id(checkpoint: str) -> ReferenceName | None:
    """The printed scores that belong to a checkpoint's hub id, if any."""
    text = checkpoint.lower()
    size = next((size for size in ("8b", "3b") if size in text), None)
    loss = next((loss for loss in ("ranknet", "ce") if f"-{loss}-" in f"{text}-"), None)
    found = [name for name in SCORES if size and loss and name == f"{size}-{loss}"]
    return found[0] if found else None


def judge(name: ReferenceName, scores: Sequence[float]) -> Verdict:
    """Compare scores, one a document in order, with the printed ones."""
    expected = SCORES[name]
    difference = float(np.abs(np.subtract(scores, expected)).max())  # NaN stays NaN
    same_best = int(np.argmax(scores)) == int(np.argmax(expected))
    return Verdict(
        name, tuple(scores), expected, difference, same_best, difference <= TOLERANCE and same_best
    )
