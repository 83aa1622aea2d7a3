"""The two ONNX graphs of a pointwise model, exported from Hugging Face's own layers.

`model.onnx`: input_ids_BL, attention_mask_BL (int64) → logits_B1: what Optimum and Hugging
Face expect of a sequence classification model.
`packed.onnx`: tokens, positions, groups, segments_RT and pooled_N (int32) → scores_N: many
documents a row (see `pointwise.rows`).

Both keep norms, softmax and head in fp32 and name the same weights file. Knows nothing of
checkpoints or bundles.
"""

import logging
import warnings
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from dear_batch.export.weights import Range, write_weights
from dear_batch.pointwise.recipe import Pooling

OPSET = 18
# A hidden token's attention score. Not -inf and not the dtype's minimum: either turns into
# NaN when a whole row is hidden or a negative score is added. exp(-1e9) is exactly 0.
HIDDEN = -1e9
WEIGHTS = "weights.safetensors"
# The standard form is the packed one with one pair a row: the pair is all prefix (segment 0)
# of group 0, its padding group -1; positions count from 0; the last attended position is
# pooled, found as a maximum since ONNX Runtime has no ArgMax on int64.
AROUND_PACKED = """
<ir_version: 10, opset_import: ["" : 18]>
standard (int64[batch, length] input_ids, int64[batch, length] attention_mask,
          float[batch] scores)
    => (int32[batch, length] tokens, int32[batch, length] positions,
        int32[batch, length] groups, int32[batch, length] segments,
        int32[batch] pooled, float[batch, 1] logits)
{
    std_zero = Constant<value = int32 {0}>()
    std_one = Constant<value = int32 {1}>()
    std_axis = Constant<value = int64[1] {1}>()
    std_mask = Cast<to = 6>(attention_mask)
    std_batch = Shape<start = 0, end = 1>(input_ids)
    std_batch_32 = Cast<to = 6>(std_batch)
    std_batch_scalar = Squeeze(std_batch_32)
    std_rows = Range(std_zero, std_batch_scalar, std_one)
    std_length = Shape<start = 1, end = 2>(input_ids)
    std_length_32 = Cast<to = 6>(std_length)
    std_length_scalar = Squeeze(std_length_32)
    std_columns = Range(std_zero, std_length_scalar, std_one)
    tokens = Cast<to = 6>(input_ids)
    segments = Mul(std_mask, std_zero)
    positions = Add(segments, std_columns)
    groups = Sub(std_mask, std_one)
    std_attended = Mul(positions, std_mask)
    std_last = ReduceMax<keepdims = 0>(std_attended, std_axis)
    std_starts = Mul(std_rows, std_length_scalar)
    pooled = Add(std_starts, std_last)
    logits = Unsqueeze(scores, std_axis)
}
"""


class InOutLinear(nn.Module):
    """A linear layer that holds its weight as [in, out], a view of the original."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.T, requires_grad=False)
        self.bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """`x W + b`."""
        outputs = inputs @ self.weight
        return outputs if self.bias is None else outputs + self.bias


def with_in_out_weights(module: nn.Module) -> nn.Module:
    """Replace every linear layer below `module` in place, keeping all parameter names."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, InOutLinear(child))
        else:
            with_in_out_weights(child)
    return module


def _hidden(scorer: nn.Module, ids: Tensor, positions: Tensor, visible_RTT: Tensor) -> Tensor:
    """Last hidden states, [R, T, hidden]; a given 4-D mask replaces Hugging Face's own."""
    mask_R1TT = torch.where(visible_RTT, 0.0, HIDDEN)[:, None]
    output: Tensor = scorer.model(
        input_ids=ids, attention_mask=mask_R1TT, position_ids=positions, use_cache=False
    ).last_hidden_state
    return output


class PackedGraph(nn.Module):
    """Many documents a row; each sees itself and its own prefix, causally."""

    inputs = ("tokens", "positions", "groups", "segments", "pooled")

    def __init__(self, scorer: nn.Module) -> None:
        super().__init__()
        self.scorer = scorer

    def forward(
        self, tokens: Tensor, positions: Tensor, groups: Tensor, segments: Tensor, pooled: Tensor
    ) -> Tensor:
        """scores_N. Padding has group -1 and sees padding, so that no row is all hidden."""
        order_T = torch.arange(tokens.shape[1])
        causal_TT = order_T[None, :] <= order_T[:, None]
        same_group_RTT = groups[:, :, None] == groups[:, None, :]
        same_segment_RTT = segments[:, :, None] == segments[:, None, :]
        in_prefix_RT = segments == 0
        visible_RTT = causal_TT[None] & same_group_RTT & (in_prefix_RT[:, None] | same_segment_RTT)
        hidden_RTH = _hidden(self.scorer, tokens, positions, visible_RTT)
        pooled_NH = hidden_RTH.flatten(0, 1).index_select(0, pooled)
        scores_N: Tensor = self.scorer.score(pooled_NH.float())[:, 0]
        return scores_N


class FinalPositionGraph(nn.Module):
    """One pair a row, right padded, pooled at the final position, be it padding.

    As Hugging Face computes it: a padding token sees the real tokens, not itself.
    """

    inputs = ("input_ids", "attention_mask")

    def __init__(self, scorer: nn.Module) -> None:
        super().__init__()
        self.scorer = scorer

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """logits_B1."""
        positions_L = torch.arange(input_ids.shape[1])
        causal_LL = positions_L[None, :] <= positions_L[:, None]
        visible_BLL = causal_LL[None] & (attention_mask[:, None, :] != 0)
        hidden_BLH = _hidden(self.scorer, input_ids, positions_L[None], visible_BLL)
        logits_B1: Tensor = self.scorer.score(hidden_BLH[:, -1].float())
        return logits_B1


def onnx_from_torch(model: Any, folder: Path, pooling: Pooling) -> dict[str, Any]:
    """Write the weights and the graphs into `folder`; `model` is changed by it.

    `final-position` pooling reads a padding token, which packed rows do not have: such a
    model gets the standard graph alone.

    Returns:
        Each graph's signature: inputs and outputs, name → [dtype, dimension, …].
    """
    model.set_attn_implementation("eager")  # fewer nodes than the decomposition of SDPA
    with_in_out_weights(model)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    ranges = write_weights(parameters, folder / WEIGHTS)
    if pooling == "final-position":
        rows = {0: "batch", 1: "length"}
        standard = _traced(FinalPositionGraph(model), torch.int64, (rows, rows), "logits")
        graphs = {"model.onnx": standard}
    else:
        rows = {0: "rows", 1: "row_tokens"}
        shapes = (rows, rows, rows, rows, {0: "documents"})
        packed = _traced(PackedGraph(model), torch.int32, shapes, "scores")
        graphs = {"packed.onnx": packed, "model.onnx": standard_from_packed(packed.clone())}
    for name, graph in graphs.items():
        _point_at_weights(graph.graph, folder, ranges)
        ir.save(graph, folder / name)
    return {name: _signatures(graph.graph) for name, graph in sorted(graphs.items())}


def _traced(
    module: Any, dtype: torch.dtype, shapes: tuple[dict[int, str], ...], output: str
) -> ir.Model:
    """Export a module whose inputs are all of one dtype, of two or one dimensions."""
    # A tensor of its own for each input: the exporter takes equal objects for one input.
    examples = tuple(torch.ones([8 - 5 * axis for axis in shape], dtype=dtype) for shape in shapes)
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
            output_names=[output],
            opset_version=OPSET,
            verbose=False,
        )
    model: ir.Model = program.model
    for node in model.graph:  # stack traces, with this machine's paths in them
        node.metadata_props.clear()
        node.doc_string = None
    return model


def standard_from_packed(model: ir.Model) -> ir.Model:
    """Put the standard form's inputs and output around a packed graph, which is changed."""
    graph, around = model.graph, ir.from_onnx_text(AROUND_PACKED).graph
    given = {value.name: value for value in around.inputs}
    made = {value.name: value for value in around.outputs}
    nodes = list(around)
    around.outputs.clear()
    around.inputs.clear()
    around.remove(nodes)
    graph.extend(nodes)
    for value in graph.inputs:
        ir.convenience.replace_all_uses_with(value, made[value.name])
    ir.convenience.replace_all_uses_with(given["scores"], graph.outputs[0])
    graph.inputs[:] = [given[name] for name in FinalPositionGraph.inputs]
    graph.outputs[:] = [made["logits"]]
    graph.sort()
    return model


def _point_at_weights(graph: Any, folder: Path, ranges: dict[str, Range]) -> None:
    """Replace every initializer that is a weight by its range of the weights file."""
    for value in graph.initializers.values():
        stored = ranges.get(value.name.removeprefix("scorer."))
        if stored is not None:
            tensor = value.const_value
            value.const_value = ir.ExternalTensor(
                WEIGHTS,
                stored.offset,
                stored.length,
                tensor.dtype,
                shape=tensor.shape,
                name=value.name,
                base_dir=folder,
            )


def _signatures(graph: Any) -> dict[str, dict[str, list[str | int]]]:
    sides = {"inputs": graph.inputs, "outputs": graph.outputs}
    return {side: {v.name: _signature(v) for v in values} for side, values in sides.items()}


def _signature(value: Any) -> list[str | int]:
    dimensions = [d if isinstance(d, int) else str(d.value) for d in value.shape]
    return [value.dtype.name.lower(), *dimensions]
