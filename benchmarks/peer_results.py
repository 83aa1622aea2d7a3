"""What the timings of `peers.py` amount to: compared scores, rates, who is ranked, the goals.

A side is ranked where its scores are within the gate of its precision from the reference. Knows
nothing of processes or models.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from dear_batch.evaluate.evaluation import evaluate
from dear_batch.parity import GATES, Gate, compare

# The loop that all others are measured by, and the least that is wanted of ours in fp32: times as
# fast as these sides, each at its best batch.
LOOP = "DeAR README loop"
CROSS_ENCODER = "CrossEncoder"
OPTIMUM = "Optimum, sorted"
GOALS = {LOOP: 5.0, CROSS_ENCODER: 3.0, OPTIMUM: 1.2}
LOW_PRECISION_GOAL = 1.7  # times ours in fp32
LOW_PRECISION = Gate(tau=0.97)


@dataclass(slots=True)
class Timed:
    """A side at one batch size: what each repeat took, and the scores of the last.

    `role` is "default" where the package chooses that batch, "best" where the first round did,
    of several.
    """

    name: str
    precision: str
    batch: int | None
    ours: bool
    role: str = ""
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    computed_tokens: int | None = None
    same_ids: bool = True
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Task:
    """What all sides score, and what their scores are compared with.

    `qids`, `docids` and `reference` have an entry a list; `real_tokens` are those of all pairs
    after truncation, before anything is shared or padded.
    """

    qids: Sequence[str]
    docids: Sequence[Sequence[str]]
    reference: Sequence[np.ndarray]
    real_tokens: int
    qrels: Path | None = None

    def split(self, scores: Sequence[float]) -> list[np.ndarray]:
        """Scores list by list."""
        ends = np.cumsum([len(docids) for docids in self.docids])[:-1]
        return np.split(np.float32(scores), ends)


def entry(timed: Timed, task: Task) -> dict[str, Any]:
    """The figures of a side."""
    scores = task.split(timed.scores)
    parity = compare(task.reference, scores)
    seconds = median(timed.seconds)
    return {
        "name": timed.name,
        "precision": timed.precision,
        "batch": timed.batch,
        "role": timed.role,
        "ours": timed.ours,
        "seconds": timed.seconds,
        "median_seconds": seconds,
        "cpu_seconds": timed.cpu_seconds,
        "real_tokens_per_s": round(task.real_tokens / seconds, 1),
        "computed_tokens": timed.computed_tokens,
        "same_ids": timed.same_ids,
        "parity": asdict(parity),
        "ndcg@10": ndcg(task, scores),
        "not_ranked": gate(timed.precision).misses(parity),
        "versions": timed.versions,
    }


def gate(precision: str) -> Gate:
    """What scores of a precision must keep to."""
    return {**GATES}.get(precision, LOW_PRECISION)


def ndcg(task: Task, scores: Sequence[np.ndarray]) -> float | None:
    """nDCG@10 over the queries of the task that are judged."""
    if task.qrels is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run.trec")
        with path.open("w") as file:
            for qid, docids, found in zip(task.qids, task.docids, scores, strict=True):
                for rank, n in enumerate(np.argsort(-found, kind="stable"), start=1):
                    file.write(f"{qid} Q0 {docids[n]} {rank} {-rank} x\n")
        (found,) = evaluate(task.qrels, [path], average_over="run")
    return round(found.measures["nDCG@10"], 4)


def compared(entries: list[dict[str, Any]], ceiling: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries, fastest first and those that are not ranked last, measured by the loop."""
    loop = next((e["median_seconds"] for e in entries if e["name"] == LOOP), None)
    for item in entries:
        seconds, computed = item["median_seconds"], item["computed_tokens"]
        item["times_loop"] = loop and round(loop / seconds, 2)
        per_token = ceiling["flop_per_packed_token" if item["ours"] else "flop_per_token"]
        flop = per_token * computed if computed else None  # layers' products alone
        item["share_of_fp32_ceiling"] = flop and round(flop / seconds / ceiling["gflops"] / 1e9, 3)
    return sorted(entries, key=lambda e: (e["not_ranked"] is not None, e["median_seconds"]))


def goals(entries: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """How many times as fast ours is: in fp32 as peers, at less as ours in fp32."""
    ranked = [item for item in entries if item["not_ranked"] is None]

    def best(name: str, precision: str = "fp32", *, ours: bool = False) -> float | None:
        found = (e for e in ranked if e["ours"] == ours and e["precision"] == precision)
        return min((e["median_seconds"] for e in found if ours or e["name"] == name), default=None)

    full = best("", ours=True)
    found = {}
    if full is None:
        return found
    for name, wanted in GOALS.items():
        if peer := best(name):
            found[f"fp32, times {name}"] = {"wanted": wanted, "found": round(peer / full, 2)}
    for precision in sorted({e["precision"] for e in ranked if e["ours"]} - {"fp32"}):
        low = best("", precision, ours=True)
        if low:
            name = f"{precision}, times our fp32"
            found[name] = {"wanted": LOW_PRECISION_GOAL, "found": round(full / low, 2)}
    return found
