"""Edits of a traced ONNX graph: layers repeated, weights named by file, the standard form.

Works on onnx_ir values alone; of torch it knows the names of dtypes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from dear_batch.export.weights import Range

STANDARD_INPUTS = ("input_ids", "attention_mask")
DATA_TYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
}
PARAMETER = "scorer."  # the exporter's prefix to a parameter's name
# The standard form is the packed one with one pair a row: the pair is all prefix (segment 0)
# of group 0, its padding group -1; positions count from 0; the last attended position is
# pooled, found as a maximum since ONNX Runtime has no ArgMax on int64.
AROUND_PACKED = """
<ir_version: 10, opset_import: ["" : 23]>
standard (int64[batch, length] input_ids, int64[batch, length] attention_mask,
          float[batch, 1] scores)
    => (int32[batch, length] tokens, int32[batch, length] positions,
        int32[batch, length] groups, int32[batch, length] segments,
        int32[batch, 1] pooled, float[batch, 1] logits)
{
    std_zero = Constant<value = int32 {0}>()
    std_one = Constant<value = int32 {1}>()
    std_axis = Constant<value = int64[1] {1}>()
    std_mask = Cast<to = 6>(attention_mask)
    std_length = Shape<start = 1, end = 2>(input_ids)
    std_length_32 = Cast<to = 6>(std_length)
    std_length_scalar = Squeeze(std_length_32)
    std_columns = Range(std_zero, std_length_scalar, std_one)
    tokens = Cast<to = 6>(input_ids)
    segments = Mul(std_mask, std_zero)
    positions = Add(segments, std_columns)
    groups = Sub(std_mask, std_one)
    std_attended = Mul(positions, std_mask)
    pooled = ReduceMax(std_attended, std_axis)
    logits = Identity(scores)
}
"""


def repeat_middle_layer(graph: ir.Graph, n_layers: int) -> None:
    """Copy the second of three traced layers until there are `n_layers`.

    Beside its first output the traced graph has the output of every layer but the last; they
    mark where a layer begins and ends, and are no outputs afterwards.
    """
    result, *ends = graph.outputs
    graph.outputs[:] = [result]
    if n_layers <= len(ends) + 1:
        return
    begin, end = ends
    for value in [v for v in graph.initializers.values() if ".layers.2." in str(v.name)]:
        value.name = str(value.name).replace(".layers.2.", f".layers.{n_layers - 1}.")
    nodes = _between(graph, begin, end)
    after = list(end.uses())
    last, previous = nodes[-1], end
    for number in range(2, n_layers - 1):
        copies, previous = _copied(graph, nodes, {begin: previous}, end, number)
        graph.insert_after(last, copies)
        last = copies[-1]
    for node, index in after:
        node.replace_input_with(index, previous)


def _between(graph: ir.Graph, begin: ir.Value, end: ir.Value) -> list[ir.Node]:
    """Nodes that `end` needs beyond what `begin` needs, in graph order."""
    wanted = _needed_by(end) - _needed_by(begin)
    return [node for node in graph if node in wanted]


def _needed_by(value: ir.Value) -> set[ir.Node]:
    found: set[ir.Node] = set()
    waiting = [value]
    while waiting:
        node = waiting.pop().producer()
        if node is not None and node not in found:
            found.add(node)
            waiting += [used for used in node.inputs if used is not None]
    return found


def _copied(
    graph: ir.Graph,
    nodes: Sequence[ir.Node],
    values: dict[ir.Value, ir.Value],
    end: ir.Value,
    number: int,
) -> tuple[list[ir.Node], ir.Value]:
    """The layer's nodes again as layer `number`, and the value that it ends in."""

    def mapped(value: ir.Value | None) -> ir.Value | None:
        if value is None or value in values or ".layers.1." not in (value.name or ""):
            return None if value is None else values.get(value, value)
        weight = ir.Value(
            name=str(value.name).replace(".layers.1.", f".layers.{number}."),
            shape=value.shape,
            type=value.type,
            const_value=value.const_value,
        )
        graph.register_initializer(weight)
        values[value] = weight
        return weight

    copies = []
    for node in nodes:
        copy = ir.Node(
            node.domain,
            node.op_type,
            [mapped(value) for value in node.inputs],
            node.attributes.values(),
            num_outputs=len(node.outputs),
            name=f"{node.name}_layer_{number}",
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name, new.shape, new.type = f"{old.name}_layer_{number}", old.shape, old.type
            values[old] = new
        copies.append(copy)
    return copies, values[end]


def point_at_weights(graph: ir.Graph, file: Path, ranges: dict[str, Range]) -> None:
    """Replace every initializer that is a weight by its range of the weights file."""
    for value in graph.initializers.values():
        name = str(value.name)
        stored = ranges.get(name.removeprefix(PARAMETER))
        computed = not name.startswith(PARAMETER) or name.endswith("inv_freq")
        assert stored or computed, f"{name} would keep random values"  # noqa: S101 - invariant
        if stored is not None:
            value.shape = ir.Shape(stored.shape)
            value.const_value = ir.ExternalTensor(
                file.name,
                stored.offset,
                stored.length,
                DATA_TYPES[stored.dtype],
                shape=value.shape,
                name=str(value.name),
                base_dir=file.parent,
            )


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
    graph.inputs[:] = [given[name] for name in STANDARD_INPUTS]
    graph.outputs[:] = [made["logits"]]
    graph.sort()
    return model


def emulated(model: ir.Model, half: ir.DataType) -> ir.Model:
    """The same graph in fp32 values that were rounded to a 16-bit type, infinity included.

    For runtimes without products in that type, and for those that leave the rounding out: ONNX
    Runtime on a CPU multiplies fp16 values in fp32 and never overflows. A product in 16 bits is
    one in fp32, rounded: GPUs accumulate in fp32. The graph is changed.
    """
    graph = model.graph
    narrow = [v for v in graph.initializers.values() if v.dtype == half]
    for node in list(graph):
        narrow += [v for v in node.outputs if v.dtype == half and node.op_type in ROUNDING]
        for value in node.outputs:
            if value.dtype == half and node.op_type != "Cast":
                value.dtype = ir.DataType.FLOAT
    for value in narrow:
        _rounded(graph, value, half)
    return model


ROUNDING = ("Cast", "MatMul")  # of the operations that our graphs have in 16 bits


def _rounded(graph: ir.Graph, value: ir.Value, half: ir.DataType) -> None:
    """Give all users of a value its rounding, as fp32."""
    uses, producer, steps = list(value.uses()), value.producer(), []
    found = value
    for dtype in (half, ir.DataType.FLOAT):
        cast = ir.node("Cast", [found], {"to": dtype.value}, name=f"{value.name}_{dtype.name}")
        found = cast.outputs[0]
        found.name, found.dtype, found.shape = f"{cast.name}_value", dtype, value.shape
        steps.append(cast)
    if producer is None:
        graph.insert_before(graph[0], steps)
    else:
        graph.insert_after(producer, steps)
    for node, index in uses:
        node.replace_input_with(index, found)


def signatures(graph: Any) -> dict[str, dict[str, list[str | int]]]:
    """Inputs and outputs by name: [dtype, dimension, …]."""
    sides = {"inputs": graph.inputs, "outputs": graph.outputs}
    return {side: {v.name: _signature(v) for v in values} for side, values in sides.items()}


def _signature(value: Any) -> list[str | int]:
    dimensions = [d if isinstance(d, int) else str(d.value) for d in value.shape]
    return [value.dtype.name.lower(), *dimensions]
