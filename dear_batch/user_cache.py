"""Small files in the user's cache folder that are believed: for this user alone.

Whoever can write them as this user can do anything that a job does, so they are believed if
nobody else can. They may be lost at any time. Knows nothing of what they hold.
"""

import json
import os
import stat
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

# O_NONBLOCK: a FIFO in place of a file must not hold the job until somebody writes into it.
FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
MAX_BYTES = 16 << 20
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def cache_file(name: str) -> Path | None:
    """Where such a file lies; None for a user without a home.

    XDG base directories: a relative path is to be ignored.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        folder = given if given.is_absolute() else Path.home() / ".cache"
    except RuntimeError:  # this user has no home
        return None
    return folder / "dear-batch" / name


def read_cache(path: Path | None) -> Any:
    """The JSON in the file, None where there is none or another user could have written it."""
    try:
        return json.loads(read_own(path) or "")
    except (ValueError, RecursionError):
        return None


def write_cache(path: Path | None, fields: Any) -> None:
    """Replace the file by JSON, as `write_own` does."""
    write_own(path, json.dumps(fields).encode())


def read_own(path: Path | None) -> bytes | None:
    """What the file holds, None where there is none or another user could have written it."""
    try:
        with os.fdopen(os.open(path or "", FLAGS), "rb") as file:
            found = os.fstat(file.fileno())
            mine = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
            if not mine or found.st_mode & OTHERS_WRITE or found.st_size > MAX_BYTES:
                return None
            return file.read()
    except OSError:
        return None


def write_own(path: Path | None, content: bytes) -> None:
    """Replace the file; a folder that cannot be written is no reason to fail.

    It is not synced: a lost cache costs what filled it.
    """
    if path is None:
        return
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            with os.fdopen(os.open(temporary, flags, 0o600), "wb") as file:
                file.write(content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
