"""Whose output folder it is, who works in it now, and whether it is done.

`LOCK` keeps a second run out; `plan.json` says what job writes here, and no other one does;
`_SUCCESS` holds the hash of the manifest and is written last.
"""

import fcntl
import hashlib
import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dear_batch.errors import ConfigurationError, OutputError, TryAgainError
from dear_batch.files.durable import make_folder, remove, replacing, sync, writing

SCHEMA_VERSION = 2
LOCK, PLAN, REPORT, MANIFEST = "LOCK", "plan.json", "report.json", "manifest.json"
METRICS, SUCCESS = "metrics.prom", "_SUCCESS"
# What a run that failed before it had a plan leaves.
BEFORE_A_PLAN = frozenset({LOCK, PLAN, REPORT, METRICS, "parts", "commits", "quarantine"})
# The names that only we give, in the folders of a job.
PART_NAME = re.compile(r"\d{5}(-\d{12})?(-[0-9a-f]{12})?-[0-9a-f]{32}(\.[a-z]+)?\.parquet")
COMMIT_NAME = re.compile(r"\d{5}(-\d{12})?\.json")
TEMPORARY = re.compile(r"\..+\.([0-9a-f]{32}|[a-z0-9_]{8})\.tmp")
SEAL = "sha256"
_OURS = re.compile(r"[^/\\\0]+\.(?:json|parquet|trec)")
Fields = dict[str, Any]


class OtherJobError(ConfigurationError):
    """The folder is another job's."""


def check_folder(folder: Path) -> None:
    """Refuse a folder that is not ours before anything is written.

    Raises:
        OutputError: a file, or a folder with contents and no `plan.json`.
    """
    try:
        is_other = folder.is_symlink() or folder.exists()
    except OSError as error:  # a name that is too long
        raise OutputError(f"The output {folder} cannot be made: {error.strerror}.") from error
    if is_other and not folder.is_dir():
        raise OutputError(f"The output {folder} is not a folder.", valid="a new or empty folder")
    above = next(p for p in folder.absolute().parents if p.exists())
    if not above.is_dir():
        raise OutputError(f"The output {folder} cannot be made: {above} is not a folder.")
    if folder.is_dir() and not _has_our_plan(folder):
        foreign = sorted(path.name for path in folder.iterdir() if not _is_ours(path))
        if foreign:
            raise OutputError(
                f"The output folder {folder} is not empty and not ours: it has no plan.json.",
                where=", ".join(foreign[:5]),
                valid="a new or empty folder, or one of an earlier run of this job",
                next_step="choose another --output",
            )


def _has_our_plan(folder: Path) -> bool:
    """Whether `plan.json` is a job's, or lies, damaged, beside a LOCK of ours."""
    if not (folder / PLAN).is_file():
        return False
    plan, lock = read_json(folder / PLAN) or {}, read_json(folder / LOCK) or {}
    return {"schema_version", "outputs"} <= plan.keys() or {"host", "pid"} <= lock.keys()


def _is_ours(path: Path) -> bool:
    """Whether a run that was killed before it had a plan, or while it began anew, left this."""
    if path.name == PLAN:  # another run has just written it, or it is not ours
        return _has_our_plan(path.parent)
    return path.name in BEFORE_A_PLAN or bool(TEMPORARY.fullmatch(path.name))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder and hold its lock; the lock goes with the process, however that ends.

    Raises:
        OutputError: the folder cannot be made or written to.
        TryAgainError: another run holds the lock.
    """
    try:
        for part in [*reversed(folder.absolute().parents), folder.absolute()]:
            if not part.exists():
                make_folder(part)
    except OSError as error:
        raise OutputError(
            f"Cannot make the output folder {folder}: {error.strerror}.",
            valid="a folder that can be written to",
            next_step="choose another --output",
        ) from error
    descriptor = _lock(folder)
    try:
        with writing(folder / LOCK):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, _holder(), 0)
        yield
    finally:
        os.close(descriptor)


def _lock(folder: Path) -> int:
    """The descriptor of LOCK, held; tried again where it was removed in that instant."""
    path = folder / LOCK
    while True:
        with writing(path):
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(path, flags, 0o666)
        try:
            with writing(path):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
            os.close(descriptor)
        except BlockingIOError:
            holder = os.read(descriptor, 1 << 12)
            os.close(descriptor)
            raise _held(folder, holder) from None


def _holder() -> bytes:
    start = datetime.now(UTC).isoformat(timespec="seconds")
    fields = {"host": socket.gethostname(), "pid": os.getpid(), "start": start}
    return json.dumps(fields).encode() + b"\n"


def _held(folder: Path, holder: bytes) -> TryAgainError:
    return TryAgainError(
        f"Another run is at work in {folder}.",
        where=holder.decode(errors="replace").strip(),
        valid="one run at a time",
        next_step=f"wait for it (dear-batch status {folder}), then run the same command again",
    )


def read_json(path: Path) -> Fields | None:
    """The object in a JSON file, None where there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError):
        return None
    return content if isinstance(content, dict) else None


def write_json(path: Path, fields: Fields) -> None:
    """Write a JSON file, complete or not at all.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    with replacing(path) as temporary:
        text = json.dumps(fields, indent=2, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def sealed(fields: Fields) -> Fields:
    """The fields of a file with their own hash, which tells of any changed byte."""
    return {**fields, SEAL: _seal(fields)}


def unsealed(fields: Fields) -> Fields | None:
    """The fields without their hash, None where it is not theirs."""
    rest = {name: value for name, value in fields.items() if name != SEAL}
    return rest if fields.get(SEAL) == _seal(rest) else None


def _seal(fields: Fields) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def write_plan(folder: Path, fields: Fields) -> None:
    """Write the plan of a folder.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    write_json(folder / PLAN, sealed(fields))


def read_plan(folder: Path) -> Fields | None:
    """The plan of a folder, None where there is none of this version that is whole."""
    plan = unsealed(read_json(folder / PLAN) or {})
    return plan if plan and plan.get("schema_version") == SCHEMA_VERSION else None


def names_in(manifest: Fields | None) -> list[str]:
    """What a manifest, whole or not, names as published, so far as it is a name of ours."""
    files = (manifest or {}).get("files")
    if not isinstance(files, dict):
        return []
    return [name for name in files if _OURS.fullmatch(name) and name != PLAN]


def finished(folder: Path) -> Fields | None:
    """The manifest of a folder that is done, else None.

    `_SUCCESS` holds its hash, and all files that it names are there in their size; what they
    hold is `verify`'s affair, but for the report, which is told again.
    """
    try:
        raw = (folder / MANIFEST).read_bytes()
        promised = (folder / SUCCESS).read_text(encoding="ascii").strip()
        if hashlib.sha256(raw).hexdigest() != promised:
            return None
        manifest: Fields = json.loads(raw)
        sizes = {name: (folder / name).lstat().st_size for name in manifest["files"]}
    except (OSError, ValueError):
        return None
    records = manifest["files"].items()
    whole = all(sizes[name] == record["bytes"] for name, record in records)
    report = manifest["files"].get(REPORT, {}).get("sha256")
    told = hashlib.sha256((folder / REPORT).read_bytes()).hexdigest() == report
    return manifest if whole and told else None


def refuse_other_job(folder: Path, found: Fields, wanted: Fields, *, again: bool = False) -> None:
    """Refuse what is not the job of the folder, and say in what they differ.

    `again`: another second stage over the same first one is offered.

    Raises:
        OtherJobError: they differ.
    """
    wanted = json.loads(json.dumps(wanted))
    differing = [name for name in wanted if found.get(name) != wanted[name]]
    if not differing:
        return
    inner = [name for name in differing if isinstance(wanted[name], dict) and found.get(name)]
    where = [name for name in differing if name not in inner]
    for name in inner:
        both = {**found[name], **wanted[name]}
        where += [f"{name}.{k}" for k in both if found[name].get(k) != wanted[name].get(k)]
    other = f"choose another --output, or begin anew with --restart, which empties {folder}"
    of_stage_two = all(n == "job.text_depth" or n.startswith("listwise") for n in where)
    raise OtherJobError(
        f"The output folder {folder} belongs to another job: its inputs, bundle or "
        "settings differ.",
        where=f"{folder / PLAN}: {', '.join(where)}",
        valid="a new folder for each job and night",
        next_step=f"--stage listwise, for another listwise stage over the same parts; or {other}"
        if again and wanted.get("listwise") and of_stage_two
        else other,
    )


def refuse_other_engine(folder: Path, known: Fields, runtime: Fields) -> None:
    """Refuse to go on with another engine or kind of device than a stage began with.

    Raises:
        OtherJobError: this machine, or what is installed on it, now gets another one.
    """
    began, gets = ((f.get("engine"), f["device"]) for f in (known, runtime))
    if began == gets or began[0] is None:  # the listwise stage has one engine
        return
    raise OtherJobError(
        f"The job in {folder} was begun with {began[0]} on {began[1]}; here it gets {gets[0]} on "
        f"{gets[1]}, whose scores differ by rounding.",
        where=str(folder / PLAN),
        valid="one engine and kind of device for a whole job",
        next_step=f"go on with --engine {began[0]} --device {began[1]}, or begin anew with "
        f"--restart, which empties {folder}",
    )


def clear(folder: Path, names: list[str]) -> None:
    """Remove a job from its folder, its end first; `names` are those that it publishes.

    Raises:
        OutputError: something cannot be removed.
    """
    for name in (SUCCESS, MANIFEST, *names, REPORT):
        remove(folder / name)
    for place in ("commits", "parts", "quarantine"):
        _remove_files(folder / place)
    remove(folder / PLAN)


def _remove_files(folder: Path) -> None:
    """Remove our own files in a folder and the folders of stages in it."""
    if folder.is_symlink() or not folder.is_dir():
        return
    with writing(folder):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                _remove_files(path)
            elif any(name.fullmatch(path.name) for name in (PART_NAME, COMMIT_NAME, TEMPORARY)):
                path.unlink()
        sync(folder)
