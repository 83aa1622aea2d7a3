"""Which files an ONNX graph names as its weights, read before ONNX Runtime opens anything.

A walker of protobuf's wire format (protobuf.dev/programming-guides/encoding) that knows of
onnx.proto no more than the fields that lead to a tensor. What a parser might read in two ways
is malformed here. Knows nothing of folders or bundles.
"""

from collections.abc import Iterator, Mapping

# onnx/onnx.proto: message → field number → the message it holds, where tensors lie below it.
LEADS_TO_TENSORS: Mapping[str, Mapping[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {13: "StringStringEntryProto"},
}
ENTRY = "StringStringEntryProto"  # of TensorProto.external_data: key = 1, value = 2
MAX_DEPTH = 100  # protobuf's own limit of nested messages
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
FIXED_BYTES = {FIXED64: 8, FIXED32: 4}
MORE = 0x80  # the bit of a varint's byte that says that another follows
MAX_TAG = 2**32 - 1  # of 29 bits of field number and 3 of wire type

Field = tuple[int, int, int, int]  # number, wire type, and where its payload begins and ends


class MalformedGraphError(ValueError):
    """The bytes are no graph, or one that two parsers might read differently."""


def external_locations(graph: bytes) -> Iterator[str]:
    """The `location` of every tensor whose data lies in another file, wherever it hides.

    Initializers, sparse ones, attributes of nodes, their subgraphs, functions, training graphs.

    Raises:
        MalformedGraphError: not a whole ModelProto.
    """
    open_messages = [("ModelProto", _fields(graph, 0, len(graph)))]
    while open_messages:
        message, fields = open_messages[-1]
        field = next(fields, None)
        if field is None:
            open_messages.pop()
            continue
        number, wire_type, begin, end = field
        child = LEADS_TO_TENSORS[message].get(number)
        if child is None:
            continue
        if wire_type != LENGTH:
            raise MalformedGraphError(f"{message} has a field {number} that is no {child}")
        if len(open_messages) == MAX_DEPTH:
            raise MalformedGraphError(f"its messages are nested more than {MAX_DEPTH} deep")
        if child == ENTRY:
            yield from _location(graph, begin, end)
        else:
            open_messages.append((child, _fields(graph, begin, end)))


def _location(graph: bytes, begin: int, end: int) -> Iterator[str]:
    texts = {1: b"", 2: b""}
    for number, wire_type, start, stop in _fields(graph, begin, end):
        if number in texts:
            if wire_type != LENGTH:
                raise MalformedGraphError("external data is described by something else than text")
            texts[number] = graph[start:stop]  # the last one counts, as in every parser
    if texts[1] == b"location":
        try:
            yield texts[2].decode()
        except UnicodeDecodeError as error:
            raise MalformedGraphError("a location of external data is no UTF-8") from error


def _fields(graph: bytes, at: int, end: int) -> Iterator[Field]:
    """The fields of the message in `graph[at:end]`, which they must fill exactly."""
    while at < end:
        tag, at = _varint(graph, at, end)
        number, wire_type = tag >> 3, tag & 7
        if not number or tag > MAX_TAG:
            raise MalformedGraphError(f"a field has the number {number}")
        begin = at
        if wire_type == LENGTH:
            length, begin = _varint(graph, at, end)
            at = begin + length
        elif wire_type == VARINT:
            at = _varint(graph, at, end)[1]
        elif wire_type in FIXED_BYTES:
            at += FIXED_BYTES[wire_type]
        else:
            raise MalformedGraphError(f"a field has the wire type {wire_type}")
        if at > end:
            raise MalformedGraphError("a field is longer than what holds it")
        yield number, wire_type, begin, at


def _varint(graph: bytes, at: int, end: int) -> tuple[int, int]:
    """The number at `at`, and where the next byte lies."""
    value = 0
    for shift in range(0, 70, 7):  # 64 bits at most
        if at >= end:
            break
        byte = graph[at]
        at += 1
        value |= (byte & ~MORE) << shift
        if byte < MORE:
            return value, at
    raise MalformedGraphError("a number has no end")
