"""The rate of matrix products: which products, and that they are what is timed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from dear_batch.pointwise import ceiling
from dear_batch.pointwise.ceiling import (
    TOKENS,
    flops_per_token,
    layer_products,
    measure_ceiling,
    product_graph,
)

Make = Callable[..., Path]
# Llama-3.1-8B and Llama-3.2-3B, by the configs of their checkpoints.
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
}
LLAMA_3B = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "num_hidden_layers": 28,
    "head_dim": 128,
}


def test_the_products_of_a_layer() -> None:
    assert layer_products(LLAMA_8B) == {
        (4096, 4096): 2,
        (4096, 1024): 2,
        (4096, 14336): 2,
        (14336, 4096): 1,
    }


@pytest.mark.parametrize(("config", "billions"), [(LLAMA_8B, 13.96), (LLAMA_3B, 5.64)])
def test_operations_a_token(config: dict[str, Any], billions: float) -> None:
    """Twice the 6.98 and 2.82 billion parameters that are no embeddings."""
    assert flops_per_token(config) / 1e9 == pytest.approx(billions, abs=0.005)


@pytest.mark.model
@pytest.mark.parametrize("style", ["llama31", "llama32", "llama2"])
def test_every_weight_of_a_layer_is_counted(style: str, checkpoint: Make) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(checkpoint(style))
    weights = sum(p.numel() for n, p in model.named_parameters() if n.endswith("proj.weight"))
    config = model.config.to_dict()
    assert flops_per_token(config) == 2 * weights
    last = f"layers.{config['num_hidden_layers'] - 1}."
    pooled = sum(
        p.numel()
        for n, p in model.named_parameters()
        if n.endswith("proj.weight") and last in n and "k_proj" not in n and "v_proj" not in n
    )
    assert flops_per_token(config, packed=True) == 2 * (weights - pooled)


def test_the_graph_multiplies() -> None:
    weight_KN = np.random.default_rng(1).standard_normal((130, 300), np.float32)
    inputs_MK = np.random.default_rng(2).standard_normal((7, 130), np.float32)
    session = ort.InferenceSession(product_graph(weight_KN, "fp32"))
    (found_MN,) = session.run(["c"], {"a": inputs_MK})
    np.testing.assert_allclose(found_MN, inputs_MK @ weight_KN, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_graph_is_valid(precision: str) -> None:
    import onnx
    from onnx.numpy_helper import to_array

    values = ceiling._random((3, 5), precision)
    model = onnx.load_from_string(product_graph(values, precision))
    onnx.checker.check_model(model)
    weight = to_array(model.graph.initializer[0]).astype(np.float32)
    expected = np.random.default_rng(0).standard_normal((3, 5), np.float32)
    np.testing.assert_allclose(weight, expected, rtol=2**-7)  # what bf16 keeps


def test_each_product_counts_as_often_as_a_layer_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """512 tokens take as long as 256, and 1,024 take more than twice as long."""
    took = {256: 256e-3, 512: 256e-3, 1024: 1024e-3}
    monkeypatch.setattr(ceiling, "_best_seconds", lambda _multiply, M: took[M])
    found = measure_ceiling("onnxruntime", "cpu", "fp32", {(8, 4): 2, (4, 8): 1}, lambda: None)
    assert (found.by, found.precision, found.tokens, found.why) == ("onnxruntime", "fp32", 512, "")
    assert found.flops == pytest.approx(3 * 512 * 2 * 8 * 4 / (3 * 256e-3))


@pytest.mark.model
@pytest.mark.parametrize(("engine", "by"), [("onnxruntime", "onnxruntime"), ("torch", "torch")])
def test_both_engines_are_timed(engine: str, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "LEAST_S", 0.01)
    beats: list[None] = []
    products = {(256, 512): 2, (512, 256): 1}
    found = measure_ceiling(engine, "cpu", "fp32", products, lambda: beats.append(None))
    assert found.by == by
    assert found.tokens in TOKENS["cpu"]
    assert found.flops is not None
    assert 1e8 < found.flops < 1e14  # a slow core, and more than any processor
    assert len(beats) == len(TOKENS["cpu"]) * len(products)


def test_what_cannot_be_measured_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measure_ceiling("onnxruntime", "cpu", "bf16", {(8, 4): 1}, lambda: None)
    assert found.flops is None
    assert "onnxruntime has no products in bf16 on cpu" in found.why
    gpu = measure_ceiling("tensorrt", "cuda:99", "fp16", {(8, 4): 1}, lambda: None)
    assert (gpu.flops, gpu.by) == (None, "onnxruntime")
    monkeypatch.setattr(ceiling, "LEAST_S", 0.001)
    int8 = measure_ceiling("onnxruntime", "cpu", "int8", {(8, 4): 1}, lambda: None)
    assert int8.precision == "fp32"
    assert int8.flops is not None
