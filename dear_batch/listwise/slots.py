"""The key-value cache of a batch that decodes together, and the attention that reads it.

One static block a layer, [rows, key-value heads, slots, head size]. A step writes its tokens
into the same new slots of every row; what a row does not keep (padding, a guess that was
wrong) stays there as a hole that the mask covers, so nothing is ever rolled back or moved.
Knows nothing of prompts or answers.
"""

from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

ATTENTION = "dear_batch_slots"


class SlotCache:
    """Keys and values of `rows` sequences in `slots` places, as transformers' models fill it.

    Legend: R rows, H key-value heads, S slots, T tokens of a step, D head size.
    """

    def __init__(self, config: Any, rows: int, slots: int, dtype: Any, device: str) -> None:
        heads, size = config.num_key_value_heads, head_size(config)
        shape = (config.num_hidden_layers, 2, rows, heads, slots, size)
        # Zeros: a masked value counts for nothing only while it is a number.
        self._blocks = torch.zeros(shape, dtype=dtype, device=device)
        self._into = slice(0, 0)
        self._shared = 0
        self._prompts = False
        self.used = 0

    def fill(self, rows: slice, shared: int) -> None:
        """The next forward brings prompts of these rows, behind `shared` tokens of row 0."""
        self._into, self._shared, self._prompts = rows, shared, True
        for target in range(rows.start, rows.stop) if shared else ():
            self._blocks[:, :, target, :, :shared] = self._blocks[:, :, 0, :, :shared]

    def extend(self, rows: int) -> None:
        """The next forward brings a step of the first `rows` rows, behind the slots in use."""
        self._into, self._prompts = slice(0, rows), False

    def update(self, keys_RHTD: Any, values_RHTD: Any, layer: int, *_: Any) -> tuple[Any, Any]:
        """Keep a layer's keys and values; returns those to attend to."""
        start = self._shared if self._prompts else self.used
        end = start + keys_RHTD.shape[2]
        keys_RHSD, values_RHSD = self._blocks[layer, :, self._into]
        keys_RHSD[:, :, start:end] = keys_RHTD
        values_RHSD[:, :, start:end] = values_RHTD
        return keys_RHSD[:, :, :end], values_RHSD[:, :, :end]

    def swap(self, one: int, other: int) -> None:
        """Let two rows change places."""
        both = self._blocks[:, :, [other, one], :, : self.used]
        self._blocks[:, :, [one, other], :, : self.used] = both

    def grow(self, slots: int) -> None:
        """Make room for `slots` slots in all."""
        *outer, present, size = self._blocks.shape
        if slots > present:
            blocks = self._blocks.new_zeros(*outer, max(slots, present + present // 4), size)
            blocks[..., : self.used, :] = self._blocks[..., : self.used, :]
            self._blocks = blocks

    def get_seq_length(self, *_: Any) -> int:
        """Part of transformers' cache protocol; positions and masks are given explicitly."""
        return self._shared if self._prompts else self.used


def head_size(config: Any) -> int:
    """Numbers in a head's key or value; older configs leave it to be derived."""
    stated: int | None = getattr(config, "head_dim", None)
    return stated or int(config.hidden_size // config.num_attention_heads)


def slot_attention(
    _module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Any, None]:
    """Attention as transformers calls it; a mask from `folded_mask` means a decoding step.

    Query heads that share a key-value head are laid side by side as more queries of it: the
    cache is read once, where repeating it for every head would copy it at each layer.
    """
    if attention_mask is None:
        # Behind shared tokens: blank queries in their place keep the causal kernel, which
        # skips what a mask would have it compute.
        shared = key.shape[2] - query.shape[2]
        output = scaled_dot_product_attention(
            pad(query, (0, 0, shared, 0)),
            key,
            value,
            is_causal=True,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )[:, :, shared:]
    else:
        folded = query.reshape(*key.shape[:2], -1, query.shape[-1])
        output = scaled_dot_product_attention(
            folded, key, value, attn_mask=attention_mask, scale=scaling
        ).reshape(query.shape)
    return output.transpose(1, 2), None


def folded_mask(seen_RTS: Any, config: Any, dtype: Any) -> Any:
    """What to add to the attention of a step, made once for all layers, [R, 1, G·T, S].

    G query heads share a key-value head; `seen_RTS` is true where a token may look.
    """
    groups = config.num_attention_heads // config.num_key_value_heads
    mask_RTS = torch.zeros(seen_RTS.shape, dtype=dtype, device=seen_RTS.device)
    mask_RTS.masked_fill_(~seen_RTS, float("-inf"))
    return mask_RTS.repeat(1, groups, 1)[:, None]


AttentionInterface.register(ATTENTION, slot_attention)
