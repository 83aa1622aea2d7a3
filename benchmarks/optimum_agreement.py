"""An exported bundle opened by Optimum itself, beside our own scores.

`optimum-onnx` requires transformers 4, so it runs in an environment of its own (`make
optimum` makes it). The first call writes our scores, the second compares:

    python benchmarks/optimum_agreement.py ours BUNDLE SCORES.json
    .venv-optimum/bin/python benchmarks/optimum_agreement.py optimum BUNDLE SCORES.json
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

TOLERANCE = 1e-4
PAIRS = Path(__file__).parent.parent / "dear_batch" / "pointwise" / "parity_pairs.jsonl"


def lists() -> list[dict]:
    return [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]


def ours(bundle: str, path: str) -> None:
    from dear_batch import Reranker

    reranker = Reranker.load(bundle)
    scores = [
        reranker.score(item["query"], [(d["title"], d["text"]) for d in item["documents"]])
        for item in lists()
    ]
    Path(path).write_text(json.dumps(scores))


def optimum(bundle: str, path: str) -> None:
    import onnxruntime
    from optimum.onnxruntime import ORTModelForSequenceClassification
    from transformers import AutoTokenizer

    model = ORTModelForSequenceClassification.from_pretrained(
        bundle, subfolder="onnx", file_name="model.onnx"
    )
    tokenizer = AutoTokenizer.from_pretrained(bundle)
    worst = 0.0
    for item, expected in zip(lists(), json.loads(Path(path).read_text()), strict=True):
        inputs = tokenizer(
            ["query: " + item["query"]] * len(item["documents"]),
            [f"document: {d['title']} {d['text']}" for d in item["documents"]],
            truncation=True,
            max_length=228,
            padding=True,
            return_tensors="pt",
        )
        inputs.pop("token_type_ids", None)
        found = model(**inputs).logits[:, 0].tolist()
        worst = max(worst, *(abs(a - b) for a, b in zip(found, expected, strict=True)))
    pairs = sum(len(item["documents"]) for item in lists())
    versions = {name: version(name) for name in ("optimum-onnx", "transformers")}
    versions["onnxruntime"] = onnxruntime.__version__
    print(json.dumps({"pairs": pairs, "max_abs_difference": worst, "versions": versions}))
    if not worst <= TOLERANCE:
        sys.exit(f"scores differ by {worst}, more than {TOLERANCE}")


if __name__ == "__main__":
    {"ours": ours, "optimum": optimum}[sys.argv[1]](*sys.argv[2:])
