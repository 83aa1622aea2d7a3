"""What volume costs: one job over few short candidates, and one over many.

Measures, in processes of their own, peak memory, CPU seconds a candidate by phase and in all, and
the share of time in which the engine had a batch to compute. The model is random and has one
narrow layer, so that everything but the model weighs far more than it does in a real job.

    python benchmarks/volume.py BASE [--candidates 200000 2000000]
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from ledger import MB, one_layer, write_candidates


def one(spec_json: str) -> None:
    """Run the job in this process; prints what it cost."""
    from dear_batch.run.local import run_job
    from dear_batch.run.watch import Watch
    from dear_batch.spec_files import spec_from_dict
    from dear_batch.specs import JobSpec

    class Phases(Watch):
        """CPU seconds of the whole process, by the phase of the job."""

        def __init__(self) -> None:
            super().__init__()
            self.cpu = defaultdict[str, float](float)
            self._name, self._since = "start", 0.0

        def phase(self, name: str) -> None:
            now = time.process_time()
            self.cpu[self._name] += now - self._since
            self._name, self._since = name, now

    watch, begun = Phases(), time.perf_counter()
    found = run_job(spec_from_dict(json.loads(spec_json), JobSpec), watch)
    watch.phase("end")
    status = Path("/proc/self/status").read_text().splitlines()
    peak = int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024
    candidates = found["candidates"]["written"]
    fields = {
        "candidates": candidates,
        "wall_s": round(time.perf_counter() - begun, 1),
        "peak_mb": round(peak / MB, 1),
        "cpu_us_a_candidate": round(1e6 * time.process_time() / candidates, 1),
        "phases_cpu_s": {name: round(seconds, 2) for name, seconds in watch.cpu.items()},
        "tokens": found["tokens"],
        "tokens_per_second": found["tokens_per_second"],
        "busy_share": round(1 - found["idle_share"], 4),
        "seconds": found["seconds"],
        "shards": found["shards"]["pointwise"]["done"],
    }
    print(json.dumps(fields))


def ran(bundle: Path, folder: Path, candidates: int) -> dict[str, Any]:
    path = folder / f"{candidates}.parquet"
    write_candidates(path, candidates)
    spec = {
        "input": {"paths": [str(path)]},
        "pointwise": {"bundle": str(bundle)},
        "output": {"folder": str(folder / str(candidates))},
        "execution": {"row_tokens": 512, "batch_tokens": 512},  # nothing is timed in any of them
    }
    command = [sys.executable, __file__, "--one", json.dumps(spec)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found), file=sys.stderr)
    shutil.rmtree(folder / str(candidates))
    path.unlink()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path, nargs="?")
    parser.add_argument("--candidates", type=int, nargs="+", default=[200_000, 2_000_000])
    parser.add_argument("--one")
    arguments = parser.parse_args()
    if arguments.one:
        one(arguments.one)
        return
    folder = Path(tempfile.mkdtemp(prefix="dear-batch-volume-"))
    try:
        bundle = one_layer(arguments.base, folder)
        ran(bundle, folder, 1000)  # caches are filled
        jobs = [ran(bundle, folder, n) for n in arguments.candidates]
    finally:
        shutil.rmtree(folder)
    first, last = jobs[0], jobs[-1]
    more = {
        name: round(last[name] / first[name] - 1, 4) for name in ("peak_mb", "cpu_us_a_candidate")
    }
    machine = {"cpu": platform.processor() or platform.machine(), "python": sys.version.split()[0]}
    print(json.dumps({"jobs": jobs, "last_over_first": more, "machine": machine}))


if __name__ == "__main__":
    main()
