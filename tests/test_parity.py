import math

import numpy as np

from dear_batch.parity import compare


def arrays(*lists: list[float]) -> list[np.ndarray]:
    return [np.array(values, np.float32) for values in lists]


def test_equal_scores() -> None:
    parity = compare(arrays([1, 2, 3], [4, 4]), arrays([1, 2, 3], [4, 4]))
    assert parity.max_abs_difference == 0
    assert parity.kendall_tau == 1
    assert parity.top10_overlap == 1
    assert (parity.pairs, parity.ties, parity.reference_ties) == (5, 1, 1)


def test_differences_are_in_logits_and_in_spreads() -> None:
    parity = compare(arrays([0, 2]), arrays([0.5, 2]))  # the deviation of [0, 2] is 1
    assert parity.max_abs_difference == 0.5
    assert parity.relative_difference == 0.5


def test_a_reversed_list() -> None:
    parity = compare(arrays(list(range(20))), arrays(list(range(20, 0, -1))))
    assert parity.kendall_tau == -1
    assert parity.top10_overlap == 0


def test_scores_that_collapse_are_no_agreement() -> None:
    parity = compare(arrays([1, 2, 3]), arrays([1, 1, 1]))
    assert parity.kendall_tau == 0
    assert parity.ties == 2


def test_nan_is_infinitely_far() -> None:
    assert math.isinf(compare(arrays([1, 2]), arrays([1, math.nan])).max_abs_difference)
