"""Commands around a model: `export` makes a bundle, `verify-reference` and `score` try one."""

import sys
from pathlib import Path
from shlex import quote
from typing import Any

import click

from dear_batch.cli.common import need, stopped_by_interrupts
from dear_batch.errors import ConfigurationError, InputError, UsageError
from dear_batch.log import outcome

EXPORT_EXAMPLES = """
\b
Examples:
  dear-batch export export/dear-3b-ce.toml --dry-run
  dear-batch export export/dear-3b-ce.toml
  dear-batch export --adapter my-lora --model my-base --output bundles/mine
  dear-batch export bundles/mine --engine tensorrt
  dear-batch export bundles/mine --engine tensorrt --target sm_80,sm_89
"""

SCORE_EXAMPLES = """
\b
Examples:
  dear-batch score bundles/mine "who wrote Emma?" "Jane Austen wrote Emma."
  cat passages.txt | dear-batch score bundles/mine "who wrote Emma?" -
"""


@click.command(epilog=EXPORT_EXAMPLES)
@click.argument("spec", required=False, type=click.Path(path_type=Path), metavar="[SPEC|BUNDLE]")
@click.option("--model", help="Local folder or hub id of the full model or base.")
@click.option("--revision", help="Commit, tag or branch of the model; recorded as a commit.")
@click.option("--adapter", help="Local folder or hub id of a LoRA adapter.")
@click.option("--adapter-revision", help="Commit, tag or branch of the adapter.")
@click.option("--output", help="Folder of the bundle; must not exist.")
@click.option("--task", type=click.Choice(["auto", "pointwise", "listwise"]))
@click.option("--recipe", type=click.Choice(["readme", "paper-script"]))
@click.option("--pooling", type=click.Choice(["last-token", "final-position"]))
@click.option("--parity-data", help="JSON lines {query, documents} for the parity gate.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "fp16", "bf16"]),
    help="Of the graphs (auto: fp32) and of engines (auto: fp16).",
)
@click.option(
    "--engine",
    type=click.Choice(["onnxruntime", "tensorrt"]),
    help="tensorrt: build TensorRT engines, too, or for the BUNDLE that is given.",
)
@click.option("--target", "targets", help="Kinds of GPU to build for: sm_80,sm_89.")
@click.option("--flavour", type=click.Choice(["auto", "tensorrt", "tensorrt_rtx"]))
@click.option("--calibrate", help="Parquet file of candidates: chooses the length of rows.")
@click.option("--row-tokens", type=int, help="The longest row of the engines.")
@click.option("--batch-tokens", type=int, help="The most tokens of a batch of the engines.")
@click.option("--level", type=int, help="TensorRT's optimization level, 0 to 5.")
@click.option("--dry-run", is_flag=True, help="Show what the export needs, and stop.")
def export(spec: Path | None, dry_run: bool, **options: Any) -> None:
    """Turn a checkpoint into a verified bundle: merge, ONNX, parity with PyTorch.

    The merge runs in fp32: an 8B model needs 32 GB of memory and of disk, a 3B model 13 GB.
    --dry-run computes both for the checkpoint at hand. Options override the spec. With a BUNDLE
    in place of a SPEC, TensorRT engines are built for it.
    """
    if options["targets"] is not None:
        options["targets"] = tuple(options["targets"].split(","))
    with stopped_by_interrupts():
        if spec is not None and (spec / "bundle.json").is_file():
            _export_engines(spec, dry_run, options)
        else:
            _export_checkpoint(spec, dry_run, options)


def _export_checkpoint(spec: Path | None, dry_run: bool, options: dict[str, Any]) -> None:
    from dear_batch.show import needs_table, steps
    from dear_batch.spec_files import load_spec
    from dear_batch.specs import ExportSpec

    if spec is None:
        need(
            {
                "--model or --adapter": options["model"] or options["adapter"],
                "--output": options["output"],
            }
        )
    parsed = load_spec(spec, ExportSpec, options)
    from dear_batch.export.bundle_from_checkpoint import Plan, bundle_from_checkpoint

    plan = Plan(parsed)
    wanted = None
    if parsed.engine == "tensorrt":
        from dear_batch.export.engines import check_buildable, planned

        wanted = parsed.engines()
        check_buildable(plan.model.id, plan.task, parsed.pooling)
        planned(wanted)  # before the hour that the rest may take
    needs_table(plan.needs.to_json(), plan.model.id, plan.task)
    if dry_run:
        outcome({"status": "dry-run", "task": plan.task, **plan.needs.to_json()})
        return
    with steps() as report:
        bundle = bundle_from_checkpoint(plan, report)
    fields: dict[str, Any] = {"task": bundle.manifest.task, "parity": bundle.manifest.parity}
    if wanted is not None:
        fields["engines"] = _built(bundle.folder, wanted)
    outcome({"status": "ok", "bundle": str(bundle.folder), **fields})


def _export_engines(bundle: Path, dry_run: bool, options: dict[str, Any]) -> None:
    """Build engines for a bundle that is there; it is a checkpoint's options that do not fit."""
    from dear_batch.spec_files import load_spec
    from dear_batch.specs import EngineSpec

    engine = options.pop("engine")
    names = EngineSpec.__dataclass_fields__.keys()
    wrong = [name for name, value in options.items() if value is not None and name not in names]
    if engine != "tensorrt" or wrong or dry_run:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in wrong)
        why = "; --dry-run is for checkpoints" if dry_run else ""
        raise UsageError(
            f"{bundle} is a bundle already{f'; {named} would make another' if named else why}.",
            valid="--engine tensorrt, with --target, --precision, --flavour, --calibrate, "
            "--row-tokens, --batch-tokens, --level",
            next_step=f"dear-batch export {quote(str(bundle))} --engine tensorrt",
        )
    wanted = load_spec(None, EngineSpec, {name: options[name] for name in names})
    outcome({"status": "ok", "bundle": str(bundle), "engines": _built(bundle, wanted)})


def _built(bundle: Path, wanted: Any) -> list[dict[str, Any]]:
    from dataclasses import asdict

    from dear_batch.export.engines import add_engines
    from dear_batch.show import progress, steps

    with steps() as report, progress("%") as advance:
        engines = add_engines(bundle, wanted, report, advance)
    return [
        {name: value for name, value in asdict(engine).items() if name != "profiles"}
        for engine in engines
    ]


@click.command(epilog=SCORE_EXAMPLES)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("query")
@click.argument("documents", nargs=-1, required=True)
@click.option("--device", default="auto", show_default=True)
@click.option(
    "--engine",
    default="auto",
    type=click.Choice(["auto", "tensorrt", "onnxruntime", "torch"]),
    show_default=True,
)
def score(bundle: Path, query: str, documents: tuple[str, ...], device: str, engine: Any) -> None:
    """Score documents against a query, best first; `-` reads a document a line from stdin."""
    from dear_batch.api import Reranker

    texts = [text for d in documents for text in (_stdin_lines() if d == "-" else [d])]
    if not texts:
        raise UsageError("There is no document on stdin.", valid="a document a line")
    reranker = Reranker.load(bundle, engine=engine, device=device)
    for item in reranker.rerank(query, texts):
        outcome({"score": item.score, "index": item.index, "document": item.document})


def _stdin_lines() -> list[str]:
    """Lines of stdin; only newlines part them, since passages hold other separators."""
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"The documents on stdin are not UTF-8 text: {error}.") from error
    return text.rstrip("\n").split("\n") if text else []


@click.command("verify-reference")
@click.argument("checkpoint")
@click.option("--adapter", help="LoRA adapter of the checkpoint.")
@click.option("--revision", default="main", show_default=True)
@click.option("--adapter-revision", default="main", show_default=True)
@click.option(
    "--scores",
    type=click.Choice(["8b-ce", "8b-ranknet", "3b-ce", "3b-ranknet"]),
    help="Which printed scores; by default from the checkpoint's name.",
)
def verify_reference(checkpoint: str, scores: Any, **options: Any) -> None:
    """Score the DeAR README's example and compare with the scores printed there.

    CHECKPOINT is a bundle, a local folder or a hub id. A checkpoint runs in PyTorch bf16 as
    the README does; a bundle runs in its own engine.

    \b
    Example:
      dear-batch verify-reference abdoelsayed/dear-3b-reranker-ce-v1
    """  # noqa: D301 - click reads \b
    from dear_batch.export.verify_reference import verify
    from dear_batch.pointwise.reference import TOLERANCE
    from dear_batch.show import verdict_table

    verdict = verify(checkpoint, scores, **options)
    verdict_table(verdict)
    outcome({"status": "ok" if verdict.ok else "different", "scores": list(verdict.scores)})
    if not verdict.ok:
        raise ConfigurationError(
            f"The scores differ from the printed ones by {verdict.max_abs_difference:.3f}.",
            valid=f"up to {TOLERANCE}, with the same best document",
        )
