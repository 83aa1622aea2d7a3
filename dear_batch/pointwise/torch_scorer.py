"""Plain PyTorch scoring, one padded pair a row: the reference, and the fall-back engine.

Written for clarity: it calls Hugging Face's own model and pools at the position that the
attention mask gives. Knows nothing of packing.
"""

from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from dear_batch.errors import ConfigurationError, missing_extra
from dear_batch.pointwise.recipe import Recipe
from dear_batch.pointwise.rows import Batch, Layout, padded_arrays

try:
    import torch
    from safetensors.torch import load_file
    from torch import nn
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from dear_batch.torch_memory import memory_errors
except ModuleNotFoundError as error:
    raise missing_extra(error.name or "torch", "export", "Scoring with PyTorch") from error

if TYPE_CHECKING:
    from dear_batch.bundle import Bundle

BATCH_TOKENS = 2048


class TorchScorer:
    """A Hugging Face sequence classification model (one label) behind the `Scorer` Protocol."""

    engine = "torch"

    def __init__(self, model: Any, recipe: Recipe, device: str = "cpu") -> None:
        self._model = model.to(device).eval()
        self._recipe = recipe
        self.device = device
        fixed = recipe.max_length if recipe.pooling == "final-position" else None
        self.layout = Layout(False, recipe.max_length, BATCH_TOKENS, fixed)

    @classmethod
    def from_bundle(cls, bundle: "Bundle", device: str) -> Self:
        """Load the bundle's weights; `auto` takes CUDA where there is one.

        Raises:
            ConfigurationError: there is no such GPU.
            TrustError: the bundle was changed while it was being loaded.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        elif device != "cpu" and int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
            raise ConfigurationError(
                f"PyTorch finds no GPU for --device {device}.",
                valid=f"--device cpu, or one of {torch.cuda.device_count()} GPUs",
            )
        with memory_errors():
            model = model_from_bundle(bundle)
            bundle.check_unchanged()
            return cls(model, bundle.recipe, device)

    def score(self, batch: Batch) -> NDArray[np.float32]:
        """Raw logits, scores_N."""
        with memory_errors(), torch.inference_mode():
            return self._score(batch)

    def _score(self, batch: Batch) -> NDArray[np.float32]:
        input_ids_RT, attention_mask_RT = (
            torch.from_numpy(array).to(self.device)
            for array in padded_arrays(batch, self._recipe.pad_id)
        )
        hidden_RTH = self._model.model(
            input_ids=input_ids_RT, attention_mask=attention_mask_RT, use_cache=False
        ).last_hidden_state
        if self._recipe.pooling == "final-position":
            pooled_RH = hidden_RTH[:, -1]
        else:
            last_R = attention_mask_RT.sum(-1) - 1
            pooled_RH = hidden_RTH[torch.arange(len(last_R)), last_R]
        # The head runs in fp32: bf16 logits of a long list tie massively.
        logits_R1 = pooled_RH.float() @ self._model.score.weight.float().T
        scores_N: NDArray[np.float32] = logits_R1[:, 0].cpu().numpy()
        return scores_N


def model_from_bundle(bundle: "Bundle") -> Any:
    """The bundle's weights, stored once in the graphs' layout, as a Hugging Face model."""
    config = AutoConfig.from_pretrained(
        bundle.file("config.json").parent, trust_remote_code=False, local_files_only=True
    )
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    stored = load_file(bundle.file("onnx/weights.safetensors"))
    state = {name: tensor.T if name in linear else tensor for name, tensor in stored.items()}
    model.load_state_dict(state, assign=True)
    # Rotary frequencies are computed, not stored; on the meta device they were not.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return model
