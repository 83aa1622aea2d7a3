"""What a model file may be called and may hold, found out before a native library opens it.

The same for the files of a bundle and of a checkpoint. Refuses what runs code, what names
files elsewhere, and headers that a parser could be led astray by. Knows no manifest.
"""

import json
import os
from collections.abc import Container
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from dear_batch.errors import TrustError
from dear_batch.onnx_wire import MalformedGraphError, external_locations

PICKLES = (".bin", ".ckpt", ".dill", ".joblib", ".pickle", ".pkl", ".pt", ".pt2", ".pth")
CODE = (".dll", ".dylib", ".py", ".pyc", ".pyd", ".so")
# Files in which any word may be a key, and none asks for anything.
VOCABULARIES = ("tokenizer.json", "vocab.json")
KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation")
INDEX = ".safetensors.index.json"
MAX_CONFIG_BYTES = 64 << 20
PREFIX_BYTES = 8  # the length of the header, little-endian
MAX_HEADER_BYTES = 100_000_000  # huggingface/safetensors, lib.rs: MAX_HEADER_SIZE
MAX_GRAPH_BYTES = 64 << 20  # its weights lie beside it; an 8B model's graph takes under 1 MB
NEXT_STEP = "do not load it; get the model again from a source that you trust"


def refused(path: Path, why: str, *, valid: str = "", next_step: str = NEXT_STEP) -> TrustError:
    """The error for a file that must not be loaded."""
    return TrustError(
        f"The model file {path.name} is not trusted.",
        where=f"{path}: {why}",
        valid=valid,
        next_step=next_step,
    )


def why_no_name(name: str) -> str | None:
    """Why a manifest may not list a file of that name; None where it may."""
    if not name.isprintable() or "\\" in name:
        return "holds a backslash or a control character"
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        return "points out of the bundle"
    if path.as_posix() != name or name == ".":
        return "is not the plain path of a file"
    return None


def check_suffix(path: Path) -> None:
    """Refuse a file that holds code by its name.

    Raises:
        TrustError: a pickle, Python, or a library.
    """
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        raise refused(
            path,
            "it is pickled, which can run code when it is loaded",
            valid="*.safetensors",
            next_step="move it elsewhere; where it is the only copy, convert it on a machine "
            "you can lose: safetensors.torch.save_file",
        )
    if suffix in CODE:
        raise refused(
            path,
            "it is code, and a model brings none",
            valid="weights, configs and a tokenizer",
            next_step="move it elsewhere",
        )


def read_json(raw: bytes) -> Any:
    """The value of a JSON file.

    Raises:
        ValueError: it is none.
    """
    try:
        return json.loads(raw.decode())
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def check_config(path: Path, fields: Any) -> None:
    """Refuse a config that names code to be run, or weights in other folders.

    Raises:
        TrustError: an `auto_map` at any depth, attention code of the hub, a pickled shard.
    """
    pending = [fields]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            for key in value:
                _check_key(path, key, value[key])
            pending += value.values()
        elif isinstance(value, list):
            pending += value
    if path.name.endswith(INDEX):
        _check_index(path, fields)


def _check_key(path: Path, key: str, value: Any) -> None:
    if key == "auto_map" and value and isinstance(value, dict | list | str):
        raise refused(
            path,
            "it asks to run code of its own (auto_map)",
            valid="a model of an architecture that transformers brings itself",
        )
    # transformers loads "owner/repository" as compiled code of the hub.
    if key in KERNELS and "/" in str(value):
        raise refused(path, f"it asks for compiled code of the hub ({key})", valid="eager or sdpa")


def _check_index(path: Path, fields: Any) -> None:
    """The names are joined to the folder unchecked, and what is no safetensors is unpickled."""
    weight_map = fields.get("weight_map") if isinstance(fields, dict) else None
    if not isinstance(weight_map, dict):
        raise refused(path, "it has no weight_map")
    for name in weight_map.values():
        plain = isinstance(name, str) and not why_no_name(name) and "/" not in name
        if not plain or not name.endswith(".safetensors"):
            raise refused(
                path, f"it names {name!r} as weights", valid="*.safetensors in the same folder"
            )


def check_safetensors(path: Path, file: BinaryIO) -> None:
    """Refuse a safetensors file whose header does not describe exactly what follows it.

    Raises:
        TrustError: a header too large or no JSON, or tensors outside the file or overlapping.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(PREFIX_BYTES), "little")
    room = size - PREFIX_BYTES - length
    if size < PREFIX_BYTES or room < 0:
        raise refused(path, f"its header of {length} bytes is longer than the file of {size}")
    if length > MAX_HEADER_BYTES:
        raise refused(path, f"its header has {length} bytes", valid=f"up to {MAX_HEADER_BYTES}")
    try:
        header = read_json(file.read(length))
    except ValueError as error:
        raise refused(path, f"its header is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise refused(path, "its header is no JSON object")
    spans = sorted(_span(path, k, v) for k, v in header.items() if k != "__metadata__")
    end = 0
    for begin, stop, name in spans:
        if begin < end:
            raise refused(path, f"the tensor {name!r} overlaps another")
        end = stop
    if end > room:
        raise refused(path, f"the tensor {spans[-1][2]!r} ends outside the file")


def _span(path: Path, name: str, tensor: Any) -> tuple[int, int, str]:
    offsets = tensor.get("data_offsets") if isinstance(tensor, dict) else None
    if not isinstance(offsets, list) or [type(offset) for offset in offsets] != [int, int]:
        raise refused(path, f"the tensor {name!r} has no data_offsets")
    begin, end = offsets
    if not 0 <= begin <= end:
        raise refused(path, f"the tensor {name!r} has the data_offsets {offsets}")
    return begin, end, name


def check_contents(path: Path, file: BinaryIO, listed: Container[str], name: str) -> None:
    """Refuse contents that would make a native library run code or read other files.

    Args:
        path: of the file, for messages.
        file: the same, opened.
        listed: names of the bundle's files.
        name: of this one among them.

    Raises:
        TrustError: such contents.
    """
    suffix = path.suffix.lower()
    file.seek(0)
    if suffix == ".safetensors":
        check_safetensors(path, file)
    elif suffix == ".onnx":
        graph = file.read(MAX_GRAPH_BYTES + 1)
        if len(graph) > MAX_GRAPH_BYTES:
            raise refused(path, f"it is a graph of over {MAX_GRAPH_BYTES} bytes")
        check_graph(path, graph, listed, name)
    elif suffix == ".json" and path.name not in VOCABULARIES:
        try:
            check_config(path, read_json(file.read(MAX_CONFIG_BYTES)))
        except ValueError as error:
            raise refused(path, f"it is no JSON: {error}") from error


def check_graph(path: Path, graph: bytes, listed: Container[str], name: str) -> None:
    """Refuse a graph that takes its weights from anything but listed files of its bundle.

    Args:
        path: of the graph, for messages.
        graph: its bytes.
        listed: names of the bundle's files.
        name: of the graph among them; locations are relative to its folder.

    Raises:
        TrustError: such a graph, or bytes that are none.
    """
    folder = PurePosixPath(name).parent
    try:
        for location in set(external_locations(graph)):
            if why_no_name(location) or (folder / location).as_posix() not in listed:
                raise refused(
                    path,
                    f"it takes weights from {location!r}",
                    valid="files that bundle.json lists, below the folder of the graph",
                )
    except MalformedGraphError as error:
        raise refused(path, f"it is no ONNX graph: {error}") from error
