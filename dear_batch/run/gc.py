"""Gives back the space of output folders: what dead attempts left, and whole outputs by age.

Only files of our own names are ever removed, no link is followed, and only the holder of a
folder's lock removes anything from it.
"""

import os
import re
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dear_batch.errors import DearBatchError, TrustError, TryAgainError, UsageError
from dear_batch.files.durable import remove
from dear_batch.files.results import published_names
from dear_batch.run.folder import (
    COMMIT_NAME,
    LOCK,
    MANIFEST,
    METRICS,
    PART_NAME,
    PLAN,
    REPORT,
    SUCCESS,
    TEMPORARY,
    locked,
    read_plan,
)
from dear_batch.run.ledger import FOLDERS, STAGES, Ledger, discard
from dear_batch.run.publish import QUARANTINE
from dear_batch.run.published import holder, sealed_manifest

_AGE = re.compile(r"(\d+)([hdw])")
_SECONDS = {"h": 3600, "d": 24 * 3600, "w": 7 * 24 * 3600}

Action = Literal["orphans", "removed", "held", "failed"]


@dataclass(slots=True)
class Collected:
    """What was removed from one folder. `foreign` are files in it that are not ours."""

    folder: str
    action: Action
    files: int = 0
    bytes: int = 0
    foreign: list[str] = field(default_factory=list)
    why: str = ""

    def count(self, sizes: Sequence[int]) -> None:
        """Add files of these bytes."""
        self.files += len(sizes)
        self.bytes += sum(sizes)


def age_s(text: str) -> int:
    """Seconds of an age such as `30d`.

    Raises:
        UsageError: it is none.
    """
    found = _AGE.fullmatch(text)
    if found is None:
        raise UsageError(
            f"{text!r} is no age.", where="--older-than", valid="a number with h, d or w: 30d"
        )
    return int(found[1]) * _SECONDS[found[2]]


def collect(
    folders: Sequence[Path], *, older_than_s: int | None = None, dry_run: bool = False
) -> Iterator[Collected]:
    """Tidy up each output folder among `folders` and directly below them.

    Args:
        folders: output folders, or folders of them (one a partition or night).
        older_than_s: remove finished outputs whose `_SUCCESS` is older, whole.
        dry_run: change nothing, and say what would be removed.

    Raises:
        UsageError: one of them is no folder, or a link.
    """
    for folder in folders:
        if folder.is_symlink() or not folder.is_dir():
            raise UsageError(
                f"{folder} is not a folder.", valid="output folders, or folders that hold them"
            )
    for folder in outputs(folders):
        is_old = older_than_s is not None and _is_older(folder, older_than_s)
        try:
            yield _dry(folder, whole=is_old) if dry_run else _collect(folder, whole=is_old)
        except TryAgainError as error:
            yield Collected(str(folder), "held", why=error.where)
        except DearBatchError as error:
            yield Collected(str(folder), "failed", why=error.what)
        except OSError as error:  # whatever it is, the other folders are not concerned
            yield Collected(str(folder), "failed", why=str(error))


def outputs(folders: Iterable[Path]) -> Iterator[Path]:
    """The output folders among some folders and their direct subfolders; no links."""
    seen = set[Path]()
    for folder in folders:
        below = sorted(path for path in folder.iterdir() if path.is_dir())
        for path in (folder, *below):
            if not path.is_symlink() and path not in seen and read_plan(path) is not None:
                seen.add(path)
                yield path


def _is_older(folder: Path, age: int) -> bool:
    """Whether a folder is finished, and longer ago."""
    try:
        if sealed_manifest(folder) is None:
            return False
    except TrustError:
        return False
    return (folder / SUCCESS).lstat().st_mtime < time.time() - age


def _dry(folder: Path, *, whole: bool) -> Collected:
    """What `_collect` would do; the lock is looked at, not taken."""
    lock = holder(folder)
    if lock and lock.held:
        return Collected(str(folder), "held", why=f"pid {lock.pid} on {lock.host}")
    targets = _targets(folder, whole=whole)
    found = Collected(str(folder), "removed" if whole else "orphans")
    for path in targets:
        found.count(_sizes(path))
    found.foreign = sorted(_foreign(folder, set(targets))) if whole else []
    return found


def _collect(folder: Path, *, whole: bool) -> Collected:
    found = Collected(str(folder), "removed" if whole else "orphans")
    with locked(folder):
        # A folder of which half is gone must not look finished, so its end goes first.
        for path in _targets(folder, whole=whole):
            sizes = _sizes(path)
            remove(path) if path.name == SUCCESS else discard(path)
            if not os.path.lexists(path):
                found.count(sizes)
        if whole:
            found.foreign = sorted(_foreign(folder, set()))
            _remove_folders(folder)
    return found


def _targets(folder: Path, *, whole: bool) -> list[Path]:
    """What is to go, in this order."""
    if not whole:
        return [path for path in Ledger(folder).orphans() if _is_ours(folder, path)]
    stems = [output["stem"] for output in (read_plan(folder) or {"outputs": []})["outputs"]]
    names = [name for stem in stems for name in published_names(stem).values() if "/" not in name]
    files = [SUCCESS, MANIFEST, *names, QUARANTINE, REPORT, METRICS]
    found = [folder / name for name in files if _is_file(folder / name)]
    # The plan goes last: until then the folder is known as one of ours.
    return [*found, *_inner(folder), folder / PLAN]


def _inner(folder: Path) -> Iterator[Path]:
    """Everything in the folders that a job makes in its own, and temporary files."""
    places = [folder / place for place in FOLDERS]
    places += [folder / "commits" / stage for stage in STAGES]
    for place in (folder, folder / "commits", *places):
        if place.is_dir() and not place.is_symlink():
            yield from sorted(p for p in place.iterdir() if _is_ours(folder, p))


def _is_ours(folder: Path, path: Path) -> bool:
    """Whether a path in an output folder has a name that only we give."""
    if path.is_symlink() or path.parent.is_symlink() or not path.exists():
        return False
    place = path.parent.relative_to(folder).parts
    if TEMPORARY.fullmatch(path.name):
        return True
    if not path.is_file():
        return False
    if place and place[0] == "commits":
        return bool(COMMIT_NAME.fullmatch(path.name))
    return bool(place) and place[0] in FOLDERS and bool(PART_NAME.fullmatch(path.name))


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def _sizes(path: Path) -> list[int]:
    """The bytes of a file, or of each file of a temporary folder."""
    if path.is_dir() and not path.is_symlink():
        return [p.lstat().st_size for p in path.rglob("*") if p.is_symlink() or not p.is_dir()]
    return [path.lstat().st_size]


def _foreign(folder: Path, targets: set[Path]) -> Iterator[str]:
    """What stays in a folder that is removed, because it is not ours."""
    for path in folder.rglob("*"):
        ours = path in targets or not targets.isdisjoint(path.parents) or path == folder / LOCK
        if not ours and (path.is_symlink() or not path.is_dir()):
            yield path.relative_to(folder).as_posix()


def _remove_folders(folder: Path) -> None:
    """The folders themselves and LOCK, so far as nothing else lies in them."""
    inner = [folder / "commits" / stage for stage in STAGES]
    for place in [*inner, *(folder / place for place in (*FOLDERS, "commits"))]:
        if not place.is_symlink():
            with suppress(OSError):  # not there, or not empty
                place.rmdir()
    if [path.name for path in folder.iterdir()] == [LOCK]:
        (folder / LOCK).unlink()
        folder.rmdir()
