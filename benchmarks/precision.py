"""What fp16 and bf16 graphs cost in accuracy, on real collections, beside fp32.

Scores the first 20 candidates of each list of RankGPT files with the packed graph of a bundle in
each precision, on the CPU through ONNX Runtime (bf16 by a graph of fp32 values rounded to bf16,
since it has no such products), and compares: score error over the spread, Kendall's tau, top-10
overlap, nDCG@10. These figures decided `dear_batch.parity.GATES`. The last line is JSON.

    python benchmarks/precision.py BUNDLE CANDIDATES.json QRELS [CANDIDATES.json QRELS …]
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnxruntime

from dear_batch.bundle import Bundle, open_bundle
from dear_batch.evaluate.evaluation import evaluate
from dear_batch.export.gate import runnable, scores_of
from dear_batch.export.graphs import packed_graph
from dear_batch.parity import GATES, compare
from dear_batch.pointwise.onnx_scorer import PackedOnnxScorer
from dear_batch.pointwise.recipe import PairEncoder

DEPTH = 20  # all of DL19 takes an hour on two cores
NDCG_CHANGE = {"fp32": 0.0, "fp16": 0.002, "bf16": 0.01}  # the gate's part that needs judgements


def scored(bundle: Bundle, precision: str, encoded: list, folder: Path) -> list:
    """Scores of every list of every collection, one array a list."""
    graph = packed_graph(bundle, precision, folder)
    with runnable(graph, precision) as path:
        return scores_of(PackedOnnxScorer(path, bundle.recipe, "cpu"), encoded)


def first_of(lists: list[dict]) -> list[dict]:
    return [{**item, "hits": item["hits"][:DEPTH]} for item in lists]


def ndcg(lists: list, scores: list, qrels: str, folder: Path) -> float:
    path = folder / "run.trec"
    with path.open("w") as file:
        for item, found in zip(lists, scores, strict=True):
            order = np.argsort(-found, kind="stable")
            for rank, n in enumerate(order, start=1):
                hit = item["hits"][n]
                file.write(f"{hit['qid']} Q0 {hit['docid']} {rank} {-rank} x\n")
    (found,) = evaluate(Path(qrels), [path])
    return found.measures["nDCG@10"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("collections", nargs="+", metavar="CANDIDATES.json QRELS")
    arguments = parser.parse_args()
    pairs = list(zip(arguments.collections[::2], arguments.collections[1::2], strict=True))
    bundle = open_bundle(arguments.bundle, task="pointwise")
    encoder = PairEncoder.from_file(bundle.file("tokenizer.json"), bundle.recipe)
    collections = [(first_of(json.loads(Path(c).read_text())), qrels) for c, qrels in pairs]
    encoded = [
        encoder.encode([(i["query"], [("", h["content"]) for h in i["hits"]]) for i in lists])
        for lists, _ in collections
    ]
    figures: dict[str, dict] = {}
    failures = []
    reference: list[list] = []
    for precision in GATES:
        for number, (lists, qrels) in enumerate(collections):
            name = Path(pairs[number][0]).parent.name
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                started = time.perf_counter()
                scores = scored(bundle, precision, encoded[number], folder)
                seconds = time.perf_counter() - started
                found = ndcg(lists, scores, qrels, folder)
            if precision == "fp32":
                reference.append(scores)
            parity = compare(reference[number], scores)
            entry = {
                **asdict(parity),
                "ndcg@10": round(found, 4),
                "seconds": round(seconds, 1),
            }
            figures.setdefault(name, {})[precision] = entry
            change = abs(found - figures[name]["fp32"]["ndcg@10"])
            why = GATES[precision].misses(parity)
            if why or change > NDCG_CHANGE[precision] + 5e-5:
                failures.append(f"{name} {precision}: {why}, nDCG@10 changed by {change:.4f}")
            print(name, precision, json.dumps(entry), flush=True)
    result = {
        "bundle_sha256": bundle.sha256,
        "depth": DEPTH,
        "model": bundle.manifest.source.model,
        "peaks": bundle.manifest.peaks,
        "gates": {p: {**asdict(g), "ndcg@10": NDCG_CHANGE[p]} for p, g in GATES.items()},
        "figures": figures,
        "versions": {"onnxruntime": onnxruntime.__version__, "python": platform.python_version()},
        "machine": platform.machine(),
    }
    print(json.dumps(result))
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
