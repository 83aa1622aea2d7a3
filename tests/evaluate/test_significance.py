"""The paired test and the interval against computations of another kind."""

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats

from dear_batch.evaluate.significance import bootstrap_interval, compare


def test_p_value_against_the_t_distribution() -> None:
    values, baseline = [0.5, 0.7, 0.9, 0.3], [0.4, 0.4, 0.7, 0.3]
    comparison = compare(values, baseline)
    # differences 0.1 0.3 0.2 0; mean 0.15; squared deviations .0025 .0225 .0025 .0225 = .05;
    # t = 0.15 / sqrt(.05 / 3 / 4); p of t with 3 degrees of freedom is an incomplete beta
    # (Abramowitz and Stegun 26.7.1 and 26.5.27)
    t_value = 0.15 / math.sqrt(0.05 / 3 / 4)
    expected = scipy.special.betainc(3 / 2, 1 / 2, 3 / (3 + t_value**2))
    assert comparison.topics == 4
    assert comparison.difference == pytest.approx(0.15)
    assert comparison.p_value == pytest.approx(expected)
    assert comparison.p_value == pytest.approx(scipy.stats.ttest_rel(values, baseline).pvalue)
    assert comparison.note == ""


def test_interval_of_two_topics_by_hand() -> None:
    """Two topics with 0 and 1: means 0, 1/2, 1 with chances 1/4, 1/2, 1/4: both tails > 2.5%."""
    assert bootstrap_interval(np.array([0.0, 1.0])) == (0.0, 1.0)


@pytest.mark.parametrize("topics", [43, 150])  # 150 topics take two blocks
def test_interval_against_plain_resampling(topics: int) -> None:
    differences = np.random.default_rng(5).normal(0.03, 0.2, topics)
    draw = np.random.default_rng(3).choice
    means = sorted(draw(differences, topics).mean() for _ in range(10_000))
    # Each end comes from 10,000 draws: its own noise is about 3% of the standard error.
    noise = 0.1 * differences.std() / math.sqrt(topics)
    assert bootstrap_interval(differences) == pytest.approx((means[250], means[9750]), abs=noise)


def test_interval_is_reproducible() -> None:
    differences = np.random.default_rng(7).normal(size=20)
    assert bootstrap_interval(differences) == bootstrap_interval(differences)


def test_equal_runs() -> None:
    comparison = compare([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])
    assert (comparison.difference, comparison.p_value, comparison.interval) == (0, 1, (0, 0))


def test_the_same_gain_in_every_topic() -> None:
    """The t statistic is 0.1 / 0; rounding makes the differences only almost equal."""
    comparison = compare([0.2, 0.3, 0.4], [0.1, 0.2, 0.3])
    assert comparison.p_value is None
    assert comparison.interval == pytest.approx((0.1, 0.1))
    assert "same in every topic" in comparison.note


def test_one_topic() -> None:
    comparison = compare([0.5], [0.2])
    assert comparison.difference == pytest.approx(0.3)
    assert comparison.p_value is None
    assert comparison.interval is None
    assert "one topic" in comparison.note
