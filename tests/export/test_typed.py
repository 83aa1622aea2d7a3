"""Precision by explicit types: what a graph holds, how it scores, where fp16 would overflow."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from dear_batch.bundle import Bundle, open_bundle
from dear_batch.errors import ConfigurationError
from dear_batch.export.bundle_from_checkpoint import Plan, bundle_from_checkpoint
from dear_batch.export.gate import check_packed, runnable
from dear_batch.export.graphs import packed_graph
from dear_batch.export.typed import MARGIN, recorded_peaks, scales
from dear_batch.parity import GATES
from dear_batch.pointwise.onnx_scorer import PackedOnnxScorer
from dear_batch.pointwise.own_pairs import own_pairs
from dear_batch.pointwise.recipe import PairEncoder
from dear_batch.pointwise.scorer import score_pairs
from dear_batch.specs import ExportSpec

pytestmark = pytest.mark.model
Make = Callable[..., Path]
FP16_MOST = 65_504
WIDE = {"Softmax", "ReduceMean", "Pow", "Sqrt", "Cos", "Sin", "Add", "Sigmoid"}
HALF = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}


def own_scores(bundle: Bundle, graph: Path) -> np.ndarray:
    """The package's own pairs through a packed graph."""
    encoder = PairEncoder.from_file(bundle.file("tokenizer.json"), bundle.recipe)
    pairs = [pair for pairs in encoder.encode(own_pairs()) for pair in pairs]
    return score_pairs(PackedOnnxScorer(graph, bundle.recipe, "cpu"), pairs)


def typed_nodes(path: Path) -> Iterator[tuple[onnx.NodeProto, int]]:
    """The nodes of a graph, each with the element type of its first output."""
    graph = onnx.load(path, load_external_data=False).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    types |= {value.name: value.type.tensor_type.elem_type for value in graph.output}
    for node in graph.node:
        yield node, types[node.output[0]]


@pytest.mark.parametrize(
    ("style", "precision"),
    [("llama31", "fp16"), ("llama31", "bf16"), ("llama32", "fp16"), ("llama2", "bf16")],
)
def test_the_graphs_pass_their_gate(style: str, precision: Any, bundle: Make) -> None:
    manifest = open_bundle(bundle(style, precision=precision)).manifest
    assert manifest.precision == precision
    assert manifest.parity is not None
    assert set(manifest.parity["graphs"]) == {"model.onnx", "packed.onnx"}
    for figures in manifest.parity["graphs"].values():
        assert 1e-5 < figures["relative_difference"] <= GATES[precision].relative
        assert figures["ties"] == 0  # the head is fp32
    assert not list(bundle(style, precision=precision).glob("onnx/emulated*"))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_products_are_narrow_and_all_else_is_not(precision: str, bundle: Make) -> None:
    found: dict[str, set[int]] = {}
    for node, kind in typed_nodes(bundle("llama31", precision=precision) / "onnx/packed.onnx"):
        if node.op_type == "MatMul":
            name = "head" if any("score.weight" in name for name in node.input) else "product"
            found.setdefault(name, set()).add(kind)
        elif node.op_type in WIDE:
            found.setdefault(node.op_type, set()).add(kind)
    single = {onnx.TensorProto.FLOAT}
    assert found.pop("product") == {HALF[precision]}
    assert found.pop("Add") - {onnx.TensorProto.INT64} == single  # the residual stream
    assert found.keys() == {"head", *WIDE} - {"Add"}
    assert all(kinds == single for kinds in found.values())


def test_weights_are_stored_narrow_where_products_are(bundle: Make) -> None:
    stored = load_file(bundle("llama31", precision="fp16") / "onnx/weights.safetensors")
    kinds = {name: tensor.dtype for name, tensor in stored.items()}
    for name, kind in kinds.items():
        narrow = "_proj.weight" in name or "embed_tokens" in name
        assert kind == (torch.float16 if narrow else torch.float32), name
    assert {"model.norm.weight", "score.weight", "model.layers.1.mlp.down_proj.scale"} <= set(kinds)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_bundles_graph_in_another_precision(precision: Any, bundle: Make, tmp_path: Path) -> None:
    """Derived from the stored weights, it is the graph that an export would have written."""
    graph = packed_graph(open_bundle(bundle("llama31")), precision, tmp_path)
    exported = bundle("llama31", precision=precision) / "onnx"
    for name in ("packed.onnx", "weights.safetensors"):
        assert (tmp_path / name).read_bytes() == (exported / name).read_bytes()
    parity = check_packed(open_bundle(bundle("llama31")), graph, precision)
    assert parity.pairs == 64


def test_a_graph_that_scores_otherwise_is_refused(bundle: Make, tmp_path: Path) -> None:
    graph = packed_graph(open_bundle(bundle("llama31")), "fp16", tmp_path)
    other = open_bundle(bundle("llama32"))
    with pytest.raises(ConfigurationError, match="does not score as PyTorch does"):
        check_packed(other, graph, "fp16")


def test_final_position_pooling_has_no_packed_graph(bundle: Make, tmp_path: Path) -> None:
    folder = bundle("llama31", pooling="final-position", precision="fp16")
    with pytest.raises(ConfigurationError, match="final position"):
        packed_graph(open_bundle(folder), "fp16", tmp_path)


def test_biases_are_added_in_fp32(checkpoint: Make, bundle: Make) -> None:
    model = checkpoint("llama31", attention_bias=True, mlp_bias=True, seed=3)
    for precision in ("fp16", "bf16"):
        parity = open_bundle(
            bundle("llama31", model=str(model), precision=precision)
        ).manifest.parity
        assert parity is not None


def edited(source: Path, target: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a checkpoint with edited weights."""
    shutil.copytree(source, target)
    weights = load_file(source / "model.safetensors")
    edit(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def plant(weights: dict[str, torch.Tensor]) -> None:
    """Massive activations as real Llamas have them: at the first token, in one dimension.

    Hidden dimension 5 tells the first token (BOS) from all others; neuron 3 of layer 0 reads it
    alone, and writes to dimension 7 alone.
    """
    weights["model.embed_tokens.weight"][:, 5] = 0
    weights["model.embed_tokens.weight"][1, 5] = 10
    layer = "model.layers.0"
    weights[f"{layer}.self_attn.o_proj.weight"][5] = 0
    for name in ("gate_proj", "up_proj"):
        weights[f"{layer}.mlp.{name}.weight"][3] = 0
        weights[f"{layer}.mlp.{name}.weight"][3, 5] = 4
    weights[f"{layer}.mlp.down_proj.weight"][:, 3] = 0
    weights[f"{layer}.mlp.down_proj.weight"][7, 3] = 400


def test_massive_activations_pass_where_a_naive_cast_gives_nan(
    checkpoint: Make, tmp_path: Path
) -> None:
    """The residual stream goes beyond what fp16 holds (trap 5)."""
    folder = edited(checkpoint("llama31"), tmp_path / "planted", plant)
    spec = ExportSpec(output=str(tmp_path / "bundle"), model=str(folder), precision="fp16")
    bundle = open_bundle(bundle_from_checkpoint(Plan(spec), lambda _step: None).folder)
    assert bundle.manifest.peaks is not None
    assert max(bundle.manifest.peaks) > FP16_MOST
    assert float(np.std(bundle.manifest.own_scores)) > 0.1

    peaks = (0.0,) * len(bundle.manifest.peaks)
    unscaled = replace(bundle, manifest=replace(bundle.manifest, peaks=peaks))
    (tmp_path / "unscaled").mkdir()
    graph = packed_graph(unscaled, "fp16", tmp_path / "unscaled")
    with pytest.raises(ConfigurationError, match="does not score as PyTorch does"):
        check_packed(bundle, graph, "fp16")
    (tmp_path / "scaled").mkdir()
    check_packed(bundle, packed_graph(bundle, "fp16", tmp_path / "scaled"), "fp16")

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(1, 40)[None]
    with torch.inference_mode():
        residual = model.model(ids, output_hidden_states=True).hidden_states[1]
        naive = copy.deepcopy(model).half()(ids).logits
    assert float(residual.abs().max()) > FP16_MOST
    assert not naive.isfinite().all()


def test_a_weight_that_fp16_cannot_hold_is_named(checkpoint: Make, tmp_path: Path) -> None:
    def too_large(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.0.mlp.down_proj.weight"][7, 3] = 70_000

    folder = edited(checkpoint("llama31"), tmp_path / "edited", too_large)
    spec = ExportSpec(output=str(tmp_path / "bundle"), model=str(folder), precision="fp16")
    with pytest.raises(ConfigurationError, match="holds values that F16 cannot") as error:
        bundle_from_checkpoint(Plan(spec), lambda _step: None)
    assert "layers.0.mlp.down_proj.weight" in str(error.value)
    assert "--precision bf16" in str(error.value.next_step)
    assert not (tmp_path / "bundle").exists()


def test_peaks_are_those_of_every_layer(checkpoint: Make) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint("llama31")).eval()
    ids = torch.arange(3, 40)[None]
    seen: list[torch.Tensor] = []
    handle = model.model.layers[1].mlp.down_proj.register_forward_hook(
        lambda _module, inputs, output: seen.extend([*inputs, output])
    )
    with torch.inference_mode(), recorded_peaks(model) as peaks:
        model(ids)
    handle.remove()
    assert peaks[1] == max(float(tensor.abs().max()) for tensor in seen)
    with torch.inference_mode():
        model(ids * 2)
    assert peaks[1] == max(float(tensor.abs().max()) for tensor in seen)  # the hooks are gone


def test_scales_are_powers_of_two_that_leave_the_margin() -> None:
    most = FP16_MOST / MARGIN
    found = scales([0.0, 1.0, most, most * 1.01, 3e6], "fp16")
    values = [float(value) for value in found.values()]
    assert values == [1.0, 1.0, 1.0, 2.0, 1024.0]
    assert list(found)[3] == "model.layers.3.mlp.down_proj.scale"
    assert scales([1e9], "bf16") == scales([1e9], "fp32") == {}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_emulated_graph_rounds_as_torch_does(
    precision: Any, bundle: Make, tmp_path: Path
) -> None:
    """The first product of the graph, its inputs read from it, beside torch's own."""
    path = bundle("llama31", precision=precision) / "onnx/packed.onnx"
    with runnable(path, precision) as emulated:
        model = onnx.load(emulated)
    graph = model.graph
    product = next(node for node in graph.node if node.op_type == "MatMul")
    kinds = {v.name: v.type.tensor_type.elem_type for v in graph.value_info}
    assert kinds[product.output[0]] == onnx.TensorProto.FLOAT
    (user,) = [node for node in graph.node if product.output[0] in node.input]
    (wide,) = [node for node in graph.node if user.output[0] in node.input]
    shown = [*product.input, wide.output[0]]
    del graph.output[:]
    for name in shown:
        graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    onnx.save(model, tmp_path / "shown.onnx")
    ids = np.arange(3, 43, dtype=np.int32)[None]
    zeros = np.zeros_like(ids)
    feeds = dict(zip(("positions", "groups", "segments"), (zeros,) * 3, strict=True))
    session = onnxruntime.InferenceSession(tmp_path / "shown.onnx")
    pooled = np.zeros((1, 1), np.int32)
    left, right, found = session.run(shown, {"tokens": ids, "pooled": pooled, **feeds})
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    narrow = [torch.from_numpy(array).to(dtype) for array in (left, right)]
    for array, tensor in zip((left, right), narrow, strict=True):
        np.testing.assert_array_equal(array, tensor.float().numpy())
    exact = narrow[0].float() @ narrow[1].float()
    np.testing.assert_array_equal(found, exact.to(dtype).float().numpy())


def test_a_product_that_overflows_fp16_is_seen(checkpoint: Make, tmp_path: Path) -> None:
    """No scale guards the up-projection; ONNX Runtime's own fp16 would hide it (trap 5)."""

    def too_large(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.0.mlp.up_proj.weight"][3] *= 60_000

    folder = edited(checkpoint("llama31"), tmp_path / "edited", too_large)
    spec = ExportSpec(output=str(tmp_path / "bundle"), model=str(folder), precision="fp16")
    with pytest.raises(ConfigurationError, match="does not score as PyTorch does"):
        bundle_from_checkpoint(Plan(spec), lambda _step: None)


def test_own_pairs_are_the_ones_that_scores_are_kept_for(bundle: Make) -> None:
    manifest = open_bundle(bundle("llama31")).manifest
    assert manifest.own_scores is not None
    assert len(manifest.own_scores) == sum(len(documents) for _, documents in own_pairs()) == 64
    assert json.loads(json.dumps(manifest.own_scores)) == list(manifest.own_scores)
