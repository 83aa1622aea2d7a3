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
from dear_batch.errors import ConfigurationError, InputError, missing_extra
from dear_batch.export.checkpoint import Checkpoint, check_weights

try:
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open
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


def model_from_checkpoint(model: Checkpoint, adapter: Checkpoint | None, task: Task) -> Any:
    """The merged Hugging Face model in fp32 on the CPU, in evaluation mode.

    Raises:
        InputError: weights that cannot be read or do not fit their config.
        ConfigurationError: weights or a score head that are missing, or lost in merging.
    """
    check_weights(model, "*.safetensors")
    if adapter is not None:
        check_weights(adapter, "adapter_model.safetensors")
    try:
        head = _stored_head(adapter or model) if task == "pointwise" else None
        with quiet():
            merged = _load(model, adapter, task)
            if adapter is not None:
                merged = _merge(merged, adapter)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"The weights of {model.id} cannot be loaded.",
            where=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}",
            valid="whole safetensors files that fit their config.json",
            next_step="fetch the checkpoint again",
        ) from error
    if head is not None and not torch.equal(merged.score.weight, head.to(torch.float32)):
        raise ConfigurationError(
            f"The score head of {(adapter or model).id} did not survive loading.",
            valid="a sequence classification checkpoint whose `score.weight` loads as it is",
        )
    return merged.eval().requires_grad_(False)


@contextmanager
def quiet() -> Iterator[None]:
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


def _load(model: Checkpoint, adapter: Checkpoint | None, task: Task) -> Any:
    common = {
        "dtype": torch.float32,
        "use_safetensors": True,
        "trust_remote_code": False,
        "output_loading_info": True,
    }
    if task == "listwise":
        loaded, info = AutoModelForCausalLM.from_pretrained(str(model.folder), **common)
    else:
        loaded, info = AutoModelForSequenceClassification.from_pretrained(
            str(model.folder), num_labels=1, **common
        )
    # transformers starts what a checkpoint lacks at random; only an adapter's head may be.
    missing = set(info["missing_keys"]) - ({HEAD} if adapter is not None else set())
    if missing:
        raise _incomplete(model, missing, "every weight of its architecture")
    return loaded


def _merge(model: Any, adapter: Checkpoint) -> Any:
    """Add the adapter's deltas; every tensor that it holds must find its place, and the reverse."""
    peft = PeftModel.from_pretrained(model, str(adapter.folder), torch_device="cpu")
    expected = set(get_peft_model_state_dict(peft, save_embedding_layers=False))
    difference = expected ^ set(adapter.tensors())
    if difference:
        raise _incomplete(adapter, difference, "exactly the tensors that its config calls for")
    return peft.merge_and_unload(safe_merge=True)


def _incomplete(checkpoint: Checkpoint, names: set[str], valid: str) -> ConfigurationError:
    listed = ", ".join(sorted(names)[:3])
    return ConfigurationError(
        f"The weights of {checkpoint.id} are not complete: {len(names)} tensors do not match.",
        where=listed,
        valid=valid,
        next_step="fetch the checkpoint again, or see whether --task fits it",
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
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(source.folder), trust_remote_code=False)
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
