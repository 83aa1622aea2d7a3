"""The end of a job: its parts become the published files, all of them or none.

Everything is written and flushed under temporary names first. Then the old end is taken back,
the files get their names, and report, manifest and `_SUCCESS` follow in this order.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dear_batch import __version__
from dear_batch.bundle import hash_file
from dear_batch.files.durable import remove, replacing, staging, sync, writing
from dear_batch.files.results import (
    QUARANTINE_SCHEMA,
    REFUSAL_ROWS,
    RERANKED_RESULTS_SCHEMA,
    RESULTS_SCHEMA,
    TRANSCRIPT_ROWS,
    TRANSCRIPTS_SCHEMA,
    merge_runs,
    merge_tables,
    published_names,
)
from dear_batch.run.folder import MANIFEST, REPORT, SUCCESS, names_in, read_json, write_json
from dear_batch.run.ledger import Commit, Ledger

SCHEMA_VERSION = 1
QUARANTINE = "quarantine.parquet"
Beat = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Finished:
    """An output whose shards are all committed; `pointwise` are those of the first stage."""

    stem: str
    pointwise: Sequence[Commit]
    listwise: Sequence[Commit] | None

    @property
    def last(self) -> Sequence[Commit]:
        """The commits whose parts make the run."""
        return self.pointwise if self.listwise is None else self.listwise

    def counts(self) -> dict[str, int]:
        """What was written."""
        written = [commit.counts for commit in self.pointwise]
        return {
            name: sum(counts[name]["written"] for counts in written)
            for name in ("queries", "candidates")
        }


@dataclass(slots=True)
class _Staged:
    """Files that are complete under temporary names."""

    ledger: Ledger
    beat: Beat
    stack: ExitStack
    files: dict[str, Path] = field(default_factory=dict)

    def add(self, name: str) -> Path:
        """A temporary path for a published file."""
        self.files[name] = self.stack.enter_context(staging(self.ledger.folder / name))
        return self.files[name]

    def drain(self, rows: Iterable[int]) -> int:
        """Run a merge to its end; the rows that it wrote."""
        total = 0
        for count in rows:
            self.beat()
            total += count
        return total

    def parts(self, commits: Sequence[Commit], kind: str) -> Iterator[Path]:
        """Paths of the committed files of a kind."""
        for commit in commits:
            if kind in commit.files:
                yield self.ledger.path_of(commit.files[kind])


def published(outputs: Sequence[Finished]) -> list[str]:
    """The names of the runs of a job."""
    return [published_names(output.stem)["run"] for output in outputs]


def publish(
    ledger: Ledger,
    outputs: Sequence[Finished],
    tag: str,
    *,
    report: Mapping[str, Any],
    manifest: Mapping[str, Any],
    beat: Beat,
) -> None:
    """Write all outputs of a job; `beat` is called until nothing can stop it any more.

    Args:
        ledger: of the folder to publish in.
        outputs: what to publish.
        tag: the last column of the runs.
        report: becomes `report.json`.
        manifest: what `manifest.json` says beside the files and their hashes.
        beat: may raise, and then nothing is published.

    Raises:
        OutputError: the folder cannot be written, or the disk is full; nothing is published.
        InputError: a part cannot be read.
    """
    folder = ledger.folder
    temporary: list[Path] = []
    try:
        with ExitStack() as stack:
            staged = _Staged(ledger, beat, stack)
            for output in outputs:
                _merge(staged, output, tag)
            refusals = [c for output in outputs for c in output.pointwise]
            if any("quarantine" in commit.files for commit in refusals):
                parts = staged.parts(refusals, "quarantine")
                path = staged.add(QUARANTINE)
                staged.drain(merge_tables(parts, path, QUARANTINE_SCHEMA, REFUSAL_ROWS))
            temporary = list(staged.files.values())
        beat()
        _retract(folder, {*staged.files})
        with writing(folder / REPORT):
            for name, path in staged.files.items():
                path.replace(folder / name)
            sync(folder)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
    write_json(folder / REPORT, dict(report))
    _conclude(folder, [*staged.files, REPORT], manifest)


def _merge(staged: _Staged, output: Finished, tag: str) -> None:
    """Write the run, the results and the transcripts of an output."""
    names = published_names(output.stem)
    schema = RESULTS_SCHEMA if output.listwise is None else RERANKED_RESULTS_SCHEMA
    parts = staged.parts(output.last, "part")
    trec, results = staged.add(names["run"]), staged.add(names["results"])
    rows = staged.drain(merge_runs(parts, trec, results, schema, tag))
    if rows != output.counts()["candidates"]:
        raise AssertionError(f"{rows} candidates are in the parts, not {output.counts()}")
    if output.listwise is not None:
        parts = staged.parts(output.listwise, "transcripts")
        path = staged.add(names["transcripts"])
        staged.drain(merge_tables(parts, path, TRANSCRIPTS_SCHEMA, TRANSCRIPT_ROWS))


def _retract(folder: Path, names: set[str]) -> None:
    """Take back the end of an earlier run, and those of its files that have no successor."""
    old = names_in(read_json(folder / MANIFEST))
    remove(folder / SUCCESS)
    for name in old:
        if name not in names:
            remove(folder / name)
    remove(folder / MANIFEST)


def _conclude(folder: Path, names: Sequence[str], manifest: Mapping[str, Any]) -> None:
    files = {name: asdict(hash_file(folder / name)) for name in names}
    fields = {
        "schema_version": SCHEMA_VERSION,
        "tool": f"dear-batch {__version__}",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **manifest,
        "files": files,
    }
    write_json(folder / MANIFEST, fields)
    with replacing(folder / SUCCESS) as temporary:
        temporary.write_text(hash_file(folder / MANIFEST).sha256 + "\n", encoding="ascii")
