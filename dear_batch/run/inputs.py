"""The inputs of a job, pinned: what they were when it was planned, and that they still are.

Size, time and footer are known at once. The sha256 of every byte is computed in a thread while
the job works, and recorded in the ledger before any shard of that input is committed.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from dear_batch.errors import InputError
from dear_batch.files.columns import Layout
from dear_batch.files.parquet import InputFile, open_input
from dear_batch.run.ledger import Ledger

_BLOCK = 1 << 20
BEAT_S = 0.5  # between two signs of life while a hash is waited for
_TAIL = 8  # length of the footer, magic


@dataclass(frozen=True, slots=True)
class Pin:
    """One input as it was planned."""

    path: str
    bytes: int
    mtime_ns: int
    footer_sha256: str
    rows: int
    layout: Layout

    @classmethod
    def of(cls, file: InputFile) -> Self:
        """Pin a file that was just opened.

        Raises:
            InputError: it cannot be read any more.
        """
        try:
            found = Path(file.path).stat()
            footer = _footer_sha256(file.path)
        except OSError as error:
            raise _unreadable(file.path, error) from error
        return cls(file.path, found.st_size, found.st_mtime_ns, footer, file.n_rows, file.layout)


def opened(path: str) -> tuple[InputFile, Pin]:
    """Open an input and pin it; both are of the same file.

    Raises:
        InputError: as `open_input`, or it is being replaced at this moment.
    """
    before = Path(path).stat() if Path(path).exists() else None
    file = open_input(path)
    pin = Pin.of(file)
    if before is None or _state_of(before) != _state(path):
        raise changed(path, "it is being written")
    return file, pin


def _footer_sha256(path: str) -> str:
    with Path(path).open("rb") as file:
        file.seek(-_TAIL, os.SEEK_END)
        tail = file.read(_TAIL)
        file.seek(-_TAIL - int.from_bytes(tail[:4], "little"), os.SEEK_END)
        return hashlib.sha256(file.read()).hexdigest()


def _footer_now(path: str) -> str | None:
    """The hash of a footer; None where what lies at the end is no footer any more."""
    try:
        return _footer_sha256(path)
    except OSError:
        return None


class Hashes:
    """The sha256 of each input, computed in the order in which a job reads them.

    A context manager; leaving it ends the thread.
    """

    def __init__(
        self, pins: Sequence[Pin], ledger: Ledger, beat: Callable[[], None] = lambda: None
    ) -> None:
        self._pins, self._ledger, self._beat = pins, ledger, beat
        self._over = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="dear-batch-hash")
        self._found: list[Future[tuple[str, tuple[int, ...]]]] = []

    def __enter__(self) -> Self:
        """Begin."""
        self._found = [self._pool.submit(self._hash, i) for i in range(len(self._pins))]
        return self

    def __exit__(self, *_: object) -> None:
        """End the thread."""
        self.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def stop(self) -> None:
        """Let nobody wait for a hash any longer, whatever thread it is."""
        self._over.set()

    def sha256(self, number: int) -> str:
        """The hash of an input, waited for; seen to be the one that an earlier attempt found.

        Raises:
            InputError: the input changed since it was planned.
            InterruptedError: it was stopped meanwhile.
        """
        while not self._found[number].done():
            wait([self._found[number]], timeout=BEAT_S)
            self._beat_on()
        sha256, state = self._found[number].result()
        if _state(self._pins[number].path) != state:
            self._check_again(number, sha256)
        return sha256

    def of_source(self, numbers: Sequence[int]) -> str:
        """One hash for all inputs of a source."""
        found = [self.sha256(number) for number in numbers]
        return joined(found)

    def check(self) -> None:
        """See that no input changed since it was planned, each to its last byte.

        Raises:
            InputError: one did.
        """
        for number in range(len(self._pins)):
            self.sha256(number)

    def _hash(self, number: int) -> tuple[str, tuple[int, ...]]:
        """Hash an input, with its state before the first byte was read."""
        pin = self._pins[number]
        state = _state(pin.path)
        sha256 = hash_blocks(pin.path, self._go_on)
        if state[:2] != (pin.bytes, pin.mtime_ns):
            raise changed(pin.path, "its size or time differs from the plan")
        if _footer_now(pin.path) != pin.footer_sha256:
            raise changed(pin.path, "its footer differs from the plan")
        record(self._ledger, number, pin, sha256)
        return sha256, state

    def _check_again(self, number: int, sha256: str) -> None:
        """Something touched the file; only its bytes count, and its size and time as planned."""
        pin = self._pins[number]
        state = _state(pin.path)
        if state[:2] != (pin.bytes, pin.mtime_ns) or hash_blocks(pin.path, self._beat_on) != sha256:
            raise changed(pin.path, "its bytes, size or time differ from the plan")
        self._found[number] = Future()
        self._found[number].set_result((sha256, state))

    def _beat_on(self) -> None:
        self._beat()
        self._go_on()

    def _go_on(self) -> None:
        if self._over.is_set():
            raise InterruptedError


def hash_blocks(path: str, check: Callable[[], None]) -> str:
    """The sha256 of a file; `check` is called between blocks and may raise.

    Raises:
        InputError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
                check()
    except InterruptedError:
        raise
    except OSError as error:
        raise _unreadable(path, error) from error
    return digest.hexdigest()


def changed(path: str, why: str) -> InputError:
    """The error for an input that is no longer what was planned."""
    return InputError(
        f"The input {Path(path).name} changed while the job was under way.",
        where=f"{path}: {why}",
        valid="the file as it was when the job was planned",
        next_step="put the file back and run the same command again, or run it on the new file "
        "with --restart or into another --output",
    )


def _state(path: str) -> tuple[int, ...]:
    try:
        return _state_of(Path(path).stat())
    except OSError as error:
        raise _unreadable(path, error) from error


def _state_of(found: os.stat_result) -> tuple[int, ...]:
    return (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev)


def _unreadable(path: str, error: OSError) -> InputError:
    return InputError(f"{path} cannot be read: {error.strerror}.", where=path)


def joined(found: Sequence[str]) -> str:
    """One hash for several."""
    return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()


def record(ledger: Ledger, number: int, pin: Pin, sha256: str) -> None:
    """Note the hash of an input, or see that it is the one that an earlier attempt noted.

    Raises:
        InputError: it is not.
    """
    known = ledger.found("input", f"{number:05d}") or ledger.commit(
        "input",
        f"{number:05d}",
        fingerprint=pin.footer_sha256,
        input_sha256=sha256,
        files={},
        counts={"path": pin.path, "sha256": sha256},
    )
    if known.input_sha256 != sha256:
        raise changed(pin.path, "its sha256 differs from that of an earlier attempt")


def recorded(ledger: Ledger, number: int) -> str | None:
    """The hash that an earlier attempt recorded for an input."""
    commit = ledger.found("input", f"{number:05d}")
    return commit.input_sha256 if commit else None


def recorded_of_source(ledger: Ledger, numbers: Sequence[int]) -> str | None:
    """One hash for all inputs of a source, where all are recorded."""
    found = [sha256 for number in numbers if (sha256 := recorded(ledger, number))]
    return joined(found) if len(found) == len(numbers) else None


def check_pins(pins: Sequence[Pin]) -> None:
    """See at a glance whether the inputs are as they were planned.

    Raises:
        InputError: one is gone, or its size or time differ.
    """
    for pin in pins:
        if _state(pin.path)[:2] != (pin.bytes, pin.mtime_ns):
            raise changed(pin.path, "its size or time differ from the plan")
