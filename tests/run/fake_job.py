"""What a worker runs in place of `dear_batch.run.local` and `probe`: faults on demand.

`fake_job.install(folder)` writes a `sitecustomize.py` that puts this module in its place in
every Python that finds the folder on PYTHONPATH. A job is a list of steps, in FAKE_JOB as
JSON; files in the output folder tell the children of one job apart.
"""

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dear_batch.errors import InputError
from dear_batch.run.watch import Watch
from dear_batch.specs import JobSpec

ITEMS = 20  # of every shard


class FakeInputError(InputError):
    """A class that the parent does not know."""


def install(folder: Path) -> None:
    (folder / "sitecustomize.py").write_text(
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('dear_batch.run.local', {__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "for name in ('local', 'probe'):\n"
        "    sys.modules[f'dear_batch.run.{name}'] = module\n"
        "spec.loader.exec_module(module)\n",
        encoding="utf-8",
    )


def run_job(
    spec: JobSpec,
    watch: Watch,
    *,
    stage: str,
    restart: bool,
    poison: Mapping[str, frozenset[int]],
    careful: bool,
) -> dict[str, Any]:
    folder = Path(spec.output.folder)
    start = {"stage": stage, "restart": restart, "careful": careful, "pid": os.getpid()}
    _note(folder, "starts", start | {"poison": {key: sorted(v) for key, v in poison.items()}})
    job = Job(folder, watch, poison)
    for name, *arguments in json.loads(os.environ["FAKE_JOB"]):
        getattr(job, name)(*arguments)
    return {"status": "ok", "stage": stage, "depth": spec.pointwise.depth, "exit_code": 0}


def probe(
    spec: JobSpec, *, stage: str, shard: str, first: int, end: int | None, watch: Watch
) -> int:
    folder = Path(spec.output.folder)
    _note(folder, "probes", {"stage": stage, "shard": shard, "first": first, "end": end})
    job = Job(folder, watch, {})
    for name, *arguments in json.loads(os.environ.get("FAKE_PROBE", "[]")):
        getattr(job, name)(*arguments)
    for deadly in json.loads(os.environ.get("FAKE_POISON", "{}")).get(f"{stage}/{shard}", []):
        if end is not None and first <= deadly < end:
            die("SIGSEGV")
    return ITEMS


def _note(folder: Path, name: str, fact: Mapping[str, Any]) -> None:
    with (folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(fact) + "\n")


def die(how: str) -> None:
    if how == "SIGSEGV":
        ctypes.string_at(0)
    if how == "SIGABRT":
        os.abort()
    if how == "exit":
        os._exit(7)
    if how == "SIGTERM":  # as it was before the worker listened to it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.Signals[how])
    time.sleep(60)


class Job:
    """The steps that a test may ask for."""

    def __init__(self, folder: Path, watch: Watch, poison: Mapping[str, frozenset[int]]) -> None:
        self.folder = folder
        self.watch = watch
        self.poison = poison

    def phase(self, name: str) -> None:
        self.watch.phase(name)

    def shard(self, stage: str, key: str) -> None:
        """A shard: its poison kills unless it is left out; it is worked on only once."""
        done = self.folder / f"done-{key}"
        if done.exists():
            return
        self.watch.shard(stage, key)
        deadly = json.loads(os.environ.get("FAKE_POISON", "{}")).get(f"{stage}/{key}", [])
        if set(deadly) - self.poison.get(f"{stage}/{key}", frozenset()):
            die("SIGSEGV")
        done.touch()

    def enter(self, stage: str, key: str) -> None:
        self.watch.shard(stage, key)

    def die(self, how: str, times: int) -> None:
        """Die the first so many times that a job of this folder comes here."""
        deaths = self.folder / "deaths"
        before = len(deaths.read_text()) if deaths.exists() else 0
        if before < times:
            deaths.write_text("x" * (before + 1))
            die(how)

    def say(self, words: str) -> None:
        sys.stderr.write(words + "\n")

    def write_stdout(self, words: str) -> None:
        """As a native library would."""
        os.write(1, words.encode())

    def log(self, event: str, fields: Mapping[str, Any]) -> None:
        self.watch.log(event, **fields)

    def advance(self, times: int) -> None:
        for done in range(times):
            self.watch.advance("pointwise", done + 1, times)

    def work(self, seconds: float) -> None:
        """Batches, with a check after each."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.watch.check()
            time.sleep(0.01)

    def be_ready(self) -> None:
        """Let the test know that the next step begins."""
        (self.folder / "ready").write_text(str(os.getpid()))

    def sleep_in_native_code(self) -> None:
        """Without the GIL, and past signals: sleep() returns early for each."""
        while True:
            ctypes.CDLL(None).sleep(100)

    def hold_the_gil(self) -> None:
        """A native call that keeps the GIL: no Python code of this process runs any more."""
        while True:
            ctypes.PyDLL(None).sleep(100)

    def fail(self, what: str) -> None:
        raise FakeInputError(what, where="a.parquet, row 3", valid="text", next_step="mend it")

    def crash(self, what: str) -> None:
        raise ValueError(what)

    def environment(self, *names: str) -> None:
        self.watch.log("environment", **{name: os.environ.get(name) for name in names})
