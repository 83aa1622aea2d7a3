"""Precision by explicit types: what of a Llama is computed in 16 bits, and what stays in fp32.

Matrix products and what they multiply are 16-bit (weights, attention's queries, keys, values and
probabilities); norms, the residual stream, softmax, the rotary tables and the score head are
fp32. Nothing is left to an engine's flags: the traced graph says it, operation by operation.

In fp16 the down-projection is scaled: a few of its inputs and outputs are "massive" (Sun et al.,
arXiv 2402.17762) and may exceed 65,504. A power of two for each layer, from the largest values
seen, divides its inputs and multiplies its outputs, both in fp32, so that it costs no accuracy.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dear_batch.bundle import Precision

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
# Between the largest value seen on the parity pairs and the largest that fp16 holds.
MARGIN = 16
SCALED = "down_proj"
SCALE = f"{SCALED}.scale"


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


class HalfLinear(InOutLinear):
    """The same product in 16 bits; inputs may be fp32, outputs are unless `narrow`."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, *, narrow: bool = False) -> None:
        super().__init__(linear)
        self.weight.data = self.weight.to(dtype)
        self._narrow = narrow

    def forward(self, inputs: Tensor) -> Tensor:
        """`x W + b`; the bias is added in fp32."""
        outputs = inputs.to(self.weight.dtype) @ self.weight
        if self.bias is not None:
            outputs = outputs.float() + self.bias
        return outputs.to(self.weight.dtype) if self._narrow else outputs.float()


class ScaledLinear(HalfLinear):
    """A product whose inputs or outputs may exceed what fp16 holds."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__(linear, dtype)
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """`s (x / s) W + b`, with s a power of two."""
        outputs = ((inputs / self.scale).to(self.weight.dtype) @ self.weight).float() * self.scale
        return outputs if self.bias is None else outputs + self.bias


class HalfEmbedding(nn.Embedding):
    """16-bit embeddings; what is looked up begins the fp32 residual stream."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Rows of the table, fp32."""
        return super().forward(input).float()


def with_types(module: nn.Module, precision: Precision) -> nn.Module:
    """Replace the layers below `module` in place by typed ones, keeping all parameter names."""
    dtype = DTYPES[precision]
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, _typed_linear(name, child, precision))
        elif isinstance(child, nn.Embedding) and precision != "fp32":
            setattr(module, name, HalfEmbedding.from_pretrained(child.weight.to(dtype)))
        else:
            with_types(child, precision)
    return module


def _typed_linear(name: str, linear: nn.Linear, precision: Precision) -> InOutLinear:
    dtype = DTYPES[precision]
    if precision == "fp32" or name == "score":
        return InOutLinear(linear)
    if precision == "fp16" and name == SCALED:
        return ScaledLinear(linear, dtype)
    return HalfLinear(linear, dtype, narrow=name == "v_proj")


def stored_dtype(name: str, precision: Precision) -> torch.dtype:
    """What a parameter of that name is stored as: matrices and embeddings in `precision`."""
    is_half = name.endswith("_proj.weight") or name == "model.embed_tokens.weight"
    return DTYPES[precision] if is_half else torch.float32


def scales(peaks: Sequence[float], precision: Precision) -> dict[str, Tensor]:
    """The scale of each layer's down-projection by parameter name; fp16 alone has any."""
    if precision != "fp16":
        return {}
    most = torch.finfo(torch.float16).max / MARGIN
    return {
        f"model.layers.{number}.mlp.{SCALE}": torch.tensor([_power_of_two(peak / most)])
        for number, peak in enumerate(peaks)
    }


def _power_of_two(ratio: float) -> float:
    """The least power of two from 1 that is not below a ratio."""
    return 2.0 ** max(0, math.ceil(math.log2(ratio))) if ratio > 0 else 1.0


@contextmanager
def recorded_peaks(model: Any) -> Iterator[list[float]]:
    """The largest absolute input or output of each down-projection while the block runs."""
    peaks = [0.0] * len(model.model.layers)

    def note(number: int, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen = (float(tensor.abs().max()) for tensor in (inputs[0], output))
        peaks[number] = max(peaks[number], *seen)

    hooks = [
        layer.mlp.down_proj.register_forward_hook(partial(note, number))
        for number, layer in enumerate(model.model.layers)
    ]
    try:
        yield peaks
    finally:
        for hook in hooks:
            hook.remove()
