"""What the measurements of a benchmark come to: rates, shares, limits, time and cost.

Sums alone: the same measurements give the same figures.
"""

from collections.abc import Mapping
from statistics import median
from typing import Any

from dear_batch.pointwise.ceiling import flops_per_token
from dear_batch.pointwise.selection import told
from dear_batch.run.bench import STAGES, Measured
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
    loaded, work = measured.loaded, measured.passes[0].work
    real_tokens = measured.passes[0].real_tokens
    seconds = {s: median(p.seconds[s] for p in measured.passes) for s in STAGES}
    serial, spread = _cpu_side(measured, seconds)
    cores, score = loaded.machine.cores, seconds["score"]
    total = _overlapped(score, serial, spread, cores, shared=loaded.scorer.device == "cpu")
    per_token = flops_per_token(measured.config)
    reached, most = work.computed_tokens * per_token / score, measured.ceiling.flops
    found = {
        "pairs_per_second": work.pairs / total,
        "real_tokens_per_second": real_tokens / total,
        "computed_tokens_per_second": work.computed_tokens / score,
        "prefix_share": 1 - work.tokens / real_tokens,
        "padding_share": 1 - work.tokens / work.computed_tokens,
        "engine_share": score / total,
        "engine_share_in_turn": score / sum(seconds.values()),
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
        "seconds": {"load": _digits(measured.load_seconds), **_all_digits(seconds)},
        "score_seconds": [_digits(p.seconds["score"]) for p in measured.passes],
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
        "passes": len(measured.passes),
    }


def _cpu_side(measured: Measured, seconds: dict[str, float]) -> tuple[float, float]:
    """Seconds of all but the engine: on one core, and those that spread over cores.

    Python's stages share one interpreter lock. Of tokenising, wall time on `cores` is
    `serial + spread / cores` and CPU time `serial + spread`, which gives both.
    """
    cores = measured.loaded.machine.cores
    wall = seconds["tokenise"]
    cpu = max(wall, median(p.tokenise_cpu_seconds for p in measured.passes))
    spread = min(cpu, (cpu - wall) * cores / (cores - 1)) if cores > 1 else 0.0
    others = sum(seconds[stage] for stage in STAGES if stage not in {"tokenise", "score"})
    return others + cpu - spread, spread


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
