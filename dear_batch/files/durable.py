"""Writes that end complete or absent, whatever interrupts them.

Knows nothing of what is written: the caller gets a temporary path, writes a file there in
its own way, and the file takes its final name when the block ends without an exception.
"""

import contextlib
import errno
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from dear_batch.errors import OutputError

_UNWRITABLE = frozenset(
    {
        errno.EACCES,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EIO,
        errno.EISDIR,
        errno.ELOOP,  # a link in the place of a file of ours
        errno.ENAMETOOLONG,
        errno.ENOLCK,  # a file system without locks, or without links
        errno.ENOSPC,
        errno.ENOTSUP,
        errno.EPERM,
        errno.EROFS,
    }
)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file whole: yields a new, empty temporary file in the folder of `path`.

    When the block ends, the file is flushed to disk and renamed to `path`, replacing what was
    there; when the block raises, it is removed and `path` is as before. A killed process can
    leave the temporary file (`.<name>.<uuid>.tmp`), never half a `path`.

    Raises:
        OutputError: the folder is missing, read-only or full, or `path` is a folder.
    """
    with _temporary(path) as temporary:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    with writing(path):
        sync(path.parent)


@contextlib.contextmanager
def staging(path: Path) -> Iterator[Path]:
    """As `replacing`, but the file stays temporary when the block ends, flushed to disk.

    The caller gives it its name, or removes it, when other files are ready too.

    Raises:
        OutputError: as for `replacing`.
    """
    temporary = new_temporary(path)
    try:
        yield temporary
        with writing(path):
            sync(temporary)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def linking(path: Path) -> Iterator[Path]:
    """As `replacing`, but a file of that name is never replaced.

    Raises:
        FileExistsError: there is one; it is as it was.
        OutputError: as for `replacing`.
    """
    with _temporary(path) as temporary:
        yield temporary
        sync(temporary)
        os.link(temporary, path, follow_symlinks=False)  # atomic: exactly one attempt wins
    with writing(path):
        sync(path.parent)


def new_temporary(path: Path) -> Path:
    """A new, empty temporary file beside `path`.

    Raises:
        OutputError: the folder is missing, read-only or full, or `path` is a folder.
    """
    if path.is_dir():
        raise OutputError(
            f"Cannot write {path.name}: a folder has that name.",
            where=str(path),
            valid="the path of a file",
            next_step=f"add a file name, such as {path / 'candidates.parquet'}",
        )
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with writing(path):
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        os.close(os.open(temporary, flags, 0o666))
    return temporary


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, gone when the block ends unless it got a name by then."""
    temporary = new_temporary(path)
    with writing(path):
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder that outlives a power cut; its parent is there.

    Raises:
        OutputError: the parent is read-only or full, or something else has that name.
    """
    refuse_other(folder)
    with writing(folder):
        if not folder.is_dir():
            folder.mkdir(exist_ok=True)
            sync(folder.parent)


def refuse_other(folder: Path) -> None:
    """See that what has the name of a folder, if anything, is one.

    Raises:
        OutputError: it is a file, or a link, which could lead anywhere.
    """
    if folder.is_symlink() or folder.is_file():
        kind = "link" if folder.is_symlink() else "file"
        raise OutputError(f"{folder} is a {kind}.", where=str(folder), valid="a folder of our own")


def remove(path: Path) -> None:
    """Remove a file, if it is there, for good.

    Raises:
        OutputError: the folder is read-only.
    """
    if path.exists() or path.is_symlink():
        with writing(path):
            path.unlink()
            sync(path.parent)


@contextlib.contextmanager
def scratch_folder(beside: Path) -> Iterator[Path]:
    """A folder for temporary files on the disk of `beside`, removed when the block ends.

    Raises:
        OutputError: the folder of `beside` is missing, read-only or full.
    """
    with writing(beside):
        folder = tempfile.TemporaryDirectory(
            prefix=f".{beside.name[:64]}.", suffix=".tmp", dir=beside.parent
        )
    with folder as name:
        yield Path(name)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the operating system says while `path` is written into an `OutputError`."""
    if not path.parent.is_dir():
        raise OutputError(
            f"Cannot write {path.name}: its folder does not exist.",
            where=str(path.parent),
            next_step=f"mkdir -p {path.parent}",
        )
    try:
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise OutputError(
            f"Cannot write {path.name}: {os.strerror(error.errno)}.",
            where=str(path),
            valid="a folder that can be written to and has space left",
            next_step="free space or name another output, then run the same command again",
        ) from error


def sync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    # A failed fsync is never tried again: the kernel may have dropped the pages it could not
    # write, and would report success the second time.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
