"""A small two-stage job that runs in forked children, where tests kill it.

The first stage is a real tiny bundle; the second is the fake of `tests/run/fake_ranker`, so that
a run takes a fraction of a second. Everything that takes long to import is imported before the
fork, and nothing that starts threads is used before it.
"""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dear_batch.errors import DearBatchError
from dear_batch.pointwise import onnx_scorer
from dear_batch.run import plan, planning
from dear_batch.run.local import run_job
from dear_batch.run.watch import Watch
from dear_batch.spec_files import spec_from_dict
from dear_batch.specs import JobSpec
from tests.run.fake_ranker import install

assert onnx_scorer
BUG = 1
CALLS = ("fsync", "replace", "rename", "link", "unlink", "mkdir")


def run(settings: dict[str, Any], folder: Path, watch: Watch | None = None) -> dict[str, Any]:
    """The report of the job, or its error, in this process."""
    plan.LEAST_SHARD_BYTES = plan.SHARD_BYTES = settings["shard_bytes"]
    planning.LEAST_QUERIES = settings["least_queries"]
    install(pytest.MonkeyPatch())
    fields = {**settings["spec"], "output": {**settings["spec"]["output"], "folder": str(folder)}}
    try:
        return run_job(spec_from_dict(fields, JobSpec), watch, **settings.get("options", {}))
    except DearBatchError as error:
        return {"exit_code": error.exit_code, "error": str(error)}


def forked(action: Callable[[], Any]) -> int:
    """The pid of a child that does it and exits with 0, or with 1 and a traceback."""
    pid = os.fork()
    if pid:
        return pid
    try:
        action()
        sys.stdout.flush()
        os._exit(0)
    except BaseException:  # noqa: BLE001 - the end of a process
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(BUG)


def wait(pid: int) -> int:
    """Its exit code; negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_child(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The report of an undisturbed run in a child."""
    read, write = os.pipe()

    def work() -> None:
        os.write(write, json.dumps(run(settings, folder)).encode())

    pid = forked(work)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        raw = pipe.read()
    if wait(pid) != 0:
        raise AssertionError(f"a run in {folder} died")
    report: dict[str, Any] = json.loads(raw)
    return report


def kill_at(number: int, *, after: bool) -> None:
    """Kill this process at its so-manieth call that changes the disk, before or after it."""
    count = 0

    def wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
        def fatal(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            mine = count
            if mine == number and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*args, **options)
            if mine == number and after:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return fatal

    for name in CALLS:
        setattr(os, name, wrapped(getattr(os, name)))
