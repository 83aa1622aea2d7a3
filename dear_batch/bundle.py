"""What a bundle holds, written and read in one place.

    bundle.json            the manifest: sources, recipe, graphs, parity, sha256 of every file
    config.json tokenizer.json …                  as Hugging Face saves them
    onnx/model.onnx onnx/packed.onnx onnx/weights.safetensors   pointwise
    model.safetensors …                           listwise
    engines/tensorrt_rtx-sm_89/<sha256>.plan …    compiled, each for one kind of GPU

A bundle is trusted file by file: nothing is loaded that the manifest does not name with its
hash, and the folder holds nothing else, since transformers takes what it finds there. Native
libraries open files by their paths, so what was checked is compared with what lies there once
they have. Engines are listed by themselves: they can be added later, and one is checked when it
is about to be loaded. Knows nothing of engines or of how a bundle is made.
"""

import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from dear_batch import trust
from dear_batch.bundle_files import (
    ENGINES,
    changed,
    check_files,
    check_nothing_else,
    checked_plan,
    regular,
    unreadable,
)
from dear_batch.errors import ConfigurationError, DearBatchError, TrustError
from dear_batch.manifest_fields import misfit
from dear_batch.pointwise.profiles import Profile
from dear_batch.pointwise.recipe import Recipe
from dear_batch.verified import FileState, Hashes, opened_folder

SCHEMA_VERSION = 3
MANIFEST = "bundle.json"
MAX_MANIFEST_BYTES = 16 << 20
OWN = "sha256"  # the manifest's field about itself
BLANK = "0" * 64
Task = Literal["pointwise", "listwise"]
Precision = Literal["fp32", "fp16", "bf16"]
Flavour = Literal["tensorrt", "tensorrt_rtx"]  # which of its two products, as Python imports it


@dataclass(frozen=True, slots=True)
class Source:
    """Where the weights came from. Revisions are 40-hex commits, or None for local folders."""

    model: str
    revision: str | None
    adapter: str | None = None
    adapter_revision: str | None = None
    base_checked_by: Literal["name", "shapes"] | None = None


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size in bytes and sha256 of one file of the bundle."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Engine:
    """A TensorRT plan of the packed graph: it runs on that version, SM and platform alone.

    `path` within the bundle; `sm` such as "sm_89"; `platform` such as "linux-x86_64";
    `row_tokens` and `batch_tokens` are the most that its profiles take.
    """

    path: str
    bytes: int
    sha256: str
    flavour: Flavour
    version: str
    sm: str
    platform: str
    precision: Precision
    row_tokens: int
    batch_tokens: int
    profiles: tuple[Profile, ...]
    build_seconds: float

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """The record that `asdict` made."""
        return cls(**{**fields, "profiles": tuple(map(Profile.from_json, fields["profiles"]))})

    def __str__(self) -> str:
        """As messages name it."""
        return f"{self.flavour} {self.version} {self.sm} {self.precision} ({self.platform})"


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of `bundle.json`.

    `graphs` maps a graph's path to its inputs and outputs: name → [dtype, dimension…].
    `own_scores` are PyTorch's fp32 scores of the pairs that the package brings
    (`pointwise.own_pairs`); `peaks` the largest absolute values around each layer's
    down-projection while they were scored. Both are None for a listwise bundle.
    """

    task: Task
    source: Source
    precision: Precision
    recipe: Recipe | None
    architecture: Mapping[str, int | str]
    graphs: Mapping[str, Any]
    parity: Mapping[str, Any] | None
    versions: Mapping[str, str]
    created: str
    own_scores: tuple[float, ...] | None = None
    peaks: tuple[float, ...] | None = None
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    engines: tuple[Engine, ...] = ()
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """The manifest that `to_json` wrote."""
        recipe = fields["recipe"]
        files = {path: FileRecord(**record) for path, record in fields["files"].items()}
        lists = {
            name: None if fields[name] is None else tuple(fields[name])
            for name in ("own_scores", "peaks")
        }
        return cls(
            **{
                **fields,
                **lists,
                "engines": tuple(map(Engine.from_json, fields["engines"])),
                "source": Source(**fields["source"]),
                "recipe": None if recipe is None else Recipe.from_json(recipe),
                "files": files,
            }
        )

    def to_json(self) -> dict[str, Any]:
        """JSON-able fields."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle. `opened` is what its files and folders were when they were checked.

    `sha256` is that of the manifest without its engines: it says what model this is. `paranoid`
    hashes engines, too, however lately they were hashed.
    """

    folder: Path
    manifest: Manifest
    sha256: str
    opened: Mapping[str, FileState] = field(default_factory=dict)
    paranoid: bool = False

    def file(self, name: str) -> Path:
        """The path of a file that the manifest lists.

        Raises:
            TrustError: it does not, so nothing is known of the file.
        """
        if name not in self.manifest.files:
            raise changed(self.folder, name, "the manifest does not list it")
        return self.folder / name

    def check_unchanged(self) -> None:
        """Find out whether what a native library has read is what was checked.

        Engines may have been added meanwhile: they are no part of what was read.

        Raises:
            TrustError: a file or folder was written to or replaced since, or never checked.
        """
        names = dict.fromkeys((MANIFEST, *self.manifest.files, *self.opened))
        stale = [name for name in names if not self._is_as_checked(name)]
        if stale and not self._only_got_engines(stale):
            raise TrustError(
                f"The bundle {self.folder} was changed while it was being loaded.",
                where=f"{stale[0]} is no longer what was checked",
                valid="a bundle that nobody writes to",
                next_step="run the job again; export a new version to a path of its own",
            )

    def _is_as_checked(self, name: str) -> bool:
        found = self._found(name)
        return found is not None and found == self.opened.get(name)

    def _only_got_engines(self, stale: Sequence[str]) -> bool:
        """Whether the manifest was replaced by one of the same model, and nothing else came.

        The manifest's folder changes with that, and when the folder of the engines is made.
        """
        checked = self.opened.get(".")
        if self.manifest.task != "pointwise" or not checked or not {MANIFEST, "."} >= {*stale}:
            return False
        try:
            with opened_folder(self.folder) as top, opened_folder(ENGINES, top):
                here = FileState.of(os.fstat(top))
                manifest = _parse(self.folder / MANIFEST, _read_manifest(self.folder, top)[0])
                states = check_nothing_else(self.folder, top, {MANIFEST, *manifest.files})
        except (OSError, DearBatchError):
            return False
        same_folder = (here.device, here.inode) == (checked.device, checked.inode)
        others = {name: state for name, state in states.items() if name != "."}
        same_others = others.items() <= self.opened.items()
        return same_folder and same_others and _identity(manifest) == self.sha256

    def _found(self, name: str) -> FileState | None:
        """What lies there now; a link is not followed."""
        try:
            with opened_folder(self.folder) as top:
                return FileState.of(os.stat(name, dir_fd=top, follow_symlinks=False))
        except OSError:
            return None

    @contextmanager
    def plan(self, engine: Engine) -> Iterator[mmap.mmap]:
        """The bytes of an engine, seen to be those that the manifest names, while they are used.

        Raises:
            TrustError: they are not, or were written to meanwhile, or it is no regular file.
        """
        with (
            unreadable(self.folder, engine.path),
            opened_folder(self.folder) as top,
            checked_plan(self.folder, top, engine, Hashes.load(paranoid=self.paranoid)) as data,
        ):
            yield data

    @property
    def recipe(self) -> Recipe:
        """The pointwise recipe.

        Raises:
            ConfigurationError: a listwise bundle.
        """
        if self.manifest.recipe is None:
            raise ConfigurationError(
                f"The bundle {self.folder} is listwise; it has no pointwise recipe.",
                valid="a pointwise bundle",
                next_step=f"dear-batch inspect {self.folder}",
            )
        return self.manifest.recipe


def hash_file(path: Path) -> FileRecord:
    """Size and sha256 of a file, read once."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(path.stat().st_size, digest)


def hash_folder(folder: Path) -> dict[str, FileRecord]:
    """Every file below `folder` but the manifest, by relative path."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {p.relative_to(folder).as_posix(): hash_file(p) for p in files}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `bundle.json`; the folder is published by a rename of the whole.

    It begins with the sha256 of itself, that field in zeros, so that it tells of any changed
    byte, as its other fields do of the files.
    """
    text = json.dumps({OWN: BLANK, **manifest.to_json()}, indent=2, ensure_ascii=False) + "\n"
    text = text.replace(BLANK, hashlib.sha256(text.encode()).hexdigest(), 1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def open_bundle(
    folder: str | Path,
    task: Task | None = None,
    *,
    verify: bool = True,
    paranoid: bool = False,
) -> Bundle:
    """Read a bundle and check every file against the manifest.

    Args:
        folder: where it lies.
        task: what it is to be used for.
        verify: False reads the manifest only, for showing it; nothing may be loaded from it.
        paranoid: hash files that were hashed before and have not changed since, too.

    Raises:
        ConfigurationError: no bundle there, one of another schema version, or not of `task`.
        TrustError: a file is missing, changed, linked, or not in the manifest, or it could run
            code or read other files when it is loaded.
    """
    folder = Path(folder)
    if not os.path.lexists(folder / MANIFEST):
        raise ConfigurationError(
            f"{folder} is not a bundle: it has no {MANIFEST}.",
            valid="a folder that `dear-batch export` wrote",
            next_step="dear-batch export --help",
        )
    with unreadable(folder, "."), opened_folder(folder) as top:
        raw, state = _read_manifest(folder, top)
        manifest = _parse(folder / MANIFEST, raw)
        if task and manifest.task != task:
            raise ConfigurationError(
                f"The bundle {folder} is a {manifest.task} model, given as the {task} one.",
                valid=f"a {task} bundle",
                next_step=f"dear-batch inspect {folder}",
            )
        opened = {MANIFEST: state} if verify else {}
        if verify:
            opened |= check_nothing_else(folder, top, {MANIFEST, *manifest.files})
            opened |= check_files(folder, top, manifest.files, Hashes.load(paranoid=paranoid))
    return Bundle(folder, manifest, _identity(manifest), opened, paranoid)


def _identity(manifest: Manifest) -> str:
    fields = {**manifest.to_json(), "engines": []}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _read_manifest(folder: Path, top: int) -> tuple[bytes, FileState]:
    with regular(folder, top, MANIFEST) as (file, state):
        if state.bytes > MAX_MANIFEST_BYTES:
            raise _unreadable_manifest(folder / MANIFEST, f"{state.bytes} bytes")
        return file.read(MAX_MANIFEST_BYTES), state


def _parse(path: Path, raw: bytes) -> Manifest:
    try:
        fields = trust.read_json(raw)
        _check_own(fields.pop(OWN, None), raw)
        version = fields["schema_version"]
        why = misfit(fields) if version == SCHEMA_VERSION else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _unreadable_manifest(path, f"{type(error).__name__}: {error}") from error
    if version != SCHEMA_VERSION:
        raise ConfigurationError(
            f"The bundle {path.parent} has schema version {version}.",
            valid=f"schema version {SCHEMA_VERSION}",
            next_step="export the bundle again with this version of dear-batch",
        )
    if why is not None:
        raise _unreadable_manifest(path, why.removeprefix("."))
    return Manifest.from_json(fields)


def _check_own(sha256: str | None, raw: bytes) -> None:
    """Bundles of the first versions have none.

    Raises:
        ValueError: the manifest was changed.
    """
    if sha256 is None:
        return
    blank = raw.replace(sha256.encode(), BLANK.encode(), 1)
    if hashlib.sha256(blank).hexdigest() != sha256:
        raise ValueError(f"its own sha256 is not {sha256}")


def _unreadable_manifest(path: Path, why: str) -> TrustError:
    return TrustError(
        f"The manifest {path} cannot be read.",
        where=why,
        valid=f"a {MANIFEST} as `dear-batch export` writes it",
        next_step="export the bundle again",
    )
