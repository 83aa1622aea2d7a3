"""What is done: a commit for each shard of each stage, and the files that it names.

A shard's files get unique names; they count once `commits/<stage>/<shard>.json`, put there by a
link that never replaces, names them with size and hash. Knows nothing of what a shard is.
"""

import json
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dear_batch.bundle import FileRecord, hash_file
from dear_batch.errors import OutputError
from dear_batch.files.durable import linking, make_folder, remove
from dear_batch.run.folder import PART_NAME, TEMPORARY, sealed, unsealed

SCHEMA_VERSION = 1
STAGES = ("input", "regroup", "pointwise", "listwise")
FOLDERS = ("parts", "quarantine")
Counts = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """A file that a commit names, by its path within the output folder."""

    name: str
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        """Check that it lies in one of our folders, whoever wrote the commit."""
        place, _, name = self.name.partition("/")
        if place not in FOLDERS or not name or "/" in name:
            raise ValueError(self.name)


@dataclass(frozen=True, slots=True)
class Commit:
    """A finished shard. `input_sha256` is of what it was made from, beside the fingerprint."""

    stage: str
    shard: str
    fingerprint: str
    input_sha256: str
    files: Mapping[str, Part]
    counts: Counts
    attempt: str
    created: str
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True, slots=True)
class Ledger:
    """The commits of one output folder, as seen by the attempt that holds its lock."""

    folder: Path
    attempt: str = field(default_factory=lambda: uuid.uuid4().hex)

    def new_file(self, place: str, shard: str, fingerprint: str = "", end: str = "") -> Path:
        """A unique path in `parts` or `quarantine`; its folder is there."""
        make_folder(self.folder / place)
        middle = f"-{fingerprint[:12]}" if fingerprint else ""
        return self.folder / place / f"{shard}{middle}-{uuid.uuid4().hex}{end}.parquet"

    def path_of(self, part: Part) -> Path:
        """Where a committed file lies."""
        return self.folder / part.name

    def kept(self, stage: str, shard: str, fingerprint: str, input_sha256: str) -> Commit | None:
        """The commit of a shard, if it holds; one that does not is removed.

        Raises:
            OutputError: it cannot be removed.
        """
        path = self._path(stage, shard)
        found = _read(path)
        wanted = (stage, shard, fingerprint, input_sha256)
        if (
            found
            and wanted == (found.stage, found.shard, found.fingerprint, found.input_sha256)
            and all(self._is_whole(part) for part in found.files.values())
        ):
            return found
        remove(path)
        return None

    def found(self, stage: str, shard: str) -> Commit | None:
        """The commit of a shard as it stands; its files are not looked at."""
        return _read(self._path(stage, shard))

    def commit(
        self,
        stage: str,
        shard: str,
        *,
        fingerprint: str,
        input_sha256: str,
        files: Mapping[str, Path],
        counts: Counts,
    ) -> Commit:
        """Make a shard count; if another attempt was first, its commit is the one that does.

        Raises:
            OutputError: the disk is full or read-only, or another attempt's commit is broken.
        """
        parts = {kind: self._part(path) for kind, path in files.items()}
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        mine = Commit(stage, shard, fingerprint, input_sha256, parts, counts, self.attempt, now)
        path = self._path(stage, shard)
        for folder in (path.parent.parent, path.parent):
            make_folder(folder)
        if self._link(path, mine):
            return mine
        theirs = self.kept(stage, shard, fingerprint, input_sha256)
        if theirs is None and self._link(path, mine):  # it did not hold, and is gone
            return mine
        for part in parts.values():
            remove(self.path_of(part))
        if theirs is None:
            raise OutputError(
                f"Another run commits to {self.folder} at the same time, and not the same.",
                where=str(path),
                valid="one run at a time on a file system whose locks work (flock)",
                next_step="stop the other run, then run the same command again",
            )
        return theirs

    def _link(self, path: Path, commit: Commit) -> bool:
        try:
            with linking(path) as temporary:
                temporary.write_text(json.dumps(sealed(asdict(commit))) + "\n", encoding="utf-8")
        except FileExistsError:
            return False
        return True

    def orphans(self) -> Iterator[Path]:
        """Files of ours that no commit names, and temporary files; the lock is held."""
        named = {part.name for commit in self._all() for part in commit.files.values()}
        for place in FOLDERS:
            for path in sorted((self.folder / place).glob("[!.]*.parquet")):
                if PART_NAME.fullmatch(path.name) and f"{place}/{path.name}" not in named:
                    yield path
        yield from temporaries(self.folder)

    def drop(self, stage: str) -> None:
        """Remove all commits of a stage."""
        for path in sorted((self.folder / "commits" / stage).glob("*.json")):
            remove(path)

    def _all(self) -> Iterator[Commit]:
        for stage in STAGES:
            for path in sorted((self.folder / "commits" / stage).glob("*.json")):
                commit = _read(path)
                if commit:
                    yield commit

    def _part(self, path: Path) -> Part:
        record = hash_file(path)
        return Part(path.relative_to(self.folder).as_posix(), record.bytes, record.sha256)

    def _is_whole(self, part: Part) -> bool:
        path = self.path_of(part)
        try:
            found = path.lstat()
            return (
                stat.S_ISREG(found.st_mode)
                and found.st_size == part.bytes
                and hash_file(path) == FileRecord(part.bytes, part.sha256)
            )
        except OSError:
            return False

    def _path(self, stage: str, shard: str) -> Path:
        return self.folder / "commits" / stage / f"{shard}.json"


def discard(path: Path) -> None:
    """Remove an orphan; one that stays costs space, and nothing else."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def temporaries(folder: Path) -> Iterator[Path]:
    """What killed attempts left: `.<name>.<uuid>.tmp`, files and folders."""
    places = [folder, *(folder / place for place in FOLDERS), folder / "commits"]
    places += [folder / "commits" / stage for stage in STAGES]
    for place in places:
        yield from sorted(p for p in place.glob(".*.tmp") if TEMPORARY.fullmatch(p.name))


def _read(path: Path) -> Commit | None:
    try:
        fields = unsealed(json.loads(path.read_text(encoding="utf-8"))) or {}
        files = {kind: Part(**part) for kind, part in fields["files"].items()}
        found = Commit(**{**fields, "files": files})
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return None
    return found if found.schema_version == SCHEMA_VERSION else None
