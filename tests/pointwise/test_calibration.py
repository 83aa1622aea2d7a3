"""The layout that costs least: what is timed, and what follows from it."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dear_batch.pointwise import calibration
from dear_batch.pointwise.calibration import candidates, cheapest, cost, timed
from dear_batch.pointwise.recipe import EncodedPair
from dear_batch.pointwise.rows import Batch, Layout
from dear_batch.pointwise.scorer import OneAtATime

USUAL = Layout(True, 512, 512)


def pairs_of(query: int, document: int, n: int = 400) -> list[EncodedPair]:
    """Lists of 20 documents that share a query of so many tokens."""
    return [
        EncodedPair(
            np.full(query, k // 20, np.int32), np.full(document, k, np.int32), truncated=False
        )
        for k in range(n)
    ]


class Timed(OneAtATime):
    """A scorer to which a token costs `base` and `attention` for each other one of its row."""

    engine, device, precision, layout = "timed", "cpu", "fp32", USUAL

    def __init__(self, base: float, attention: float = 0, most: int = 1 << 20) -> None:
        self.base, self.attention, self.most = base, attention, most
        self.now, self.calls = 0.0, list[int]()

    def score(self, batch: Batch) -> NDArray[np.float32]:
        tokens = len(batch.rows) * batch.length
        self.calls.append(tokens)
        if tokens > self.most:
            raise MemoryError
        self.now += tokens * (self.base + self.attention * batch.length)
        return np.zeros(len(batch.documents), np.float32)


def clocked(scorer: Timed, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(calibration, "perf_counter", lambda: scorer.now)
    return scorer


def test_the_usual_layout_is_the_first_candidate_and_none_is_too_short() -> None:
    on_cpu = candidates(USUAL, 228, on_gpu=False)
    assert [(n.row_tokens, n.batch_tokens) for n in on_cpu] == [
        (512, 512),
        (256, 256),
        (1024, 1024),
        (2048, 2048),
    ]
    assert [n.row_tokens for n in candidates(USUAL, 600, on_gpu=False)] == [512, 1024, 2048]
    usual = Layout(True, 1024, 16384)
    on_gpu = candidates(usual, 228, on_gpu=True)
    assert on_gpu[0] == usual
    assert len(on_gpu) == len(set(on_gpu)) == 12
    assert cost(on_gpu) == 4 * (8192 + 16384 + 32768)


def test_a_shared_query_pays_for_longer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    layouts, pairs = candidates(USUAL, 228, on_gpu=False), pairs_of(100, 100)
    rates = timed(clocked(Timed(1e-6), monkeypatch), pairs, layouts)
    assert rates is not None
    assert rates == {layout: pytest.approx(1e-6) for layout in layouts}
    assert cheapest(pairs, rates).row_tokens == 2048


def test_attention_decides_where_nothing_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    layouts, pairs = candidates(USUAL, 228, on_gpu=False), pairs_of(4, 124)
    rates = timed(clocked(Timed(1e-6, 1e-9), monkeypatch), pairs, layouts)
    assert rates is not None
    assert cheapest(pairs, rates).row_tokens == 256


def test_the_usual_layout_stays_unless_another_clearly_gains() -> None:
    first, second = candidates(USUAL, 228, on_gpu=False)[:2]
    pairs = pairs_of(4, 60, n=60)
    assert cheapest(pairs, {first: 1.0, second: 0.99}) == first
    assert cheapest(pairs, {first: 1.0, second: 0.5}) == second
    assert cheapest(pairs, {first: None, second: 1.0}) == second
    assert cheapest(pairs, {first: None, second: None}) == first


def test_where_memory_runs_out_a_layout_is_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    layouts, pairs = candidates(USUAL, 228, on_gpu=False), pairs_of(100, 100)
    rates = timed(clocked(Timed(1e-6, most=1100), monkeypatch), pairs, layouts)
    assert rates is not None
    assert [layout.row_tokens for layout, rate in rates.items() if rate is None] == [2048]
    assert cheapest(pairs, rates).row_tokens == 1024


def test_what_takes_long_is_left_and_each_layout_is_timed_once_at_least(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layouts, pairs = candidates(USUAL, 228, on_gpu=False), pairs_of(10, 100)
    slow = Timed(calibration.MOST_S / 3000)
    assert timed(clocked(slow, monkeypatch), pairs, layouts) is None
    assert slow.now < 2 * calibration.MOST_S
    once = Timed(calibration.MOST_S / 11_000)
    rates = timed(clocked(once, monkeypatch), pairs, layouts)
    assert rates is not None
    assert rates.keys() == set(layouts)
    assert once.now < 1.5 * calibration.MOST_S


def test_it_can_be_left_between_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    beats = 0

    def beat() -> None:
        nonlocal beats
        beats += 1
        if beats == 3:
            raise InterruptedError

    scorer = clocked(Timed(1e-6), monkeypatch)
    with pytest.raises(InterruptedError):
        timed(scorer, pairs_of(10, 100), candidates(USUAL, 228, on_gpu=False), beat)
    assert len(scorer.calls) == 2
