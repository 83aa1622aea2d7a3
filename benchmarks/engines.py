"""Every engine of this machine on random weights of the 8B and 3B shapes: speed and scores.

For each shape and 16-bit precision a bundle is written, a TensorRT engine is built where that can
be, and each engine scores the same pairs, of lengths as those of TREC DL 2019, in a process of its
own; so does plain PyTorch, Hugging Face's model in bf16 on batches of like length. "Real" tokens
are counted before queries are shared, "computed" ones with padding. The device's own rate of 16-bit
matrix products is measured, too, and each engine's share of it on computed tokens. Scores of a few
pairs are compared with PyTorch fp32 on the CPU. What could not run is listed with the reason. The
last line is JSON, also kept in benchmarks/results/ unless a model was made smaller.

    python benchmarks/engines.py [--shapes 8b 3b] [--precisions fp16 bf16] [--layers N] [--tiny]

Goals on one H100 SXM: 70% of the rate, 49,000 (8B) and 115,000 (3B) real tokens a second.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from installed import versions

from dear_batch.bundle import Manifest, Source, hash_folder, open_bundle, write_manifest
from dear_batch.errors import DearBatchError
from dear_batch.machine import Machine, machine
from dear_batch.parity import compare
from dear_batch.pointwise.own_pairs import N_OWN_PAIRS
from dear_batch.pointwise.recipe import EncodedPair, Recipe
from dear_batch.pointwise.rows import Batch
from dear_batch.pointwise.scorer import open_scorer, score_pairs
from dear_batch.pointwise.selection import Choice, choose

RESULTS = Path(__file__).parent / "results"
# hidden, intermediate, layers, heads, key-value heads, vocabulary: the models' config.json.
SHAPES = {
    "8b": (4096, 14336, 32, 32, 8, 128256),  # meta-llama/Llama-3.1-8B
    "3b": (3072, 8192, 28, 24, 8, 128256),  # meta-llama/Llama-3.2-3B
    "tiny": (128, 256, 2, 4, 2, 512),
}
HEAD_DIM = 128
GOALS = {"8b": 49_000, "3b": 115_000}
# Documents of TREC DL 2019 (43 queries, BM25's first hundred) by length in the `readme` recipe,
# counted with SmolLM2's tokenizer, whose vocabulary is smaller than Llama 3's: (below, share).
DOCUMENTS = (
    *((32, 0.003), (48, 0.050), (64, 0.195), (80, 0.232), (96, 0.148), (112, 0.106)),
    *((128, 0.101), (144, 0.070), (160, 0.041), (192, 0.037), (216, 0.017)),
)
PREFIX_TOKENS = 10  # bos, "query:" and the query, on average
LIST = 100  # candidates of a query
COMPARED = 8  # pairs whose scores are compared with fp32
RECIPE = Recipe("readme", "last-token", (1,), (1,), (), pad_id=0)
PLAIN = "transformers"  # Hugging Face's model in plain PyTorch, none of our engines
ENGINES = ("tensorrt", "onnxruntime", "torch", PLAIN)
PACKAGES = ("tensorrt", "tensorrt_rtx", "onnxruntime-gpu", "torch", "transformers", "cuda-core")


def random_pairs(count: int, vocabulary: int) -> list[EncodedPair]:
    rng = np.random.default_rng(4)
    above = [24, *(below for below, _ in DOCUMENTS[:-1])]
    shares = np.array([share for _, share in DOCUMENTS])
    bins = rng.choice(len(DOCUMENTS), count, p=shares / shares.sum())
    pairs = []
    for n, chosen in enumerate(bins):
        length = int(rng.integers(above[chosen], DOCUMENTS[chosen][0]))
        if n % LIST == 0:
            prefix = rng.integers(2, vocabulary, PREFIX_TOKENS, dtype=np.int32)
        document = rng.integers(2, vocabulary, length, dtype=np.int32)
        pairs.append(EncodedPair(prefix, document, truncated=False))
    return pairs


def write_bundle(folder: Path, shape: str, layers: int, precision: str) -> None:
    """Random weights as an export would leave them; there is no tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from dear_batch.export.graphs import onnx_from_torch

    hidden, intermediate, _, heads, key_value_heads, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=min(HEAD_DIM, hidden // heads),
        max_position_embeddings=8192,
        num_labels=1,
        architectures=["LlamaForSequenceClassification"],
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    with torch.device("meta"):
        model = LlamaForSequenceClassification(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.fill_(1)
        else:
            parameter.data.uniform_(-0.03, 0.03)
    config.save_pretrained(folder)
    (folder / "onnx").mkdir()
    peaks = [0.0] * layers  # no activation is massive
    signatures = onnx_from_torch(model, folder / "onnx", RECIPE.pooling, precision, peaks)
    manifest = Manifest(
        task="pointwise",
        source=Source(f"random weights, {shape}", None),
        precision=precision,
        recipe=RECIPE,
        architecture={"layers": layers, "hidden": hidden},
        graphs={f"onnx/{name}": value for name, value in signatures.items()},
        parity=None,
        versions={},
        created=datetime.now(UTC).isoformat(),
        own_scores=(0.0,) * N_OWN_PAIRS,  # which nothing here is compared with
        peaks=tuple(peaks),
        files=hash_folder(folder),
    )
    write_manifest(folder, manifest)


def build_engine(folder: Path, precision: str) -> dict[str, Any]:
    from dear_batch.export.engines import add_engines
    from dear_batch.specs import EngineSpec

    spec = EngineSpec(precision=precision)
    (engine,) = add_engines(folder, spec, print, lambda *_: None)
    return {"engine": str(engine), "bytes": engine.bytes, "seconds": engine.build_seconds}


def measure(folder: Path, engine: str, device: str, count: int, shape: str) -> dict[str, Any]:
    """Speed of an engine, the second time over, and the scores of the first few pairs."""
    if engine == PLAIN:
        from plain_torch import measure_plain

        return measure_plain(folder, device, random_pairs(count, SHAPES[shape][-1]), COMPARED)
    bundle = open_bundle(folder)
    choice = choose(bundle, machine(), engine, device)
    start = time.perf_counter()
    scorer = open_scorer(bundle, choice)
    load_seconds = time.perf_counter() - start
    pairs = random_pairs(count, SHAPES[shape][-1])
    scores = score_pairs(scorer, pairs[:COMPARED])
    score_pairs(scorer, pairs)  # kernels are chosen, graphs are captured
    done: list[Batch] = []
    start = time.perf_counter()
    found = score_pairs(scorer, pairs, done.append)
    seconds = time.perf_counter() - start
    assert np.isfinite(found).all()
    real = sum(map(len, pairs))
    computed = sum(len(batch.rows) * batch.length for batch in done)
    return {
        "engine": scorer.engine,
        "device": scorer.device,
        "computes_in": scorer.precision,
        "row_tokens": scorer.layout.row_tokens,
        "batch_tokens": scorer.layout.batch_tokens,
        "load_seconds": round(load_seconds, 1),
        "seconds": round(seconds, 3),
        "pairs": len(pairs),
        "real_tokens_per_s": round(real / seconds, 1),
        "computed_tokens_per_s": round(computed / seconds, 1),
        "scores": scores.tolist(),
    }


def reference(folder: Path, count: int, shape: str) -> dict[str, Any]:
    """What PyTorch computes in fp32 on the CPU."""
    scorer = open_scorer(open_bundle(folder), Choice("torch", "cpu"))
    pairs = random_pairs(count, SHAPES[shape][-1])[:COMPARED]
    return {"scores": score_pairs(scorer, pairs).tolist()}


def product_rate(shape: str, device: str) -> dict[str, Any]:
    """TFLOP/s of 16-bit matrix products of a shape's up-projection, by PyTorch."""
    import torch

    hidden, intermediate = SHAPES[shape][:2]
    kind = "cpu" if device == "cpu" else "cuda"
    rows = 16384 if kind == "cuda" else 16  # a CPU without such products takes seconds
    rates = {}
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        a = torch.randn(rows, hidden, device=kind).to(dtype)
        b = torch.randn(hidden, intermediate, device=kind).to(dtype)
        out = a @ b
        count, seconds = 1, 0.0
        while seconds < 1.0:
            count *= 2
            if kind == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(count):
                torch.mm(a, b, out=out)
            if kind == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        rates[name] = digits(2 * rows * hidden * intermediate * count / seconds / 1e12)
    return rates


STEPS = {
    "bundle": write_bundle,
    "build": build_engine,
    "measure": measure,
    "reference": reference,
    "rate": product_rate,
}


def step(name: str, *arguments: Any) -> dict[str, Any]:
    """Run a step in a process of its own, which gives back all memory; its result or a reason."""
    text = json.dumps([name, [str(a) if isinstance(a, Path) else a for a in arguments]])
    command = [sys.executable, __file__, "--step", text]
    done = subprocess.run(command, check=False, capture_output=True)
    lines = done.stdout.decode().strip().splitlines()
    if done.returncode == 0 and lines:
        found: dict[str, Any] = json.loads(lines[-1])
        return found
    last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no word"]
    return {"reason": f"exit code {done.returncode}: {last[0][:300]}"}


def run_step(text: str) -> None:
    name, arguments = json.loads(text)
    if name in {"bundle", "build", "measure", "reference"}:
        arguments[0] = Path(arguments[0])
    try:
        found = STEPS[name](*arguments) or {}
    except DearBatchError as error:
        found = {"reason": " ".join(str(error).split())}
    except MemoryError as error:
        found = {"reason": f"not enough memory: {error}"}
    print(json.dumps(found))


def layer_parameters(shape: str, layers: int) -> int:
    """Weights of all layers, which each token is multiplied by."""
    hidden, intermediate, _, heads, key_value_heads, _ = SHAPES[shape]
    size = min(HEAD_DIM, hidden // heads)
    attention = hidden * size * (2 * heads + 2 * key_value_heads)
    return layers * (attention + 3 * hidden * intermediate)


def report(result: dict[str, Any]) -> None:
    name = f"{result['shape']} {result['weights']} {result['engine']}"
    if "reason" in result:
        print(f"{name}: not run: {result['reason']}", flush=True)
        return
    share = result["share_of_product_rate"]
    print(
        f"{name} on {result['device']} in {result['computes_in']}: "
        f"{result['real_tokens_per_s']:,.0f} real tokens/s, "
        f"{result['computed_tokens_per_s']:,.0f} computed, "
        + ("" if share is None else f"{share:.0%} of the rate of products, ")
        + f"scores {result['difference_over_spread']} of the spread from fp32",
        flush=True,
    )


def benchmark(options: argparse.Namespace, shape: str, folder: Path) -> list[dict[str, Any]]:
    """All engines on one shape."""
    layers = options.layers or SHAPES[shape][2]
    rates = step("rate", shape, options.device)
    on_gpu = options.device != "cpu" and "reason" not in rates  # a CPU's share tells nothing
    best = max(rates.values()) if on_gpu else None
    results = []
    expected: list[float] | None = None
    for precision in options.precisions:
        place = folder / f"{shape}-{precision}"
        place.mkdir()
        common = {"shape": shape, "layers": layers, "weights": precision, "product_tflops": rates}
        made = step("bundle", place, shape, layers, precision)
        if expected is None and "reason" not in made:
            expected = step("reference", place, options.pairs, shape).get("scores")
        for engine in options.engines:
            if engine in ("torch", PLAIN) and precision != options.precisions[0]:
                continue  # it computes in bf16 whatever is stored
            found: dict[str, Any] = {**common, "engine": engine, **made}
            if engine == "tensorrt" and "reason" not in made:
                found["build"] = step("build", place, precision)
                found |= {k: v for k, v in found["build"].items() if k == "reason"}
            if "reason" not in found:
                found |= step("measure", place, engine, options.device, options.pairs, shape)
            if "reason" not in found:
                found |= judged(found, expected, best, 2 * layer_parameters(shape, layers))
            report(found)
            results.append(found)
        for path in place.rglob("*"):
            if path.is_file():
                path.unlink()  # the next one may not fit beside it
    return results


def judged(
    found: dict[str, Any], expected: list[float] | None, best: float | None, flop_per_token: int
) -> dict[str, Any]:
    """The share of the device's rate, and how far the scores are from fp32."""
    flops = found["computed_tokens_per_s"] * flop_per_token
    difference = None
    if expected is not None:
        parity = compare([np.float32(expected)], [np.float32(found["scores"])])
        difference = digits(parity.relative_difference)
    return {
        "share_of_product_rate": None if best is None else digits(flops / best / 1e12),
        "difference_over_spread": difference,
        "goal_real_tokens_per_s": GOALS.get(found["shape"]),
    }


def digits(number: float) -> float:
    """The first four digits."""
    return float(f"{number:.4g}")


def outcome(options: argparse.Namespace, here: Machine, results: list[dict[str, Any]]) -> dict:
    return {
        "benchmark": "engines",
        "device": here.device_name(options.device if here.driver.gpus else "cpu"),
        "cpu": f"{here.cpu}, {here.cores} cores",
        "driver": here.driver.version,
        "versions": versions(PACKAGES),
        "when": datetime.now(UTC).date().isoformat(),
        "results": [result for result in results if "reason" not in result],
        "not_run": [
            {key: result[key] for key in ("shape", "weights", "engine", "reason")}
            for result in results
            if "reason" in result
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["8b", "3b"])
    parser.add_argument(
        "--precisions", nargs="+", choices=["fp16", "bf16"], default=["fp16", "bf16"]
    )
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to rehearse")
    parser.add_argument("--pairs", type=int, default=4000)
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few pairs")
    options = parser.parse_args()
    if options.step:
        run_step(options.step)
        return
    if options.tiny:
        options.shapes, options.pairs = ["tiny"], min(options.pairs, 200)
    here, results = machine(), []
    with tempfile.TemporaryDirectory() as temporary:
        for shape in options.shapes:
            results += benchmark(options, shape, Path(temporary))
    found = outcome(options, here, results)
    if not (options.tiny or options.layers or options.device == "cpu"):
        name = re.sub(r"[^a-z0-9]+", "-", found["device"].lower()).strip("-")
        (RESULTS / f"engines-{name}.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
