import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dear_batch.run.poison import TooMuchPoisonError, find_poison


class Shard:
    """Kills for the items it is told; counts how often it is asked."""

    def __init__(self, *deadly: int) -> None:
        self.deadly = deadly
        self.asked = list[tuple[int, int]]()

    def kills(self, first: int, end: int) -> bool:
        self.asked.append((first, end))
        return any(first <= item < end for item in self.deadly)


@given(st.data(), st.integers(1, 5000))
def test_every_item_that_kills_alone_is_found_in_few_probes(data: st.DataObject, n: int) -> None:
    deadly = data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=4))
    shard = Shard(*deadly)
    assert find_poison(n, shard.kills) == deadly
    assert len(shard.asked) <= len(deadly) * (math.ceil(math.log2(n)) + 2)
    assert all(0 <= first < end <= n for first, end in shard.asked)


def test_where_nothing_kills_nothing_is_found() -> None:
    shard = Shard()
    assert find_poison(1000, shard.kills) == frozenset()
    assert len(shard.asked) <= 11
    assert find_poison(0, shard.kills) == frozenset()


@pytest.mark.parametrize("n", [2, 3, 20, 1000])
def test_items_that_kill_only_together_are_no_poison(n: int) -> None:
    assert find_poison(n, lambda first, end: end - first >= n) == frozenset()
    assert find_poison(n, lambda first, end: end - first >= 2) == frozenset()


def test_what_kills_alone_is_found_before_what_kills_together() -> None:
    def kills(first: int, end: int) -> bool:
        return first <= 3 < end or (first <= 50 and end > 60)

    assert find_poison(100, kills) == {3}


@pytest.mark.parametrize(
    ("kills", "limits"),
    [
        (lambda _first, _end: True, {}),
        (Shard(*range(9)).kills, {"max_probes": 1000}),
        (Shard(5, 500).kills, {"max_probes": 15}),
    ],
)
def test_too_much_is_given_up(kills: Callable[[int, int], bool], limits: dict[str, int]) -> None:
    with pytest.raises(TooMuchPoisonError):
        find_poison(1000, kills, **limits)


def test_the_limits_themselves_are_allowed() -> None:
    assert find_poison(1000, Shard(*range(8)).kills, max_probes=1000) == set(range(8))
    shard = Shard(5, 500)
    find_poison(1000, shard.kills)
    assert find_poison(1000, shard.kills, max_probes=len(shard.asked)) == {5, 500}
    assert 64 >= len(shard.asked) > 15
