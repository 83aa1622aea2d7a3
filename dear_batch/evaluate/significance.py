"""Whether a run differs from a baseline, topic by topic. Knows only arrays of differences."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.stats

RESAMPLES = 10_000
CONFIDENCE = 0.95
_SEED = 20_250_816
_BLOCK_DRAWS = 1 << 20  # draws held at once: 8 MiB of indices, however many the topics
_ROUNDING = 1e-12  # measures lie in 0..1; a spread of differences below this is rounding


@dataclass(frozen=True, slots=True)
class Comparison:
    """The mean of one measure minus the baseline's, over the topics of both.

    `p_value` is that of the two-sided paired t-test, `interval` the bootstrap's 95%
    percentile interval of the mean difference, not corrected for the number of measures.
    Where one is None, `note` says why.
    """

    topics: int
    difference: float
    p_value: float | None
    interval: tuple[float, float] | None
    note: str = ""


def compare(values: npt.ArrayLike, baseline_values: npt.ArrayLike) -> Comparison:
    """Compare two runs on one measure; the arrays hold the same topics in the same order."""
    differences_Q = np.asarray(values, np.float64) - np.asarray(baseline_values, np.float64)
    topics = len(differences_Q)
    mean = float(differences_Q.mean())
    if topics == 1:
        return Comparison(topics, mean, None, None, "not computed: one topic only")
    if not np.any(differences_Q):
        return Comparison(topics, 0.0, 1.0, (0.0, 0.0))
    interval = bootstrap_interval(differences_Q)
    if np.ptp(differences_Q) < _ROUNDING:
        note = "no p-value: the difference is the same in every topic"
        return Comparison(topics, mean, None, interval, note)
    # The paired test is the one-sample test of the differences against 0.
    p_value = float(scipy.stats.ttest_1samp(differences_Q, 0.0).pvalue)
    return Comparison(topics, mean, p_value, interval)


def bootstrap_interval(differences_Q: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron and Tibshirani 1993, section 13.3).

    Topics are drawn with replacement `RESAMPLES` times from a fixed seed, so that the same
    runs give the same interval.
    """
    rng = np.random.default_rng(_SEED)
    topics = len(differences_Q)
    means_S = np.empty(RESAMPLES)
    block = max(1, _BLOCK_DRAWS // topics)
    for start in range(0, RESAMPLES, block):
        stop = min(start + block, RESAMPLES)
        draws_SQ = rng.integers(topics, size=(stop - start, topics))
        means_S[start:stop] = differences_Q[draws_SQ].mean(axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means_S, (tail, 1 - tail))
    return float(low), float(high)
