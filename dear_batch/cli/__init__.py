"""The command line: parse → spec → call → exit code. Click only; the rest loads inside commands.

People read the terminal (stderr for progress and errors), programs read stdout, whose last
line is one JSON object where a command has an outcome.
"""

import errno
import sys
import traceback
from typing import Any, NoReturn

import click

from dear_batch import __version__
from dear_batch.cli.bench import bench
from dear_batch.cli.data import convert, evaluate, inspect
from dear_batch.cli.doctor import doctor
from dear_batch.cli.folders import gc, status, verify
from dear_batch.cli.jobs import run
from dear_batch.cli.models import export, score, verify_reference
from dear_batch.cli.partitioned import failed
from dear_batch.errors import DearBatchError, UsageError, bug
from dear_batch.log import is_terminal, log, log_error, outcome

# What the system says of a path that was given, where no command expects it.
_OF_A_PATH = frozenset({errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EACCES, errno.EPERM})


class _Group(click.Group):
    """A group whose commands end in our errors: a message on stderr, and their exit code.

    `run`, which schedulers call, ends with a line of JSON on stdout, too, whatever the error.
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DearBatchError as error:
            log_error(error)
            _end(ctx, error)
        except click.UsageError as error:
            if ctx.invoked_subcommand != run.name:
                raise
            _end(ctx, _told(error))
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:  # noqa: BLE001 - a traceback helps nobody but us
            ours = _of_a_path(error) or _bug(error)
            log_error(ours)
            _end(ctx, ours)


def _end(ctx: click.Context, error: DearBatchError) -> NoReturn:
    if ctx.invoked_subcommand == run.name:
        outcome(failed(error).fields)
    sys.exit(error.exit_code)


def _told(error: click.UsageError) -> UsageError:
    """Click's own error as one of ours; people see it as click shows it."""
    ours = UsageError(error.format_message(), next_step=f"dear-batch {run.name} --help")
    if is_terminal(sys.stderr):
        error.show()
    else:
        log_error(ours)
    return ours


def _of_a_path(error: Exception) -> UsageError | None:
    """The error of a path that the system refuses, if it is one."""
    if not isinstance(error, OSError) or error.errno not in _OF_A_PATH or not error.filename:
        return None
    return UsageError(
        f"A path cannot be used: {error.strerror}.",
        where=str(error.filename),
        valid="a path that exists and may be read",
    )


def _bug(error: Exception) -> DearBatchError:
    log("bug", "error", traceback=traceback.format_exc())
    return bug(error)


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
    bench,
    evaluate,
    inspect,
    doctor,
    verify_reference,
):
    main.add_command(_command)
