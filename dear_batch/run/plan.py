"""What a job will read, in which shards, and what it will write: decided before a model loads.

Every input is opened and its qid column read, so that a bad file stops the job before
anything is scored.
"""

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dear_batch.data import Shard
from dear_batch.errors import InputError, UsageError
from dear_batch.files.parquet import InputFile, RowReader, open_input, qid_runs
from dear_batch.files.regroup import distinct_qids, regroup, repeated_qids
from dear_batch.run.admission import can_be_scored
from dear_batch.specs import JobSpec

# Text of a shard, uncompressed. A shard is what a crash loses and what a worker takes.
SHARD_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Source:
    """An input file as it is read, and what to call it to the user.

    `kept_rows`: for each qid that has several lists in the output, the row of the one to keep,
    or None where that lies in another file. `regrouped`: it was written by the job from
    scattered rows, so its rows mean nothing to the user.
    """

    file: InputFile
    name: str
    regrouped: bool = False
    kept_rows: dict[str, int | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Output:
    """One run file: its stem (`run` for a job with one) and the sources and shards behind it."""

    stem: str
    sources: tuple[Source, ...]
    shards: tuple[tuple[Shard, ...], ...]

    @property
    def n_queries(self) -> int:
        """Lists to be read."""
        return sum(shard.n_queries for shards in self.shards for shard in shards)


@dataclass(frozen=True, slots=True)
class Plan:
    """Inputs as the user names them, and the outputs made from them."""

    inputs: tuple[InputFile, ...]
    outputs: tuple[Output, ...]


def plan_job(spec: JobSpec, scratch: Path) -> Plan:
    """Open, check and divide all inputs; scattered flat rows are regrouped into `scratch`.

    Raises:
        InputError: no input, an unreadable one, mixed layouts, or interpolation without
            first-stage scores.
        UsageError: `run_per_input` with two inputs of one name.
    """
    files = tuple(open_input(path) for path in expand(spec.input.paths))
    _check_together(files, spec)
    groups = [(file,) for file in files] if spec.output.run_per_input else [files]
    stems = [Path(file.path).stem for file in files] if spec.output.run_per_input else ["run"]
    if len(set(stems)) < len(stems):
        raise UsageError(
            "Two inputs have the same file name, so their run files would too.",
            where=", ".join(sorted({stem for stem in stems if stems.count(stem) > 1})),
            valid="one file name an input with --run-per-input",
        )
    outputs = (
        _plan_output(stem, group, scratch) for stem, group in zip(stems, groups, strict=True)
    )
    return Plan(files, tuple(outputs))


def expand(patterns: Sequence[str], *, may_be_gone: bool = False) -> list[str]:
    """Files of all paths and globs, sorted within a glob, each once.

    Where they `may_be_gone`, only those that are there.

    Raises:
        InputError: a glob that matches nothing, unless its files may be gone.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        is_glob = glob.has_magic(pattern) and not Path(pattern).exists()
        matches = sorted(glob.glob(pattern, recursive=True)) if is_glob else [pattern]  # noqa: PTH207 - Path.glob takes no absolute pattern
        if not matches and not may_be_gone:
            raise InputError(f"No file matches {pattern}.", where=str(Path.cwd()))
        found.update(dict.fromkeys(matches))
    return [path for path in found if not may_be_gone or is_there(path)]


def is_there(path: str) -> bool:
    """Whether a file can be seen; a folder that may not be entered has none."""
    return os.access(path, os.F_OK)


def _check_together(files: tuple[InputFile, ...], spec: JobSpec) -> None:
    layouts = {file.layout for file in files}
    if len(layouts) > 1:
        nested = next(file.path for file in files if file.layout == "nested")
        flat = next(file.path for file in files if file.layout == "flat")
        raise InputError(
            "The inputs differ in layout.",
            where=f"{nested} has one row a query, {flat} one row a candidate",
            valid="one layout a job",
        )
    unscored = [file.path for file in files if not file.has_score]
    if spec.pointwise.interpolate < 1 and unscored:
        raise InputError(
            "Interpolation needs first-stage scores.",
            where=f"{unscored[0]} has no `score`",
            valid="a numeric `score` for every candidate, or --interpolate 1",
        )


def _plan_output(stem: str, files: tuple[InputFile, ...], scratch: Path) -> Output:
    if files[0].layout == "nested":
        sources = _nested_sources(files, scratch)
    else:
        sources = _flat_sources(stem, files, scratch)
    shards = tuple(tuple(cut(source.file, i)) for i, source in enumerate(sources))
    return Output(stem, sources, shards)


def _nested_sources(files: tuple[InputFile, ...], scratch: Path) -> tuple[Source, ...]:
    kept = repeated_qids([file.path for file in files], beside=scratch / "qids")
    if kept:
        kept |= _first_that_can_be_scored(files, frozenset(kept))
    return tuple(
        Source(
            file,
            file.path,
            kept_rows={qid: row if at == i else None for qid, (at, row) in kept.items()},
        )
        for i, file in enumerate(files)
    )


def _first_that_can_be_scored(
    files: tuple[InputFile, ...], qids: frozenset[str]
) -> dict[str, tuple[int, int]]:
    """(file, row) of the first sound list of each qid; decided here, so that shards stay pure."""
    found: dict[str, tuple[int, int]] = {}
    for at, file in enumerate(files):
        with RowReader(file) as reader:
            for item in reader.read(0, file.n_rows):
                if item.qid in qids and item.qid not in found and can_be_scored(item):
                    found[item.qid] = (at, item.row)
    return found


def _flat_sources(stem: str, files: tuple[InputFile, ...], scratch: Path) -> tuple[Source, ...]:
    """The files themselves where every query's rows are contiguous, else one regrouped file."""
    paths = [file.path for file in files]
    runs = sum(1 for file in files for qid, _, _ in qid_runs(file) if qid is not None)
    if runs == distinct_qids(paths, beside=scratch / "qids"):
        return tuple(Source(file, file.path) for file in files)
    out = scratch / f"{stem}.parquet"
    regroup(paths, out)
    return (Source(open_input(out), ", ".join(paths), regrouped=True),)


def cut(file: InputFile, number: int) -> Iterator[Shard]:
    """Divide a file at query boundaries into shards of about `SHARD_BYTES`.

    `number` is the file's place among its output's, so that keys differ where names do not.
    """
    target = max(1, SHARD_BYTES // file.row_bytes)
    first, rows, queries = 0, 0, 0
    for _, start, length in _boundaries(file):
        rows, queries = start + length - first, queries + 1
        if rows >= target:
            yield _shard(file, number, first, rows, queries)
            first, rows, queries = start + length, 0, 0
    if rows:
        yield _shard(file, number, first, rows, queries)


def _boundaries(file: InputFile) -> Iterable[tuple[object, int, int]]:
    if file.layout == "nested":  # each row is a query: nothing needs to be read
        return ((None, row, 1) for row in range(file.n_rows))
    return qid_runs(file)


def _shard(file: InputFile, number: int, first: int, rows: int, queries: int) -> Shard:
    key = f"{number:05d}-{Path(file.path).stem}-{first:010d}"
    return Shard(file.path, first, rows, queries, key)
