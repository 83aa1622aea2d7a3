"""The command line: parse → spec → call → exit code. Click only; the rest loads inside commands.

People read the terminal (stderr for progress and errors), programs read stdout, whose last
line is one JSON object where a command has an outcome.
"""

import sys
import traceback
from typing import Any

import click

from dear_batch import __version__
from dear_batch.cli.data import convert, evaluate, inspect
from dear_batch.cli.folders import gc, status, verify
from dear_batch.cli.jobs import run
from dear_batch.cli.models import export, score, verify_reference
from dear_batch.errors import DearBatchError, bug
from dear_batch.log import log, log_error


class _Group(click.Group):
    """A group whose commands end in our errors: a message on stderr, and their exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DearBatchError as error:
            log_error(error)
            sys.exit(error.exit_code)
        except (click.ClickException, click.exceptions.Exit, click.Abort, OSError):
            raise
        except Exception as error:  # noqa: BLE001 - a traceback helps nobody but us
            log("bug", "error", traceback=traceback.format_exc())
            log_error(bug(error))
            sys.exit(DearBatchError.exit_code)


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


for _command in (
    convert,
    export,
    run,
    status,
    verify,
    gc,
    score,
    evaluate,
    inspect,
    verify_reference,
):
    main.add_command(_command)
