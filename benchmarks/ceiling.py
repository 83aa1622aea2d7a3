"""The fastest fp32 matrix products that this machine reaches on the shapes of a model's layer.

Each product of a layer (as the model has them, and with Q, K, V and gate and up fused) is timed
alone by PyTorch and by ONNX Runtime, at several numbers of rows. An engine's rate at a number of
rows is the layer's FLOPs over the sum of its products' times; the best of all is the ceiling. The
last line is JSON.

    python benchmarks/ceiling.py CONFIG.json
"""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from dear_batch.pointwise.ceiling import flops_per_token, layer_products

ROWS = (256, 512, 1024)
SECONDS = 0.1  # of a try
TRIES = 4
THREADS = len(os.sched_getaffinity(0))
Shape = tuple[int, int]


def products(config: dict[str, Any]) -> dict[str, list[Shape]]:
    """The products of a layer as (inputs, outputs), one by one and fused."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    size = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries = size * config["num_attention_heads"]
    keys = size * (config.get("num_key_value_heads") or config["num_attention_heads"])
    rest = [(queries, hidden), (inner, hidden)]
    return {
        "separate": [*Counter(layer_products(config)).elements()],
        "fused": [(hidden, queries + 2 * keys), (hidden, 2 * inner), *rest],
    }


def by_torch(rows: int, shape: Shape) -> Callable[[], Any]:
    """A product of PyTorch's."""
    a, b = torch.randn(rows, shape[0]), torch.randn(shape[1], shape[0])
    return lambda: torch.nn.functional.linear(a, b)  # as a model holds its weights


def by_onnxruntime(rows: int, shape: Shape) -> Callable[[], Any]:
    """A product of ONNX Runtime's, whose weights are packed when the session is made."""
    weights = np.random.default_rng(0).standard_normal(shape, np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["a", "b"], ["c"])],
        "product",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, [rows, shape[0]])],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, [rows, shape[1]])],
        [numpy_helper.from_array(weights, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    binding = session.io_binding()
    a = np.random.default_rng(1).standard_normal((rows, shape[0]), np.float32)
    binding.bind_cpu_input("a", a)
    binding.bind_ortvalue_output(
        "c", onnxruntime.OrtValue.ortvalue_from_numpy(np.empty((rows, shape[1]), np.float32))
    )
    return lambda: session.run_with_iobinding(binding)


ENGINES = {"torch": by_torch, "onnxruntime": by_onnxruntime}


def best_seconds(product: Callable[[], Any]) -> float:
    """The least mean time of a call, over a few tries."""
    product()
    means = []
    for _ in range(TRIES):
        count, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < SECONDS:
            product()
            count += 1
        means.append(elapsed / count)
    return min(means)


def ceiling(config: dict[str, Any]) -> dict[str, Any]:
    """The best rate in GFLOP/s, where it was reached, and the best of each engine."""
    torch.set_num_threads(THREADS)
    flop = flops_per_token(config) / config["num_hidden_layers"]
    found = []
    for engine, product in ENGINES.items():
        for rows in ROWS:
            shapes = {shape for some in products(config).values() for shape in some}
            seconds = {shape: best_seconds(product(rows, shape)) for shape in sorted(shapes)}
            for form, some in products(config).items():
                rate = flop * rows / sum(seconds[shape] for shape in some) / 1e9
                found.append({"engine": engine, "rows": rows, "form": form, "gflops": rate})
    best = max(found, key=lambda item: item["gflops"])
    by_engine = {e: max(i["gflops"] for i in found if i["engine"] == e) for e in ENGINES}
    return {
        **best,
        "gflops": round(best["gflops"], 1),
        "by_engine": {engine: round(rate, 1) for engine, rate in by_engine.items()},
        "flop_per_token": flops_per_token(config),
        "flop_per_packed_token": flops_per_token(config, packed=True),
    }


if __name__ == "__main__":
    print(json.dumps(ceiling(json.loads(Path(sys.argv[1]).read_text()))))
