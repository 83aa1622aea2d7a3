"""What an export needs before it starts: memory and disk, from the config alone."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from optimum.utils import NormalizedConfigManager
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from dear_batch.bundle import Task
from dear_batch.errors import InputError

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Graphs, tokenizer and manifest beside the weights; the working set of a parity batch.
EXTRA_DISK = 64 << 20
EXTRA_MEMORY = 1 << 30


@dataclass(frozen=True, slots=True)
class Needs:
    """Estimated needs in bytes, and what the machine has."""

    parameters: int
    memory_bytes: int
    disk_bytes: int
    memory_available_bytes: int | None
    disk_free_bytes: int

    def to_json(self) -> dict[str, int | None]:
        """JSON-able fields."""
        return asdict(self)


def needs_from_config(config: dict[str, Any], task: Task, output: Path) -> Needs:
    """Needs of an export of this config.

    The merge holds every parameter in fp32 (4 bytes); a pointwise bundle stores them once in
    fp32, a listwise one in the checkpoint's own dtype. The gate's engine takes as much memory
    as the model, which is gone by then.

    Raises:
        InputError: the config is not one of its model type.
    """
    auto = AutoModelForSequenceClassification if task == "pointwise" else AutoModelForCausalLM
    try:
        settings = AutoConfig.for_model(**{**config, "num_labels": 1})
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise InputError(
            f"config.json describes no {config['model_type']} model: {str(error).splitlines()[0]}.",
            next_step="fetch the checkpoint again",
        ) from error
    with torch.device("meta"):
        parameters = sum(p.numel() for p in auto.from_config(settings).parameters())
    stored = 4 if task == "pointwise" else BYTES[checkpoint_dtype(config)]
    return Needs(
        parameters=parameters,
        memory_bytes=4 * parameters + EXTRA_MEMORY,
        disk_bytes=stored * parameters + EXTRA_DISK,
        memory_available_bytes=_available_memory(),
        disk_free_bytes=shutil.disk_usage(_existing(output)).free,
    )


def checkpoint_dtype(config: dict[str, Any]) -> str:
    """The dtype that a config says its weights are stored in (`torch_dtype` before 5.0)."""
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return dtype if dtype in BYTES else "float32"


def architecture(config: Any) -> dict[str, int | str]:
    """Normalised dimensions of a Hugging Face config, by Optimum's own table."""
    normalized = NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)
    names = (
        "hidden_size",
        "num_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    dimensions: dict[str, int | str] = {name: getattr(normalized, name) for name in names}
    return {"model_type": config.model_type, **dimensions}


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def _available_memory() -> int | None:
    """Linux's own estimate of what can be had without swapping; None elsewhere."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    lines = meminfo.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
