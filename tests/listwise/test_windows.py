"""Windows cover every place from the bottom to the top, and answers only reorder."""

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dear_batch.data import Permutation, Window
from dear_batch.listwise.windows import apply, kept, windows

SIZES = st.integers(1, 80)
STEPS = st.integers(2, 25).flatmap(lambda w: st.tuples(st.just(w), st.integers(1, w)))


def answer(start: int, end: int, order: list[int]) -> Permutation:
    return Permutation(Window("q", start, end), tuple(order), "ok", (0.0,) * len(order))


@pytest.mark.parametrize(
    ("n", "window", "step", "expected"),
    [
        (30, 20, 10, [(10, 30), (0, 20)]),  # the published setting
        (100, 20, 10, [(k, k + 20) for k in range(80, -1, -10)]),  # RankGPT's
        (20, 20, 10, [(0, 20)]),
        (21, 20, 10, [(1, 21), (0, 11)]),
        (25, 20, 10, [(5, 25), (0, 15)]),
        (7, 20, 10, [(0, 7)]),
        (1, 20, 10, [(0, 1)]),
        (0, 20, 10, []),
        (21, 20, 20, [(1, 21), (0, 1)]),
    ],
)
def test_windows(n: int, window: int, step: int, expected: list[tuple[int, int]]) -> None:
    assert windows(n, window, step) == expected


def rank_llm(n: int, window: int, step: int) -> list[tuple[int, int]]:
    """The loop of castorini/rank_llm, rerank/listwise/listwise_rankllm.py, `sliding_windows`.

    There a list shorter than the window is given a window of its length by the caller.
    """
    window = min(window, n)
    found, end, start = [], n, n - window
    while end > 0 and start + step != 0:
        start = max(start, 0)
        found.append((start, end))
        end, start = end - step, start - step
    return found


@given(SIZES, STEPS)
def test_windows_are_those_of_rank_llm(n: int, sizes: tuple[int, int]) -> None:
    if sizes[1] <= min(n, sizes[0]):
        assert windows(n, *sizes) == rank_llm(n, *sizes)


@given(SIZES, STEPS)
def test_windows_cover_every_place_and_end_at_the_top(n: int, sizes: tuple[int, int]) -> None:
    window, step = sizes
    found = windows(n, window, step)
    assert {place for start, end in found for place in range(start, end)} == set(range(n))
    assert found[0][1] == n
    assert found[-1][0] == 0
    assert all(1 <= end - start <= window for start, end in found)
    for (lower_start, lower_end), (start, end) in itertools.pairwise(found):
        assert end == lower_end - step
        assert start == max(0, lower_start - step)


@given(SIZES, STEPS, st.randoms(use_true_random=False))
def test_any_answers_leave_a_permutation(
    n: int, sizes: tuple[int, int], rng: random.Random
) -> None:
    order = list(range(n))
    for start, end in windows(n, *sizes):
        places = list(range(end - start))
        rng.shuffle(places)
        before = order
        order = apply(answer(start, end, places), order)
        assert order[:start] + order[end:] == before[:start] + before[end:]
        assert order[start:end] == [before[start + place] for place in places]
    assert sorted(order) == list(range(n))


@given(SIZES, STEPS, st.randoms(use_true_random=False))
def test_with_an_oracle_the_best_rise_to_the_top(
    n: int, sizes: tuple[int, int], rng: random.Random
) -> None:
    window, step = sizes
    order = list(range(n))  # the value of a document is its rank among all
    rng.shuffle(order)
    for start, end in windows(n, window, step):
        inside = order[start:end]
        best_first = sorted(range(len(inside)), key=inside.__getitem__)
        order = apply(answer(start, end, best_first), order)
    best = n if n <= window else window - step
    assert order[:best] == list(range(best))


def test_a_single_passage_is_kept() -> None:
    found = kept(Window("q", 0, 1))
    assert (found.order, found.status, found.prompt_tokens) == ((0,), "kept", 0)
    assert math.isnan(found.logprobs[0])
    assert apply(found, ["a"]) == ["a"]


@pytest.mark.parametrize("order", [[0], [0, 0], [0, 2], [0, 1, 2]])
def test_an_answer_that_is_no_permutation_is_a_bug(order: list[int]) -> None:
    with pytest.raises(AssertionError, match="no permutation"):
        apply(answer(0, 2, order), ["a", "b", "c"])
