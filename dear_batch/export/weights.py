"""Writes a pointwise model's weights once, in the layout that all its readers share.

A safetensors file whose linear weights are stored [in, out], as the graphs multiply by them:
`model.onnx` and `packed.onnx` name ranges of it as their external data, and the PyTorch
scorer reads it by name (and transposes). Streams tensor by tensor: nothing is held twice.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dear_batch.errors import ConfigurationError

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
ALIGNMENT = 4096  # the header's padding: tensors start on a page where their sizes allow


@dataclass(frozen=True, slots=True)
class Range:
    """Where one tensor lies within the file, in bytes, its shape and its dtype."""

    offset: int
    length: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def write_weights(
    tensors: Mapping[str, torch.Tensor], dtypes: Mapping[str, torch.dtype], path: Path
) -> dict[str, Range]:
    """Write tensors, each as its dtype, and say where each lies.

    The format: 8 bytes header length, JSON header, data (huggingface/safetensors README);
    the header may end in spaces. The library's own writer wants every tensor contiguous in
    memory at once, which would hold an 8B model twice.

    Raises:
        ConfigurationError: a finite weight is too large for its dtype.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "linear": "[in, out]"}}
    spans: dict[str, tuple[int, int]] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * dtypes[name].itemsize
        spans[name] = (begin, end)
        header[name] = {
            "dtype": NAMES[dtypes[name]],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    start = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT
    with path.open("xb") as file:
        file.write((start - 8).to_bytes(8, "little"))
        file.write(text.ljust(start - 8))
        for name, tensor in tensors.items():
            file.write(_bytes(name, tensor, dtypes[name]))
    return {
        name: Range(start + begin, end - begin, tuple(tensors[name].shape), dtypes[name])
        for name, (begin, end) in spans.items()
    }


def _bytes(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> memoryview:
    cast = tensor.to(dtype).contiguous().reshape(-1)
    if not cast.isfinite().all() and tensor.isfinite().all():
        raise ConfigurationError(
            f"The weight {name} holds values that {NAMES[dtype]} cannot.",
            where=f"up to {float(tensor.abs().max()):.4g}",
            valid=f"{torch.finfo(dtype).max:g} at most",
            next_step="the same command with --precision bf16",
        )
    data: memoryview = cast.view(torch.uint8).numpy().data
    return data
