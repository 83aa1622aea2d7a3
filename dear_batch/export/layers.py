"""A Llama's layers as the graphs compute them, with Hugging Face's modules for the parameters.

Written out so that engines find what they have kernels for: for ONNX Runtime in fp32 the
`Attention` and `RotaryEmbedding` of opset 23, else the attention that TensorRT fuses in 16 bits,
everywhere a norm that ONNX Runtime fuses. What all layers share (mask, rotary tables) is
computed once. Of the last layer only pooled positions are computed, of others keys and values.
The parity gate holds each graph against Hugging Face's own forward.

Shapes: R rows, T tokens of a row, P pooled positions of a row, X hidden size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.onnx import ops

# A hidden token's attention score. Not -inf and not the dtype's minimum: either turns into
# NaN when a whole row is hidden or a negative score is added. exp(-1e9) is exactly 0.
HIDDEN = -1e9


@dataclass(frozen=True, slots=True)
class Shared:
    """What every layer uses, for some of the queries or for all of them.

    Attributes:
        mask: [R, 1, queries, T]; whether a token is seen, for operators what is added to a score.
        cos, sin: rotary tables of the queries, [R, queries, D / 2].
    """

    mask: Tensor
    cos: Tensor
    sin: Tensor

    def at(self, index: "Index") -> "Shared":
        """The same for picked queries."""
        return Shared(index(self.mask[:, 0])[:, None], index(self.cos), index(self.sin))


Parts = tuple[Tensor, Tensor, Tensor]  # query, key, value: [R, …, heads * D]
Attention = Callable[[Any, Parts, Shared, Shared], Tensor]


class Index:
    """Picks P positions of each row; flat, since batched gathers are slow on CPUs."""

    def __init__(self, pooled_RP: Tensor, tokens: int) -> None:
        rows, self._pooled = pooled_RP.shape
        starts_R1 = torch.arange(rows)[:, None] * tokens
        self._flat = (starts_R1 + pooled_RP).flatten()
        self._rows = rows

    def __call__(self, values: Tensor) -> Tensor:
        """[R, T, …] → [R, P, …]."""
        picked = values.flatten(0, 1).index_select(0, self._flat)
        return picked.unflatten(0, (self._rows, self._pooled))


def pooled_hidden(
    model: Any,
    tokens_RT: Tensor,
    positions_RT: Tensor,
    visible_RTT: Tensor,
    pooled_RP: Tensor,
    *,
    dtype: torch.dtype | None,
) -> tuple[Tensor, list[Tensor]]:
    """Normed last hidden states at pooled positions, [R, P, X], and every other layer's output.

    Attention is computed in products of `dtype`, or by ONNX's own operators where that is None.
    """
    hidden_RTX = model.embed_tokens(tokens_RT)
    cos, sin = model.rotary_emb(hidden_RTX, positions_RT)
    half = cos.shape[-1] // 2
    mask_R1TT = visible_RTT[:, None]
    attention: Attention = _operators
    if dtype is not None:
        attention = partial(_products, dtype=dtype)
    else:
        mask_R1TT = torch.where(mask_R1TT, 0.0, HIDDEN)
    shared = Shared(mask_R1TT, cos[..., :half], sin[..., :half])
    outputs: list[Tensor] = []
    for layer in model.layers[:-1]:
        hidden_RTX = _layer(layer, hidden_RTX, shared, attention)
        outputs.append(hidden_RTX)
    index = Index(pooled_RP, tokens_RT.shape[1])
    hidden_RPX = _layer(model.layers[-1], hidden_RTX, shared, attention, index)
    return _normed(model.norm, hidden_RPX), outputs


def _layer(
    layer: Any,
    hidden: Tensor,
    shared: Shared,
    attention: Attention,
    index: Index | None = None,
) -> Tensor:
    """A decoder layer (modeling_llama.py of transformers), for the queries of `index`."""
    module = layer.self_attn
    normed = _normed(layer.input_layernorm, hidden)
    key, value = module.k_proj(normed), module.v_proj(normed)
    of_queries = shared
    if index is not None:
        hidden, normed, of_queries = index(hidden), index(normed), shared.at(index)
    mixed = attention(module, (module.q_proj(normed), key, value), of_queries, shared)
    hidden = hidden + module.o_proj(mixed)
    result: Tensor = hidden + layer.mlp(_normed(layer.post_attention_layernorm, hidden))
    return result


def _operators(module: Any, parts: Parts, of_queries: Shared, of_keys: Shared) -> Tensor:
    """Attention as ONNX's own operators; [R, queries, heads * D] comes back."""
    query, key, value = parts
    heads = query.shape[-1] // module.head_dim
    of_values = heads // module.num_key_value_groups
    mixed, *_ = ops.attention(
        ops.rotary_embedding(query, of_queries.cos, of_queries.sin, num_heads=heads),
        ops.rotary_embedding(key, of_keys.cos, of_keys.sin, num_heads=of_values),
        value,
        of_queries.mask,
        scale=module.scaling,
        q_num_heads=heads,
        kv_num_heads=of_values,
    )
    return mixed


def _products(
    module: Any, parts: Parts, of_queries: Shared, of_keys: Shared, *, dtype: torch.dtype
) -> Tensor:
    """Attention in products of a dtype around an fp32 softmax; [R, queries, heads * D].

    Query and key are scaled before they are multiplied, each by the root, so that no score
    overflows. This is the form that TensorRT fuses into one kernel; written with a broadcast
    dimension for the query heads of a group it does not, and [T, T] scores go to memory.
    """
    query, key, value = (
        part.unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for part in parts
    )
    root, groups = math.sqrt(module.scaling), module.num_key_value_groups
    query = (_rotated(query, of_queries) * root).to(dtype)
    key = _repeated((_rotated(key, of_keys) * root).to(dtype), groups)
    value = _repeated(value.to(dtype), groups)
    scores = (query @ key.transpose(-1, -2)).float()
    weights = torch.softmax(torch.where(of_queries.mask, scores, HIDDEN), -1).to(dtype)
    return (weights @ value).transpose(1, 2).flatten(2)


def _normed(norm: Any, hidden: Tensor) -> Tensor:
    """RMSNorm (Zhang and Sennrich, arXiv 1910.07467), in the form that ONNX Runtime fuses."""
    mean = hidden.pow(2).mean(-1, keepdim=True)
    result: Tensor = hidden / torch.sqrt(mean + norm.variance_epsilon) * norm.weight
    return result


def _rotated(heads: Tensor, tables: Shared) -> Tensor:
    """Rotary position embedding (Su et al., arXiv 2104.09864), halves side by side."""
    first, second = heads.chunk(2, -1)
    cos, sin = tables.cos[:, None], tables.sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _repeated(tensor: Tensor, groups: int) -> Tensor:
    """Key-value heads, once for each query head of their group."""
    rows, heads, tokens, size = tensor.shape
    wide = tensor[:, :, None].expand(rows, heads, groups, tokens, size)
    return wide.reshape(rows, heads * groups, tokens, size)
