"""Opens files without following links, and hashes each once for as long as it stays as it is.

A sha256 is remembered in the user's cache folder by device, inode, size and both times of the
file: a large bundle is not hashed again every night. Knows nothing of bundles.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass, field
from io import BufferedReader, FileIO
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, Self

from dear_batch.user_cache import FLAGS, cache_file, read_cache, write_cache

# A file that was changed this recently may be changed again within one tick of its time stamps.
SETTLED_NS = 2 * 10**9
MAX_REMEMBERED = 4096  # files; the oldest are forgotten


@dataclass(frozen=True, slots=True)
class FileState:
    """What changes when a file is written to, or replaced: times in nanoseconds."""

    device: int
    inode: int
    bytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> Self:
        """The state that a stat shows."""
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@contextlib.contextmanager
def opened_folder(path: str | PurePath, top: int | None = None) -> Iterator[int]:
    """The descriptor of a folder: a path, or the name of one below the folder `top`.

    Below `top` no component of the name may be a link.

    Raises:
        OSError: it cannot be opened, or a link is in the way.
    """
    if top is None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    else:
        descriptor = os.dup(top)
        for part in PurePosixPath(path).parts:
            above = descriptor
            try:
                descriptor = os.open(part, FLAGS | os.O_DIRECTORY, dir_fd=above)
            finally:
                os.close(above)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def opened_file(top: int, name: str) -> Iterator[BufferedReader]:
    """A file below the folder `top`, opened for reading; no component may be a link.

    Raises:
        OSError: it cannot be opened, or a link is in the way.
    """
    path = PurePosixPath(name)
    with opened_folder(path.parent, top) as folder:
        raw: Any = FileIO(
            path.name, opener=lambda part, _flags: os.open(part, FLAGS, dir_fd=folder)
        )
    with BufferedReader(raw) as file:
        yield file


@dataclass(slots=True)
class Hashes:
    """Compares opened files with their sha256; what matched is remembered from job to job."""

    path: Path | None
    paranoid: bool = False
    known: dict[str, list[Any]] = field(default_factory=dict)
    learned: bool = False

    @classmethod
    def load(cls, *, paranoid: bool = False) -> Self:
        """With what this user's earlier jobs remembered; `paranoid` hashes all the same."""
        path = cache_file("verified.json")
        return cls(path, paranoid, _remembered(path))

    def matches(self, file: BufferedReader, state: FileState, sha256: str) -> bool:
        """Whether a file, whose state was just read from its descriptor, has this hash."""
        device, inode, *rest = astuple(state)
        key, entry = f"{device}:{inode}", [*rest, sha256]
        if not self.paranoid and self.known.get(key) == entry:
            return True
        started_ns = time.time_ns()
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            return False
        self.known.pop(key, None)
        if max(state.mtime_ns, state.ctime_ns) < started_ns - SETTLED_NS:
            self.known[key] = entry
            self.learned = True
        return True

    def save(self) -> None:
        """Remember what was hashed; a folder that cannot be written is no reason to fail."""
        if self.learned:
            newest = dict(list(self.known.items())[-MAX_REMEMBERED:])
            write_cache(self.path, {"schema_version": 1, "files": newest})


def _remembered(path: Path | None) -> dict[str, list[Any]]:
    """What the cache file holds, nothing where it is no such file."""
    fields = read_cache(path)
    return fields["files"] if _is_cache(fields) else {}


def _is_cache(fields: Any) -> bool:
    if not isinstance(fields, dict) or fields.get("schema_version") != 1:
        return False
    files = fields.get("files")
    return isinstance(files, dict) and all(
        isinstance(entry, list) and [type(value) for value in entry] == [int, int, int, str]
        for entry in files.values()
    )
