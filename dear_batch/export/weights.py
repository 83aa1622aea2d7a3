"""Writes a pointwise model's weights once, in the layout that all its readers share.

A safetensors file whose linear weights are stored [in, out], as the graphs multiply by them:
`model.onnx` and `packed.onnx` name ranges of it as their external data, and the PyTorch
scorer reads it by name (and transposes). Streams tensor by tensor: nothing is held twice.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ALIGNMENT = 4096  # the header's padding: tensors start on a page where their sizes allow


@dataclass(frozen=True, slots=True)
class Range:
    """Where one tensor lies within the file, in bytes, and its shape."""

    offset: int
    length: int
    shape: tuple[int, ...]


def write_weights(tensors: dict[str, Any], path: Path) -> dict[str, Range]:
    """Write fp32 torch tensors and say where each lies.

    The format: 8 bytes header length, JSON header, data (huggingface/safetensors README);
    the header may end in spaces. The library's own writer wants every tensor contiguous in
    memory at once, which would hold an 8B model twice.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "linear": "[in, out]"}}
    spans: dict[str, tuple[int, int]] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        spans[name] = (begin, end)
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    start = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT
    with path.open("xb") as file:
        file.write((start - 8).to_bytes(8, "little"))
        file.write(text.ljust(start - 8))
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor.numpy()).data)
    return {
        name: Range(start + begin, end - begin, tuple(tensors[name].shape))
        for name, (begin, end) in spans.items()
    }
