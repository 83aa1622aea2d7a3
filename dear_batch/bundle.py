"""What a bundle holds, written and read in one place.

    bundle.json            the manifest: sources, recipe, graphs, parity, sha256 of every file
    config.json tokenizer.json …                  as Hugging Face saves them
    onnx/model.onnx onnx/packed.onnx onnx/weights.safetensors   pointwise
    model.safetensors …                           listwise

A bundle is trusted file by file: nothing is loaded that the manifest does not name with its
hash, and the folder holds nothing else, since transformers takes what it finds there. Knows
nothing of engines or of how a bundle is made.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from dear_batch.errors import ConfigurationError, TrustError
from dear_batch.pointwise.recipe import Recipe

SCHEMA_VERSION = 1
MANIFEST = "bundle.json"
Task = Literal["pointwise", "listwise"]


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
class Manifest:
    """The contents of `bundle.json`.

    `graphs` maps a graph's path to its inputs and outputs: name → [dtype, dimension…].
    """

    task: Task
    source: Source
    precision: str
    recipe: Recipe | None
    architecture: Mapping[str, int | str]
    graphs: Mapping[str, Any]
    parity: Mapping[str, Any] | None
    versions: Mapping[str, str]
    created: str
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """The manifest that `to_json` wrote."""
        recipe = fields["recipe"]
        files = {path: FileRecord(**record) for path, record in fields["files"].items()}
        return cls(
            **{
                **fields,
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
    """An opened bundle whose files were checked against its manifest."""

    folder: Path
    manifest: Manifest
    sha256: str

    def file(self, name: str) -> Path:
        """The path of a file that the manifest lists.

        Raises:
            TrustError: it does not, so nothing is known of the file.
        """
        if name not in self.manifest.files:
            raise _changed(self.folder, name, "the manifest does not list it")
        return self.folder / name

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
    """Write `bundle.json`; the folder is published by a rename of the whole."""
    text = json.dumps(manifest.to_json(), indent=2, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def open_bundle(folder: str | Path, *, task: Task | None = None, verify: bool = True) -> Bundle:
    """Read a bundle and check every file against the manifest.

    `verify=False` reads the manifest only, for showing it; nothing may be loaded from it.

    Raises:
        ConfigurationError: no bundle there, one of another schema version, or not of `task`.
        TrustError: a file is missing, changed, linked, or not in the manifest.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise ConfigurationError(
            f"{folder} is not a bundle: it has no {MANIFEST}.",
            valid="a folder that `dear-batch export` wrote",
            next_step="dear-batch export --help",
        )
    raw = path.read_bytes()
    manifest = _parse(path, raw)
    if task and manifest.task != task:
        raise ConfigurationError(
            f"The bundle {folder} is a {manifest.task} model, given as the {task} one.",
            valid=f"a {task} bundle",
            next_step=f"dear-batch inspect {folder}",
        )
    if verify:
        _verify(folder, manifest)
    return Bundle(folder, manifest, hashlib.sha256(raw).hexdigest())


def _parse(path: Path, raw: bytes) -> Manifest:
    try:
        fields = json.loads(raw)
        version = fields["schema_version"]
        if version == SCHEMA_VERSION:
            return Manifest.from_json(fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrustError(
            f"The manifest {path} cannot be read: {error!r}.", next_step="export the bundle again"
        ) from error
    raise ConfigurationError(
        f"The bundle {path.parent} has schema version {version}.",
        valid=f"schema version {SCHEMA_VERSION}",
        next_step="export the bundle again with this version of dear-batch",
    )


def _verify(folder: Path, manifest: Manifest) -> None:
    for name, record in manifest.files.items():
        path = folder / name
        if path.resolve() != folder.resolve() / name or not path.is_file():
            raise _changed(folder, name, "it is missing or not a regular file")
        if path.stat().st_size != record.bytes:
            raise _changed(folder, name, f"{path.stat().st_size} bytes, not {record.bytes}")
        if hash_file(path).sha256 != record.sha256:
            raise _changed(folder, name, "its sha256 differs")
    for path in sorted(folder.rglob("*")):
        _check_listed(folder, path, manifest)


def _check_listed(folder: Path, path: Path, manifest: Manifest) -> None:
    """Refuse what transformers or a graph could load though the manifest does not list it."""
    name = path.relative_to(folder)
    if path.is_dir() and not path.is_symlink():
        return
    # A graph may name any file beside it as its weights; transformers loads no hidden files.
    beside_graphs = name.parts[0] == "onnx"
    is_hidden = any(part.startswith(".") for part in name.parts)
    if name.as_posix() not in {MANIFEST, *manifest.files} and (beside_graphs or not is_hidden):
        raise _changed(folder, name.as_posix(), "the manifest does not list it", f"rm {path}; or ")
    if beside_graphs and path.stat().st_nlink > 1:
        raise _changed(folder, name.as_posix(), "it is a hard link")


def _changed(folder: Path, name: str, why: str, first: str = "") -> TrustError:
    return TrustError(
        f"The bundle {folder} is not what its manifest says.",
        where=f"{name}: {why}",
        valid="the files exactly as `dear-batch export` wrote them",
        next_step=f"{first}copy the bundle again from its source, or export it again",
    )
