"""Pairs as an engine takes them: each once, in rows, in batches. Pure; knows nothing of engines."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dear_batch.pointwise.recipe import EncodedPair
from dear_batch.pointwise.rows import Batch, Layout, batches


@dataclass(frozen=True, slots=True)
class Planned:
    """Batches of the distinct ones among N pairs.

    `place_N` says which distinct pair each of them is: what the batches' `documents` count.
    """

    batches: tuple[Batch, ...]
    place_N: NDArray[np.intp]


def planned(pairs: Sequence[EncodedPair], layout: Layout) -> Planned:
    """Lay pairs out; equal ones are scored once.

    At two places of a row the same ids differ in the last bits, and copies of a passage would
    not tie.

    Raises:
        ValueError: a pair is longer than a packed row.
    """
    places = dict[tuple[bytes, bytes], int]()
    distinct, place_N = list[EncodedPair](), np.empty(len(pairs), np.intp)
    for n, pair in enumerate(pairs):
        key = (pair.prefix_ids.tobytes(), pair.document_ids.tobytes())
        place_N[n] = place = places.setdefault(key, len(distinct))
        if place == len(distinct):
            distinct.append(pair)
    return Planned(tuple(batches(distinct, layout)), place_N)
