"""The command `run`: spec and options to a job, its report to an outcome and an exit code."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from dear_batch.cli.common import need, outcome
from dear_batch.errors import EXIT_INCOMPLETE, DearBatchError

EXAMPLES = """
\b
Examples:
  dear-batch run jobs/nightly.toml
  dear-batch run --input candidates.parquet --bundle bundles/mine --output runs/tonight
  dear-batch run jobs/nightly.toml --output "runs/$(date +%F)" --depth 50
  dear-batch run jobs/dl19.toml --stage pointwise
  dear-batch run jobs/dl19.toml --stage listwise --listwise-depth 20
"""


@click.command(epilog=EXAMPLES)
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
            need({k: overrides[v] for k, v in {**needed, "--output": "output.folder"}.items()})
        parsed = load_spec(spec, JobSpec, overrides)
        from dear_batch.run.local import run_job

        with progress("queries") as advance:
            report = run_job(parsed, advance, stage=stage)
    except DearBatchError as error:
        click.secho(f"error: {error}", err=True)
        outcome({"status": "failed", "exit_code": error.exit_code, "error": error.what})
        sys.exit(error.exit_code)
    run_summary(report, parsed.output.folder)
    _end(report, parsed.output.folder)


def _end(report: Mapping[str, Any], folder: str) -> None:
    """The outcome of a job that was published, and its exit code."""
    from dear_batch.run.report import TOO_MANY_FAILED

    if report["status"] != TOO_MANY_FAILED:
        outcome({"output": folder, **report})
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
    how = {"exit_code": EXIT_INCOMPLETE, "error": error.what, "output": folder}
    outcome({**how, **report})
    sys.exit(EXIT_INCOMPLETE)
