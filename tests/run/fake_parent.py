"""A command line around `supervise`, as `dear_batch.cli` has one: the spec's folder is argv[1]."""

import signal
import sys

from dear_batch.errors import DearBatchError
from dear_batch.log import error_parts, log_error, outcome
from dear_batch.run.supervisor import supervise
from dear_batch.run.watch import StoppedError
from dear_batch.show import progress
from dear_batch.specs import ExecutionSpec, InputSpec, JobSpec, OutputSpec, PointwiseSpec


def spec_of(folder: str, stall_timeout_s: int = 60) -> JobSpec:
    return JobSpec(
        input=InputSpec(("in.parquet",), max_bad="1%"),
        pointwise=PointwiseSpec("bundle", depth=3),
        output=OutputSpec(folder),
        execution=ExecutionSpec(stall_timeout_s=stall_timeout_s),
    )


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where pytest is in a job
    if "nohup" in sys.argv:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with progress("queries") as advance:
            ended = supervise(spec_of(sys.argv[1]), advance=advance)
    except DearBatchError as error:
        log_error(error)
        status = "stopped" if isinstance(error, StoppedError) else "failed"
        outcome({"status": status, "exit_code": error.exit_code, "error": error_parts(error)})
        sys.exit(error.exit_code)
    outcome({"output": sys.argv[1], **ended.report})
    sys.exit(ended.exit_code)


if __name__ == "__main__":
    main()
