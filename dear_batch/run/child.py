"""One child process at work, seen from its parent: events, last words, signals, a watchdog.

Knows the protocol of `worker`, not what the work is nor what to do when the child dies.
"""

import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import IO, Any, Self

from dear_batch import errors
from dear_batch.errors import DearBatchError, TryAgainError
from dear_batch.log import log, redact, silence
from dear_batch.python_command import python_command
from dear_batch.run.interrupts import STOPS, Interrupts, stopped
from dear_batch.run.watch import StoppedError

TICK_S = 0.1  # the longest time in which a signal or a death goes unnoticed
DUMP_S = 2.0  # for the stacks of a child in which nothing moves
EXIT_S = 2.0  # for a child that has said its last word
REAP_S = 2.0  # for the kernel to end a killed child; one that hangs in a file system may outlast it
SUSPENDED_S = 5.0  # a turn that took so long: the machine slept, not the child
CHUNK_BYTES = 1 << 16
LAST_WORDS = 50  # lines of stderr
LONGEST_WORDS = 10_000  # bytes of one
_BREAKS = re.compile(rb"[\r\n]+")

Advance = Callable[[str, float, int], None]  # (stage, queries done, queries in all)


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a job its process is."""

    phase: str
    stage: str = ""
    shard: str = ""

    def __str__(self) -> str:
        """For people."""
        return f"stage {self.stage}, shard {self.shard}" if self.shard else f"phase {self.phase}"


class ChildDiedError(Exception):
    """The child ended without a last event; `how` is a signal's name or an exit code.

    `began` tells whether it had come to a shard, there or before.
    """

    def __init__(self, how: str, place: Place, last_words: tuple[str, ...], *, began: bool) -> None:
        super().__init__(how)
        self.how = how
        self.place = place
        self.began = began
        self.last_words = last_words


class Child:
    """Runs one request; `result` waits for its end, leaving the context kills what is left.

    The thread that enters must live as long as the child: the kernel ties one to the other.
    """

    def __init__(
        self, request: Mapping[str, Any], place: Place, interrupts: Interrupts, stall_s: float
    ) -> None:
        self.place = place
        self._request = request
        self._interrupts = interrupts
        self._stall_s = stall_s
        self._final: Mapping[str, Any] | None = None
        self._last_words = deque[str](maxlen=LAST_WORDS)
        self._selector = selectors.DefaultSelector()
        self._began = False
        self._told_to_stop = False
        self._killed = False
        self._dumped = 0.0  # when stacks were asked for
        self._advance: Advance = lambda _stage, _done, _total: None

    def __enter__(self) -> Self:
        """Start it.

        Raises:
            TryAgainError: the machine has no process to give.
        """
        try:
            self._process = subprocess.Popen(
                worker_command(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # a terminal's Ctrl-C reaches us alone
            )
        except OSError as error:
            what = f"The process of the job cannot be started: {error.strerror}."
            raise TryAgainError(what, where=str(self.place)) from error
        self._register(self._process.stdout, self._take_event)
        self._register(self._process.stderr, self._take_words)
        self._turned = self._lived = time.monotonic()
        self._ask()
        return self

    def __exit__(self, *_: object) -> None:
        """Let nothing of it live on."""
        self._kill()
        self._selector.close()
        for stream in (self._process.stdout, self._process.stderr):
            if stream:
                stream.close()
        if self._process.stdin:
            with suppress(BrokenPipeError):  # what it did not read any more
                self._process.stdin.close()

    def _ask(self) -> None:
        """Send the request; stdin stays open, its end would be our death."""
        line = json.dumps({"parent": os.getpid(), **self._request}).encode() + b"\n"
        if self._process.stdin:
            with suppress(BrokenPipeError):  # it died, as its status will show
                self._process.stdin.write(line)
                self._process.stdin.flush()

    def result(self, advance: Advance | None = None) -> Any:
        """What the work returned.

        Raises:
            DearBatchError: the child's own, reconstructed; a bug; or it was stopped or stalled.
            ChildDiedError: it died.
        """
        self._advance = advance or self._advance
        while self._final is None and self._lives():
            self._turn()
        self._let_it_end()
        if self._final is not None:
            return _result_of(self._final)
        raise self._cause_of_death()

    @property
    def told(self) -> bool:
        """Whether it said itself how it ended."""
        return self._final is not None

    def _turn(self) -> None:
        self._listen(TICK_S)
        now = time.monotonic()
        if now - self._turned > SUSPENDED_S:
            self._lived = now
        self._turned = now
        self._heed_signals()
        self._watch_for_stall()

    def _heed_signals(self) -> None:
        if self._interrupts.name and not self._told_to_stop:
            self._told_to_stop = True
            log("stopping", signal=self._interrupts.name, where=str(self.place))
            self._process.send_signal(signal.SIGTERM)
        if self._interrupts.overdue:
            log("killing", level="warning", where=str(self.place))
            self._kill()

    def _watch_for_stall(self) -> None:
        now = time.monotonic()
        if self._dumped and now - self._dumped > DUMP_S:
            self._kill()
        elif not self._dumped and now - self._lived > self._stall_s:
            self._dumped = now
            log("stalled", level="error", where=str(self.place), seconds=self._stall_s)
            self._process.send_signal(signal.SIGUSR1)

    def _let_it_end(self) -> None:
        """Hear a child out that has said its last word, then let go of it."""
        deadline = time.monotonic() + EXIT_S
        while self._lives() and time.monotonic() < deadline:
            self._listen(TICK_S)
        self._kill()
        while self._listen(0):
            pass

    def _lives(self) -> bool:
        return not self._killed and self._process.poll() is None

    def _kill(self) -> None:
        """Kill it and what it may have started; the group is its own until it is reaped."""
        if self._lives():
            self._killed = True
            os.killpg(self._process.pid, signal.SIGKILL)
            try:
                self._process.wait(REAP_S)
            except subprocess.TimeoutExpired:
                log("unkillable", level="error", pid=self._process.pid, where=str(self.place))

    def _cause_of_death(self) -> Exception:
        if self._interrupts.name:
            return stopped(self._interrupts.name)
        if self._dumped:
            return TryAgainError(
                f"Nothing moved for {self._stall_s:g} s, so the job was ended.",
                where=str(self.place),
                valid="a sign of life within execution.stall_timeout_s",
                next_step="see the stacks in the log; running the same command again goes on "
                "from what is finished",
            )
        how = _how(self._process.returncode)
        if how in {number.name for number in STOPS}:  # before it could listen to signals
            return stopped(how)
        return ChildDiedError(how, self.place, tuple(self._last_words), began=self._began)

    def _register(self, stream: IO[bytes] | None, take: Callable[[bytes], None]) -> None:
        if stream is not None:
            self._selector.register(stream.fileno(), selectors.EVENT_READ, Lines(take))

    def _listen(self, timeout_s: float) -> bool:
        """Take what the child says; whether there was anything."""
        ready = self._selector.select(timeout_s)
        for key, _ in ready:
            data = os.read(key.fd, CHUNK_BYTES)
            key.data.feed(data)
            if not data:
                self._selector.unregister(key.fd)
        return bool(ready)

    def _take_words(self, line: bytes) -> None:
        text = redact(line[:LONGEST_WORDS].decode(errors="replace"))
        self._last_words.append(text)
        log("stderr", line=text)

    def _take_event(self, line: bytes) -> None:
        try:
            event = json.loads(line)
            kind = event["event"]
        except (ValueError, TypeError, KeyError):  # printed before the worker claimed its stdout
            self._take_words(line)
            return
        self._lived = time.monotonic()
        if kind in {"done", "error", "bug"}:
            self._final = event
        elif kind == "advance":
            self._show(event["stage"], event["done"], event["total"])
        elif kind == "phase":
            self.place = Place(event["name"])
            log("phase", name=event["name"])
        elif kind == "shard":
            self._began = True
            self.place = replace(self.place, stage=event["stage"], shard=event["key"])
        elif kind == "log":
            log(event["name"], **event["fields"])

    def _show(self, stage: str, done: float, total: int) -> None:
        try:
            self._advance(stage, done, total)
        except OSError:  # the terminal was closed
            silence(sys.stderr)


class Lines:
    """Parts bytes into lines that are not empty; a progress bar's carriage return ends one too."""

    def __init__(self, take: Callable[[bytes], None]) -> None:
        self._take = take
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Take what was read; nothing is the end, where what is left is a line."""
        *lines, self._rest = _BREAKS.split(self._rest + data) if data else [self._rest, b""]
        for line in filter(None, lines):
            self._take(line)


def worker_command() -> list[str]:
    """Starts the worker."""
    return python_command("dear_batch.run.worker")


def _how(returncode: int | None) -> str:
    if returncode is None:
        return "SIGKILL"  # sent, and the kernel has not got round to it
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        return signal.Signals(-returncode).name
    except ValueError:
        return f"signal {-returncode}"


def _result_of(final: Mapping[str, Any]) -> Any:
    if final["event"] == "done":
        return final["result"]
    if final["event"] == "error":
        raise _error_of(redact(final))
    log("bug", level="error", what=final["what"], traceback=final["traceback"])
    raise errors.bug(redact(final["what"]))


def _error_of(event: Mapping[str, Any]) -> DearBatchError:
    """The child's error, of the nearest class that is known here."""
    known = {**vars(errors), StoppedError.__name__: StoppedError}
    kind = next(known[name] for name in event["classes"] if name in known)
    error: DearBatchError = kind(
        event["what"], where=event["where"], valid=event["valid"], next_step=event["next_step"]
    )
    return error
