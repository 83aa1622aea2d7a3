"""Compares two engines' scores for the same candidate lists. Knows only numbers.

Used when a bundle is exported: its graphs against plain PyTorch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau

Scores = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Parity:
    """How far scores are from their reference.

    Attributes:
        pairs: documents compared.
        max_abs_difference: in logits.
        relative_difference: the same over the standard deviation of all reference scores.
        kendall_tau: mean over lists (tau-b); 1 where both orders agree.
        top10_overlap: mean share of each list's first ten that both have.
        ties, reference_ties: documents whose score equals that of the one before it.
    """

    pairs: int
    max_abs_difference: float
    relative_difference: float
    kendall_tau: float
    top10_overlap: float
    ties: int
    reference_ties: int


def compare(reference: Sequence[Scores], scores: Sequence[Scores]) -> Parity:
    """Parity of `scores` with `reference`, one array a list, in the same order.

    A score that is not finite makes the difference infinite.
    """
    expected, found = np.concatenate(reference), np.concatenate(scores)
    difference = np.abs(expected.astype(np.float64) - found)
    worst = float(difference.max()) if np.isfinite(difference).all() else float("inf")
    spread = float(expected.std()) or 1.0
    pairs = list(zip(reference, scores, strict=True))
    return Parity(
        pairs=len(expected),
        max_abs_difference=worst,
        relative_difference=worst / spread,
        kendall_tau=float(np.mean([_tau(a, b) for a, b in pairs])),
        top10_overlap=float(np.mean([_overlap(a, b) for a, b in pairs])),
        ties=sum(len(b) - len(np.unique(b)) for _, b in pairs),
        reference_ties=sum(len(a) - len(np.unique(a)) for a, _ in pairs),
    )


def _tau(reference: Scores, scores: Scores) -> float:
    """Kendall's tau-b; where a side is constant: 1 if both are, else 0."""
    constant = len(np.unique(reference)) == 1, len(np.unique(scores)) == 1
    if any(constant):
        return float(all(constant))
    return float(kendalltau(reference, scores).statistic)


def _overlap(reference: Scores, scores: Scores, depth: int = 10) -> float:
    first, second = (set(np.argsort(-s, kind="stable")[:depth]) for s in (reference, scores))
    return len(first & second) / min(depth, len(reference))
