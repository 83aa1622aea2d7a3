"""A bundle's causal language model, as permutation decoding calls it.

Prompts in, hidden states out; logits are computed only where they are asked for. Knows
nothing of identifiers or windows.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from dear_batch.errors import ConfigurationError
from dear_batch.listwise.slots import ATTENTION, SlotCache, folded_mask, head_size

if TYPE_CHECKING:
    from dear_batch.bundle import Bundle

Precision = Literal["fp32", "bf16"]
CPU_CACHE_BYTES = 2 << 30
GPU_SHARE = 0.7  # of its memory for weights and cache; the rest for activations and others
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class LanguageModel:
    """A Hugging Face causal LM with a slot cache.

    Legend: R rows, T tokens, S slots, H hidden size, V tokens of the vocabulary asked for.
    """

    def __init__(self, model: Any, device: str = "cpu") -> None:
        self._model = model.eval()
        self._model.set_attn_implementation(ATTENTION)
        self.device = device
        self.config = model.config
        self.end()

    @classmethod
    def from_bundle(cls, bundle: "Bundle", device: str, precision: Precision) -> Self:
        """Load the weights; the files were checked when the bundle was opened."""
        logging.disable_progress_bar()
        model = AutoModelForCausalLM.from_pretrained(
            bundle.folder,
            dtype=DTYPES[precision],
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
        return cls(model.to(device), device)

    @property
    def precision(self) -> Precision:
        """What the weights and the cache are held in."""
        return "bf16" if self._model.dtype == torch.bfloat16 else "fp32"

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end a text."""
        ends = self._model.generation_config.eos_token_id
        ends = self.config.eos_token_id if ends is None else ends
        return frozenset([ends] if isinstance(ends, int) else ends or [])

    @property
    def cache_bytes(self) -> int:
        """What a batch's cache may take: the same on every run, so that batches are, too."""
        if self.device == "cpu":
            return CPU_CACHE_BYTES
        total = int(torch.cuda.get_device_properties(self.device).total_memory)
        weights = sum(int(p.nbytes) for p in self._model.parameters())
        return max(0, int(GPU_SHARE * total) - weights)

    @property
    def token_bytes(self) -> int:
        """Bytes that one token takes in the cache."""
        heads = self.config.num_hidden_layers * self.config.num_key_value_heads
        return int(2 * heads * head_size(self.config) * self._model.dtype.itemsize)

    def begin(self, rows: int, slots: int) -> None:
        """Make an empty cache for a batch."""
        self.end()  # its predecessor is freed before it is allocated
        self.cache = SlotCache(self.config, rows, slots, self._model.dtype, self.device)

    def end(self) -> None:
        """Free the cache."""
        self.cache = SlotCache(self.config, 0, 0, self._model.dtype, self.device)

    def read_prompts(self, first: int, prompts: Sequence[Sequence[int]], shared: int = 0) -> Any:
        """Run prompts into rows from `first` on; hidden states, [R, T, H].

        Their first `shared` tokens are those of row 0, which was read before: only the rest is
        run. Shorter prompts are padded on the right, where causal attention never looks.
        """
        longest = max(map(len, prompts))
        ids = torch.zeros((len(prompts), longest), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.as_tensor(prompt)
        self.cache.fill(slice(first, first + len(prompts)), shared)
        positions = torch.arange(shared, longest, device=self.device).expand(len(prompts), -1)
        return self._forward(ids[:, shared:], positions, None)

    def step(self, ids_RT: Any, positions_RT: Any, seen_RTS: Any) -> Any:
        """Run some tokens of each row, whose keys take the next slots; hidden states, [R, T, H]."""
        rows, tokens = ids_RT.shape
        self.cache.grow(self.cache.used + tokens)
        self.cache.extend(rows)
        mask = folded_mask(seen_RTS, self.config, self._model.dtype)
        hidden_RTH = self._forward(ids_RT, positions_RT.to(self.device), mask)
        self.cache.used += tokens
        return hidden_RTH

    def _forward(self, ids_RT: Any, positions_RT: Any, mask: Any) -> Any:
        return self._model.model(
            input_ids=ids_RT.to(self.device),
            position_ids=positions_RT,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state

    def head(self, tokens: Sequence[int]) -> Any:
        """The output rows of some tokens in fp32, [V, H]: bf16 logits tie."""
        return self._model.lm_head.weight[list(tokens)].float()

    def greedy(self, hidden_NH: Any) -> list[int]:
        """The most likely token of the whole vocabulary at each state."""
        found: list[int] = self._model.lm_head(hidden_NH).argmax(-1).tolist()
        return found


def found_device(device: str) -> str:
    """The device to use; `auto` takes CUDA where there is one.

    Raises:
        ConfigurationError: PyTorch has no such device.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cpu" and int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise ConfigurationError(
            f"PyTorch finds no GPU for --device {device}.",
            valid=f"--device cpu, or one of {torch.cuda.device_count()} GPUs",
        )
    return device
