"""What stage 1 leaves in `parts/` for stage 2, and how stage 2 knows that it is all there.

parts/<stem>.parquet    the rankings of one output, with the text of their top
parts/pointwise.json    size and sha256 of each part, and stage 1's report; written last
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dear_batch.bundle import FileRecord, hash_file
from dear_batch.errors import ConfigurationError, InputError
from dear_batch.files.durable import replacing
from dear_batch.run.folder import no_stage_one

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Handover:
    """The end of stage 1: its parts by stem, how deep they carry text, and its report."""

    depth: int
    parts: dict[str, FileRecord]
    report: dict[str, Any]


def part_path(folder: Path, stem: str) -> Path:
    """Where the part of an output lies."""
    return folder / "parts" / f"{stem}.parquet"


def write_handover(folder: Path, stems: Sequence[str], depth: int, report: dict[str, Any]) -> None:
    """Record the parts of a finished stage 1."""
    parts = {stem: hash_file(part_path(folder, stem)) for stem in stems}
    fields = {"schema_version": SCHEMA_VERSION, **asdict(Handover(depth, parts, report))}
    with replacing(_path(folder)) as temporary:
        text = json.dumps(fields, indent=2, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def read_handover(folder: Path, depth: int) -> Handover:
    """The parts of a finished stage 1, each seen to be as it was written.

    Raises:
        ConfigurationError: stage 1 did not finish, or its parts carry less than `depth`.
        InputError: a part is missing or changed.
    """
    fields = _read(folder)
    parts = {stem: FileRecord(**record) for stem, record in fields["parts"].items()}
    found = Handover(fields["depth"], parts, fields["report"])
    if depth > found.depth:
        raise ConfigurationError(
            f"The parts of stage 1 carry the text of the first {found.depth} candidates, "
            f"and the listwise depth is {depth}.",
            where=str(_path(folder)),
            valid=f"a listwise depth of 2 to {found.depth}",
            next_step="lower --listwise-depth, or run both stages into another --output",
        )
    for stem, record in parts.items():
        _check(part_path(folder, stem), record)
    return found


def _path(folder: Path) -> Path:
    return folder / "parts" / "pointwise.json"


def _read(folder: Path) -> dict[str, Any]:
    try:
        fields = json.loads(_path(folder).read_text(encoding="utf-8"))
    except (ValueError, FileNotFoundError) as error:
        raise no_stage_one(folder) from error
    if not isinstance(fields, dict) or fields.get("schema_version") != SCHEMA_VERSION:
        raise no_stage_one(folder)
    return fields


def _check(path: Path, record: FileRecord) -> None:
    if not path.is_file() or hash_file(path) != record:
        raise InputError(
            f"The part {path.name} of stage 1 is missing or changed.",
            where=str(path),
            valid=f"{record.bytes} bytes with the sha256 {record.sha256}",
            next_step="the same command with --stage pointwise, which writes it again",
        )
