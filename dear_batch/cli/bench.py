"""The command `bench`: a bundle, candidates and a machine, all of them the user's own."""

import re
from pathlib import Path
from typing import Any

import click

from dear_batch.cli.common import stopped_by_interrupts
from dear_batch.errors import UsageError
from dear_batch.log import log, outcome

EXAMPLES = """
\b
Examples:
  dear-batch bench --bundle bundles/mine --input candidates.parquet
  dear-batch bench --bundle bundles/mine --input candidates.parquet --engine torch --pairs 200
  dear-batch bench --bundle bundles/mine --input candidates.parquet --price-per-hour 2.50 \\
    --volume 10M --json
"""
_VOLUME = re.compile(r"(?P<count>\d+(\.\d+)?)(?P<unit>[kMG]?)")
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}


@click.command(epilog=EXAMPLES)
@click.option("--bundle", required=True, type=click.Path(path_type=Path), help="Pointwise bundle.")
@click.option(
    "--input",
    "path",
    required=True,
    type=click.Path(path_type=Path),
    help="Parquet file of candidates; a sample of it is scored.",
)
@click.option(
    "--engine",
    default="auto",
    type=click.Choice(["auto", "tensorrt", "onnxruntime", "torch"]),
    show_default=True,
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--pairs", type=click.IntRange(min=1), help="Pairs that each pass scores.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=1),
    help="About how long to score, in place of --pairs; default 60.",
)
@click.option(
    "--price-per-hour", type=click.FloatRange(min=0), help="What an hour of this machine costs."
)
@click.option("--volume", help="Candidates to tell the time of: 250000, 250k, 10M, 1.5G.")
@click.option("--json", "as_json", is_flag=True, help="One line of JSON instead of a table.")
def bench(
    bundle: Path,
    path: Path,
    volume: str | None,
    price_per_hour: float | None,
    *,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure how fast a bundle scores candidates like these here, and what that costs.

    Loads the bundle as `run` does and scores a sample of the lists three times, after a
    warm-up: medians of every stage, the engine's share of a job's time, how near it comes to
    what the device can multiply, and how fast an engine the CPU side could feed. Nothing is
    kept but the rate, from which `run --dry-run` estimates.
    """
    candidates = None if volume is None else _candidates(volume)
    if options["pairs"] and options["seconds"]:
        raise UsageError("--pairs and --seconds do not go together.", valid="one of them")
    with stopped_by_interrupts():
        found = _figures(bundle, path, candidates, price_per_hour, **options)
    if as_json:
        outcome(found)
        return
    from dear_batch.bench_view import view
    from dear_batch.show import show

    show(view(found))


def _figures(
    bundle: Path,
    path: Path,
    volume: int | None,
    price_per_hour: float | None,
    *,
    engine: Any,
    device: str,
    pairs: int | None,
    seconds: float | None,
) -> dict[str, Any]:
    from dear_batch.run.bench import SECONDS, measure
    from dear_batch.run.bench_figures import figures
    from dear_batch.run.rates import remember
    from dear_batch.run.watch import Watch
    from dear_batch.show import progress
    from dear_batch.specs import ExecutionSpec

    class Told(Watch):
        def log(self, event: str, **fields: Any) -> None:
            log(event, **fields)

    execution = ExecutionSpec(engine=engine, device=device)
    with progress("pairs") as advance:
        measured = measure(
            bundle,
            path,
            execution,
            pairs=pairs,
            seconds=seconds or SECONDS,
            watch=Told(),
            advance=advance,
        )
    found = figures(measured, price_per_hour=price_per_hour, volume=volume)
    rate = found["tokens"] / found["seconds"]["score"]
    remember(measured.loaded.bundle.sha256, found["engine"], found["device"], rate)
    return found


def _candidates(text: str) -> int:
    """A number such as 10M."""
    found = _VOLUME.fullmatch(text)
    count = round(float(found["count"]) * _UNITS[found["unit"]]) if found else 0
    if not count:
        raise UsageError(
            f"The value of '--volume' is out of range: found {text!r}.",
            valid="a number of candidates such as 250000, 250k or 10M",
        )
    return count
