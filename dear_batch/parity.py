"""Compares two engines' scores for the same candidate lists. Knows only numbers.

Used when a bundle is exported, its graphs against plain PyTorch, and when an engine runs for the
first time on a machine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau

from dear_batch.bundle import Precision

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


@dataclass(frozen=True, slots=True)
class Gate:
    """What scores of a precision must keep to; None leaves a figure open.

    Attributes:
        absolute: the largest difference, in logits.
        relative: the same over the standard deviation of the reference scores.
        tau, overlap: the least mean Kendall's τ and top-10 overlap.
    """

    absolute: float | None = None
    relative: float | None = None
    tau: float = 0.0
    overlap: float = 0.0

    def misses(self, parity: Parity) -> str | None:
        """What of a comparison is beyond the gate; None where nothing is."""
        figures = (
            ("max |Δscore|", parity.max_abs_difference, self.absolute),
            ("max |Δscore| ÷ spread", parity.relative_difference, self.relative),
        )
        for name, found, most in figures:
            if most is not None and not found <= most:
                return f"{name} {found:.3g}, more than {most:g}"
        if not parity.kendall_tau >= self.tau:
            return f"Kendall τ {parity.kendall_tau:.4f}, less than {self.tau:g}"
        if not parity.top10_overlap >= self.overlap:
            return f"top-10 overlap {parity.top10_overlap:.4f}, less than {self.overlap:g}"
        return None


# Figures that decided them: benchmarks/results/precision.json.
GATES: Mapping[Precision, Gate] = {
    "fp32": Gate(absolute=1e-4),
    "fp16": Gate(relative=0.02, tau=0.98, overlap=0.98),
    "bf16": Gate(relative=0.15, tau=0.95, overlap=0.95),
}


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
