"""The two ONNX graphs of a pointwise model, exported from Hugging Face's own layers.

`model.onnx`: input_ids_BL, attention_mask_BL (int64) → logits_B1: what Optimum and Hugging
Face expect of a sequence classification model.
`packed.onnx`: tokens, positions, groups, segments_RT and pooled_RP (int32) → scores_RP: many
documents a row (see `pointwise.rows`).

Both name the same weights file. The exporter's time grows with every layer, and all layers are
but the last alike, so it traces a stand-in of three layers with random weights; `graph_edits`
repeats the second. Knows nothing of checkpoints or bundles.
"""

import copy
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from dear_batch.bundle import Bundle, Precision
from dear_batch.errors import ConfigurationError
from dear_batch.export.graph_edits import (
    STANDARD_INPUTS,
    point_at_weights,
    repeat_middle_layer,
    signatures,
    standard_from_packed,
)
from dear_batch.export.layers import pooled_hidden
from dear_batch.export.typed import DTYPES, SCALE, scales, stored_dtype, with_types
from dear_batch.export.weights import write_weights
from dear_batch.pointwise.recipe import Pooling

OPSET = 23
EXAMPLES = {"rows": 3, "row_tokens": 8, "documents": 2, "batch": 3, "length": 8}
WEIGHTS = "weights.safetensors"
TRACED_LAYERS = 3  # the first, one like all others, and the last, which is pooled


class PackedGraph(nn.Module):
    """Many documents a row; each sees itself and its own prefix, causally."""

    inputs = ("tokens", "positions", "groups", "segments", "pooled")

    def __init__(self, scorer: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.scorer: Any = scorer
        self.dtype = dtype  # see `pooled_hidden`

    def forward(
        self, tokens: Tensor, positions: Tensor, groups: Tensor, segments: Tensor, pooled: Tensor
    ) -> tuple[Tensor, ...]:
        """scores_RP and the output of each layer but the last.

        Padding has group -1 and sees padding, so that no token's view is all hidden.
        """
        order_T = torch.arange(tokens.shape[1])
        causal_TT = order_T[None, :] <= order_T[:, None]
        same_group_RTT = groups[:, :, None] == groups[:, None, :]
        same_segment_RTT = segments[:, :, None] == segments[:, None, :]
        in_prefix_RT = segments == 0
        visible_RTT = causal_TT[None] & same_group_RTT & (in_prefix_RT[:, None] | same_segment_RTT)
        hidden_RPX, layers = pooled_hidden(
            self.scorer.model, tokens, positions, visible_RTT, pooled, dtype=self.dtype
        )
        return self.scorer.score(hidden_RPX.float())[..., 0], *layers


class FinalPositionGraph(nn.Module):
    """One pair a row, right padded, pooled at the final position, be it padding.

    As Hugging Face computes it: a padding token sees the real tokens, not itself.
    """

    inputs = STANDARD_INPUTS

    def __init__(self, scorer: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.scorer: Any = scorer
        self.dtype = dtype  # see `pooled_hidden`

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """logits_B1 and the output of each layer but the last."""
        B, L = input_ids.shape
        positions_L = torch.arange(L)
        causal_LL = positions_L[None, :] <= positions_L[:, None]
        visible_BLL = causal_LL[None] & (attention_mask[:, None, :] != 0)
        final_B1 = torch.full((B, 1), L - 1)
        hidden_B1X, layers = pooled_hidden(
            self.scorer.model,
            input_ids,
            positions_L.expand(B, L),
            visible_BLL,
            final_B1,
            dtype=self.dtype,
        )
        return self.scorer.score(hidden_B1X[:, 0].float()), *layers


def onnx_from_torch(
    model: Any, folder: Path, pooling: Pooling, precision: Precision, peaks: Sequence[float]
) -> dict[str, Any]:
    """Write the weights and the graphs into `folder`; `model` (fp32) is changed by it.

    `final-position` pooling reads a padding token, which packed rows do not have: such a
    model gets the standard graph alone. `peaks` are those of `typed.recorded_peaks`.

    Returns:
        Each graph's signature: inputs and outputs, name → [dtype, dimension, …].

    Raises:
        ConfigurationError: a weight is too large for the precision.
    """
    with_types(model, "fp32")
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    parameters |= scales(peaks, precision)
    traced = _written(
        parameters,
        model.config,
        folder / WEIGHTS,
        pooling,
        precision,
        operators=precision == "fp32",
    )
    if pooling == "final-position":
        graphs = {"model.onnx": traced}
    else:
        graphs = {"model.onnx": standard_from_packed(traced.clone()), "packed.onnx": traced}
    for name, graph in graphs.items():
        ir.save(graph, folder / name)
    return {name: signatures(graph.graph) for name, graph in graphs.items()}


def packed_graph(bundle: Bundle, precision: Precision, folder: Path) -> Path:
    """Write a bundle's packed graph and its weights again, in a precision, for TensorRT.

    Raises:
        ConfigurationError: a weight is too large for the precision, or the bundle's recipe
            has no packed graph.
        TrustError: the bundle was changed while it was read.
    """
    recipe, path = bundle.recipe, folder / "packed.onnx"
    if recipe.pooling == "final-position":
        raise ConfigurationError(
            f"The bundle {bundle.folder} pools at the final position, which packed rows lack.",
            valid='a bundle exported with pooling = "last-token"',
        )
    config = AutoConfig.from_pretrained(
        bundle.file("config.json").parent, trust_remote_code=False, local_files_only=True
    )
    stored = load_file(bundle.file(f"onnx/{WEIGHTS}"))
    parameters = {name: tensor for name, tensor in stored.items() if not name.endswith(SCALE)}
    parameters |= scales(bundle.manifest.peaks or (), precision)
    traced = _written(parameters, config, folder / WEIGHTS, recipe.pooling, precision)
    bundle.check_unchanged()
    ir.save(traced, path)
    return path


def _written(
    parameters: dict[str, Tensor],
    config: Any,
    path: Path,
    pooling: Pooling,
    precision: Precision,
    *,
    operators: bool = False,
) -> ir.Model:
    """Write the weights to `path`, and return the graph that names them.

    With `operators` attention is a node of its own, which TensorRT does not build.
    """
    dtype = None if operators else DTYPES[precision]
    dtypes = {name: stored_dtype(name, precision) for name in parameters}
    ranges = write_weights(parameters, dtypes, path)
    stand_in = _stand_in(config, precision)
    if pooling == "final-position":
        rows = {0: "batch", 1: "length"}
        module: nn.Module = FinalPositionGraph(stand_in, dtype)
        traced = _traced(module, torch.int64, (rows, rows), "logits")
    else:
        rows = {0: "rows", 1: "row_tokens"}
        shapes = (rows, rows, rows, rows, {0: "rows", 1: "documents"})
        traced = _traced(PackedGraph(stand_in, dtype), torch.int32, shapes, "scores")
    repeat_middle_layer(traced.graph, config.num_hidden_layers)
    point_at_weights(traced.graph, path, ranges)
    return traced


def _stand_in(config: Any, precision: Precision) -> nn.Module:
    """A model of the same layers, three at most, and hardly any vocabulary.

    Its weights are random: the exporter merges equal ones.
    """
    small = copy.deepcopy(config)
    small.num_hidden_layers = min(TRACED_LAYERS, config.num_hidden_layers)
    small.vocab_size, small.pad_token_id = 8, None
    model: nn.Module = AutoModelForSequenceClassification.from_config(small, dtype=torch.float32)
    with_types(model, precision)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(generator=generator)
    return model


def _traced(
    module: Any, dtype: torch.dtype, shapes: tuple[dict[int, str], ...], output: str
) -> ir.Model:
    """Export a module whose inputs are all of one dtype."""
    # Sizes that differ, and a tensor of its own for each input: equal objects are one input to
    # the exporter.
    examples = tuple(
        torch.ones([EXAMPLES[name] for name in shape.values()], dtype=dtype) for shape in shapes
    )
    layers = len(module.scorer.model.layers) - 1
    # Two notices a machine without torchvision prints at every export.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            module.eval(),
            examples,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=list(module.inputs),
            output_names=[output, *(f"layer_{i}" for i in range(layers))],
            opset_version=OPSET,
            verbose=False,
        )
    model: ir.Model = program.model
    for node in model.graph:  # stack traces, with this machine's paths in them
        node.metadata_props.clear()
        node.doc_string = None
    return model
