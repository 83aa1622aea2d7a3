"""Finds the items of a shard that kill whoever works on them, by halving.

Knows nothing of processes: whether a range kills is asked of a callback, and asking is dear.
"""

from collections.abc import Callable

MAX_PROBES = 64
MAX_POISON = 8

Kills = Callable[[int, int], bool]  # (first, end): does working through these items kill?


class TooMuchPoisonError(Exception):
    """The search was given up: too many items kill, or it took too many probes."""


def find_poison(
    items: int, kills: Kills, *, max_probes: int = MAX_PROBES, max_poison: int = MAX_POISON
) -> frozenset[int]:
    """The items below `items` that kill alone, in at most log2(items) + 2 probes for each.

    What kills only together with others is not found.

    Raises:
        TooMuchPoisonError: there are more than `max_poison`, or it takes over `max_probes`.
    """
    probes = 0

    def probe(first: int, end: int) -> bool:
        nonlocal probes
        probes += 1
        if probes > max_probes:
            raise TooMuchPoisonError(f"{max_probes} probes did not find everything that kills")
        return kills(first, end)

    found = set[int]()
    first = 0
    while first < items and (not found or probe(first, items)):
        if len(found) == max_poison:
            raise TooMuchPoisonError(f"more than {max_poison} items kill")
        culprit = _first_culprit(first, items, probe)
        if culprit is None:
            break
        found.add(culprit)
        first = culprit + 1
    return frozenset(found)


def _first_culprit(first: int, end: int, kills: Kills) -> int | None:
    """The first item of a range that kills alone, if the range is right to be suspected."""
    seen = False  # whether the range at hand was itself seen to kill
    while end - first > 1:
        middle = (first + end) // 2
        seen = kills(first, middle)
        first, end = (first, middle) if seen else (middle, end)
    return first if seen or kills(first, end) else None
