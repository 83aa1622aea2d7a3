"""What the measurements of a benchmark come to: rates, shares, limits, time and cost.

Sums alone: the same measurements give the same figures.
"""

from collections.abc import Mapping
from statistics import median
from typing import Any

from dear_batch.pointwise.ceiling import flops_per_token
from dear_batch.pointwise.selection import told
from dear_batch.run.bench import CPU_STAGES, Measured
from dear_batch.run.report import OK

CORES = 16  # of a server's share for one GPU: the CPU side is told for so many, too
MILLION = 1_000_000
DIGITS = 4
Fields = dict[str, Any]


def figures(
    measured: Measured, *, price_per_hour: float | None = None, volume: int | None = None
) -> Fields:
    """Everything that `bench` tells, JSON-able.

    `price_per_hour` is the machine's; `volume` is a number of candidates.
    """
    loaded, work = measured.loaded, measured.scoring[0].work
    real_tokens, cores = measured.scoring[0].real_tokens, loaded.machine.cores
    score = median(one.seconds for one in measured.scoring)
    seconds, serial, spread = _cpu_side(measured, real_tokens)
    total = _overlapped(score, serial, spread, cores, shared=loaded.scorer.device == "cpu")
    packed = loaded.scorer.layout.packed
    per_token = flops_per_token(measured.config, packed=packed)
    reached, most = work.computed_tokens * per_token / score, measured.ceiling.flops
    found = {
        "pairs_per_second": work.pairs / total,
        "real_tokens_per_second": real_tokens / total,
        "computed_tokens_per_second": work.computed_tokens / score,
        "prefix_share": 1 - work.tokens / real_tokens,
        "padding_share": 1 - work.tokens / work.computed_tokens,
        "engine_share": score / total,
        "engine_share_in_turn": score / (score + sum(seconds.values())),
        "flops_per_second": reached,
        "ceiling_share": reached / most if most else None,
        "cpu_side_real_tokens_per_second": real_tokens / (serial + spread / cores),
        f"cpu_side_real_tokens_per_second_{CORES}_cores": real_tokens / (serial + spread / CORES),
    }
    ceiling = measured.ceiling
    return {
        "status": OK,
        **_facts(measured),
        "pairs": work.pairs,
        "truncated_pairs": work.truncated_pairs,
        "real_tokens": real_tokens,
        "tokens": work.tokens,
        "computed_tokens": work.computed_tokens,
        "memory_backoffs": work.memory_backoffs,
        "load_seconds": _digits(measured.load_seconds),
        "score_seconds": [_digits(one.seconds) for one in measured.scoring],
        "seconds": _all_digits({**seconds, "score": score}),
        **_all_digits(found),
        "flops_per_token": per_token,
        "ceiling": {
            "flops_per_second": _digits(ceiling.flops),
            "by": ceiling.by,
            "precision": ceiling.precision,
            "tokens": ceiling.tokens,
            "why_not": ceiling.why,
        },
        "million": _volume(MILLION, work.pairs / total, price_per_hour),
        "volume": volume and _volume(volume, work.pairs / total, price_per_hour),
    }


def _facts(measured: Measured) -> Fields:
    """What was measured."""
    loaded = measured.loaded
    scorer = loaded.scorer
    return {
        "bundle": str(loaded.bundle.folder),
        "input": measured.input,
        **told(loaded.choice),
        "engine_version": loaded.choice.engine_version(loaded.machine),
        "precision": scorer.precision,
        "device_name": loaded.machine.device_name(scorer.device),
        "cores": loaded.machine.cores,
        "row_tokens": scorer.layout.row_tokens,
        "batch_tokens": scorer.layout.batch_tokens,
        "lists": measured.lists,
        "passes": len(measured.scoring),
    }


def _cpu_side(measured: Measured, real_tokens: int) -> tuple[Fields, float, float]:
    """Seconds of each stage for so many tokens; those on one core, those that spread over cores.

    Python's stages share one interpreter lock.
    """
    share = real_tokens / measured.cpu_side[0].real_tokens
    seconds = {
        stage: share * median(one.seconds[stage] for one in measured.cpu_side)
        for stage in CPU_STAGES
    }
    calling = share * median(one.calling_seconds for one in measured.cpu_side)
    spread = share * median(one.spread_seconds for one in measured.cpu_side)
    return seconds, sum(seconds.values()) - seconds["tokenise"] + calling, spread


def _overlapped(score: float, serial: float, spread: float, cores: int, *, shared: bool) -> float:
    """Seconds of a job, in which reading and writing go beside the engine.

    An engine on the CPU `shared` its cores: what they do for others, they do not do for it.
    """
    if shared:
        return score + (serial + spread) / cores
    return max(score, serial + spread / cores)


def _volume(candidates: int, rate: float, price_per_hour: float | None) -> Fields:
    seconds = candidates / rate
    cost = None if price_per_hour is None else _digits(seconds / 3600 * price_per_hour)
    return {"candidates": candidates, "seconds": _digits(seconds), "cost": cost}


def _all_digits(found: Mapping[str, float | None]) -> Fields:
    return {name: _digits(value) for name, value in found.items()}


def _digits(value: float | None) -> float | None:
    """The first digits; more would be noise."""
    return None if value is None else float(f"{value:.{DIGITS}g}")
