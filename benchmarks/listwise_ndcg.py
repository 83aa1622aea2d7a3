"""nDCG of the first stage, of stage 1 and of stages 1 and 2 with each prompt, by real jobs.

One job with `--stage pointwise`, then one `--stage listwise` a prompt over the same parts. The
last line is JSON.

    python benchmarks/listwise_ndcg.py POINTWISE LISTWISE CANDIDATES.json QRELS
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from dear_batch.evaluate.evaluation import evaluate

PROMPTS = ("readme", "rankllm-chat")
MEASURES = ("nDCG@1", "nDCG@5", "nDCG@10")
KEPT = ("windows", "prompt_tokens", "answer_tokens", "forwards", "cut_passages",
        "shortened_passages", "device", "precision", "seconds")  # fmt: skip


def dear_batch(*arguments: object) -> None:
    command = [sys.executable, "-m", "dear_batch", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def write_run(path: Path, rows: list[dict[str, Any]], key: Callable[..., int]) -> Path:
    lines = (f"{row['qid']} Q0 {row['docid']} {key(row)} {-key(row)} x\n" for row in rows)
    path.write_text("".join(lines))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("pointwise", "listwise", "candidates", "qrels"):
        parser.add_argument(name, type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parquet, output = folder / "candidates.parquet", folder / "run"
        dear_batch("convert", "rankgpt", arguments.candidates, "-o", parquet)
        job = ["run", "--input", parquet, "--bundle", arguments.pointwise]
        job += ["--listwise", arguments.listwise, "--output", output]
        dear_batch(*job, "--stage", "pointwise")
        runs, reports = [], {}
        for prompt in PROMPTS:
            dear_batch(*job, "--stage", "listwise", "--prompt", prompt)
            rows = pq.read_table(output / "results.parquet").to_pylist()
            if not runs:
                runs.append(write_run(folder / "first", rows, lambda row: row["first_rank"]))
                runs.append(write_run(folder / "stage-1", rows, lambda row: row["pointwise_rank"]))
            runs.append((output / "run.trec").rename(folder / prompt))
            listwise = json.loads((output / "report.json").read_text())["listwise"]
            reports[prompt] = {k: listwise[k] for k in (*KEPT, "depth", "window", "step")}
        evaluations = evaluate(arguments.qrels, runs)
    names = ("first_stage", "stage_1", *(f"stage_1_and_2_{prompt}" for prompt in PROMPTS))
    result = {
        "candidates": arguments.candidates.name,
        "ndcg": {
            name: {measure: round(e.measures[measure], 4) for measure in MEASURES}
            for name, e in zip(names, evaluations, strict=True)
        },
        "listwise": reports,
    }
    print(json.dumps(result, indent=2))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
