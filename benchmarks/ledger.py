"""What trust costs: a million short candidates through a one-layer model.

Measures, in processes of their own, the CPU seconds of the ledger (locks, plans, hashes, parts'
commits, their verification, report and manifest) and of the accounting beside those of the whole
job, the peak memory, and after kill -9 at half how long a restart takes until it scores. The
model is random and has one narrow layer, so that everything but the model weighs far more than it
does in a real job.

    python benchmarks/ledger.py BASE [--candidates 1000000]
"""

import argparse
import json
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parent.parent
LIST = 100
WORDS = 10  # a passage; at most 20 tokens
MB = 1e6


def words() -> list[str]:
    lines = (ROOT / "examples/collection/corpus.jsonl").read_text(encoding="utf-8").splitlines()
    return " ".join(json.loads(line)["text"] for line in lines).split()


def write_candidates(path: Path, n: int) -> None:
    """A flat file, a row a candidate, in row groups of 64 Ki rows."""
    pool, rng = words(), np.random.default_rng(5)
    starts = rng.integers(0, len(pool) - WORDS, n)
    texts = [" ".join(pool[s : s + WORDS])[:70] for s in starts]
    number = np.arange(n)
    table = pa.table(
        {
            "qid": pa.array(number // LIST).cast(pa.string()),
            "query": pa.array([texts[i // LIST * LIST] for i in range(n)]),
            "docid": pa.array(number).cast(pa.string()),
            "text": texts,
        }
    )
    pq.write_table(table, path, row_group_size=1 << 16)


def one_layer(base: Path, folder: Path) -> Path:
    """A bundle of a random model with one layer a third as wide as SmolLM2's."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlamaForSequenceClassification

    from dear_batch.export.bundle_from_checkpoint import Plan, bundle_from_checkpoint
    from dear_batch.specs import ExportSpec

    torch.manual_seed(0)
    shape = {"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 3}
    config = AutoConfig.from_pretrained(
        base, num_hidden_layers=1, num_labels=1, num_key_value_heads=1, **shape
    )
    checkpoint = folder / "checkpoint"
    LlamaForSequenceClassification(config).save_pretrained(checkpoint)
    AutoTokenizer.from_pretrained(base).save_pretrained(checkpoint)
    spec = ExportSpec(output=str(folder / "bundle"), model=str(checkpoint))
    return bundle_from_checkpoint(Plan(spec), lambda _step: None).folder


def one(spec_json: str, start: float) -> None:
    """Run the job in this process; prints what it cost."""
    from dear_batch.pointwise.onnx_scorer import PackedOnnxScorer
    from dear_batch.run import inputs, ledger, local, outcome, planning, pointwise, report
    from dear_batch.spec_files import spec_from_dict
    from dear_batch.specs import JobSpec

    spent: Counter[str] = Counter()
    depth = Counter[tuple[str, int]]()

    def counted(owner: Any, name: str, kind: str) -> None:
        call: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            here = (kind, threading.get_ident())
            depth[here] += 1
            before = time.thread_time()
            try:
                return call(*args, **options)
            finally:
                depth[here] -= 1
                if depth[here] == 0:
                    spent[kind] += time.thread_time() - before

        setattr(owner, name, timed)

    for owner, names in {
        ledger.Ledger: ("commit", "kept", "found", "new_file", "orphans"),
        inputs.Pin: (),
        outcome: ("report", "manifest", "record"),
        planning: ("fitting_plan", "outline"),
        local: ("write_json", "locked", "finished", "fitting_plan", "outline", "temporaries"),
    }.items():
        for name in names:
            counted(owner, name, "ledger")
    counted(inputs.Hashes, "_hash", "input hashes")
    for name in ("ranked", "refused", "to_json"):
        counted(report.Tally, name, "accounting")
    counted(local, "publish", "publish")
    counted(pointwise.Stage, "_finish", "rank and write parts")
    first = [0.0]
    score = PackedOnnxScorer.score

    def scored(*args: Any) -> Any:
        first[0] = first[0] or time.time() - start
        return score(*args)

    PackedOnnxScorer.score = scored
    found = local.run_job(spec_from_dict(json.loads(spec_json), JobSpec))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cpu = usage.ru_utime + usage.ru_stime
    status = Path("/proc/self/status").read_text().splitlines()
    peak = int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024
    fields = {
        "ready_s": round(first[0], 2),
        "wall_s": round(time.time() - start, 1),
        "cpu_s": round(cpu, 1),
        "cpu_share": {kind: round(seconds / cpu, 5) for kind, seconds in spent.items()},
        "peak_mb": round(peak / MB),
        "idle_share": found["idle_share"],
        "tokens": found["tokens"],
        "shards": found["shards"]["pointwise"],
    }
    print(json.dumps(fields))


def child(spec: dict[str, Any]) -> list[str]:
    return [sys.executable, __file__, "--one", json.dumps(spec), "--start", str(time.time())]


def ran(spec: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(child(spec), check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found), file=sys.stderr)
    return found


def killed_at_half(spec: dict[str, Any], shards: int) -> int:
    """Run the job until half of its shards are committed, then kill -9."""
    commits = Path(spec["output"]["folder"]) / "commits" / "pointwise"
    job = subprocess.Popen(child(spec), stdout=subprocess.DEVNULL)
    while len([*commits.glob("[!.]*.json")]) < shards // 2:
        time.sleep(0.05)
        assert job.poll() is None
    job.send_signal(signal.SIGKILL)
    job.wait()
    return len([*commits.glob("[!.]*.json")])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path, nargs="?")
    parser.add_argument("--candidates", type=int, default=1_000_000)
    parser.add_argument("--one")
    parser.add_argument("--start", type=float)
    arguments = parser.parse_args()
    if arguments.one:
        one(arguments.one, arguments.start)
        return
    folder = Path(tempfile.mkdtemp(prefix="dear-batch-ledger-"))
    try:
        measure(arguments.base, arguments.candidates, folder)
    finally:
        shutil.rmtree(folder)


def measure(base: Path, candidates: int, folder: Path) -> None:
    bundle = one_layer(base, folder)
    results: dict[str, Any] = {}

    def spec(name: str, n: int) -> dict[str, Any]:
        path = folder / f"{n}.parquet"
        if not path.exists():
            write_candidates(path, n)
        return {
            "input": {"paths": [str(path)]},
            "pointwise": {"bundle": str(bundle)},
            "output": {"folder": str(folder / name)},
        }

    results["tenth"] = ran(spec("tenth", candidates // 10))
    results["whole"] = ran(spec("whole", candidates))
    results["committed_at_kill"] = killed_at_half(
        spec("half", candidates), results["whole"]["shards"]["done"]
    )
    results["restart"] = ran(spec("half", candidates))
    files = ("run.trec", "results.parquet")
    results["same_bytes"] = all(
        (folder / "whole" / name).read_bytes() == (folder / "half" / name).read_bytes()
        for name in files
    )
    machine = {"cpu": platform.processor() or platform.machine(), "python": sys.version.split()[0]}
    print(json.dumps({"candidates": candidates, **results, "machine": machine}))


if __name__ == "__main__":
    main()
