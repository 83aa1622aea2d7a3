"""Commands around a model: `export` makes a bundle, `verify-reference` and `score` try one."""

import sys
from pathlib import Path
from typing import Any

import click

from dear_batch.cli.common import need
from dear_batch.errors import ConfigurationError, InputError, UsageError
from dear_batch.log import outcome

EXPORT_EXAMPLES = """
\b
Examples:
  dear-batch export export/dear-3b-ce.toml --dry-run
  dear-batch export export/dear-3b-ce.toml
  dear-batch export --adapter my-lora --model my-base --output bundles/mine
"""

SCORE_EXAMPLES = """
\b
Examples:
  dear-batch score bundles/mine "who wrote Emma?" "Jane Austen wrote Emma."
  cat passages.txt | dear-batch score bundles/mine "who wrote Emma?" -
"""


@click.command(epilog=EXPORT_EXAMPLES)
@click.argument("spec", required=False, type=click.Path(path_type=Path), metavar="[SPEC.toml]")
@click.option("--model", help="Local folder or hub id of the full model or base.")
@click.option("--revision", help="Commit, tag or branch of the model; recorded as a commit.")
@click.option("--adapter", help="Local folder or hub id of a LoRA adapter.")
@click.option("--adapter-revision", help="Commit, tag or branch of the adapter.")
@click.option("--output", help="Folder of the bundle; must not exist.")
@click.option("--task", type=click.Choice(["auto", "pointwise", "listwise"]))
@click.option("--recipe", type=click.Choice(["readme", "paper-script"]))
@click.option("--pooling", type=click.Choice(["last-token", "final-position"]))
@click.option("--parity-data", help="JSON lines {query, documents} for the parity gate.")
@click.option("--dry-run", is_flag=True, help="Show what the export needs, and stop.")
def export(spec: Path | None, dry_run: bool, **options: str | None) -> None:
    """Turn a checkpoint into a verified bundle: merge, ONNX, parity with PyTorch.

    The merge runs in fp32: an 8B model needs 32 GB of memory and of disk, a 3B model 13 GB.
    --dry-run computes both for the checkpoint at hand. Options override the spec.
    """
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
    needs_table(plan.needs.to_json(), plan.model.id, plan.task)
    if dry_run:
        outcome({"status": "dry-run", "task": plan.task, **plan.needs.to_json()})
        return
    with steps() as report:
        bundle = bundle_from_checkpoint(plan, report)
    outcome(
        {
            "status": "ok",
            "bundle": str(bundle.folder),
            "task": bundle.manifest.task,
            "parity": bundle.manifest.parity,
        }
    )


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
