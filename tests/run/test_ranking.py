import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dear_batch.data import RunLine, ScoredCandidate, ScoredList
from dear_batch.run.ranking import rank, strictly_decreasing

FLOATS = st.floats(-50, 50, width=32)


def scored(logits: list[float | None], first: list[float] | None = None) -> ScoredList:
    first_scores = first or [None] * len(logits)
    return ScoredList(
        "q",
        tuple(
            ScoredCandidate(f"d{i}", i + 1, first_scores[i], logit)
            for i, logit in enumerate(logits)
        ),
    )


@given(st.lists(FLOATS | st.just(1.5), min_size=1, max_size=50), st.integers(0, 5))
def test_every_evaluator_recovers_the_order(logits: list[float], tail: int) -> None:
    """trec_eval: by score as float32 descending, ties by docid descending."""
    ranking = rank(scored([*logits, *[None] * tail]))
    lines = [str(RunLine("q", e.docid, e.rank, e.score, "t")).split() for e in ranking.entries]
    printed = [np.float32(line[4]) for line in lines]
    assert all(a > b for a, b in itertools.pairwise(printed))
    recovered = sorted(lines, key=lambda line: (np.float32(line[4]), line[2]), reverse=True)
    assert [line[2] for line in recovered] == [entry.docid for entry in ranking.entries]
    assert [entry.rank for entry in ranking.entries] == list(range(1, len(lines) + 1))


@given(st.lists(FLOATS, min_size=1, max_size=30))
def test_nudges_are_the_smallest_that_do(values: list[float]) -> None:
    scores = np.sort(np.array(values, np.float32))[::-1]
    nudged = strictly_decreasing(scores)
    assert np.all(np.diff(nudged) < 0)
    changed = nudged != scores
    assert not changed[0]
    for i in np.flatnonzero(changed):
        assert nudged[i] == np.nextafter(nudged[i - 1], np.float32(-np.inf))


def test_distinct_logits_are_written_as_they_are() -> None:
    ranking = rank(scored([0.25, -3.5, 9.125]))
    assert [(e.docid, e.score) for e in ranking.entries] == [
        ("d2", 9.125),
        ("d0", 0.25),
        ("d1", -3.5),
    ]


def test_ties_go_by_first_stage_rank() -> None:
    ranking = rank(scored([1.0, 2.0, 1.0, 2.0]))
    assert [e.docid for e in ranking.entries] == ["d1", "d3", "d0", "d2"]
    assert [e.first_rank for e in ranking.entries] == [2, 4, 1, 3]


def test_the_tail_keeps_first_stage_order_below_the_scored() -> None:
    ranking = rank(scored([-9.0, -1.0, None, None]))
    assert [e.docid for e in ranking.entries] == ["d1", "d0", "d2", "d3"]
    assert [e.logit for e in ranking.entries] == [-1.0, -9.0, None, None]
    assert ranking.entries[2].score < -9.0


def test_interpolation_mixes_z_scores() -> None:
    # z of [1, 3] and of [10, 0] are [-1, 1] and [1, -1] (population deviation).
    ranking = rank(scored([1.0, 3.0], [10.0, 0.0]), interpolate=0.75)
    assert [(e.docid, e.score) for e in ranking.entries] == [("d1", 0.5), ("d0", -0.5)]
    assert [e.logit for e in ranking.entries] == [3.0, 1.0]
    first_stage = rank(scored([1.0, 3.0], [10.0, 0.0]), interpolate=0.0)
    assert [e.docid for e in first_stage.entries] == ["d0", "d1"]


def test_equal_first_stage_scores_say_nothing() -> None:
    ranking = rank(scored([1.0, 3.0], [5.0, 5.0]), interpolate=0.5)
    assert [e.docid for e in ranking.entries] == ["d1", "d0"]


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_nine_digits_identify_a_float32(value: float) -> None:
    text = str(RunLine("q", "d", 1, value, "tag")).split()[4]
    assert np.float32(text) == np.float32(value)


@pytest.mark.parametrize("value", [16777216.0, 0.9])
def test_neighbours_in_float32_are_told_apart(value: float) -> None:
    """2^24 = 2^24 + 1 and 0.9 = 0.9 + 1e-9 as float32."""
    nudged = strictly_decreasing(np.array([value, value + 1e-9], np.float32))
    assert math.isfinite(nudged[1])
    assert np.float32(f"{nudged[1]:.9g}") < np.float32(f"{nudged[0]:.9g}")
