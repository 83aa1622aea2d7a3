"""Finds a checkpoint (local folder or hub id), and refuses what must not be loaded.

Knows nothing of models: it reads configs, file names and the headers of weights only.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dear_batch import trust
from dear_batch.bundle import Task
from dear_batch.errors import ConfigurationError, InputError, TrustError, missing_extra
from dear_batch.manifest_fields import REVISION

try:
    from huggingface_hub import HfApi, snapshot_download
    from safetensors import SafetensorError, safe_open
except ModuleNotFoundError as error:
    raise missing_extra(error.name or "safetensors", "export", "Export") from error

MODEL_TYPES: dict[Task, tuple[str, ...]] = {
    "pointwise": ("llama",),
    "listwise": ("llama", "mistral"),  # RankZephyr is a Mistral
}
# Everything a Llama checkpoint needs; weights as safetensors only, and no code.
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
        fields = _read_json(path)
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
        InputError: a config that cannot be read.
        TrustError: see `check_folder`, or the hub names no commit.
    """
    folder = Path(name)
    if folder.is_dir():
        check_folder(folder)
        return Checkpoint(name, folder, None)
    commit, folder = _fetched(name, revision, weights)
    check_folder(folder)
    return Checkpoint(name, folder, commit)


def _fetched(name: str, revision: str, weights: bool) -> tuple[str, Path]:
    try:
        commit = _pinned(name, revision, HfApi().model_info(name, revision=revision).sha)
        patterns = PATTERNS if weights else [p for p in PATTERNS if p != "*.safetensors"]
        path = snapshot_download(name, revision=commit, allow_patterns=patterns)
    except TrustError:
        raise
    except Exception as error:  # whatever HTTP client the hub's library uses
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigurationError(
            f"The checkpoint {name!r} is neither a local folder nor a hub id within reach.",
            where=f"revision {revision}: {type(error).__name__}: {reason}",
            valid="a folder with config.json and safetensors, or a hub id such as "
            "abdoelsayed/dear-3b-reranker-ce-v1",
            next_step="check the spelling and the network; gated models need `hf auth login`",
        ) from error
    return commit, Path(path)


def _pinned(name: str, revision: str, commit: str | None) -> str:
    if commit is not None and REVISION.fullmatch(commit):
        return commit
    raise TrustError(
        f"The hub gives no commit for {name!r}, so its files could change at any time.",
        where=f"revision {revision}: {commit!r}",
        valid="40 hex digits",
    )


def check_folder(folder: Path) -> None:
    """Refuse a model or adapter folder of which anything could run code.

    The files beside the configs alone: nothing opens those of folders below. A snapshot of the
    hub's cache consists of links, so they are followed here.

    Raises:
        InputError: a config that cannot be read.
        TrustError: pickles or code beside the weights, a config that asks for code, or
            safetensors whose header is not to be trusted.
    """
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file())
        for path in files:
            trust.check_suffix(path)
        for path in files:
            _check_file(path)
    except OSError as error:
        raise InputError(f"The folder {folder} cannot be read: {error}.") from error


def _check_file(path: Path) -> None:
    if path.suffix == ".json" and path.name not in trust.VOCABULARIES:
        trust.check_config(path, _read_json(path))
    elif path.suffix == ".safetensors":
        with path.open("rb") as file:
            trust.check_safetensors(path, file)


def _read_json(path: Path) -> Any:
    try:
        return trust.read_json(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from error


def check_model(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config of a full model whose files may be loaded.

    Raises:
        ConfigurationError: an adapter, or a quantised model.
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


def check_weights(checkpoint: Checkpoint, pattern: str) -> None:
    """Refuse a checkpoint without weights; `pattern` finds them.

    Raises:
        ConfigurationError: it has none.
    """
    if not any(checkpoint.folder.glob(pattern)):
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
