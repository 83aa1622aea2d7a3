"""Our run beside a plain PyTorch loop written to the authors' README, on real collections.

Reranks a RankGPT file twice with the same checkpoint: by `dear-batch run` from an exported
bundle, and by the README's recipe (text pairs, one pair a row, padded, Hugging Face model,
fp32). Prints nDCG@1/5/10 of the first stage, of both, and of our run mixed in equal parts with
the first stage (z-scores), and the largest score difference; the last line is JSON.

    python benchmarks/agreement.py BUNDLE BASE ADAPTER CANDIDATES.json QRELS
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dear_batch.data import ScoredCandidate, ScoredList
from dear_batch.evaluate.evaluation import evaluate
from dear_batch.run.ranking import rank

BATCH = 16
TOLERANCE = 1e-4
MEASURES = ("nDCG@1", "nDCG@5", "nDCG@10")


def readme_scores(base: str, adapter: str, lists: list[dict]) -> dict[tuple[str, str], float]:
    """The README's `rerank`, pairs sorted by length; (qid, docid) → logit."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, dtype=torch.float32
    )
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    tokenizer.padding_side = "right"
    pairs = [
        (
            str(hit["qid"]),
            str(hit["docid"]),
            "query: " + item["query"],
            "document:  " + hit["content"],
        )
        for item in lists
        for hit in item["hits"]
    ]
    pairs.sort(key=lambda pair: len(pair[3]))
    scores = {}
    for start in range(0, len(pairs), BATCH):
        batch = pairs[start : start + BATCH]
        inputs = tokenizer(
            [pair[2] for pair in batch],
            [pair[3] for pair in batch],
            truncation=True,
            max_length=228,
            padding=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            logits = model(**inputs).logits.squeeze(-1)
        scores.update({pair[:2]: logit for pair, logit in zip(batch, logits.tolist(), strict=True)})
    return scores


def our_scores(bundle: str, candidates: str, folder: Path) -> dict[tuple[str, str], float]:
    parquet, output = folder / "candidates.parquet", folder / "ours"
    command = [sys.executable, "-m", "dear_batch"]
    subprocess.run([*command, "convert", "rankgpt", candidates, "-o", parquet], check=True)
    subprocess.run(
        [*command, "run", "--input", parquet, "--bundle", bundle, "--output", output], check=True
    )
    rows = pq.read_table(output / "results.parquet").to_pylist()
    return {(row["qid"], row["docid"]): row["logit"] for row in rows}


def write_run(path: Path, scores: dict[tuple[str, str], float]) -> Path:
    by_query: dict[str, list[tuple[float, str]]] = {}
    for (qid, docid), score in scores.items():
        by_query.setdefault(qid, []).append((score, docid))
    with path.open("w") as file:
        for qid, documents in by_query.items():
            for rank, (score, docid) in enumerate(sorted(documents, reverse=True), start=1):
                file.write(f"{qid} Q0 {docid} {rank} {score!r} plain\n")
    return path


def mixed(results: Path, path: Path) -> Path:
    """The run that `--interpolate 0.5` writes, from the logits of the run at hand."""
    lists: dict[str, list[ScoredCandidate]] = {}
    for row in pq.read_table(results).sort_by("first_rank").to_pylist():
        lists.setdefault(row["qid"], []).append(
            ScoredCandidate(row["docid"], row["first_rank"], row["first_score"], row["logit"])
        )
    scores = {
        (qid, entry.docid): entry.score
        for qid, candidates in lists.items()
        for entry in rank(ScoredList(qid, tuple(candidates)), interpolate=0.5).entries
    }
    return write_run(path, scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("bundle", "base", "adapter", "candidates", "qrels"):
        parser.add_argument(name)
    arguments = parser.parse_args()
    lists = json.loads(Path(arguments.candidates).read_text())
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        start = time.perf_counter()
        ours = our_scores(arguments.bundle, arguments.candidates, folder)
        middle = time.perf_counter()
        plain = readme_scores(arguments.base, arguments.adapter, lists)
        end = time.perf_counter()
        first = {
            (str(hit["qid"]), str(hit["docid"])): -float(hit["rank"])
            for item in lists
            for hit in item["hits"]
        }
        assert ours.keys() == plain.keys() == first.keys()
        runs = [
            write_run(folder / "first-stage", first),
            folder / "ours" / "run.trec",
            mixed(folder / "ours" / "results.parquet", folder / "mixed"),
            write_run(folder / "plain-pytorch", plain),
        ]
        evaluations = evaluate(Path(arguments.qrels), runs)
        report = json.loads((folder / "ours" / "report.json").read_text())
    names = ("first_stage", "dear_batch", "dear_batch_mixed_with_first_stage", "plain_pytorch")
    figures = {
        name: {measure: round(e.measures[measure], 4) for measure in MEASURES}
        for name, e in zip(names, evaluations, strict=True)
    }
    result = {
        "candidates": Path(arguments.candidates).name,
        "pairs": len(ours),
        "ndcg": figures,
        "max_abs_difference": max(abs(ours[key] - plain[key]) for key in ours),
        "seconds": {
            "dear_batch": round(middle - start, 1),
            "plain_pytorch": round(end - middle, 1),
        },
        "tokens": report["tokens"],
        "padding_share": report["padding_share"],
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    print(json.dumps(figures, indent=2))
    print(json.dumps(result))
    if (
        figures["dear_batch"] != figures["plain_pytorch"]
        or result["max_abs_difference"] > TOLERANCE
    ):
        sys.exit("the two do not agree")


if __name__ == "__main__":
    main()
