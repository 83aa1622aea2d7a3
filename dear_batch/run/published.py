"""What an output folder says of itself: plan, commits, report, manifest, `_SUCCESS`, LOCK.

Read, never written, and without the lock. Nothing is followed but regular files of our names.
"""

import hashlib
import json
import os
import platform
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dear_batch.errors import InputError, TrustError

PLAN, REPORT, MANIFEST, SUCCESS, LOCK = (
    "plan.json",
    "report.json",
    "manifest.json",
    "_SUCCESS",
    "LOCK",
)
PLAN_VERSION = 2
STAGES = ("input", "regroup", "pointwise", "listwise")
LOCKS = Path("/proc/locks")
Fields = dict[str, Any]
_HELD = re.compile(r": FLOCK +ADVISORY +WRITE +(\d+) (\S+):(\d+) ")
_PART = re.compile(r"(parts|quarantine)/[^/]+\.parquet")


@dataclass(frozen=True, slots=True)
class Holder:
    """Who wrote LOCK last, and whether they hold it; None where that cannot be seen from here."""

    held: bool | None
    host: str = ""
    pid: int = 0
    start: str = ""


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


def read_bytes(path: Path) -> bytes | None:
    """A whole small file, None where there is none.

    Raises:
        TrustError: see `open_regular`.
    """
    descriptor = open_regular(path)
    if descriptor is None:
        return None
    with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor, no path
        return file.read()


def read_fields(path: Path) -> Fields | None:
    """A JSON object, None where there is no such file.

    Raises:
        TrustError: something else lies there.
    """
    raw = read_bytes(path)
    if raw is None:
        return None
    try:
        fields = json.loads(raw)
    except ValueError as error:
        raise TrustError(f"{path} is not valid JSON: {error}.", where=str(path)) from error
    if not isinstance(fields, dict):
        raise TrustError(f"{path} is not a JSON object.", where=str(path))
    return fields


def sealed_manifest(folder: Path) -> Fields | None:
    """The manifest of a finished folder; None where it is not finished.

    Raises:
        TrustError: `_SUCCESS` is not of this manifest.
    """
    seal = read_bytes(folder / SUCCESS)
    if seal is None:
        return None
    raw = read_bytes(folder / MANIFEST) or b""
    if seal != f"{hashlib.sha256(raw).hexdigest()}\n".encode():
        raise TrustError(
            f"{SUCCESS} is not of this {MANIFEST}.",
            where=str(folder / SUCCESS),
            valid="the sha256 of the manifest",
        )
    return read_fields(folder / MANIFEST)


def is_ours(folder: Path) -> bool:
    """Whether a folder, itself no link, holds a plan of a job."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    try:
        plan = read_fields(folder / PLAN)
    except TrustError:
        return False
    return plan is not None and plan.keys() >= {"schema_version", "inputs", "outputs"}


def read_plan(folder: Path) -> Fields | None:
    """The plan of a job, None where there is none.

    Raises:
        InputError: it is of another version.
        TrustError: it cannot be read.
    """
    plan = read_fields(folder / PLAN)
    if plan is not None and plan.get("schema_version") != PLAN_VERSION:
        raise InputError(
            f"{folder} was planned by another version of dear-batch.",
            where=f"{folder / PLAN}: schema_version {plan.get('schema_version')}",
            valid=f"schema_version {PLAN_VERSION}",
        )
    return plan


def shard_keys(plan: Fields) -> list[str]:
    """The keys of all shards, the same for both stages."""
    return [
        shard["key"]
        for output in plan["outputs"]
        for source in output["sources"]
        for shard in source["shards"]
    ]


def commits(folder: Path) -> Iterator[tuple[Path, Fields | None]]:
    """Every commit with its path; None for one that cannot be read or names foreign files."""
    for stage in STAGES:
        place = folder / "commits" / stage
        if place.is_symlink() or not place.is_dir():
            continue
        for path in sorted(place.glob("[!.]*.json")):
            yield path, _commit(path)


def _commit(path: Path) -> Fields | None:
    try:
        fields = read_fields(path)
        if fields is None:  # removed since it was listed
            return None
        names = [part["name"] for part in fields["files"].values()]
    except (TrustError, KeyError, TypeError, AttributeError):
        return None
    whole = fields.keys() >= {"fingerprint", "counts"} and all(map(_PART.fullmatch, names))
    return fields if whole else None


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
    if not held and host not in {"", platform.node()}:
        held = None
    return Holder(held, host, pid if isinstance(pid, int) else 0, str(said.get("start", "")))


def _said(raw: bytes) -> Fields:
    try:
        fields = json.loads(raw)
    except ValueError:  # empty until its holder has written into it
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
