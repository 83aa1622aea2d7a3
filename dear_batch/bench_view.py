"""What `bench` found, as a table for one screen."""

from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

from rich.table import Table
from rich.text import Text

from dear_batch.show import passed_over

UNITS = ((1e12, "TFLOP/s"), (1e9, "GFLOP/s"), (1e6, "MFLOP/s"))


def view(found: Mapping[str, Any]) -> Table:
    """A line for each figure that a person decides by."""
    title = f"{found['bundle']} on {found['device_name']}"
    table = Table(title=Text(title), title_justify="left", show_header=False)
    for name, text in _lines(found):
        table.add_row(name, Text(text))
    return table


def _lines(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "engine", _engine(found)
    for line in passed_over(found):
        yield "passed over", line
    yield "sample", _sample(found)
    yield "speed", _speed(found)
    yield "computed", _computed(found)
    yield "seconds", ", ".join(f"{name} {value:.4f}" for name, value in found["seconds"].items())
    yield "engine's share", _shares(found)
    yield "ceiling", _ceiling(found)
    yield "CPU side", _cpu_side(found)
    if found["memory_backoffs"]:
        yield "out of memory", f"batches were halved {found['memory_backoffs']:,} times"
    for volume in filter(None, (found["million"], found["volume"])):
        cost = "" if volume["cost"] is None else f", cost {volume['cost']:,.2f}"
        yield f"{volume['candidates']:,} candidates", f"{_duration(volume['seconds'])}{cost}"


def _engine(found: Mapping[str, Any]) -> str:
    version = found["plan"] or found["engine_version"]
    return (
        f"{found['engine']} {version} on {found['device']}, {found['precision']}; "
        f"rows of {found['row_tokens']:,} tokens, batches of {found['batch_tokens']:,}"
    )


def _sample(found: Mapping[str, Any]) -> str:
    low, high = min(found["score_seconds"]), max(found["score_seconds"])
    return (
        f"{found['pairs']:,} pairs of {found['lists']:,} lists, {found['real_tokens']:,} tokens, "
        f"{found['truncated_pairs'] / found['pairs']:.1%} of the pairs truncated; "
        f"median of {found['passes']} passes of {low:g} to {high:g} s"
    )


def _speed(found: Mapping[str, Any]) -> str:
    rate = found["real_tokens_per_second"]
    return f"{rate:,.0f} tokens/s, {found['pairs_per_second']:,.2f} pairs/s"


def _computed(found: Mapping[str, Any]) -> str:
    return (
        f"{found['computed_tokens_per_second']:,.0f} tokens/s in the engine; "
        f"{found['prefix_share']:.1%} saved by shared prefixes and equal pairs, "
        f"{found['padding_share']:.1%} padding"
    )


def _shares(found: Mapping[str, Any]) -> str:
    return (
        f"{found['engine_share']:.1%} with the stages side by side, "
        f"{found['engine_share_in_turn']:.1%} one after another"
    )


def _ceiling(found: Mapping[str, Any]) -> str:
    ceiling, reached = found["ceiling"], _rate(found["flops_per_second"])
    if ceiling["flops_per_second"] is None:
        return f"not measured: {ceiling['why_not']}; reached {reached}"
    return (
        f"{_rate(ceiling['flops_per_second'])} of matrix products in {ceiling['precision']} "
        f"(by {ceiling['by']}, {ceiling['tokens']:,} tokens at once); reached {reached}, "
        f"{found['ceiling_share']:.0%}"
    )


def _cpu_side(found: Mapping[str, Any]) -> str:
    here = found["cpu_side_real_tokens_per_second"]
    more = found["cpu_side_real_tokens_per_second_16_cores"]
    return (
        f"feeds an engine of up to {here:,.0f} tokens/s on {found['cores']} cores, "
        f"{more:,.0f} on 16"
    )


def _rate(flops: float) -> str:
    size, unit = next((u for u in UNITS if flops >= u[0]), UNITS[-1])
    return f"{flops / size:,.3g} {unit}"


def _duration(seconds: float) -> str:
    return f"about {timedelta(seconds=max(1, round(seconds)))}"
