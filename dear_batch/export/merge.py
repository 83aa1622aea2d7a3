"""Loads a checkpoint in fp32 and merges its adapter, once, in fp32.

Merging in half precision loses an adapter's small deltas. The score head is checked against
the file it came from: PEFT and transformers both start a missing head at random, silently.
Knows nothing of ONNX or bundles.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dear_batch.bundle import Task
from dear_batch.errors import ConfigurationError, missing_extra
from dear_batch.export.checkpoint import Checkpoint, check_weights

try:
    import torch
    from peft import PeftModel
    from safetensors import safe_open
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        PreTrainedTokenizerFast,
    )
    from transformers.utils import logging
except ModuleNotFoundError as error:
    raise missing_extra(error.name or "torch", "export", "Export") from error

HEAD = "score.weight"


def model_from_checkpoint(
    model: Checkpoint, adapter: Checkpoint | None, task: Task, *, dtype: Any = torch.float32
) -> Any:
    """The merged Hugging Face model on the CPU, in evaluation mode.

    Raises:
        ConfigurationError: a score head that is missing, not of one label, or lost in merging.
        TrustError: pickled weights.
    """
    check_weights(model)
    if adapter is not None:
        check_weights(adapter)
    head = _stored_head(adapter or model) if task == "pointwise" else None
    with _quiet():
        merged = _load(model, task, dtype)
        if adapter is not None:
            peft = PeftModel.from_pretrained(merged, str(adapter.folder), torch_device="cpu")
            merged = peft.merge_and_unload(safe_merge=True)
    if head is not None and not torch.equal(merged.score.weight, head.to(dtype)):
        raise ConfigurationError(
            f"The score head of {(adapter or model).id} did not survive loading.",
            valid="a sequence classification checkpoint whose `score.weight` loads as it is",
        )
    return merged.eval().requires_grad_(False)


@contextmanager
def _quiet() -> Iterator[None]:
    """No report of a missing head (it is checked here) and no notices of other libraries."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.enable_progress_bar()
        logging.set_verbosity(verbosity)


def _load(model: Checkpoint, task: Task, dtype: Any) -> Any:
    common = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False}
    if task == "listwise":
        return AutoModelForCausalLM.from_pretrained(str(model.folder), **common)
    return AutoModelForSequenceClassification.from_pretrained(
        str(model.folder), num_labels=1, **common
    )


def _stored_head(checkpoint: Checkpoint) -> torch.Tensor:
    """The score head as the checkpoint stores it, shape [1, hidden].

    PEFT keeps it in `modules_to_save`, under `base_model.model.score.weight`.
    """
    for path in sorted(checkpoint.folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors handle is no dict
                if name == HEAD or name.endswith(f".{HEAD}"):
                    return _one_label(checkpoint, file.get_tensor(name))
    raise ConfigurationError(
        f"{checkpoint.id} has no score head (`{HEAD}`); its scores would be random.",
        where=str(checkpoint.folder),
        valid="a sequence classification model, or an adapter trained with the head in "
        "modules_to_save",
        next_step="for a listwise (causal LM) checkpoint: --task listwise",
    )


def _one_label(checkpoint: Checkpoint, head: torch.Tensor) -> torch.Tensor:
    if head.shape[0] != 1:
        raise ConfigurationError(
            f"The score head of {checkpoint.id} has {head.shape[0]} labels.", valid="one label"
        )
    return head


def tokenizer_from_checkpoint(model: Checkpoint, adapter: Checkpoint | None) -> Any:
    """The adapter's tokenizer where it ships one, else the model's; always a fast one.

    Raises:
        ConfigurationError: there is none that `tokenizers` can run.
    """
    has_own = adapter is not None and (adapter.folder / "tokenizer.json").is_file()
    source = adapter if adapter is not None and has_own else model
    with _quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(source.folder))
        except (OSError, ValueError) as error:
            raise _no_tokenizer(source) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise _no_tokenizer(source)
    if tokenizer.pad_token_id is None:  # the authors' README: pad = eos
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _no_tokenizer(source: Checkpoint) -> ConfigurationError:
    return ConfigurationError(
        f"{source.id} has no tokenizer that can be loaded.",
        where=str(source.folder),
        valid="tokenizer.json (and tokenizer_config.json) beside the weights",
    )
