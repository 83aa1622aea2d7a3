"""Finds a checkpoint (local folder or hub id), and refuses what must not be loaded.

Knows nothing of models: it reads configs and file names only.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dear_batch.bundle import Task
from dear_batch.errors import ConfigurationError, InputError, TrustError, missing_extra

try:
    from huggingface_hub import HfApi, snapshot_download
    from safetensors import SafetensorError, safe_open
except ModuleNotFoundError as error:
    raise missing_extra(error.name or "safetensors", "export", "Export") from error

MODEL_TYPES: dict[Task, tuple[str, ...]] = {
    "pointwise": ("llama",),
    "listwise": ("llama", "mistral"),  # RankZephyr is a Mistral
}
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
# Everything a Llama checkpoint needs; weights as safetensors only.
PATTERNS = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder of model or adapter files. `revision` is a 40-hex commit, None if local."""

    id: str
    folder: Path
    revision: str | None

    def config(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the checkpoint, or None where it is absent.

        Raises:
            InputError: it is not a JSON object.
        """
        path = self.folder / name
        if not path.is_file():
            return None
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path} is not valid JSON: {error}.") from error
        if not isinstance(fields, dict):
            raise InputError(f"{path} is not a JSON object.")
        return fields

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every stored tensor, read from the files' headers.

        Raises:
            InputError: a file is cut or broken.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, "np") as file:
                    for name in file.keys():  # noqa: SIM118 - a safetensors handle is no dict
                        shapes[name] = tuple(file.get_slice(name).get_shape())
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"The weights of {self.id} cannot be read.",
                    where=f"{path}: {error}",
                    valid="whole safetensors files",
                    next_step="fetch the checkpoint again",
                ) from error
        return shapes


def resolve(name: str, revision: str, *, weights: bool = True) -> Checkpoint:
    """The checkpoint of a local folder, or of a hub id at a pinned commit.

    A branch or tag is resolved to its commit first, so that all files are of one commit.
    `weights=False` fetches configs and tokenizer only.

    Raises:
        ConfigurationError: no such folder, and the hub does not have (or reach) the id.
    """
    folder = Path(name)
    if folder.is_dir():
        return Checkpoint(name, folder, None)
    try:
        commit = HfApi().model_info(name, revision=revision).sha
        patterns = PATTERNS if weights else [p for p in PATTERNS if p != "*.safetensors"]
        path = snapshot_download(name, revision=commit, allow_patterns=patterns)
    except Exception as error:  # whatever HTTP client the hub's library uses
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigurationError(
            f"The checkpoint {name!r} is neither a local folder nor a hub id within reach.",
            where=f"revision {revision}: {type(error).__name__}: {reason}",
            valid="a folder with config.json and safetensors, or a hub id such as "
            "abdoelsayed/dear-3b-reranker-ce-v1",
            next_step="check the spelling and the network; gated models need `hf auth login`",
        ) from error
    return Checkpoint(name, Path(path), commit)


def check_model(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config of a full model whose files may be loaded.

    Raises:
        ConfigurationError: an adapter, or a quantised model.
        TrustError: pickled weights, or a config that asks for remote code.
    """
    config = checkpoint.config("config.json")
    if config is None:
        adapter = checkpoint.config("adapter_config.json") is not None
        raise ConfigurationError(
            f"{checkpoint.id} is {'a LoRA adapter' if adapter else 'not a model'}: "
            "it has no config.json.",
            where=str(checkpoint.folder),
            valid="--model takes a full model; an adapter goes to --adapter",
            next_step=f"dear-batch export --adapter {checkpoint.id} --output OUT"
            if adapter
            else "",
        )
    refuse_remote_code(checkpoint, "config.json")
    if config.get("quantization_config"):
        raise ConfigurationError(
            f"{checkpoint.id} is quantised (quantization_config in config.json).",
            valid="weights in fp32, bf16 or fp16",
            next_step="export the checkpoint that it was made from",
        )
    return config


def check_architecture(checkpoint: Checkpoint, config: dict[str, Any], task: Task) -> None:
    """Refuse what the task's engine does not know.

    Raises:
        ConfigurationError: no Llama model, nor, as listwise, a Mistral one.
    """
    if config.get("model_type") not in MODEL_TYPES[task]:
        raise ConfigurationError(
            f"{checkpoint.id} is a {config.get('model_type')!r} model.",
            valid=f"as {task}, a model_type of {' or '.join(map(repr, MODEL_TYPES[task]))} (llama: "
            "Llama 2, Llama 3.x, SmolLM2 and their like)",
        )


def refuse_remote_code(checkpoint: Checkpoint, name: str) -> None:
    """Refuse a config that names code to be run.

    Raises:
        TrustError: it has an `auto_map`.
    """
    if (checkpoint.config(name) or {}).get("auto_map"):
        raise TrustError(
            f"{checkpoint.id} asks to run code of its own (auto_map in {name}).",
            valid="a plain Llama checkpoint",
        )


def check_weights(checkpoint: Checkpoint, pattern: str) -> None:
    """Refuse a checkpoint whose weights are pickled or absent; `pattern` finds good ones.

    Raises:
        TrustError: its only weights are pickles.
        ConfigurationError: it has no weights.
    """
    if any(checkpoint.folder.glob(pattern)):
        return
    pickled = sorted(p.name for p in checkpoint.folder.iterdir() if p.suffix in PICKLES)
    if pickled:
        raise TrustError(
            f"The weights of {checkpoint.id} are pickled, which can run code when loaded.",
            where=", ".join(pickled),
            valid="*.safetensors",
            next_step="convert them on a machine you can lose: safetensors.torch.save_file",
        )
    raise ConfigurationError(
        f"{checkpoint.id} has no weights.", where=str(checkpoint.folder), valid=pattern
    )


def check_adapter(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config of a LoRA adapter.

    Raises:
        ConfigurationError: a full model or something else, or an adapter that is not LoRA.
    """
    config = checkpoint.config("adapter_config.json")
    if config is None:
        model = checkpoint.config("config.json") is not None
        raise ConfigurationError(
            f"{checkpoint.id} is {'a full model' if model else 'not an adapter'}: "
            "it has no adapter_config.json.",
            where=str(checkpoint.folder),
            valid="--adapter takes a PEFT LoRA adapter; a full model goes to --model",
            next_step=f"dear-batch export --model {checkpoint.id} --output OUT" if model else "",
        )
    if config.get("peft_type") != "LORA":
        raise ConfigurationError(
            f"{checkpoint.id} is a {config.get('peft_type')!r} adapter.", valid="peft_type 'LORA'"
        )
    return config


def check_base(
    adapter: Checkpoint, adapter_config: dict[str, Any], model: Checkpoint
) -> Literal["name", "shapes"]:
    """Check that an adapter was trained on this base; says what the check could rest on.

    Every adapted tensor must fit; where both have hub ids, these must be equal too.

    Raises:
        ConfigurationError: another base.
    """
    trained_on = str(adapter_config.get("base_model_name_or_path") or "")
    model_config = model.config("config.json") or {}
    known_as = model.id if model.revision else str(model_config.get("_name_or_path") or "")
    named = trained_on.lower() == known_as.lower()
    # A relative path looks like a hub id, so a difference counts only where both are ids.
    both_ids = _is_hub_id(known_as) and _is_hub_id(trained_on) and not Path(trained_on).exists()
    if both_ids and not named:
        raise _other_base(adapter, trained_on, model, f"this model is {known_as}")
    _check_shapes(adapter, trained_on, model)
    return "name" if named else "shapes"


def _check_shapes(adapter: Checkpoint, trained_on: str, model: Checkpoint) -> None:
    base, prefix = model.tensors(), "base_model.model."
    for name, shape in adapter.tensors().items():
        stem, _, side = name.removeprefix(prefix).partition(".lora_")
        if not side:
            continue
        weight = base.get(f"{stem}.weight")
        if weight is None:
            raise _other_base(adapter, trained_on, model, f"it adapts {stem}, absent here")
        # W [out, in] + B [out, r] A [r, in]
        dimension = 1 if side.startswith("A") else 0
        if shape[dimension] != weight[dimension]:
            raise _other_base(
                adapter, trained_on, model, f"{name} is {shape}, the weight here {weight}"
            )


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and "\\" not in name


def _other_base(
    adapter: Checkpoint, trained_on: str, model: Checkpoint, why: str
) -> ConfigurationError:
    return ConfigurationError(
        f"The adapter {adapter.id} was not trained on {model.id}.",
        where=why,
        valid=f"the base it names: {trained_on or 'unknown'}",
        next_step=f"dear-batch export --model {trained_on} --adapter {adapter.id} --output OUT"
        if trained_on
        else "",
    )
