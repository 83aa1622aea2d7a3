"""The walker finds what the `onnx` package finds, and survives what that package refuses."""

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from dear_batch.onnx_wire import (
    ENTRY,
    LEADS_TO_TENSORS,
    MAX_DEPTH,
    MalformedGraphError,
    external_locations,
)


def external(location: str, name: str = "w") -> TensorProto:
    """A tensor whose data lies in that file."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "8")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def inside(name: str = "w") -> TensorProto:
    return helper.make_tensor(name, TensorProto.FLOAT, [2], [1.0, 2.0])


def sparse(values: TensorProto, indices: TensorProto) -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(values=values, indices=indices, dims=[4])


def graph(**fields: list[object]) -> onnx.GraphProto:
    return onnx.GraphProto(name="g", **fields)


def model(**fields: list[object]) -> onnx.ModelProto:
    return onnx.ModelProto(ir_version=8, producer_name="test", graph=graph(**fields))


def node(**attributes: object) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["y"], **attributes)


def if_node(location: str) -> onnx.NodeProto:
    branch = graph(initializer=[external(location)])
    return helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=graph())


def nested(location: str, depth: int) -> onnx.NodeProto:
    found = node(value=external(location))
    for _ in range(depth):
        found = helper.make_node("If", ["c"], ["y"], then_branch=graph(node=[found]))
    return found


def function(location: str) -> onnx.FunctionProto:
    attribute = helper.make_attribute("a", external(location))
    return onnx.FunctionProto(name="f", attribute_proto=[attribute])


def with_functions(location: str) -> onnx.ModelProto:
    found = model()
    found.functions.append(onnx.FunctionProto(name="f", node=[node(value=external(location))]))
    return found


def with_defaults(location: str) -> onnx.ModelProto:
    found = model()
    found.functions.append(function(location))
    return found


def with_training(location: str) -> onnx.ModelProto:
    found = model()
    found.training_info.add(algorithm=graph(initializer=[external(location)]))
    return found


AT = "../elsewhere"
PLACES = {
    "an initializer": lambda at: model(initializer=[inside(), external(at)]),
    "a sparse initializer": lambda at: model(sparse_initializer=[sparse(external(at), inside())]),
    "its indices": lambda at: model(sparse_initializer=[sparse(inside(), external(at))]),
    "an attribute": lambda at: model(node=[node(value=external(at))]),
    "a list of tensors": lambda at: model(node=[node(values=[inside(), external(at)])]),
    "a sparse attribute": lambda at: model(
        node=[node(sparse_value=sparse(external(at), inside()))]
    ),
    "sparse attributes": lambda at: model(
        node=[node(sparse_values=[sparse(external(at), inside())])]
    ),
    "a subgraph": lambda at: model(node=[if_node(at)]),
    "a list of subgraphs": lambda at: model(
        node=[node(bodies=[graph(), graph(initializer=[external(at)])])]
    ),
    "a deep subgraph": lambda at: model(node=[nested(at, 20)]),
    "a function": with_functions,
    "a function's attribute": with_defaults,
    "a training graph": with_training,
}


@pytest.mark.parametrize("place", PLACES)
def test_external_data_is_found_in(place: str) -> None:
    assert list(external_locations(PLACES[place](AT).SerializeToString())) == [AT]
    assert list(external_locations(PLACES[place]("/etc/x").SerializeToString())) == ["/etc/x"]


def test_the_table_is_that_of_onnx() -> None:
    """Every field below a model that leads to a tensor, from onnx's own descriptors."""

    def children(message: object) -> dict[int, object]:
        return {f.number: f.message_type for f in message.fields if f.message_type}

    known, pending = {}, [onnx.ModelProto.DESCRIPTOR]
    while pending:
        message = pending.pop()
        if message.name not in known:
            known[message.name] = children(message)
            pending += known[message.name].values()
    leading = {"TensorProto"}
    while (
        found := {
            name
            for name, fields in known.items()
            if any(child.name in leading for child in fields.values())
        }
        - leading
    ):
        leading |= found
    table = {
        name: {number: c.name for number, c in known[name].items() if c.name in leading}
        for name in leading - {"TensorProto"}
    }
    external_data = TensorProto.DESCRIPTOR.fields_by_name["external_data"].number
    assert {**table, "TensorProto": {external_data: ENTRY}} == LEADS_TO_TENSORS


def test_a_graph_without_external_data() -> None:
    assert list(external_locations(model(initializer=[inside()]).SerializeToString())) == []
    assert list(external_locations(b"")) == []


def test_the_last_of_two_keys_counts_as_in_every_parser() -> None:
    entry = b"\x0a\x06offset\x12\x01x" + b"\x0a\x08location\x12\x04/etc"
    tensor = b"\x6a" + bytes([len(entry)]) + entry
    assert TensorProto.FromString(tensor).external_data[0].key == "location"
    found = graph(initializer=[]).SerializeToString() + b"\x2a" + bytes([len(tensor)]) + tensor
    raw = b"\x3a" + bytes([len(found)]) + found
    assert onnx.ModelProto.FromString(raw).graph.initializer[0].external_data[0].value == "/etc"
    assert list(external_locations(raw)) == ["/etc"]


def test_a_message_in_two_parts_is_one() -> None:
    parts = (model(initializer=[external(at)]).SerializeToString() for at in ("a", "b"))
    raw = b"".join(parts)
    assert len(onnx.ModelProto.FromString(raw).graph.initializer) == 2
    assert list(external_locations(raw)) == ["a", "b"]


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"\x3a\x05abc", "longer than what holds it"),
        (b"\x3a", "no end"),
        (b"\x08" + b"\x80" * 10 + b"\x01", "no end"),
        (b"\x00\x00", "number 0"),
        (b"\xff\xff\xff\xff\x7f\x01", "number"),
        (b"\x3b\x3c", "wire type 3"),
        (b"\x38\x01", "no GraphProto"),
        (b"\x0d\x01\x02", "longer than what holds it"),
        (b"\x09\x01\x02", "longer than what holds it"),
        (b"\x3a\x06\x2a\x04\x6a\x02\x08\x01", "something else than text"),
    ],
)
def test_malformed_bytes(raw: bytes, why: str) -> None:
    with pytest.raises(MalformedGraphError, match=why):
        list(external_locations(raw))


def test_a_location_that_is_no_text() -> None:
    raw = model(initializer=[external("xxxx")]).SerializeToString()
    with pytest.raises(MalformedGraphError, match="UTF-8"):
        list(external_locations(raw.replace(b"xxxx", b"\xff\xfe\xfd\xfc")))


def test_messages_nested_beyond_what_protobuf_reads() -> None:
    raw = b""
    for _ in range(MAX_DEPTH):  # graph in attribute in node in graph …
        for tag in (b"\x32", b"\x2a", b"\x0a"):
            raw = tag + _length(raw) + raw
    with pytest.raises(MalformedGraphError, match="nested"):
        list(external_locations(b"\x3a" + _length(raw) + raw))


def _length(raw: bytes) -> bytes:
    count, found = len(raw), b""
    while count > 0x7F:
        found += bytes([count & 0x7F | 0x80])
        count >>= 7
    return found + bytes([count])


EXAMPLES = int(os.environ.get("DEAR_BATCH_FUZZ_EXAMPLES", "300"))
WHOLE = [make("weights.safetensors").SerializeToString() for make in PLACES.values()]


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes(raw: bytes) -> None:
    finds_what_onnx_finds(raw)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.sampled_from(WHOLE), st.data())
def test_mutated_graphs(raw: bytes, data: st.DataObject) -> None:
    changed = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed) - 1))
        changed[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        if not changed:
            break
    finds_what_onnx_finds(bytes(changed))


def finds_what_onnx_finds(raw: bytes) -> None:
    """Nothing that onnx's parser reads goes by; refusing more than it does is fine."""
    try:
        found = set(external_locations(raw))
    except MalformedGraphError:
        return
    try:
        parsed = onnx.ModelProto.FromString(raw)
    except Exception:  # noqa: BLE001 - the error class depends on the protobuf that is installed
        return
    assert locations_in(parsed) <= found


def locations_in(message: object) -> set[str]:
    """By protobuf's reflection, wherever tensors lie."""
    found: set[str] = set()
    if isinstance(message, TensorProto):
        found |= {e.value for e in message.external_data if e.key == "location"}
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for child in [value] if hasattr(value, "ListFields") else value:
            found |= locations_in(child)
    return found


def test_a_real_graph_on_disk_names_its_weights(tmp_path: Path) -> None:
    weights = numpy_helper.from_array(np.zeros(4096, np.float32), "w")
    onnx.save_model(
        model(initializer=[weights]),
        tmp_path / "model.onnx",
        save_as_external_data=True,
        location="model.data",
        size_threshold=0,
    )
    assert list(external_locations((tmp_path / "model.onnx").read_bytes())) == ["model.data"]
