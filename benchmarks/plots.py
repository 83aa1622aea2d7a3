"""The README's table and plot of `peers.py`, made from the committed result alone.

Rewrites what is between the two markers of README.md, and docs/peers.svg.

    python benchmarks/plots.py
"""

import json
from html import escape
from math import ceil, log10
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "peers.json"
README = ROOT / "README.md"
PLOT = ROOT / "docs" / "peers.svg"
BEGIN, END = "<!-- begin: benchmarks/plots.py -->", "<!-- end: benchmarks/plots.py -->"

Fields = dict[str, Any]

WIDTH, LEFT, RIGHT, TOP, ROW, BAR = 760, 270, 70, 44, 28, 18
OURS, OTHERS = "#2563eb", "#94a3b8"
TICKS = (1, 2, 5)  # of each power of ten


def label(side: Fields) -> str:
    """A side, its precision and batch size."""
    batch = f", batch {side['batch']}" if side["batch"] else ""
    return f"{side['name']}, {side['precision']}{batch}"


def readme(result: Fields) -> str:
    """What stands between the markers of the README."""
    ceiling, first = result["ceiling"], result["first_score"]
    lines = [
        (
            f"{result['pairs']} pairs of {result['collection']} ({result['real_tokens']:,} tokens),"
            f" {result['model']}, {result['threads']} threads of {result['cpu']}, medians of"
            f" {result['repeats']}, text in to scores out; {result['when']}, by"
            " `benchmarks/peers.py`:"
        ),
        "",
        "![Seconds of each side, on a logarithmic scale](docs/peers.svg)",
        "",
        (
            "| side | batch | seconds | tokens/s | times the loop | max difference of scores"
            " | Kendall τ | nDCG@10 |"
        ),
        "|---|---|---|---|---|---|---|---|",
        *map(row, result["sides"]),
        "",
        (
            f"Of the fastest fp32 matrix products on this model's shapes ({ceiling['gflops']:.0f}"
            f" GFLOP/s, {ceiling['engine']}), dear-batch reaches {shares(result)} on the tokens"
            " that it computes. A job of one candidate takes"
            f" {first['beyond_weights_seconds']} s beyond loading the weights."
        ),
    ]
    lines += [
        f"Not ranked: {label(side)}: {side['not_ranked']}."
        for side in result["sides"]
        if side["not_ranked"]
    ]
    lines += [
        f"Timed once, being much slower than the loop: {label(side)}."
        for side in result["sides"]
        if len(side["seconds"]) < result["repeats"]
    ]
    lines += [
        f"Not run: {side['name']}, {side['precision']}: {side['reason']}."
        for side in result["not_run"]
    ]
    return "\n".join([*lines, "", packages(result)])


def row(side: Fields) -> str:
    """A line of the table."""
    parity, ndcg = side["parity"], side["ndcg@10"]
    name = f"{side['name']}, {side['precision']}"
    cells = (
        f"**{name}**" if side["ours"] else name,
        f"{side['batch'] or ''} {side['role'] and '(' + side['role'] + ')'}".strip(),
        f"{side['median_seconds']:.1f}",
        f"{side['real_tokens_per_s']:,.0f}",
        "not ranked" if side["not_ranked"] else f"{side['times_loop']:.1f}",
        f"{parity['max_abs_difference']:.1e}",
        f"{parity['kendall_tau']:.4f}",
        "" if ndcg is None else f"{ndcg:.4f}",
    )
    return f"| {' | '.join(cells)} |"


def shares(result: Fields) -> str:
    """What each precision of ours reaches of the ceiling."""
    ours = [side for side in result["sides"] if side["ours"]]
    return ", ".join(f"{s['share_of_fp32_ceiling']:.0%} in {s['precision']}" for s in ours)


def packages(result: Fields) -> str:
    """The versions that ran; those of different environments differ."""
    found: dict[str, set[str]] = {}
    for side in result["sides"]:
        for name, version in side["versions"].items():
            found.setdefault(name, set()).add(version)
    return (
        "Versions: "
        + "; ".join(f"{name} {' and '.join(sorted(v))}" for name, v in sorted(found.items()))
        + "."
    )


def plot(result: Fields) -> str:
    """Bars of seconds as SVG, fastest first, on a logarithmic scale; the ranked sides alone."""
    sides = [side for side in result["sides"] if not side["not_ranked"]]
    seconds = [side["median_seconds"] for side in sides]
    low, high = floor_of(min(seconds)), ceil_of(max(seconds))
    height = TOP + ROW * len(sides) + 34

    def x(value: float) -> float:
        share = (log10(value) - log10(low)) / (log10(high) - log10(low))
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    lines = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            f'width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="13">'
        ),
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        text(LEFT, 22, f"Seconds for {result['pairs']} pairs (logarithmic; less is better)", "600"),
    ]
    bottom = TOP + ROW * len(sides)
    for tick in ticks(low, high):
        lines += [
            f'<line x1="{x(tick)}" y1="{TOP - 6}" x2="{x(tick)}" y2="{bottom}" stroke="#e2e8f0"/>',
            text(x(tick), bottom + 20, f"{tick:g}", anchor="middle"),
        ]
    for number, side in enumerate(sides):
        y, end = TOP + ROW * number, x(side["median_seconds"])
        weight = "600" if side["ours"] else "400"
        lines += [
            text(LEFT - 8, y + 14, label(side), weight, "end"),
            (
                f'<rect x="{LEFT}" y="{y}" width="{round(end - LEFT, 1)}" height="{BAR}" '
                f'fill="{OURS if side["ours"] else OTHERS}"/>'
            ),
            text(end + 6, y + 14, f"{side['median_seconds']:.1f}", weight),
        ]
    return "\n".join([*lines, "</svg>", ""])


def text(x: float, y: float, words: str, weight: str = "400", anchor: str = "start") -> str:
    """A line of text."""
    return (
        f'<text x="{x}" y="{y}" font-weight="{weight}" text-anchor="{anchor}" fill="#0f172a">'
        f"{escape(words)}</text>"
    )


def ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each power of ten between two values, both included."""
    powers = range(ceil(log10(low)) - 1, ceil(log10(high)) + 1)
    found = [float(f"{tick}e{power}") for power in powers for tick in TICKS]
    return [tick for tick in found if low <= tick <= high]


def floor_of(value: float) -> float:
    """The tick below a value; a bar has some length."""
    return max(tick for tick in ticks(value / 20, value) if tick < value * 0.8)


def ceil_of(value: float) -> float:
    """The tick above a value."""
    return min(ticks(value, value * 20))


def between_markers(readme_text: str, block: str) -> str:
    """README with the block in its place."""
    before, rest = readme_text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def main() -> None:
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    PLOT.write_text(plot(result), encoding="utf-8")
    old = README.read_text(encoding="utf-8")
    README.write_text(between_markers(old, readme(result)), encoding="utf-8")
    print(PLOT.relative_to(ROOT))


if __name__ == "__main__":
    main()
