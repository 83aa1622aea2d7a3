"""Which length of rows, and which budget, an engine is fastest with: timed, for pairs at hand.

Longer rows share a prefix among more documents; attention, which reads every pair of tokens of a
row, costs more, and products of other shapes run at other speeds. What an engine needs for a
token is timed once; which layout costs least then follows from the lengths of the pairs alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from time import perf_counter

from dear_batch.pointwise.planned import planned
from dear_batch.pointwise.recipe import EncodedPair
from dear_batch.pointwise.rows import Layout
from dear_batch.pointwise.scorer import Scorer

ROW_TOKENS = (256, 512, 1024, 2048)
GPU_BATCH_TOKENS = (8192, 16384, 32768)
TIMED_TOKENS = 1024  # of each layout, or one batch
MOST_S = 10.0  # for a round of all of them: what takes longer is not worth knowing
ROUNDS = 3  # within that time
CLEARLY = 1.02  # what a layout must gain to be taken in place of the usual one

Rates = Mapping[Layout, float | None]  # seconds a computed token, None where memory ran out


def candidates(usual: Layout, longest: int, *, on_gpu: bool) -> list[Layout]:
    """The layouts to choose from, the usual one first; `longest` is that of a pair, in tokens."""
    budgets = GPU_BATCH_TOKENS if on_gpu else (0,)
    others = [
        replace(usual, row_tokens=row, batch_tokens=max(row, batch))
        for row in ROW_TOKENS
        for batch in budgets
        if row >= longest
    ]
    return [usual, *(layout for layout in others if layout != usual)]


def cost(layouts: Sequence[Layout]) -> int:
    """Tokens that a round of timing computes."""
    return sum(max(TIMED_TOKENS, layout.batch_tokens) for layout in layouts)


def timed(
    scorer: Scorer,
    pairs: Sequence[EncodedPair],
    layouts: Sequence[Layout],
    beat: Callable[[], None] = lambda: None,
) -> Rates | None:
    """Seconds that a computed token takes in each layout; None where that takes too long.

    The least of a few rounds, since whatever else the machine does only adds. `beat` is called
    before each batch, and may raise.
    """
    for batch in planned(pairs, layouts[0]).batches[:1]:
        beat()
        scorer.start(batch)()  # an engine's first batch takes longer
    begun, found = perf_counter(), dict[Layout, float | None]()
    for number in range(ROUNDS):
        for layout in layouts:
            if number == 0 or found[layout]:
                rate = _seconds_a_token(scorer, pairs, layout, beat, begun + MOST_S)
                found[layout] = min(filter(None, (rate, found.get(layout))), default=None)
            spent = perf_counter() - begun
            if spent > MOST_S:
                return found if len(found) == len(layouts) else None
    return found


def _seconds_a_token(
    scorer: Scorer,
    pairs: Sequence[EncodedPair],
    layout: Layout,
    beat: Callable[[], None],
    until: float,
) -> float | None:
    tokens, begun = 0, perf_counter()
    try:
        for batch in planned(pairs, layout).batches:
            beat()
            if tokens == 0:
                begun = perf_counter()  # planning is done beside the engine
            scorer.start(batch)()
            tokens += len(batch.rows) * batch.length
            if tokens >= TIMED_TOKENS or perf_counter() > until:
                break
    except MemoryError:
        return None
    return (perf_counter() - begun) / tokens


def cheapest(pairs: Sequence[EncodedPair], rates: Rates) -> Layout:
    """The layout in which these pairs take least time; the first one, unless another gains."""
    costs = {
        layout: rate * sum(len(b.rows) * b.length for b in planned(pairs, layout).batches)
        for layout, rate in rates.items()
        if rate
    }
    usual = next(iter(rates))
    best = min(costs, key=lambda layout: costs[layout], default=usual)
    return best if costs.get(usual, float("inf")) > CLEARLY * costs.get(best, 0.0) else usual
