"""Plain PyTorch scoring, one padded pair a row: the reference, and the fall-back engine.

Written for clarity: it calls Hugging Face's own model and pools at the position that the
attention mask gives. Computes in fp32 on a CPU, in bf16 on CUDA. Knows nothing of packing.

CUDA is not executed here: needs a GPU.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from dear_batch.errors import ConfigurationError, missing_extra
from dear_batch.pointwise.recipe import Recipe
from dear_batch.pointwise.rows import Batch, Layout, padded_arrays
from dear_batch.pointwise.scorer import Finish

try:
    import torch
    from safetensors import safe_open
    from torch import nn
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from dear_batch.torch_memory import memory_errors
except ModuleNotFoundError as error:
    raise missing_extra(error.name or "torch", "export", "Scoring with PyTorch") from error

if TYPE_CHECKING:
    from dear_batch.bundle import Bundle, Precision

NAMES: "dict[Any, Precision]" = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
SCALE = ".scale"  # tensors that belong to fp16 graphs alone


class TorchScorer:
    """A Hugging Face sequence classification model (one label) behind the `Scorer` Protocol.

    The model is taken as it is: its layers compute in the dtype of their weights.
    """

    engine = "torch"

    def __init__(self, model: Any, recipe: Recipe, device: str = "cpu") -> None:
        self._model = model.to(device).eval()
        self._recipe = recipe
        self.device = device
        kind = device.partition(":")[0]
        # CUDA runs behind the calls: the next batch is laid out and copied meanwhile.
        self.in_flight = 1 if kind == "cpu" else 2
        self.precision: Precision = NAMES[model.model.embed_tokens.weight.dtype]
        fixed = recipe.max_length if recipe.pooling == "final-position" else None
        self.layout = Layout(False, recipe.max_length, BATCH_TOKENS[kind], fixed)

    @classmethod
    def from_bundle(cls, bundle: "Bundle", device: str) -> Self:
        """Load the bundle's weights on `cpu` or `cuda:N`.

        Raises:
            ConfigurationError: there is no such GPU.
            TrustError: the bundle was changed while it was being loaded.
            MemoryError: there is not enough for the weights.
        """
        number = None if device == "cpu" else int(device.partition(":")[2] or 0)
        if number is not None and number >= torch.cuda.device_count():
            raise ConfigurationError(
                f"PyTorch finds no GPU for --device {device}.",
                valid=f"--device cpu, or one of {torch.cuda.device_count()} GPUs",
                next_step="dear-batch doctor",
            )
        with memory_errors():
            if number is not None:
                # Pinned memory is of the current GPU: the first would get a context for nothing.
                torch.cuda.set_device(number)
            dtype = torch.float32 if device == "cpu" else torch.bfloat16
            model = model_from_bundle(bundle, device, dtype)
            bundle.check_unchanged()
            return cls(model, bundle.recipe, device)

    def start(self, batch: Batch) -> Finish:
        """See `Scorer`."""
        with memory_errors(), torch.inference_mode():
            scores_N = self._start(batch)

        def finish() -> NDArray[np.float32]:
            with memory_errors():
                found_N: NDArray[np.float32] = scores_N.cpu().numpy()
            return found_N

        return finish

    def _start(self, batch: Batch) -> Any:
        """Scores that the device may still be computing."""
        input_ids_RT, attention_mask_RT = (
            self._on_device(array) for array in padded_arrays(batch, self._recipe.pad_id)
        )
        hidden_RTH = self._model.model(
            input_ids=input_ids_RT, attention_mask=attention_mask_RT, use_cache=False
        ).last_hidden_state
        if self._recipe.pooling == "final-position":
            pooled_RH = hidden_RTH[:, -1]
        else:
            last_R = attention_mask_RT.sum(-1) - 1
            pooled_RH = hidden_RTH[torch.arange(len(last_R), device=last_R.device), last_R]
        # The head runs in fp32: bf16 logits of a long list tie massively.
        return (pooled_RH.float() @ self._model.score.weight.float().T)[:, 0]

    def _on_device(self, array: NDArray[np.int64]) -> Any:
        tensor = torch.from_numpy(array)
        # From memory that may be paged out, a copy would wait for all that runs before it.
        return (
            tensor
            if self.device == "cpu"
            else tensor.pin_memory().to(self.device, non_blocking=True)
        )


def model_from_bundle(bundle: "Bundle", device: str = "cpu", dtype: Any = None) -> Any:
    """The bundle's weights, stored once in the graphs' layout, as a Hugging Face model.

    They come to the device one by one, in `dtype` (fp32), the head in fp32.
    """
    config = AutoConfig.from_pretrained(
        bundle.file("config.json").parent, trust_remote_code=False, local_files_only=True
    )
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    state = {
        name: (tensor.T if name in linear else tensor).to(
            device, torch.float32 if name == "score.weight" else dtype or torch.float32
        )
        for name, tensor in _stored(bundle)
    }
    model.load_state_dict(state, assign=True)
    # Rotary frequencies are computed, not stored, and stay fp32; on the meta device they were not.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return model


def _stored(bundle: "Bundle") -> Iterator[tuple[str, Any]]:
    with safe_open(bundle.file("onnx/weights.safetensors"), "pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            if not name.endswith(SCALE):
                yield name, file.get_tensor(name)
