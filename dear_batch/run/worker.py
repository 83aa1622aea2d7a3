"""The process that does a job's work: `python -m dear_batch.run.worker`, started by `child`.

One line of JSON comes in through stdin, lines of JSON go out through what was stdout. It ends
with its parent, however that ends, and by `os._exit`: native libraries that crash while they
are unloaded can no longer spoil a job that is done.
"""

import ctypes
import faulthandler
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, NoReturn

from dear_batch.errors import DearBatchError
from dear_batch.run.watch import Watch
from dear_batch.spec_files import spec_from_dict
from dear_batch.specs import JobSpec

ADVANCE_S = 0.1  # between two events that tell how far the job is
BEAT_S = 1.0  # between two events that say only that it lives
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
EXIT_ORPHANED = 75  # nobody is left to see it
PR_SET_PDEATHSIG = 1  # linux/prctl.h

Event = Mapping[str, object]
Send = Callable[[Event], None]


def spec_to_json(spec: JobSpec) -> dict[str, Any]:
    """A spec as JSON that `spec_from_json` turns into an equal one."""
    filled: dict[str, Any] = _without_none(asdict(spec))
    return filled


def spec_from_json(values: Mapping[str, Any]) -> JobSpec:
    """The spec out of `spec_to_json`."""
    return spec_from_dict(values, JobSpec, where="request")


def _without_none(value: Any) -> Any:
    """TOML has no null, so `spec_from_dict` wants such keys left out; its tuples are lists."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return list(value) if isinstance(value, tuple) else value


class EventWatch(Watch):
    """Sends what a job tells as events, the frequent ones rarely."""

    def __init__(self, send: Send) -> None:
        super().__init__()
        self._send = send
        self._advances = dict[str, Event]()  # by stage; not sent yet
        self._advanced = 0.0
        self._beaten = 0.0

    def advance(self, stage: str, done: float, total: int) -> None:
        """Send it, or keep the latest until it is time."""
        self._advances[stage] = {"event": "advance", "stage": stage, "done": done, "total": total}
        if time.monotonic() - self._advanced >= ADVANCE_S:
            self.flush()

    def flush(self) -> None:
        """Send what was kept back."""
        self._advanced = time.monotonic()
        while self._advances:
            self._send(self._advances.popitem()[1])

    def phase(self, name: str) -> None:
        """Send it."""
        self.flush()
        self._send({"event": "phase", "name": name})

    def shard(self, stage: str, key: str) -> None:
        """Send it."""
        self.flush()
        self._send({"event": "shard", "stage": stage, "key": key})

    def log(self, event: str, **fields: object) -> None:
        """Send it."""
        self._send({"event": "log", "name": event, "fields": fields})

    def check(self) -> None:
        """Show a sign of life, then see whether to stop.

        Raises:
            StoppedError: as `Watch.check`.
        """
        now = time.monotonic()
        if now - self._beaten >= BEAT_S:
            self._beaten = now
            self._send({"event": "beat"})
        super().check()


def main() -> NoReturn:
    """Read the request, do the work, say how it ended."""
    _die_with_parent()
    send = _claim_stdout()
    line = sys.stdin.buffer.readline()
    request = json.loads(line) if line.endswith(b"\n") else None
    if request is None or os.getppid() != request["parent"]:  # it died before we were tied to it
        os._exit(EXIT_ORPHANED)
    threading.Thread(target=_outlive_nobody, daemon=True).start()
    watch = EventWatch(send)
    _prepare_process(watch)
    send({"event": "started"})
    final = _work(request, watch)
    watch.flush()
    send(final)
    sys.stdout.flush()
    os._exit(0)


def _die_with_parent() -> None:
    """Let the kernel kill us when the thread that started us ends, even while the GIL is held."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _outlive_nobody() -> None:
    """The parent holds the other end of stdin for as long as it lives."""
    while os.read(0, 1):
        pass
    os._exit(EXIT_ORPHANED)


def _claim_stdout() -> Send:
    """Keep stdout for events alone; what native libraries print there goes to stderr."""
    events = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    lock = threading.Lock()

    def send(event: Event) -> None:
        line = memoryview(json.dumps(event, default=str).encode() + b"\n")
        with lock:
            try:
                while line:
                    line = line[events.write(line) :]
            except BrokenPipeError:
                os._exit(EXIT_ORPHANED)

    return send


def _prepare_process(watch: EventWatch) -> None:
    """Signals stop the job at its next check; SIGUSR1 shows all stacks, whoever holds the GIL."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda _number, _frame: watch.stop.set())
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    os.environ.update(OFFLINE)


def _work(request: Mapping[str, Any], watch: Watch) -> Event:
    """The last event: what the work returned, or the error that ended it."""
    try:
        action = _run_job if "job" in request else _probe
        return {"event": "done", "result": action(request, watch)}
    except DearBatchError as error:
        return error_event(error)
    except BaseException as error:  # noqa: BLE001 - whatever it is, the parent must hear of it
        what = f"{type(error).__name__}: {error}".removesuffix(": ")
        return {"event": "bug", "what": what, "traceback": traceback.format_exc()}


def error_event(error: DearBatchError) -> Event:
    """An error in all its parts; of its classes the parent may know only a base."""
    return {
        "event": "error",
        "classes": [kind.__name__ for kind in type(error).__mro__],
        "what": error.what,
        "where": error.where,
        "valid": error.valid,
        "next_step": error.next_step,
    }


def _run_job(request: Mapping[str, Any], watch: Watch) -> dict[str, Any]:
    from dear_batch.run.local import run_job

    job = request["job"]
    return run_job(
        spec_from_json(job["spec"]),
        watch,
        stage=job["stage"],
        restart=job["restart"],
        careful=job["careful"],
        poison={key: frozenset(ordinals) for key, ordinals in job["poison"].items()},
    )


def _probe(request: Mapping[str, Any], watch: Watch) -> int:
    from dear_batch.run.probe import probe

    # It is expected to crash, dozens of times: no memory image of each.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    asked = dict(request["probe"])
    return probe(spec_from_json(asked.pop("spec")), watch=watch, **asked)


if __name__ == "__main__":
    main()
