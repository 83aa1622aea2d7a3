"""The command line: parse → spec → call → exit code. Click only; the rest loads inside commands.

People read the terminal (stderr for progress and errors), programs read stdout, whose last
line is one JSON object where a command has an outcome.
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import click

from dear_batch import __version__
from dear_batch.errors import ConfigurationError, DearBatchError, InputError, UsageError

EXIT_FAILED_WINDOWS = 3  # the outputs are there, and not what was asked for

EXAMPLES = {
    "convert": """
\b
Examples:
  dear-batch convert rankgpt bm25-top100.json -o candidates.parquet
  dear-batch convert tevatron bm25.jsonl -o candidates.parquet
  dear-batch convert beir scifact/ bm25.trec -o candidates.parquet
  dear-batch convert beir queries.jsonl corpus.parquet bm25.trec -o candidates.parquet
""",
    "export": """
\b
Examples:
  dear-batch export export/dear-3b-ce.toml --dry-run
  dear-batch export export/dear-3b-ce.toml
  dear-batch export --adapter my-lora --model my-base --output bundles/mine
""",
    "run": """
\b
Examples:
  dear-batch run jobs/nightly.toml
  dear-batch run --input candidates.parquet --bundle bundles/mine --output runs/tonight
  dear-batch run jobs/nightly.toml --output "runs/$(date +%F)" --depth 50
  dear-batch run jobs/dl19.toml --stage pointwise
  dear-batch run jobs/dl19.toml --stage listwise --listwise-depth 20
""",
    "score": """
\b
Examples:
  dear-batch score bundles/mine "who wrote Emma?" "Jane Austen wrote Emma."
  cat passages.txt | dear-batch score bundles/mine "who wrote Emma?" -
""",
    "evaluate": """
\b
Examples:
  dear-batch evaluate qrels.txt runs/tonight/run.trec
  dear-batch evaluate qrels/test.tsv a.trec b.trec --baseline bm25.trec --json scores.json
""",
}


class _Group(click.Group):
    """A group whose commands end in our errors: one message on stderr, and their exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DearBatchError as error:
            _fail(error)


def _fail(error: DearBatchError) -> NoReturn:
    click.secho(f"error: {error}", err=True, fg="red" if sys.stderr.isatty() else None)
    sys.exit(error.exit_code)


def _need(options: Mapping[str, object]) -> None:
    missing = [name for name, value in options.items() if not value]
    if missing:
        raise UsageError(
            f"Missing: {', '.join(missing)}.",
            valid=f"a SPEC.toml, or all of: {', '.join(options)}",
            next_step="the same command with --help",
        )


def _outcome(fields: Mapping[str, Any]) -> None:
    click.echo(json.dumps(fields, ensure_ascii=False))


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dear-batch")
def main() -> None:
    """Offline reranking of large candidate sets with DeAR rerankers.

    \b
    A job, end to end:
      dear-batch convert rankgpt bm25.json -o candidates.parquet
      dear-batch export export/dear-3b-ce.toml
      dear-batch run --input candidates.parquet --bundle bundles/dear-3b-ce --output runs/one
      dear-batch evaluate qrels.txt runs/one/run.trec
    """  # noqa: D301 - click reads \b


@main.command(epilog=EXAMPLES["convert"])
@click.argument("form", metavar="FORMAT", type=click.Choice(["rankgpt", "tevatron", "beir"]))
@click.argument("inputs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="IN...")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Parquet file to write."
)
def convert(form: str, inputs: tuple[Path, ...], output: Path) -> None:
    """Turn candidate lists of another format into the Parquet that `run` reads.

    \b
    rankgpt   JSON: [{query, hits: [{content, qid, docid, rank, score}]}]
    tevatron  JSONL: query_id, query, docid, title, text (score), a line a candidate
    beir      FOLDER RUN, or QUERIES CORPUS RUN: texts joined to a TREC run file
    """  # noqa: D301 - click reads \b
    from dear_batch.files import convert as converters

    functions: dict[str, Callable[..., Any]] = {
        "rankgpt": converters.convert_rankgpt,
        "tevatron": converters.convert_tevatron,
        "beir": converters.convert_beir,
    }
    from dear_batch.show import status

    with status(f"converting {form}"):
        converted = functions[form](inputs, output)
    _outcome({"status": "ok", **asdict(converted), "out": str(converted.out)})


@main.command(epilog=EXAMPLES["export"])
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
        _need(
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
        _outcome({"status": "dry-run", "task": plan.task, **plan.needs.to_json()})
        return
    with steps() as report:
        bundle = bundle_from_checkpoint(plan, report)
    _outcome(
        {
            "status": "ok",
            "bundle": str(bundle.folder),
            "task": bundle.manifest.task,
            "parity": bundle.manifest.parity,
        }
    )


@main.command(epilog=EXAMPLES["run"])
@click.argument("spec", required=False, type=click.Path(path_type=Path), metavar="[SPEC.toml]")
@click.option("--input", "input__paths", multiple=True, help="Parquet file or glob; repeatable.")
@click.option("--bundle", "pointwise__bundle", help="Folder of a pointwise bundle.")
@click.option("--output", "output__folder", help="Folder to publish into.")
@click.option("--depth", "pointwise__depth", type=int, help="Score only the first N candidates.")
@click.option(
    "--interpolate", "pointwise__interpolate", type=float, help="Weight of the logits, 0 to 1."
)
@click.option("--listwise", "listwise__bundle", help="Folder of a listwise bundle: stage 2.")
@click.option(
    "--listwise-depth",
    "listwise__depth",
    type=int,
    help="Places from the top that it re-orders; default 30.",
)
@click.option(
    "--window", "listwise__window", type=int, help="Passages it sees at once; default 20."
)
@click.option(
    "--step",
    "listwise__step",
    type=int,
    help="Places by which windows move up; default half a window.",
)
@click.option(
    "--prompt", "listwise__prompt", help="readme (default), rankllm-chat, or a TOML file."
)
@click.option(
    "--reasoning-tokens",
    "listwise__reasoning_tokens",
    type=int,
    help="Most tokens of reasoning before an answer; default 0, none.",
)
@click.option(
    "--listwise-precision",
    "listwise__precision",
    type=click.Choice(["auto", "fp32", "bf16"]),
    help="What its weights are held in; auto, bf16 on a GPU and else fp32.",
)
@click.option(
    "--max-failed-windows",
    "listwise__max_failed_windows",
    help="More failed windows end with exit code 3: a count, or a share such as 1%; default 0.",
)
@click.option(
    "--stage",
    type=click.Choice(["all", "pointwise", "listwise"]),
    default="all",
    show_default=True,
    help="Of a job of two stages, the first alone, or the second over what the first left.",
)
@click.option("--tag", "output__tag", help="Last column of the run file.")
@click.option(
    "--run-per-input", "output__run_per_input", is_flag=True, default=None, help="One run a file."
)
@click.option("--device", "execution__device", help="auto, cpu, cuda or cuda:N.")
@click.option("--engine", "execution__engine", type=click.Choice(["auto", "onnxruntime", "torch"]))
def run(spec: Path | None, stage: Any, **options: Any) -> None:
    """Rerank candidate lists and write a TREC run file.

    Writes run.trec, results.parquet and report.json into the output folder, and
    quarantine.parquet where something was set aside. Options override the spec.

    With --listwise a second stage re-orders the top of each list window by window and writes
    transcripts.parquet as well. Its first stage leaves parts/, from which --stage listwise
    goes on, also with other listwise settings.

    \b
    Exit codes: 0 done; 2 wrong command line; 3 done and published, but more windows failed
    than --max-failed-windows; 65 bad input; 73 cannot write; 77 untrusted artefact;
    78 parts that do not fit together, or another job's folder.
    """  # noqa: D301 - click reads \b
    from dear_batch.show import progress, run_summary
    from dear_batch.spec_files import load_spec
    from dear_batch.specs import JobSpec

    overrides = {name.replace("__", "."): value for name, value in options.items()}
    try:
        if spec is None:
            needed = {"--input": "input.paths", "--bundle": "pointwise.bundle"}
            _need({k: overrides[v] for k, v in {**needed, "--output": "output.folder"}.items()})
        parsed = load_spec(spec, JobSpec, overrides)
        from dear_batch.run.local import run_job

        with progress("queries") as advance:
            report = run_job(parsed, advance, stage=stage)
    except DearBatchError as error:
        click.secho(f"error: {error}", err=True)
        _outcome({"status": "failed", "exit_code": error.exit_code, "error": error.what})
        sys.exit(error.exit_code)
    run_summary(report, parsed.output.folder)
    _end(report, parsed.output.folder)


def _end(report: Mapping[str, Any], folder: str) -> None:
    """The outcome of a job that was published, and its exit code."""
    from dear_batch.run.listwise import TOO_MANY_FAILED

    if report["status"] != TOO_MANY_FAILED:
        _outcome({"output": folder, **report})
        return
    listwise = report["listwise"]
    error = DearBatchError(
        f"{listwise['windows']['failed']:,} of {listwise['windows']['total']:,} windows failed; "
        "their documents keep the order that they had before the window.",
        where=f"{folder}: transcripts.parquet, status 'failed'",
        valid=f"up to {listwise['max_failed_windows']} failed windows",
        next_step="the same command with --stage listwise and other settings, "
        "or with a higher --max-failed-windows",
    )
    click.secho(f"error: {error}", err=True)
    outcome = {"exit_code": EXIT_FAILED_WINDOWS, "error": error.what, "output": folder}
    _outcome({**outcome, **report})
    sys.exit(EXIT_FAILED_WINDOWS)


@main.command(epilog=EXAMPLES["score"])
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("query")
@click.argument("documents", nargs=-1, required=True)
@click.option("--device", default="auto", show_default=True)
@click.option(
    "--engine",
    default="auto",
    type=click.Choice(["auto", "onnxruntime", "torch"]),
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
        _outcome({"score": item.score, "index": item.index, "document": item.document})


def _stdin_lines() -> list[str]:
    """Lines of stdin; only newlines part them, since passages hold other separators."""
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"The documents on stdin are not UTF-8 text: {error}.") from error
    return text.rstrip("\n").split("\n") if text else []


@main.command("verify-reference")
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
    _outcome({"status": "ok" if verdict.ok else "different", "scores": list(verdict.scores)})
    if not verdict.ok:
        raise ConfigurationError(
            f"The scores differ from the printed ones by {verdict.max_abs_difference:.3f}.",
            valid=f"up to {TOLERANCE}, with the same best document",
        )


@main.command(epilog=EXAMPLES["evaluate"])
@click.argument("qrels", type=click.Path(path_type=Path))
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--baseline", type=click.Path(path_type=Path), help="Run to compare with.")
@click.option(
    "--average-over",
    type=click.Choice(["qrels", "run"]),
    default="qrels",
    show_default=True,
    help="Average over all topics of the qrels (trec_eval -c), or over those of the run.",
)
@click.option(
    "--relevance-level",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Least judgement that counts as relevant for MAP, MRR and recall.",
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write figures here.")
def evaluate(
    qrels: Path,
    runs: tuple[Path, ...],
    baseline: Path | None,
    json_path: Path | None,
    **options: Any,
) -> None:
    """Score run files against judgements: nDCG@1/5/10, MAP, MRR@10, R@100."""
    from dear_batch.evaluate.evaluation import evaluate as evaluate_runs
    from dear_batch.evaluate.report import table
    from dear_batch.files.durable import replacing
    from dear_batch.show import show

    evaluations = evaluate_runs(qrels, runs, baseline_path=baseline, **options)
    show(table(evaluations))
    figures = [evaluation.as_dict() for evaluation in evaluations]
    if json_path:
        with replacing(json_path) as temporary:
            temporary.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    means = {f["run"]: f["measures"] for f in figures}
    _outcome({"status": "ok", "average_over": options["average_over"], "runs": means})


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
def inspect(path: Path) -> None:
    """Show what a bundle, a Parquet file or an output folder holds, on one screen.

    \b
    Examples:
      dear-batch inspect bundles/dear-3b-ce
      dear-batch inspect candidates.parquet
      dear-batch inspect runs/tonight
    """  # noqa: D301 - click reads \b
    from dear_batch.inspection import inspect_path
    from dear_batch.show import show

    if not path.exists():
        raise UsageError(
            f"{path} does not exist.", valid="a bundle, a Parquet file, an output folder"
        )
    show(inspect_path(path))
