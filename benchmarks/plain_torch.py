"""What a careful user writes in plain PyTorch: Hugging Face's own forward, batches of like length.

In bf16 on a GPU, in fp32 on a CPU, as many pairs a batch as is fastest of a few. Used by
`engines.py`, beside our engines.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dear_batch.bundle import open_bundle
from dear_batch.pointwise.recipe import EncodedPair
from dear_batch.pointwise.torch_scorer import NAMES, model_from_bundle

BATCHES = (16, 64, 256)


def sorted_scores(
    model: Any, pairs: Sequence[EncodedPair], batch: int, pad_id: int
) -> tuple[list[float], int]:
    """Logits in the order of the pairs, and the tokens of all batches with their padding."""
    order = sorted(range(len(pairs)), key=lambda n: -len(pairs[n]))
    scores, computed = torch.zeros(len(pairs)), 0
    with torch.inference_mode():
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            rows = [torch.from_numpy(pairs[n].input_ids()).long() for n in chosen]
            masks = [torch.ones_like(row) for row in rows]
            ids_RT = torch.nn.utils.rnn.pad_sequence(rows, True, pad_id)
            mask_RT = torch.nn.utils.rnn.pad_sequence(masks, True, 0)
            inputs = (tensor.to(model.device) for tensor in (ids_RT, mask_RT))
            logits_R1 = model(*inputs, use_cache=False).logits
            scores[chosen] = logits_R1[:, 0].float().cpu()
            computed += ids_RT.numel()
    return scores.tolist(), computed


def measure_plain(
    folder: Path, device: str, pairs: Sequence[EncodedPair], compared: int
) -> dict[str, Any]:
    """The fastest batch size's figures, the second time over, and the first few scores."""
    start = time.perf_counter()
    bundle = open_bundle(folder)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = model_from_bundle(bundle, device, dtype).eval()
    model.score.to(dtype)  # as a checkpoint is loaded
    pad_id = model.config.pad_token_id = bundle.recipe.pad_id
    load_seconds = time.perf_counter() - start
    best: dict[str, Any] = {}
    for batch in BATCHES:
        try:
            sorted_scores(model, pairs[: 2 * batch], batch, pad_id)  # kernels are chosen
            start = time.perf_counter()
            scores, computed = sorted_scores(model, pairs, batch, pad_id)
        except torch.OutOfMemoryError:
            break
        seconds = time.perf_counter() - start
        if not best or seconds < best["seconds"]:
            best = {"batch": batch, "seconds": seconds, "computed": computed, "scores": scores}
    if not best:
        return {"reason": f"not enough memory for {BATCHES[0]} pairs"}
    seconds, scores = best["seconds"], best["scores"]
    assert np.isfinite(scores).all()
    return {
        "engine": "transformers",
        "device": device,
        "computes_in": NAMES[dtype],
        "batch": best["batch"],
        "load_seconds": round(load_seconds, 1),
        "seconds": round(seconds, 3),
        "pairs": len(pairs),
        "real_tokens_per_s": round(sum(map(len, pairs)) / seconds, 1),
        "computed_tokens_per_s": round(best["computed"] / seconds, 1),
        "scores": scores[:compared],
    }
