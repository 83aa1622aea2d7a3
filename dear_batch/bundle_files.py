"""The files of a bundle, each checked before a native library may open it.

Knows what a manifest says of files, nothing else of it.
"""

import mmap
import os
import shlex
import stat
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from dear_batch import trust
from dear_batch.errors import TrustError
from dear_batch.verified import FileState, Hashes, opened_file, opened_folder

if TYPE_CHECKING:
    from dear_batch.bundle import Engine, FileRecord

GRAPHS = "onnx"  # a graph may name any file beside it as its weights
ENGINES = "engines"  # nothing is loaded from there but by its own record


def check_nothing_else(folder: Path, top: int, listed: AbstractSet[str]) -> dict[str, FileState]:
    """Refuse what transformers or a graph could load though it is not listed.

    Returns the states of the folders: a file that is put there later changes them.

    Raises:
        TrustError: such a file or folder, or a link in place of a folder.
    """
    folders = {str(above) for name in listed for above in PurePosixPath(name).parents}
    states = {}
    for name in sorted(folders):
        with unreadable(folder, name), opened_folder(name, top) as opened:
            states[name] = FileState.of(os.fstat(opened))
            with os.scandir(opened) as found:
                entries = sorted(entry.name for entry in found)
        for entry in entries:
            path = (PurePosixPath(name) / entry).as_posix()
            # transformers loads no hidden files, and a desktop leaves some.
            hidden = entry.startswith(".") and path.split("/")[0] != GRAPHS
            if path not in listed | folders | {ENGINES} and not hidden:
                raise _unlisted(folder, path)
    return states


def _unlisted(folder: Path, name: str) -> TrustError:
    if not name.isprintable():  # no terminal is to obey it
        return changed(folder, ascii(name), "the manifest does not list it")
    remove = f"rm -r {shlex.quote(str(folder / name))}; or "
    return changed(folder, name, "the manifest does not list it", remove)


def check_files(
    folder: Path, top: int, files: "Mapping[str, FileRecord]", hashes: Hashes
) -> dict[str, FileState]:
    """Check each file on its descriptor, so that no path can lead elsewhere meanwhile.

    Returns the states of the files.

    Raises:
        TrustError: a file is missing, linked or changed, or could do harm when it is loaded.
    """
    states = {}
    for name, record in files.items():
        trust.check_suffix(folder / name)
        with regular(folder, top, name) as (file, states[name]):
            if states[name].bytes != record.bytes:
                raise changed(folder, name, f"{states[name].bytes} bytes, not {record.bytes}")
            if not hashes.matches(file, states[name], record.sha256):
                raise changed(folder, name, "its sha256 differs")
            trust.check_contents(folder / name, file, files, name)
            if FileState.of(os.fstat(file.fileno())) != states[name]:
                raise changed(folder, name, "it was written to while it was read")
    hashes.save()
    return states


@contextmanager
def checked_plan(folder: Path, top: int, engine: "Engine", hashes: Hashes) -> Iterator[mmap.mmap]:
    """An engine's bytes, hashed on the descriptor that they are read through.

    Raises:
        TrustError: it is missing, linked or changed, or was written to while it was used.
    """
    again = f"{_rebuild(folder, engine)}; or "
    with regular(folder, top, engine.path, again) as (file, state):
        if state.bytes != engine.bytes:
            raise changed(folder, engine.path, f"{state.bytes} bytes, not {engine.bytes}", again)
        if not hashes.matches(file, state, engine.sha256):
            raise changed(folder, engine.path, "its sha256 differs", again)
        hashes.save()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data
        if FileState.of(os.fstat(file.fileno())) != state:
            raise changed(folder, engine.path, "it was written to while it was loaded", again)


def _rebuild(folder: Path, engine: "Engine") -> str:
    """The command that makes an engine like this one."""
    options = {
        "engine": "tensorrt",
        "target": engine.sm,
        "flavour": engine.flavour,
        "precision": engine.precision,
        "row-tokens": engine.row_tokens,
        "batch-tokens": engine.batch_tokens,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return shlex.join(["dear-batch", "export", str(folder), *words])


@contextmanager
def regular(
    folder: Path, top: int, name: str, first: str = ""
) -> Iterator[tuple[BufferedReader, FileState]]:
    """A file of the bundle, opened: no link anywhere on the way, and of one name only.

    `first` is what an error says to try first.

    Raises:
        TrustError: it is something else, or not there.
    """
    with unreadable(folder, name, first), opened_file(top, name) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise changed(folder, name, "it is not a regular file", first)
        if found.st_nlink > 1:  # it could be written to through its other name
            raise changed(folder, name, "it is a hard link", first)
        yield file, FileState.of(found)


@contextmanager
def unreadable(folder: Path, name: str, first: str = "") -> Iterator[None]:
    """Turn what the system says of a file into an error about the bundle.

    Raises:
        TrustError: for an OSError.
    """
    try:
        yield
    except OSError as error:
        why = f"it is missing, a link, or cannot be read: {error.strerror}"
        raise changed(folder, name, why, first) from error


def changed(folder: Path, name: str, why: str, first: str = "") -> TrustError:
    """The error for a file that is not what the manifest says; `first` is to be tried first."""
    return TrustError(
        f"The bundle {folder} is not what its manifest says.",
        where=f"{name}: {why}",
        valid="the files exactly as `dear-batch export` wrote them",
        next_step=f"{first}copy the bundle again from its source, or export it again",
    )
