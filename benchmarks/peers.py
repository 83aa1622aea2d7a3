"""dear-batch beside what else scores the same pairs with the same model, on this machine.

Each side is a process of its own that loads once; sides take turns, one at work at a time, with the
same threads. A first round tries each side's batch sizes; then the best one, and the package's own,
are repeated, and the median of the whole scoring time counts: text in, scores out, the model
loaded. Real tokens are the pairs' after truncation, the same for all. Scores are compared with
PyTorch's in fp32, each pair alone; who computes something else is named and not ranked. Sides that
are much slower than the loop are timed once. What could not run is listed with the reason. The last
line is JSON, also kept in benchmarks/results/peers.json, of which `plots.py` makes the README's
table and plot.

    python benchmarks/peers.py CHECKPOINT CANDIDATES.json BUNDLE [BUNDLE …] [--qrels QRELS]

CHECKPOINT is what the bundles were exported from, in fp32 (`merged_checkpoint.py`).
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peer_process import NotRunError, Peer, Side
from peer_results import CROSS_ENCODER, LOOP, OPTIMUM, Task, Timed, compared, entry, goals
from plots import RESULT
from plots import main as plot
from rich.console import Console
from rich.table import Table

from dear_batch.bundle import open_bundle
from dear_batch.machine import machine

HERE = Path(__file__).parent
ROOT = HERE.parent
MUCH_SLOWER = 3  # times the loop
BUSY = 0.5  # load average, over a minute


def sides_of(options: argparse.Namespace) -> list[Side]:
    """Everyone that is asked; the loop first, ours last."""
    here, model = Path(sys.executable), options.checkpoint
    peers, optimum = options.peers_python, options.optimum_python
    return [
        Side(LOOP, "readme-loop", here, model, "fp32", (64,), 64),
        Side("PyTorch, sorted", "sorted", here, model, "fp32", (16,)),
        Side("PyTorch, sorted", "sorted-bf16", here, model, "bf16", (16,)),
        Side(CROSS_ENCODER, "cross-encoder", peers, model, "fp32", (32, 16, 8), 32),
        Side(f"{CROSS_ENCODER} 5, ONNX", "cross-encoder-onnx", optimum, model, "fp32", (32, 8), 32),
        Side("rerankers", "rerankers", peers, model, "fp32", (16,), 16),
        Side(OPTIMUM, "optimum", optimum, model, "fp32", (16, 8, 4)),
        *(
            Side(
                "dear-batch", "ours", here, bundle, open_bundle(bundle).manifest.precision, (None,)
            )
            for bundle in options.bundles
        ),
    ]


def started(
    sides: list[Side], lists: list[Any], not_run: list[dict[str, str]]
) -> dict[Side, tuple[Peer, list[list[int]]]]:
    """Every side that loads, with the ids that it makes of the pairs."""
    found = {}
    for side in sides:
        try:
            peer = Peer(side, lists)
            found[side] = peer, peer.ids()
            say(f"{title(side)}: loaded in {peer.load_seconds} s")
        except NotRunError as error:
            refused(side, error, not_run)
    return found


def refused(side: Side, error: NotRunError, not_run: list[dict[str, str]]) -> None:
    not_run.append({"name": side.name, "precision": side.precision, "reason": str(error)})
    say(f"{title(side)}: not run: {error}")


def title(side: Side) -> str:
    return f"{side.name}, {side.precision}"


def say(text: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} {text}", file=sys.stderr, flush=True)


def first_round(side: Side, peer: Peer, same_ids: bool) -> list[Timed]:
    """The side's own batch and its best one, each with the one time that it has so far."""
    tries = []
    for batch in side.batches:
        timed = Timed(
            side.name,
            side.precision,
            batch,
            side.kind == "ours",
            same_ids=same_ids,
            versions=peer.versions,
        )
        tries.append(repeated(timed, peer))
    best = min(tries, key=lambda timed: timed.seconds[0])
    kept = [timed for timed in tries if timed is best or timed.batch == side.default]
    for timed in kept:
        roles = ("default", timed.batch == side.default), ("best", timed is best and len(tries) > 1)
        timed.role = ", ".join(role for role, is_it in roles if is_it and timed.batch)
    return kept


def repeated(timed: Timed, peer: Peer) -> Timed:
    """Score once more."""
    found = peer.score(timed.batch)
    timed.seconds.append(found["seconds"])
    timed.cpu_seconds.append(found["cpu_seconds"])
    timed.scores, timed.computed_tokens = found["scores"], found.get("computed_tokens")
    batch = "" if timed.batch is None else f", batch {timed.batch}"
    say(f"{timed.name}, {timed.precision}{batch}: {found['seconds']} s")
    return timed


def benchmark(options: argparse.Namespace, not_run: list[dict[str, str]]) -> dict[str, Any]:
    """All sides in turns."""
    chosen = json.loads(options.candidates.read_text())[: options.queries]
    hits = [item["hits"][: options.depth] for item in chosen]
    lists = [
        (item["query"], [hit["content"] for hit in some])
        for item, some in zip(chosen, hits, strict=True)
    ]
    up = started(sides_of(options), lists, not_run)
    plain, ids = next((found for side, found in up.items() if side.kind == "sorted"), (None, []))
    if plain is None:
        sys.exit(f"nothing to compare scores with: {not_run}")
    say("the reference: PyTorch fp32, each pair alone")
    alone = plain.score(1)["scores"]
    task = Task(
        qids=[str(some[0]["qid"]) for some in hits],
        docids=[[str(hit["docid"]) for hit in some] for some in hits],
        reference=[],
        real_tokens=sum(map(len, ids)),
        qrels=options.qrels,
    )
    task = replace(task, reference=task.split(alone))
    entries = [entry(timed, task) for timed in rounds(options.repeats, up, ids, not_run)]
    for peer, _ in up.values():
        peer.end()
    return {
        "queries": len(lists),
        "pairs": len(alone),
        "real_tokens": task.real_tokens,
        "sides": entries,
    }


def rounds(
    repeats: int,
    up: dict[Side, tuple[Peer, list[list[int]]]],
    ids: list[list[int]],
    not_run: list[dict[str, str]],
) -> list[Timed]:
    """The first round chooses, the others count; every second one goes the other way round."""
    turns: list[tuple[Side, Timed]] = []
    for side, (peer, own_ids) in up.items():
        try:
            turns += [(side, timed) for timed in first_round(side, peer, own_ids == ids)]
        except NotRunError as error:
            refused(side, error, not_run)
    loop = min((t.seconds[0] for _, t in turns if t.name == LOOP), default=float("inf"))
    again = [turn for turn in turns if turn[1].seconds[0] <= MUCH_SLOWER * loop]
    for _, timed in again:
        timed.seconds, timed.cpu_seconds = [], []
    gone = set[Side]()
    for number in range(repeats):
        for side, timed in again[:: -1 if number % 2 else 1]:
            try:
                if side not in gone:
                    repeated(timed, up[side][0])
            except NotRunError as error:
                refused(side, error, not_run)
                gone.add(side)
    return [timed for side, timed in turns if side not in gone]


def name_of(checkpoint: Path) -> str:
    """What the model is called."""
    name: str = json.loads((checkpoint / "config.json").read_text())["_name_or_path"]
    return name


def measured(script: str, argument: Path) -> dict[str, Any]:
    """The last line of another benchmark."""
    say(script)
    done = subprocess.run(
        [sys.executable, HERE / script, argument], check=True, stdout=subprocess.PIPE
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def shown(result: dict[str, Any]) -> Table:
    table = Table(title=f"{result['pairs']} pairs, {result['real_tokens']:,} real tokens")
    for column in (
        "side",
        "precision",
        "batch",
        "s",
        "tokens/s",
        "times loop",
        "max Δ",
        "τ",
        "nDCG@10",
    ):
        table.add_column(column, justify="left" if column == "side" else "right")
    for item in result["sides"]:
        parity = item["parity"]
        cells = (
            item["name"],
            item["precision"],
            item["batch"] or "-",
            f"{item['median_seconds']:.1f}",
            f"{item['real_tokens_per_s']:,.0f}",
            "-" if item["not_ranked"] else f"{item['times_loop']:.2f}",
            f"{parity['max_abs_difference']:.1e}",
            f"{parity['kendall_tau']:.4f}",
            "-" if item["ndcg@10"] is None else f"{item['ndcg@10']:.4f}",
        )
        table.add_row(*map(str, cells))
    return table


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("candidates", type=Path, help="RankGPT JSON")
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--qrels", type=Path)
    parser.add_argument("--queries", type=int, default=2)
    parser.add_argument("--depth", type=int, default=100, help="candidates a query")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULT)
    for name in ("peers", "optimum"):
        python = ROOT / f".venv-{name}" / "bin" / "python"
        parser.add_argument(f"--{name}-python", type=Path, default=python)
    return parser.parse_args()


def main() -> None:
    options, here = arguments(), machine()
    load = os.getloadavg()[0]
    if load > BUSY:
        say(f"the load is {load:.1f} before anything began: other work will be in these figures")
    config = options.checkpoint / "config.json"
    ceilings = [measured("ceiling.py", config)]
    first = measured("first_score.py", options.bundles[0])
    not_run: list[dict[str, str]] = []
    found = benchmark(options, not_run)
    ceilings.append(measured("ceiling.py", config))
    ceiling = max(ceilings, key=lambda one: one["gflops"])
    sides = compared(found.pop("sides"), ceiling)
    result = {
        "benchmark": "peers",
        "when": datetime.now(UTC).date().isoformat(),
        "cpu": here.cpu,
        "threads": here.cores,
        "load_before": round(load, 2),
        "model": name_of(options.checkpoint),
        "candidates": options.candidates.name,
        "collection": options.candidates.parent.name,
        **found,
        "repeats": options.repeats,
        "ceiling": ceiling,
        "first_score": first,
        "goals": goals(sides),
        "sides": sides,
        "not_run": not_run,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    console = Console(width=110, highlight=False)
    console.print(shown(result))
    for item in not_run:
        console.print(f"{item['name']}, {item['precision']}: not run: {item['reason']}")
    for item in (item for item in sides if item["not_ranked"]):
        console.print(f"{item['name']}, {item['precision']}: not ranked: {item['not_ranked']}")
    if options.output == RESULT:
        plot()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
