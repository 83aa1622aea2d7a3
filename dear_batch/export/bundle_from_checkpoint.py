"""The export, step by step: checkpoint → merged model → graphs → parity → bundle.

The bundle appears at its path in one rename, or not at all.
"""

import importlib.metadata
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from dear_batch import __version__
from dear_batch.bundle import (
    Bundle,
    Manifest,
    Source,
    Task,
    hash_folder,
    open_bundle,
    write_manifest,
)
from dear_batch.errors import ConfigurationError, OutputError, missing_extra
from dear_batch.export.checkpoint import (
    Checkpoint,
    check_adapter,
    check_base,
    check_model,
    resolve,
)
from dear_batch.pointwise.recipe import PairEncoder, Recipe, recipe_from_tokenizer
from dear_batch.specs import ExportSpec

try:
    import torch

    from dear_batch.export import gate
    from dear_batch.export.graphs import onnx_from_torch
    from dear_batch.export.merge import model_from_checkpoint, tokenizer_from_checkpoint
    from dear_batch.export.needs import Needs, architecture, checkpoint_dtype, needs_from_config
    from dear_batch.pointwise.onnx_scorer import PackedOnnxScorer, PaddedOnnxScorer
    from dear_batch.pointwise.torch_scorer import TorchScorer
except ModuleNotFoundError as error:
    raise missing_extra(error.name or "torch", "export", "Export") from error

Report = Callable[[str], None]
RECORDED = ("torch", "transformers", "peft", "optimum", "onnx", "onnxscript", "tokenizers")


class Plan:
    """A spec whose checkpoint was found and checked: what would be exported, and its needs."""

    def __init__(self, spec: ExportSpec, *, weights: bool = True) -> None:
        self.spec = spec
        self.adapter: Checkpoint | None = None
        adapter_config: dict[str, Any] = {}
        name = spec.model
        if spec.adapter is not None:
            self.adapter = resolve(spec.adapter, spec.adapter_revision, weights=weights)
            adapter_config = check_adapter(self.adapter)
            name = name or adapter_config.get("base_model_name_or_path")
        if not name:
            raise ConfigurationError(
                f"The adapter {spec.adapter} does not name its base.", next_step="give --model"
            )
        self.model = resolve(name, spec.revision, weights=weights)
        self.config = check_model(self.model)
        self.task = _task(spec, self.config, adapter_config)
        by_name = weights or self.model.revision is None
        self.base_checked_by = (
            check_base(self.adapter, adapter_config, self.model)
            if self.adapter is not None and by_name
            else None
        )
        self.needs: Needs = needs_from_config(self.config, self.task, Path(spec.output))


def _task(spec: ExportSpec, config: dict[str, Any], adapter_config: dict[str, Any]) -> Task:
    if spec.task != "auto":
        return spec.task
    if adapter_config:
        kind = adapter_config.get("task_type")
        return "pointwise" if kind == "SEQ_CLS" else "listwise"
    names = config.get("architectures") or [""]
    return "pointwise" if names[0].endswith("ForSequenceClassification") else "listwise"


def bundle_from_checkpoint(plan: Plan, report: Report) -> Bundle:
    """Export a planned checkpoint to `spec.output`; `report` is told each step.

    Raises:
        OutputError: the output exists, or the disk is too small.
        ConfigurationError: the parity gate failed, or the checkpoint's parts do not fit.
        TrustError: pickled weights or remote code.
    """
    output = Path(plan.spec.output)
    with _whole_or_absent(output, plan.needs) as folder:
        report(f"loading and merging {plan.model.id} in fp32")
        model = model_from_checkpoint(plan.model, plan.adapter, plan.task)
        tokenizer = tokenizer_from_checkpoint(plan.model, plan.adapter)
        _save_tokenizer(tokenizer, folder)
        if model.config.pad_token_id is None:  # the authors' README
            model.config.pad_token_id = tokenizer.pad_token_id
        dimensions = architecture(model.config)
        if plan.task == "pointwise":
            pieces = _pointwise(plan, model, tokenizer, folder, report)
        else:
            pieces = _listwise(plan, model, folder, report)
        report("hashing the files")
        write_manifest(folder, _manifest(plan, dimensions, folder, **pieces))
    return open_bundle(output, verify=False)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """As transformers 5 saves it, under a class name that transformers 4 and Optimum know too."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'), "utf-8")


def _pointwise(
    plan: Plan, model: Any, tokenizer: Any, folder: Path, report: Report
) -> dict[str, Any]:
    spec = plan.spec
    # Loaded from a causal LM's config, which still names that class.
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    recipe, encoder = _recipe(spec, folder, tokenizer)
    lists = gate.parity_lists(spec.parity_data)
    encoded = encoder.encode(lists)
    gate.check_ids(tokenizer, recipe, lists, encoded)
    report("scoring the parity pairs with PyTorch fp32")
    reference = gate.scores_of(TorchScorer(model, recipe), encoded)
    report("exporting the ONNX graphs")
    (folder / "onnx").mkdir()
    signatures = onnx_from_torch(model, folder / "onnx", recipe.pooling)
    report("scoring the parity pairs with ONNX Runtime")
    scorers: dict[str, type[PaddedOnnxScorer | PackedOnnxScorer]]
    scorers = {"model.onnx": PaddedOnnxScorer, "packed.onnx": PackedOnnxScorer}
    scores = {}
    for name in signatures:
        scorer = scorers[name](folder / "onnx" / name, recipe, "cpu")
        scores[name] = gate.scores_of(scorer, encoded)
    parity = gate.gate(reference, scores, spec.precision)
    return {
        "precision": spec.precision,
        "recipe": recipe,
        "graphs": {f"onnx/{name}": signature for name, signature in signatures.items()},
        "parity": {**parity, "data": "user" if spec.parity_data else "dear-batch"},
    }


def _recipe(spec: ExportSpec, folder: Path, tokenizer: Any) -> tuple[Recipe, PairEncoder]:
    fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
    try:
        recipe = recipe_from_tokenizer(
            fast,
            spec.recipe,
            spec.pooling,
            bos_id=tokenizer.bos_token_id,
            pad_id=tokenizer.pad_token_id,
        )
    except ValueError as error:
        raise ConfigurationError(
            f"The recipe {spec.recipe} does not fit this tokenizer: {error}.",
            valid="--recipe readme",
        ) from error
    return recipe, PairEncoder(fast, recipe)


def _listwise(plan: Plan, model: Any, folder: Path, report: Report) -> dict[str, Any]:
    """Merged in fp32, cast once to the dtype that the checkpoint was stored in."""
    precision = checkpoint_dtype(plan.config)
    report(f"writing safetensors in {precision}")
    model.to(getattr(torch, precision)).save_pretrained(folder)
    return {"precision": precision, "recipe": None, "graphs": {}, "parity": None}


def _manifest(
    plan: Plan, dimensions: dict[str, int | str], folder: Path, **pieces: Any
) -> Manifest:
    adapter = plan.adapter
    return Manifest(
        task=plan.task,
        source=Source(
            model=plan.model.id,
            revision=plan.model.revision,
            adapter=adapter.id if adapter else None,
            adapter_revision=adapter.revision if adapter else None,
            base_checked_by=plan.base_checked_by,
        ),
        architecture=dimensions,
        versions={"dear-batch": __version__, **_versions()},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        files=hash_folder(folder),
        **pieces,
    )


def _versions() -> dict[str, str]:
    import onnxruntime

    known = {name: importlib.metadata.version(name) for name in RECORDED}
    return {**known, "onnxruntime": onnxruntime.__version__}


@contextmanager
def _whole_or_absent(output: Path, needs: Needs) -> Iterator[Path]:
    """A temporary folder beside `output` that becomes it on success and vanishes otherwise."""
    if output.exists():
        raise OutputError(
            f"The output {output} exists already.",
            valid="a path that does not exist yet",
            next_step=f"dear-batch inspect {output}, then remove it or choose another --output",
        )
    if needs.disk_free_bytes < needs.disk_bytes:
        raise OutputError(
            f"The disk of {output} is too small for this bundle.",
            where=f"{needs.disk_free_bytes / 1e9:.1f} GB free",
            valid=f"about {needs.disk_bytes / 1e9:.1f} GB",
        )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise OutputError(f"Cannot write beside {output}: {error.strerror}.") from error
    try:
        yield folder
        folder.chmod(0o755)
        folder.rename(output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
