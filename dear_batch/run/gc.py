"""Gives back the space of output folders: what dead attempts left, and whole outputs by age.

Only files of our own names are ever removed, no link is followed, and only the holder of a
folder's lock removes anything from it.
"""

import os
import re
import stat
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dear_batch.errors import DearBatchError, OutputError, TrustError, TryAgainError, UsageError
from dear_batch.files.durable import sync, writing
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
from dear_batch.run.published import as_written, holder, sealed_manifest

# A removal that has begun, in place of `_SUCCESS`. It takes that name, which nothing else has, by
# a rename, so at no moment does half a folder look finished, and goes last: a removal that was
# killed is finished by the next gc, of whatever age. A run that comes first removes it as any
# temporary file, and the folder is a job's again. The folder itself is not renamed, since what is
# foreign in it stays.
_REMOVING = re.compile(r"\.removing\.[0-9a-f]{32}\.tmp")
_AGE = re.compile(r"(\d+)([hdw])")
_SECONDS = {"h": 3600, "d": 24 * 3600, "w": 7 * 24 * 3600}

Action = Literal["orphans", "removed", "held", "failed"]


@dataclass(slots=True)
class Collected:
    """What was removed from one folder. `foreign` are files in it that are not ours.

    `exit_code` and `why` tell of one that failed or is held.
    """

    folder: str
    action: Action
    files: int = 0
    bytes: int = 0
    foreign: list[str] = field(default_factory=list)
    why: str = ""
    exit_code: int = 0

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
        try:
            yield (_dry if dry_run else _collect)(folder, older_than_s)
        except TryAgainError as error:
            yield Collected(str(folder), "held", why=error.where)
        except DearBatchError as error:
            yield Collected(str(folder), "failed", why=error.what, exit_code=error.exit_code)
        except OSError as error:  # whatever it is, the other folders are not concerned
            code = OutputError.exit_code
            yield Collected(str(folder), "failed", why=str(error), exit_code=code)


def outputs(folders: Iterable[Path]) -> Iterator[Path]:
    """The output folders among some folders and their direct subfolders; no links."""
    seen = set[Path]()
    for folder in folders:
        below = sorted(path for path in folder.iterdir() if path.is_dir())
        for path in (folder, *below):
            if not path.is_symlink() and path not in seen and _is_output(path):
                seen.add(path)
                yield path


def _is_output(folder: Path) -> bool:
    return read_plan(folder) is not None or bool(_marks(folder))


def _marks(folder: Path) -> list[Path]:
    """What a removal that has begun left in place of `_SUCCESS`."""
    found = sorted(folder.glob(".removing.*.tmp"))
    return [path for path in found if _REMOVING.fullmatch(path.name) and _is_file(path)]


def _goes_whole(folder: Path, age: int | None) -> bool:
    """Whether a folder is finished, and longer ago; or its removal has begun."""
    if _marks(folder):
        return True
    if age is None:
        return False
    try:
        if sealed_manifest(folder) is None:
            return False
    except TrustError:
        return False
    return (folder / SUCCESS).lstat().st_mtime < time.time() - age


def _dry(folder: Path, older_than_s: int | None) -> Collected:
    """What `_collect` would do; the lock is looked at, not taken."""
    lock = holder(folder)
    if lock and lock.held:
        return Collected(str(folder), "held", why=f"pid {lock.pid} on {lock.host}")
    whole = _goes_whole(folder, older_than_s)
    targets = _targets(folder, whole=whole)
    found = Collected(str(folder), "removed" if whole else "orphans")
    for path in targets:
        found.count(_sizes(path))
    found.foreign = sorted(_foreign(folder, set(targets))) if whole else []
    return found


def _collect(folder: Path, older_than_s: int | None) -> Collected:
    with locked(folder):
        whole = _goes_whole(folder, older_than_s)
        found = Collected(str(folder), "removed" if whole else "orphans")
        if whole:
            _begin_removal(folder)
        for path in _targets(folder, whole=whole):
            sizes = _sizes(path)
            discard(path)
            if not os.path.lexists(path):
                found.count(sizes)
        if whole:
            found.foreign = sorted(_foreign(folder, set()))
            _remove_folders(folder)
    return found


def _begin_removal(folder: Path) -> None:
    _published(folder)  # a folder that cannot be removed stays as it is
    success = folder / SUCCESS
    if _is_file(success):
        with writing(success):
            success.rename(folder / f".removing.{uuid.uuid4().hex}.tmp")
            sync(folder)


def _targets(folder: Path, *, whole: bool) -> list[Path]:
    """What is to go, in this order."""
    if not whole:
        return [path for path in Ledger(folder).orphans() if _is_ours(folder, path)]
    marks = _marks(folder)
    inner = [path for path in _inner(folder) if path not in marks]
    ends = [folder / PLAN, folder / SUCCESS, *marks]
    return [*_published(folder), *inner, *filter(_is_file, ends)]


def _published(folder: Path) -> list[Path]:
    """The files in the folder itself, but for the plan and the end.

    Raises:
        ConfigurationError: the plan does not say which.
    """
    with as_written(folder):
        stems = [output["stem"] for output in (read_plan(folder) or {"outputs": []})["outputs"]]
        named = [name for stem in stems for name in published_names(stem).values()]
        names = [MANIFEST, *(n for n in named if "/" not in n), QUARANTINE, REPORT, METRICS]
        return [folder / name for name in names if _is_file(folder / name)]


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
