"""What decided the design of the listwise cache, measured on one model.

- A decoding step over a static block, over pages of 16 and 256 slots gathered for each layer
  (what paged attention is without a kernel of its own), and over a cache that grows by
  concatenation.
- Rows in a batch.
- Tokens in a step.
- Prompts read whole, or behind a shared start that another row has read.

    python benchmarks/listwise_cache.py MODEL
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from dear_batch.listwise.model import LanguageModel
from dear_batch.listwise.slots import SlotCache

SLOTS, STEP, PREFIX, REPEATS = 1600, 5, 40, 7


class PagedCache(SlotCache):
    """Keys and values read through a page table: each layer gathers its pages."""

    page = 16

    def update(self, keys: Any, values: Any, layer: int, *_: Any) -> tuple[Any, Any]:
        """As the static cache, then through the table."""
        found = super().update(keys, values, layer)
        pages = -(-found[0].shape[2] // self.page)
        table = torch.arange(pages * self.page).clamp(max=found[0].shape[2] - 1)
        length = found[0].shape[2]
        return tuple(x.index_select(2, table)[:, :, :length] for x in found)


class GrowingCache(SlotCache):
    """A layer's keys and values are concatenated with the new ones, as DynamicCache does."""

    def update(self, keys: Any, values: Any, layer: int, *_: Any) -> tuple[Any, Any]:
        """As the static cache, but through a copy of the whole."""
        k, v = super().update(keys, values, layer)
        new = keys.shape[2]
        return torch.cat([k[:, :, :-new], keys], 2), torch.cat([v[:, :, :-new], values], 2)


def median_ms(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def step_ms(model: LanguageModel, rows: int, kind: type[SlotCache], tokens: int = STEP) -> float:
    """Milliseconds a row of a step."""
    model.begin(rows, SLOTS + tokens)
    model.cache.__class__ = kind
    ids = torch.randint(5, 4000, (rows, tokens))
    positions = SLOTS + torch.arange(tokens).expand(rows, -1)
    seen = torch.ones(rows, tokens, SLOTS + tokens, dtype=torch.bool)

    def step() -> None:
        model.cache.used = SLOTS
        model.step(ids, positions, seen)

    return round(median_ms(step) / rows, 2)


def prompt_ms(model: LanguageModel, tokens: int, shared: int) -> float:
    """Of a prompt of so many tokens, behind `shared` of them that another row has read."""
    ids = torch.randint(5, 4000, (1, tokens)).tolist()
    model.begin(2, tokens)
    model.read_prompts(0, ids)
    return round(median_ms(lambda: model.read_prompts(1, ids, shared)), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    model = AutoModelForCausalLM.from_pretrained(parser.parse_args().model, dtype=torch.float32)
    language_model = LanguageModel(model)
    pages = {f"pages of {n}": type("Paged", (PagedCache,), {"page": n}) for n in (16, 256)}
    kinds = {"static": SlotCache, **pages, "concatenated": GrowingCache}
    with torch.inference_mode():
        result = {
            "slots": SLOTS,
            "tokens_a_step": STEP,
            "step_ms_a_row_of_8": {k: step_ms(language_model, 8, v) for k, v in kinds.items()},
            "step_ms_a_row_by_rows": {
                rows: step_ms(language_model, rows, SlotCache) for rows in (1, 4, 8, 16, 32)
            },
            "step_ms_a_row_of_8_by_tokens": {
                tokens: step_ms(language_model, 8, SlotCache, tokens) for tokens in (1, 4, 5, 6, 8)
            },
            "prompt_ms": {
                tokens: {
                    "whole": prompt_ms(language_model, tokens, 0),
                    f"behind {PREFIX} shared": prompt_ms(language_model, tokens, PREFIX),
                }
                for tokens in (400, 800, 1600)
            },
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
