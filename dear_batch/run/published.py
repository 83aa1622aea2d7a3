"""What an output folder says of itself to who does not hold its lock: `_SUCCESS`, commits, LOCK."""

import hashlib
import json
import os
import re
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dear_batch.errors import ConfigurationError, TrustError
from dear_batch.run.folder import LOCK, MANIFEST, PLAN, REPORT, SUCCESS
from dear_batch.run.ledger import STAGES, Commit, Ledger

LOCKS = Path("/proc/locks")
Fields = dict[str, Any]
_HELD = re.compile(r": FLOCK +ADVISORY +WRITE +(\d+) (\S+):(\d+) ")


@dataclass(frozen=True, slots=True)
class Holder:
    """Who wrote LOCK last, and whether they hold it; None where that cannot be seen from here."""

    held: bool | None
    host: str = ""
    pid: int = 0
    start: str = ""


@contextmanager
def as_written(folder: Path) -> Iterator[None]:
    """Read what a job wrote of itself, as if it had its form, and see that it has.

    Raises:
        ConfigurationError: it has another one.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ConfigurationError(
            f"What {folder} says of its job is not what dear-batch run writes.",
            where=f"{PLAN}, {REPORT} or {MANIFEST}: {type(error).__name__}: {error}",
            valid="the files as they were written",
            next_step="copy the folder again, or run the job again with --restart",
        ) from error


def open_regular(path: Path) -> int | None:
    """A descriptor of a regular file, None where there is nothing of that name.

    Raises:
        TrustError: it is a link, a folder, a device, or may not be read.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise TrustError(f"{path} cannot be opened: {error.strerror}.", where=str(path)) from error
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise TrustError(f"{path} is not a regular file.", where=str(path))


def sealed_manifest(folder: Path) -> Fields | None:
    """The manifest of a finished folder; None where it is not finished.

    Raises:
        TrustError: `_SUCCESS` is not of this manifest.
    """
    seal, raw = _read(folder / SUCCESS), _read(folder / MANIFEST)
    if seal is None:
        return None
    if raw is None or seal != f"{hashlib.sha256(raw).hexdigest()}\n".encode():
        raise TrustError(
            f"{SUCCESS} is not of this {MANIFEST}.",
            where=str(folder / SUCCESS),
            valid="the sha256 of the manifest",
        )
    fields = _said(raw)
    if not fields:
        raise TrustError(f"{MANIFEST} is no JSON object.", where=str(folder / MANIFEST))
    return fields


def _read(path: Path) -> bytes | None:
    descriptor = open_regular(path)
    if descriptor is None:
        return None
    with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor, no path
        return file.read()


def commits(folder: Path) -> Iterator[tuple[Path, Commit | None]]:
    """Every commit with its path; None for one that cannot be read."""
    ledger = Ledger(folder)
    for stage in STAGES:
        for path in sorted((folder / "commits" / stage).glob("[!.]*.json")):
            yield path, ledger.found(stage, path.stem)


def holder(folder: Path) -> Holder | None:
    """Who holds the folder, or did last; None where no job ever began in it.

    Trying the lock, were it for an instant and shared, would make a run that starts in that
    instant end with 75. The kernel's table of locks says who holds it without touching it. It
    shows the locks of this host alone, so of those of another one only LOCK's contents are known.
    """
    descriptor = open_regular(folder / LOCK)
    if descriptor is None:
        return None
    with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor, no path
        found = os.fstat(file.fileno())
        said = _said(file.read())
    host, pid = str(said.get("host", "")), said.get("pid", 0)
    held: bool | None = _is_locked(found, pid)
    if not held and host not in {"", socket.gethostname()}:
        held = None
    return Holder(held, host, pid if isinstance(pid, int) else 0, str(said.get("start", "")))


def _said(raw: bytes) -> Fields:
    """The object in a JSON file, empty where it holds none: LOCK until its holder has written."""
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _is_locked(found: os.stat_result, pid: object) -> bool | None:
    """Whether /proc/locks has the file: `1: FLOCK ADVISORY WRITE pid major:minor:inode 0 EOF`.

    On btrfs and overlays the device there is not the one that stat gives; then the pid decides.
    """
    try:
        lines = LOCKS.read_text(encoding="ascii")
    except OSError:
        return None
    device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}"
    return any(
        inode == str(found.st_ino) and (where == device or owner == str(pid))
        for owner, where, inode in _HELD.findall(lines)
    )
