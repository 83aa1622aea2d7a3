"""How long `dear-batch run` takes to its first score, beyond loading the weights.

A job of a single candidate is timed from its process's start to its end, so publishing counts
too; from that goes what opening the engine alone takes, in a process of its own. Caches are warm:
a job went before. The last line is JSON.

    python benchmarks/first_score.py BUNDLE
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

REPEATS = 3
OPEN = """
import sys, time
from dear_batch.bundle import open_bundle
from dear_batch.machine import machine
from dear_batch.pointwise.scorer import open_scorer
from dear_batch.pointwise.selection import choose
bundle = open_bundle(sys.argv[1])
choice = choose(bundle, machine(), device="cpu")
import onnxruntime
start = time.perf_counter()
open_scorer(bundle, choice)
print(time.perf_counter() - start)
"""


def first_score(bundle: str) -> dict[str, Any]:
    """Medians, in seconds."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        row = {"qid": "1", "query": "who wrote Emma?", "docid": "a", "text": "Jane Austen."}
        pq.write_table(pa.Table.from_pylist([row]), folder / "one.parquet")
        jobs = [job(bundle, folder, f"out-{n}") for n in range(REPEATS + 1)][1:]
        opens = [
            float(subprocess.check_output([sys.executable, "-c", OPEN, bundle]))
            for _ in range(REPEATS)
        ]
    whole, weights = median(jobs), median(opens)
    return {
        "job_seconds": round(whole, 2),
        "weights_seconds": round(weights, 2),
        "beyond_weights_seconds": round(whole - weights, 2),
    }


def job(bundle: str, folder: Path, name: str) -> float:
    """Seconds of a whole job, its process's start included."""
    command = [sys.executable, "-m", "dear_batch", "run", "--device", "cpu", "--bundle", bundle]
    start = time.perf_counter()
    subprocess.run(
        [*command, "--input", folder / "one.parquet", "--output", folder / name],
        check=True,
        capture_output=True,
    )
    return time.perf_counter() - start


if __name__ == "__main__":
    print(json.dumps(first_score(sys.argv[1])))
