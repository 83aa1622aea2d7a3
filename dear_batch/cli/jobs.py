"""The command `run`: spec and options to a job, or one a partition; its end to an exit code."""

import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dear_batch.cli.common import need
from dear_batch.cli.partitioned import Ended, run_partitions
from dear_batch.errors import DearBatchError, IncompleteError, InputError, UsageError
from dear_batch.log import log, log_error, outcome

if TYPE_CHECKING:
    from dear_batch.specs import JobSpec

EXAMPLES = """
\b
Examples:
  dear-batch run jobs/nightly.toml
  dear-batch run --input candidates.parquet --bundle bundles/mine --output runs/tonight
  dear-batch run jobs/nightly.toml --output "runs/$(date +%F)" --depth 50
  dear-batch run jobs/nightly.toml --dry-run --price-per-hour 2.50
  dear-batch run jobs/nightly.toml --since 2026-11-01 --until 2026-12-01
  dear-batch run jobs/dl19.toml --stage pointwise
  dear-batch run jobs/dl19.toml --stage listwise --listwise-depth 20
"""


@dataclass(frozen=True, slots=True)
class Asked:
    """The options that are no part of a job's spec."""

    stage: Any
    restart: bool
    since: str | None
    until: str | None
    empty_exit: str | None
    dry_run: bool
    tokens_per_second: float | None
    price_per_hour: float | None


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
@click.option(
    "--max-bad",
    "input__max_bad",
    help="More quarantined candidates end with exit code 3: a count, or a share such as 1%; "
    "default 0.",
)
@click.option(
    "--since", help="First partition, such as 2026-11-23, of inputs in folders dt=2026-11-23."
)
@click.option("--until", help="The partition after the last: --since is in, --until is not.")
@click.option("--tag", "output__tag", help="Last column of the run file.")
@click.option(
    "--run-per-input", "output__run_per_input", is_flag=True, default=None, help="One run a file."
)
@click.option("--device", "execution__device", help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--engine",
    "execution__engine",
    type=click.Choice(["auto", "tensorrt", "onnxruntime", "torch"]),
    help="auto, the best that runs here: TensorRT, ONNX Runtime or PyTorch on a GPU, then a CPU.",
)
@click.option(
    "--stall-timeout",
    "execution__stall_timeout_s",
    type=int,
    help="Seconds without any progress after which the job ends with 75; default 900.",
)
@click.option(
    "--paranoid",
    "execution__paranoid",
    is_flag=True,
    default=None,
    help="Hash every file of a bundle, also those hashed before and unchanged since.",
)
@click.option("--restart", is_flag=True, help="Forget what is in the output folder and begin anew.")
@click.option(
    "--empty-exit",
    type=click.Choice(["0", "99"]),
    help="Exit code where there is nothing to do: no partition in the interval (0 by default), "
    "or no file that matches (65 by default).",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Read and check all inputs, count, estimate tokens, time and space; load no model.",
)
@click.option(
    "--tokens-per-second",
    type=click.FloatRange(min=0, min_open=True),
    help="Rate for --dry-run; by default that of this machine's last runs.",
)
@click.option(
    "--price-per-hour",
    type=click.FloatRange(min=0),
    help="What an hour of this machine costs, for --dry-run.",
)
def run(spec: Path | None, **options: Any) -> None:
    """Rerank candidate lists and write a TREC run file.

    Writes run.trec, results.parquet and report.json into the output folder, and
    quarantine.parquet where something was set aside. Options override the spec.

    Running the same command again goes on where it was cut off; a job that is done is left as
    it is.

    With --listwise a second stage re-orders the top of each list window by window and writes
    transcripts.parquet as well. Its first stage leaves parts/, from which --stage listwise
    goes on, also with other listwise settings.

    With --since and --until each partition of the interval is a job of its own, published into
    OUTPUT/dt=2026-11-23 and so on. One that fails does not stop the others.

    \b
    Exit codes:
       0  done (or nothing to do)
       1  a bug: report it with the log
       2  wrong command line or spec
       3  done and published, but more was quarantined than --max-bad, or more
          windows failed than --max-failed-windows
      65  bad input data
      73  cannot write: disk full, read-only, or not our folder
      75  try again: stopped, stalled, or another run holds the folder
      77  a model artefact is not trusted
      78  parts that do not fit together, or another job's folder
      99  nothing to do, with --empty-exit 99
    """  # noqa: D301 - click reads \b
    asked = Asked(**{name: options.pop(name) for name in Asked.__slots__})
    ended = _ended(spec, options, asked)
    outcome(ended.fields)
    sys.exit(ended.exit_code)


def _ended(path: Path | None, options: Mapping[str, Any], asked: Asked) -> Ended:
    """Do what is asked for."""
    spec = _spec(path, options)
    if bool(asked.since) != bool(asked.until):
        raise UsageError(
            "--since and --until go together.",
            valid="both, or neither: there is no latest partition",
        )
    if asked.empty_exit is not None and _matches_nothing(spec.input.paths):
        return _nothing(asked, f"No file matches {', '.join(spec.input.paths)}.")
    run_one = partial(_estimate if asked.dry_run else _run, asked=asked)
    if asked.since and asked.until:
        return _each_partition(spec, asked.since, asked.until, asked, run_one)
    return run_one(spec)


def _spec(path: Path | None, options: Mapping[str, Any]) -> "JobSpec":
    from dear_batch.spec_files import load_spec
    from dear_batch.specs import JobSpec

    overrides = {name.replace("__", "."): value for name, value in options.items()}
    if path is None:
        needed = {"--input": "input.paths", "--bundle": "pointwise.bundle"}
        need({k: overrides[v] for k, v in {**needed, "--output": "output.folder"}.items()})
    return load_spec(path, JobSpec, overrides)


def _each_partition(spec: "JobSpec", since: str, until: str, asked: Asked, run_one: Any) -> Ended:
    from dear_batch.run.partitions import partitions, spec_of

    found = partitions(spec.input.paths, since, until)
    if not found:
        return _nothing(asked, f"No partition lies from {since} to before {until}.")
    return run_partitions([(item.key, spec_of(spec, item)) for item in found], run_one)


def _matches_nothing(paths: tuple[str, ...]) -> bool:
    """Whether every input is a glob without a file."""
    from dear_batch.run.plan import expand

    for path in paths:
        with suppress(InputError):
            expand([path])
            return False
    return True


def _nothing(asked: Asked, why: str) -> Ended:
    code = int(asked.empty_exit or 0)
    log("nothing-to-do", why=why)
    return Ended({"status": "nothing-to-do", "exit_code": code, "why": why}, code)


def _run(spec: "JobSpec", asked: Asked) -> Ended:
    """Run a job in a process of its own, watched over by this one."""
    from dear_batch.run.supervisor import supervise
    from dear_batch.show import progress, run_summary

    folder = spec.output.folder
    with progress("queries") as advance:
        ended = supervise(
            spec,
            stage=asked.stage,
            restart=asked.restart,
            advance=advance,
            on_loss=partial(_report_loss, spec),
        )
    run_summary(ended.report, folder)
    fields = {"output": folder, **ended.report, "exit_code": ended.exit_code}
    if error := _incomplete(ended.report, folder):
        log_error(error)
        fields["error"] = error.what
    return Ended(fields, ended.exit_code)


def _report_loss(spec: "JobSpec", error: DearBatchError, phase: str) -> None:
    """Report for a process that died or hung and could not; not over another run's head.

    One that did not get beyond its first check may have stood in another job's folder.
    """
    from dear_batch.run.folder import locked
    from dear_batch.run.outcome import failed as report_failed

    if phase in {"start", "check"}:
        return
    with suppress(DearBatchError), locked(Path(spec.output.folder)):
        report_failed(spec, error, phase)


def _estimate(spec: "JobSpec", asked: Asked) -> Ended:
    """Run nothing: there is no process but this one, which is to heed signals, too."""
    from dear_batch.run.interrupts import Interrupts

    with Interrupts() as interrupts:  # before what takes long to import
        from dear_batch.run.estimate import Price, estimate
        from dear_batch.show import estimate_table, progress

        with progress("queries") as advance:
            fields = estimate(
                spec,
                stage=asked.stage,
                restart=asked.restart,
                price=Price(asked.tokens_per_second, asked.price_per_hour),
                advance=advance,
                beat=interrupts.check,
            )
    estimate_table(fields)
    return Ended(fields, fields["exit_code"])


def _incomplete(report: Mapping[str, Any], folder: str) -> IncompleteError | None:
    """What to say of a job that was published, and is not what was asked for."""
    status = report["status"]
    if status == "too-many-failed-windows":
        listwise = report["listwise"]
        return IncompleteError(
            f"{listwise['windows']['failed']:,} of {listwise['windows']['total']:,} windows "
            "failed; their documents keep the order that they had before the window.",
            where=f"{folder}: transcripts.parquet, status 'failed'",
            valid=f"up to {listwise['max_failed_windows']} failed windows",
            next_step="the same command with --stage listwise and other settings, "
            "or with a higher --max-failed-windows",
        )
    if status == "too-many-bad":
        bad = max(report[unit]["quarantined"] for unit in ("queries", "candidates"))
        return IncompleteError(
            f"{bad:,} of {report['candidates']['read']:,} candidates were set aside, more than "
            "--max-bad; the others are published.",
            where=f"{folder}: quarantine.parquet",
            next_step="run the same command with a higher --max-bad; or mend the input, and run it "
            "with --restart",
        )
    return None
