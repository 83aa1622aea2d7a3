"""One job after another, a partition each: what becomes of the whole from what becomes of each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dear_batch.errors import EXIT_INCOMPLETE, DearBatchError
from dear_batch.log import error_parts, log, log_error

if TYPE_CHECKING:
    from dear_batch.specs import JobSpec


@dataclass(frozen=True, slots=True)
class Ended:
    """The outcome of a command, and its exit code."""

    fields: dict[str, Any]
    exit_code: int


def failed(error: DearBatchError) -> Ended:
    """The outcome of a job that did not publish."""
    from dear_batch.run.watch import StoppedError

    status = "stopped" if isinstance(error, StoppedError) else "failed"
    parts = error_parts(error)
    fields = {"status": status, "exit_code": error.exit_code, "error": parts.pop("what"), **parts}
    return Ended({name: value for name, value in fields.items() if value != ""}, error.exit_code)


def run_partitions(
    jobs: Sequence[tuple[str, "JobSpec"]], run_one: Callable[["JobSpec"], Ended]
) -> Ended:
    """Run every job; only a signal keeps those that are left from being run.

    The exit code is that of the first that was not published, one that a retry does not mend
    before 75, and 3 where all were.
    """
    from dear_batch.run.interrupts import Interrupts
    from dear_batch.run.watch import StoppedError

    ended = list[Ended]()
    stopped = False
    with Interrupts() as interrupts:  # between two jobs, too
        for key, spec in jobs:
            log("partition", key=key, output=spec.output.folder)
            try:
                interrupts.check()
                ended.append(run_one(spec))
            except DearBatchError as error:
                log_error(error)
                ended.append(failed(error))
                stopped = isinstance(error, StoppedError)
            if stopped:
                break
    return _together([key for key, _ in jobs], ended)


def _together(keys: Sequence[str], ended: Sequence[Ended]) -> Ended:
    # What was published, if not as asked for, hides nothing that was not, and what a retry mends
    # hides nothing that it does not.
    codes = [item.exit_code for item in ended if item.exit_code]
    code = min(codes, key=lambda c: {75: 1, EXIT_INCOMPLETE: 2}.get(c, 0), default=0)
    each = [{"partition": k, **e.fields} for k, e in zip(keys, ended, strict=False)]
    each += [{"partition": key, "status": "not-run"} for key in keys[len(ended) :]]
    statuses = {str(item["status"]) for item in each}
    (status,) = statuses if len(statuses) == 1 else ("ok" if code == 0 else "failed",)
    return Ended({"status": status, "exit_code": code, "partitions": each}, code)
