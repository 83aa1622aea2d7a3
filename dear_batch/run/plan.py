"""What a job will read, in which shards, and what it will write: decided before a model loads.

Every input is opened and its qid column read, so that a bad file stops the job before
anything is scored.
"""

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from dear_batch.data import Shard
from dear_batch.errors import InputError, UsageError
from dear_batch.files.parquet import InputFile, RowReader, open_input, qid_runs
from dear_batch.files.places import Places
from dear_batch.files.regroup import distinct_qids, regroup, repeated_qids
from dear_batch.files.results import published_names
from dear_batch.run.admission import can_be_scored
from dear_batch.specs import JobSpec

# Text of a shard, uncompressed. A shard is what a crash loses and what a worker takes: small
# jobs get small ones, so that minutes are lost on a CPU too, and large jobs no millions of them.
SHARD_BYTES = 16 << 20
LEAST_SHARD_BYTES = 512 << 10
SHARDS = 256  # aimed at between these bounds

LONGEST_NAME = 255 - len("..tmp") - 33  # of an output: beside it a temporary file has room

Regroup = Callable[[int, Sequence[str]], Path]  # (number of the output, its files)


@dataclass(frozen=True, slots=True)
class Source:
    """An input file as it is read.

    `kept_rows`: for each qid that has several lists in the output, the row of the one to keep,
    or None where that lies in another file. `regrouped`: it was written by the job from
    scattered rows. `inputs` are the numbers of the inputs that it was made from.
    """

    file: InputFile
    inputs: tuple[int, ...]
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

    @property
    def shards(self) -> Iterator[tuple[Source, Shard]]:
        """All shards of all outputs in order."""
        for output in self.outputs:
            for source, shards in zip(output.sources, output.shards, strict=True):
                yield from ((source, shard) for shard in shards)

    def places(self, source: Source) -> Places:
        """Where the rows of a source stand in the user's files."""
        return Places([self.inputs[i] for i in source.inputs])


def open_inputs(spec: JobSpec) -> tuple[InputFile, ...]:
    """Open all inputs by their footers, and see that they go together.

    Raises:
        InputError: no input, an unreadable one, mixed layouts, or interpolation without
            first-stage scores.
    """
    files = tuple(open_input(path) for path in expand(spec.input.paths))
    check_together(files, spec)
    return files


def plan_job(
    spec: JobSpec,
    scratch: Path,
    *,
    files: Sequence[InputFile] | None = None,
    regrouped: Regroup | None = None,
    beat: Callable[[], None] = lambda: None,
) -> Plan:
    """Check and divide all inputs; scattered flat rows are brought together.

    Args:
        spec: the job.
        scratch: a folder for temporary files.
        files: its inputs, where they are open already.
        regrouped: gives the regrouped file of an output; by default it is made in `scratch`.
        beat: called all the while; may raise.

    Raises:
        InputError: as `open_inputs`, and where a qid column cannot be read.
        UsageError: `run_per_input` with two inputs of one name.
    """
    found = tuple(open_inputs(spec) if files is None else files)
    together = [tuple(range(len(found)))]
    groups = [(i,) for i in together[0]] if spec.output.run_per_input else together
    stems = [Path(file.path).stem for file in found] if spec.output.run_per_input else ["run"]
    if len(set(stems)) < len(stems):
        raise UsageError(
            "Two inputs have the same file name, so their run files would too.",
            where=", ".join(sorted({stem for stem in stems if stems.count(stem) > 1})),
            valid="one file name an input with --run-per-input",
        )
    _check_names(stems)
    planner = _Planner(found, scratch, regrouped or _regroup_into(scratch, beat), beat)
    outputs = (planner.output(stem, group) for stem, group in zip(stems, groups, strict=True))
    return Plan(found, tuple(outputs))


def _check_names(stems: Sequence[str]) -> None:
    """Refuse outputs that could not be given their names in the end."""
    longest = max((name for stem in stems for name in published_names(stem).values()), key=_bytes)
    if _bytes(longest) > LONGEST_NAME:
        raise UsageError(
            f"The name of an output is too long: {longest}.",
            valid=f"names of inputs that make names of outputs of up to {LONGEST_NAME} bytes",
        )


def _bytes(name: str) -> int:
    return len(os.fsencode(name))


def _regroup_into(scratch: Path, beat: Callable[[], None]) -> Regroup:
    def make(number: int, paths: Sequence[str]) -> Path:
        out = scratch / f"{number:05d}.parquet"
        regroup(paths, out, beat=beat)
        return out

    return make


def shard_bytes(files: Iterable[InputFile]) -> int:
    """The size of the shards of a job with these inputs."""
    total = sum(file.row_bytes * file.n_rows for file in files)
    return min(SHARD_BYTES, max(LEAST_SHARD_BYTES, total // SHARDS))


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


def check_together(files: Sequence[InputFile], spec: JobSpec) -> None:
    """See that inputs go together.

    Raises:
        InputError: mixed layouts, or interpolation without first-stage scores.
    """
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


class _Planner:
    """Divides the inputs of a job, output after output; sources are numbered through all."""

    def __init__(
        self,
        files: tuple[InputFile, ...],
        scratch: Path,
        regrouped: Regroup,
        beat: Callable[[], None],
    ) -> None:
        self._files, self._scratch, self._regrouped, self._beat = files, scratch, regrouped, beat
        self._shard_bytes = shard_bytes(files)
        self._outputs, self._sources = count(), count()

    def output(self, stem: str, group: tuple[int, ...]) -> Output:
        """Plan the output of a group of inputs, given by their numbers."""
        number = next(self._outputs)
        if self._files[0].layout == "nested":
            sources = self._nested(group)
        else:
            sources = self._flat(number, group)
        shards = tuple(
            tuple(cut(source.file, next(self._sources), self._shard_bytes, self._beat))
            for source in sources
        )
        return Output(stem, sources, shards)

    def _nested(self, group: tuple[int, ...]) -> tuple[Source, ...]:
        files = tuple(self._files[i] for i in group)
        paths = [file.path for file in files]
        kept = repeated_qids(paths, beside=self._scratch / "qids", beat=self._beat)
        if kept:
            kept |= _first_that_can_be_scored(files, frozenset(kept), self._beat)
        return tuple(
            Source(
                file,
                (number,),
                kept_rows={qid: row if at == i else None for qid, (at, row) in kept.items()},
            )
            for i, (number, file) in enumerate(zip(group, files, strict=True))
        )

    def _flat(self, number: int, group: tuple[int, ...]) -> tuple[Source, ...]:
        """The files themselves where every query's rows are contiguous, else one regrouped."""
        files = [self._files[i] for i in group]
        paths = [file.path for file in files]
        runs = 0
        for file in files:
            runs += sum(1 for qid, _, _ in qid_runs(file, self._beat) if qid is not None)
        if runs == distinct_qids(paths, beside=self._scratch / "qids", beat=self._beat):
            return tuple(Source(file, (i,)) for i, file in zip(group, files, strict=True))
        made = open_input(self._regrouped(number, paths), regrouped=True)
        return (Source(made, group, regrouped=True),)


def _first_that_can_be_scored(
    files: tuple[InputFile, ...], qids: frozenset[str], beat: Callable[[], None]
) -> dict[str, tuple[int, int]]:
    """(file, row) of the first sound list of each qid; decided here, so that shards stay pure."""
    found: dict[str, tuple[int, int]] = {}
    for at, file in enumerate(files):
        with RowReader(file) as reader:
            for item in reader.read(0, file.n_rows):
                if item.qid in qids and item.qid not in found and can_be_scored(item):
                    found[item.qid] = (at, item.row)
                beat()
    return found


def cut(
    file: InputFile, number: int, size: int, beat: Callable[[], None] = lambda: None
) -> Iterator[Shard]:
    """Divide a file at query boundaries into shards of about `size` bytes of text.

    `number` is the source's place in the job, so that keys differ where names do not.
    """
    target = max(1, size // file.row_bytes)
    first, rows, queries = 0, 0, 0
    for _, start, length in _boundaries(file, beat):
        rows, queries = start + length - first, queries + 1
        if rows >= target:
            yield _shard(file, number, first, rows, queries)
            first, rows, queries = start + length, 0, 0
    if rows:
        yield _shard(file, number, first, rows, queries)


def _boundaries(file: InputFile, beat: Callable[[], None]) -> Iterable[tuple[object, int, int]]:
    if file.layout == "nested":  # each row is a query: nothing needs to be read
        return ((None, row, 1) for row in range(file.n_rows))
    return qid_runs(file, beat)


def _shard(file: InputFile, number: int, first: int, rows: int, queries: int) -> Shard:
    return Shard(file.path, first, rows, queries, f"{number:05d}-{first:012d}")
