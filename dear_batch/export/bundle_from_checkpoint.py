"""The export, step by step: checkpoint → merged model → graphs → parity → bundle.

The bundle appears at its path in one rename, or not at all.
"""

import importlib.metadata
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
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
    check_architecture,
    check_base,
    check_model,
    resolve,
)
from dear_batch.files.durable import writing
from dear_batch.parity import Scores
from dear_batch.pointwise.own_pairs import own_pairs, read_pairs
from dear_batch.pointwise.recipe import EncodedPair, PairEncoder, Recipe, recipe_from_tokenizer
from dear_batch.specs import ExportSpec

try:
    import torch

    from dear_batch.export import gate
    from dear_batch.export.graphs import onnx_from_torch
    from dear_batch.export.merge import model_from_checkpoint, quiet, tokenizer_from_checkpoint
    from dear_batch.export.needs import Needs, architecture, checkpoint_dtype, needs_from_config
    from dear_batch.export.typed import recorded_peaks
    from dear_batch.pointwise.onnx_scorer import PackedOnnxScorer, PaddedOnnxScorer
    from dear_batch.pointwise.torch_scorer import TorchScorer
except ModuleNotFoundError as error:
    raise missing_extra(error.name or "torch", "export", "Export") from error

Report = Callable[[str], None]
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
RECORDED = ("torch", "transformers", "peft", "optimum", "onnx", "onnxscript", "tokenizers")


class Plan:
    """A spec whose checkpoint was found, from its configs alone, and what it would need."""

    def __init__(self, spec: ExportSpec) -> None:
        self.spec = spec
        self.adapter: Checkpoint | None = None
        self.adapter_config: dict[str, Any] = {}
        name = spec.model
        if spec.adapter is not None:
            self.adapter = resolve(spec.adapter, spec.adapter_revision, weights=False)
            self.adapter_config = check_adapter(self.adapter)
            name = name or self.adapter_config.get("base_model_name_or_path")
        if not name:
            raise ConfigurationError(
                f"The adapter {spec.adapter} does not name its base.", next_step="give --model"
            )
        self.model = resolve(name, spec.revision, weights=False)
        self.config = check_model(self.model)
        self.task = _task(spec, self.config, self.adapter_config)
        check_architecture(self.model, self.config, self.task)
        self.needs: Needs = needs_from_config(self.config, self.task, Path(spec.output))


def _task(spec: ExportSpec, config: dict[str, Any], adapter_config: dict[str, Any]) -> Task:
    """What the checkpoint was made for; the spec may only confirm it.

    A missing head is named by the merge, which looks at the weights.
    """
    if adapter_config:
        found: Task = "pointwise" if adapter_config.get("task_type") == "SEQ_CLS" else "listwise"
    else:
        names = config.get("architectures") or [""]
        found = "pointwise" if names[0].endswith("ForSequenceClassification") else "listwise"
    if spec.task == "listwise" and found == "pointwise":
        raise ConfigurationError(
            f"{spec.adapter or spec.model} is a pointwise scorer.",
            valid="--task auto or pointwise; a listwise model is a causal LM",
        )
    return found if spec.task == "auto" else spec.task


def bundle_from_checkpoint(plan: Plan, report: Report) -> Bundle:
    """Export a planned checkpoint to `spec.output`; `report` is told each step.

    Raises:
        OutputError: the output exists, or the disk is too small.
        ConfigurationError: the parity gate failed, or the checkpoint's parts do not fit.
        TrustError: pickled weights or remote code.
    """
    output = Path(plan.spec.output)
    with _whole_or_absent(output, plan.needs) as folder:
        model, adapter, checked_by = _fetched(plan, report)
        tokenizer = tokenizer_from_checkpoint(model, adapter)
        _save_tokenizer(tokenizer, folder)
        report(f"loading and merging {model.id} in fp32")
        merged = model_from_checkpoint(model, adapter, plan.task)
        if merged.config.pad_token_id is None:  # the authors' README
            merged.config.pad_token_id = tokenizer.pad_token_id
        pieces: dict[str, Any] = {"architecture": architecture(merged.config)}
        if plan.task == "pointwise":
            exported = _graphs(plan.spec, merged, tokenizer, folder, report)
            del merged  # an engine's own copy of the weights takes its place
            pieces |= _gated(plan.spec, exported, folder, report)
        else:
            pieces |= _listwise(plan, merged, folder, report)
        report("hashing the files")
        source = Source(
            model=model.id,
            revision=model.revision,
            adapter=adapter.id if adapter else None,
            adapter_revision=adapter.revision if adapter else None,
            base_checked_by=checked_by,
        )
        write_manifest(folder, _manifest(plan.task, source, folder, **pieces))
    return open_bundle(output, verify=False)


def _fetched(
    plan: Plan, report: Report
) -> tuple[Checkpoint, Checkpoint | None, Literal["name", "shapes"] | None]:
    """The checkpoints with their weights, of the commits that were planned."""
    if plan.model.revision or (plan.adapter and plan.adapter.revision):
        report("fetching the weights")
    model = resolve(plan.model.id, plan.model.revision or "main")
    if plan.adapter is None:
        return model, None, None
    adapter = resolve(plan.adapter.id, plan.adapter.revision or "main")
    return model, adapter, check_base(adapter, plan.adapter_config, model)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """As transformers 5 saves it, under a class name that transformers 4 and Optimum know too."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'), "utf-8")


@dataclass(frozen=True, slots=True)
class _Exported:
    """What the gate compares: PyTorch's scores of the encoded lists, and the graphs written.

    The first `n_own` lists are the package's own.
    """

    recipe: Recipe
    encoded: list[list[EncodedPair]]
    reference: list[Scores]
    n_own: int
    peaks: tuple[float, ...]
    signatures: dict[str, Any]


def _graphs(
    spec: ExportSpec, model: Any, tokenizer: Any, folder: Path, report: Report
) -> _Exported:
    """Write config and graphs; returns what the gate needs once the model is gone."""
    # Loaded from a causal LM's config, which still names that class.
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    recipe, encoder = _recipe(spec, folder, tokenizer)
    own = own_pairs()
    lists = own + (read_pairs(Path(spec.parity_data)) if spec.parity_data else [])
    encoded = encoder.encode(lists)
    gate.check_ids(tokenizer, recipe, lists, encoded)
    report("scoring the parity pairs with PyTorch fp32")
    with recorded_peaks(model) as peaks:
        reference = gate.scores_of(TorchScorer(model, recipe), encoded)
    report("exporting the ONNX graphs")
    (folder / "onnx").mkdir()
    signatures = onnx_from_torch(
        model, folder / "onnx", recipe.pooling, spec.graph_precision, peaks
    )
    return _Exported(recipe, encoded, reference, len(own), tuple(peaks), signatures)


def _gated(spec: ExportSpec, exported: _Exported, folder: Path, report: Report) -> dict[str, Any]:
    """Score with each graph, one session at a time, and compare."""
    report("scoring the parity pairs with ONNX Runtime")
    scorers: dict[str, type[PaddedOnnxScorer | PackedOnnxScorer]]
    scorers = {"model.onnx": PaddedOnnxScorer, "packed.onnx": PackedOnnxScorer}
    scores = {}
    for name in exported.signatures:
        with gate.runnable(folder / "onnx" / name, spec.graph_precision) as graph:
            scorer = scorers[name](graph, exported.recipe, "cpu")
            scores[name] = gate.scores_of(scorer, exported.encoded)
    parity = gate.gate(exported.reference, scores, spec.graph_precision)
    return {
        "precision": spec.graph_precision,
        "recipe": exported.recipe,
        "graphs": {f"onnx/{name}": value for name, value in exported.signatures.items()},
        "parity": {**parity, "data": "dear-batch and user" if spec.parity_data else "dear-batch"},
        "own_scores": tuple(np.concatenate(exported.reference[: exported.n_own]).tolist()),
        "peaks": exported.peaks,
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
    dtype = checkpoint_dtype(plan.config)
    report(f"writing safetensors in {dtype}")
    with quiet():
        model.to(getattr(torch, dtype)).save_pretrained(folder)
    return {"precision": PRECISIONS[dtype], "recipe": None, "graphs": {}, "parity": None}


def _manifest(task: Task, source: Source, folder: Path, **pieces: Any) -> Manifest:
    return Manifest(
        task=task,
        source=source,
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
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"Cannot make the folder of {output}: {error.strerror}.") from error
    with writing(output.absolute()):
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.absolute().parent))
        try:
            yield folder
            folder.chmod(0o755)
            for path in folder.rglob("*"):  # safetensors writes its files for their owner alone
                path.chmod(0o755 if path.is_dir() else 0o644)
            folder.rename(output)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
