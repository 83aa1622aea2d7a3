"""What becomes of several jobs from what becomes of each."""

import os
import signal
from pathlib import Path

import pytest

from dear_batch.cli.partitioned import Ended, run_partitions
from dear_batch.errors import DearBatchError, InputError, OutputError, TryAgainError
from dear_batch.run.interrupts import Interrupts
from dear_batch.run.watch import StoppedError
from dear_batch.specs import InputSpec, JobSpec, OutputSpec, PointwiseSpec

OK = Ended({"status": "ok", "exit_code": 0}, 0)
BAD = Ended({"status": "too-many-bad", "exit_code": 3}, 3)


def jobs(n: int) -> list[tuple[str, JobSpec]]:
    return [
        (f"dt={i}", JobSpec(InputSpec(("x",)), PointwiseSpec("b"), OutputSpec(f"out/dt={i}")))
        for i in range(n)
    ]


def run(*ends: Ended | DearBatchError) -> tuple[Ended, list[str]]:
    """The end of jobs that end so, and the folders of those that were run."""
    seen, rest = [], iter(ends)

    def run_one(spec: JobSpec) -> Ended:
        seen.append(Path(spec.output.folder).name)
        end = next(rest)
        if isinstance(end, DearBatchError):
            raise end
        return end

    return run_partitions(jobs(len(ends)), run_one), seen


def statuses(ended: Ended) -> list[str]:
    return [item["status"] for item in ended.fields["partitions"]]


def test_all_is_well() -> None:
    ended, seen = run(OK, OK)
    assert (ended.exit_code, ended.fields["status"]) == (0, "ok")
    assert ended.fields["partitions"] == [
        {"partition": f"dt={i}", "status": "ok", "exit_code": 0} for i in range(2)
    ]
    assert seen == ["dt=0", "dt=1"]


def test_what_fails_stops_nothing_and_what_no_retry_mends_gives_the_code() -> None:
    held = TryAgainError("Another run is at work.")
    ended, seen = run(OK, BAD, InputError("cut", where="x"), OutputError("full"), held, OK)
    assert len(seen) == 6
    assert (ended.exit_code, ended.fields["status"]) == (65, "failed")
    assert statuses(ended) == ["ok", "too-many-bad", "failed", "failed", "failed", "ok"]
    assert ended.fields["partitions"][2] == {
        "partition": "dt=2",
        "status": "failed",
        "exit_code": 65,
        "error": "cut",
        "where": "x",
    }
    assert run(held, OK)[0].exit_code == 75
    assert run(BAD, held)[0].exit_code == 75  # 3 says that all is published
    assert run(OK, BAD, OK)[0].exit_code == 3


def test_a_stop_stops_all() -> None:
    ended, seen = run(OK, StoppedError("SIGTERM came."), OK)
    assert seen == ["dt=0", "dt=1"]
    assert (ended.exit_code, statuses(ended)) == (75, ["ok", "stopped", "not-run"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_between_two_jobs(number: int) -> None:
    def run_one(_: JobSpec) -> Ended:
        os.kill(os.getpid(), number)
        return OK

    ended = run_partitions(jobs(3), run_one)
    assert (ended.exit_code, statuses(ended)) == (75, ["ok", "stopped", "not-run"])


def test_a_signal_while_a_job_publishes_stops_the_next() -> None:
    """A job that notes signals itself, and is past its last look at them, ends as it would."""

    def run_one(_: JobSpec) -> Ended:
        with Interrupts():
            os.kill(os.getpid(), signal.SIGTERM)
        return OK

    ended = run_partitions(jobs(3), run_one)
    assert (ended.exit_code, statuses(ended)) == (75, ["ok", "stopped", "not-run"])
    assert run_partitions(jobs(1), run_one).exit_code == 0


def test_a_bug_is_no_outcome() -> None:
    def run_one(_: JobSpec) -> Ended:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_partitions(jobs(2), run_one)
