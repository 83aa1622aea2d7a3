"""Scores to a final order that every evaluator recovers. Pure; knows nothing of files.

trec_eval ignores the rank column, sorts by score and breaks ties by docid descending, and
several tools hold scores as float32: so the score column is strictly decreasing as float32.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dear_batch.data import Ranked, Ranking, ScoredCandidate, ScoredList

Float32 = NDArray[np.float32]


def rank(scored: ScoredList, interpolate: float = 1.0) -> Ranking:
    """Order a list by its logits, or by their mix with the first-stage scores.

    Candidates without a logit (below the scored depth) follow in first-stage order. Ties go
    by first-stage rank, then docid. `interpolate` is the weight w of the mix
    w·z(logit) + (1 - w)·z(first score), with z taken over the scored candidates; admission
    saw to it that those have one.
    """
    head = [c for c in scored.candidates if c.logit is not None]
    tail = [c for c in scored.candidates if c.logit is None]
    keys = _keys(head, interpolate)
    order = sorted(range(len(head)), key=lambda i: (-keys[i], head[i].first_rank, head[i].docid))
    final = [head[i] for i in order] + sorted(tail, key=lambda c: c.first_rank)
    scores = strictly_decreasing(keys[order], len(tail))
    entries = (
        Ranked(c.docid, place, float(score), c.logit, c.first_score, c.first_rank)
        for place, (c, score) in enumerate(zip(final, scores, strict=True), start=1)
    )
    return Ranking(scored.qid, tuple(entries))


def _keys(head: Sequence[ScoredCandidate], interpolate: float) -> Float32:
    logits = np.array([c.logit for c in head], np.float32)
    if interpolate == 1.0:
        return logits
    first = np.array([c.first_score for c in head], np.float64)
    mixed = interpolate * _z(logits) + (1 - interpolate) * _z(first)
    return mixed.astype(np.float32)


def _z(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Zero mean and unit (population) deviation; zeros where all values are equal."""
    centred = values.astype(np.float64) - values.mean(dtype=np.float64)
    deviation = centred.std()
    return centred / deviation if deviation > 0 else np.zeros_like(centred)


def strictly_decreasing(scores: Float32, below: int = 0) -> Float32:
    """Nudge non-increasing scores down by single float32 steps until each is below the last.

    `below` more scores are appended, a step each.
    """
    result = np.concatenate([scores, np.full(below, np.inf, np.float32)])
    if below == 0 and bool(np.all(np.diff(scores) < 0)):
        return result
    low = np.float32(-np.inf)
    for i in range(1, len(result)):
        if not result[i] < result[i - 1]:
            result[i] = np.nextafter(result[i - 1], low)
    return result
