"""Whether a finished folder is what its manifest says, offline and in bounded memory.

Every published file by size and sha256; the run by the rules of TREC evaluators and against
its results, line by line; the counts against the lines. Knows nothing of models.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dear_batch.errors import TrustError, TryAgainError, UsageError
from dear_batch.files.results import published_names
from dear_batch.run.folder import PLAN, REPORT, SUCCESS, read_json, read_plan
from dear_batch.run.planning import outline
from dear_batch.run.publish import QUARANTINE
from dear_batch.run.published import commits, open_regular, sealed_manifest
from dear_batch.run.report import OK, TOO_MANY_BAD, TOO_MANY_FAILED, add_up
from dear_batch.run.verify_run import RunCheck

UNITS = ("queries", "candidates")
FIRST = 5  # faults that an error names
PUBLISHED = (OK, TOO_MANY_BAD, TOO_MANY_FAILED)
NAMES = frozenset("/\\\0")
_BLOCK = 1 << 20
Fields = dict[str, Any]


@dataclass(slots=True)
class Verdict:
    """What was checked of a folder, and the faults that were found."""

    folder: str
    files: int = 0
    bytes: int = 0
    lines: int = 0
    queries: int = 0
    quarantined: int = 0
    parts: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.faults

    def error(self) -> TrustError:
        """The error that names the first faults."""
        more = f"; and {len(self.faults) - FIRST} more" if len(self.faults) > FIRST else ""
        return TrustError(
            f"The output folder {self.folder} is not what its manifest says.",
            where="; ".join(self.faults[:FIRST]) + more,
            valid="the files exactly as dear-batch run published them",
            next_step="copy the folder again, or run the job again with --restart",
        )


def verify(folder: Path) -> Verdict:
    """Check a finished folder.

    Raises:
        TryAgainError: it is not finished.
        UsageError: nothing can have this path.
    """
    verdict = Verdict(str(folder))
    _check_path(folder)
    try:
        manifest = sealed_manifest(folder)
    except TrustError as error:
        verdict.faults.append(f"{error.what} ({error.where})")
        return verdict
    if manifest is None:
        raise TryAgainError(
            f"The folder {folder} is not finished.",
            where=f"there is no {folder / SUCCESS}",
            valid="the output folder of a finished job",
            next_step=f"dear-batch status {folder}",
        )
    try:
        verdict.faults += _files(folder, manifest, verdict)
        if verdict.ok:
            verdict.faults += _contents(folder, manifest, verdict)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        verdict.faults.append(f"the manifest, plan or report lacks something: {error!r}")
    except (pa.ArrowException, OSError) as error:
        verdict.faults.append(f"a Parquet file cannot be read: {error}")
    return verdict


def _check_path(folder: Path) -> None:
    try:
        folder.lstat()
    except OSError as error:  # nothing there, or a name that is too long: no retry mends it
        what = f"A path cannot be used: {error.strerror}."
        raise UsageError(what, where=str(folder), valid="the output folder of a job") from error


def _contents(folder: Path, manifest: Fields, verdict: Verdict) -> Iterator[str]:
    """What is wrong with files that are, byte by byte, those that were published."""
    plan, report = read_plan(folder), read_json(folder / REPORT)
    if plan is None or report is None:
        yield f"{PLAN} or {REPORT}: not of this version of dear-batch"
        return
    yield from _same_job(manifest, plan)
    yield from _counts(manifest, report)
    yield from _runs(folder, manifest, verdict)
    yield from _quarantine(folder, manifest, report, verdict)
    yield from _commits(folder, manifest, plan, verdict)


def _files(folder: Path, manifest: Fields, verdict: Verdict) -> Iterator[str]:
    for name, record in manifest["files"].items():
        if NAMES.intersection(name) or name in {"", ".", ".."}:
            yield f"{name!r}: no name of a file of ours"
            continue
        yield from _file_fault(folder, name, record)
        verdict.files += 1
        verdict.bytes += record["bytes"]
    if REPORT not in manifest["files"]:
        yield f"{REPORT}: the manifest does not list it"


def _file_fault(folder: Path, name: str, record: Mapping[str, Any]) -> Iterator[str]:
    """The fault of a file by its record, if it has one."""
    try:
        descriptor = open_regular(folder / name)
    except TrustError as error:
        yield f"{name}: {error.what}"
        return
    if descriptor is None:
        yield f"{name}: it is missing"
        return
    with open(descriptor, "rb", buffering=0) as file:  # noqa: PTH123 - a descriptor, no path
        size = os.fstat(file.fileno()).st_size
        if size != record["bytes"]:
            yield f"{name}: {size:,} bytes, not {record['bytes']:,}"
        elif hashlib.file_digest(file, "sha256").hexdigest() != record["sha256"]:
            yield f"{name}: its sha256 differs"


def _same_job(manifest: Fields, plan: Fields) -> Iterator[str]:
    """The manifest and the plan tell of one job; another second stage may be under way."""
    if manifest["job"] != plan["job"]:
        yield f"manifest.json: its job is not that of {PLAN}"
    if [{**pin, "sha256": None} for pin in manifest["inputs"]] != [
        {**pin, "sha256": None} for pin in plan["job"]["inputs"]
    ]:
        yield f"manifest.json: its inputs are not those of {PLAN}"
    if [o["stem"] for o in manifest["outputs"]] != [o["stem"] for o in plan["outputs"]]:
        yield f"manifest.json: its outputs are not those of {PLAN}"


def _counts(manifest: Fields, report: Fields) -> Iterator[str]:
    """Read = written + quarantined + skipped, the same in the report and over all outputs."""
    if report["status"] not in PUBLISHED:
        yield f"{REPORT}: its status is {report['status']}"
    for unit in UNITS:
        count = manifest["counts"][unit]
        parts = count["written"] + count["quarantined"] + count["skipped"]
        if count["read"] != parts:
            yield f"manifest.json: of {count['read']:,} {unit} read, {parts:,} are accounted for"
        if report[unit] != count:
            yield f"{REPORT}: its {unit} are not those of the manifest"
        published = sum(output[unit] for output in manifest["outputs"])
        if published != count["written"]:
            yield f"manifest.json: {count['written']:,} {unit} written, {published:,} in outputs"


def _runs(folder: Path, manifest: Fields, verdict: Verdict) -> Iterator[str]:
    tag = manifest["job"]["output"]["tag"]
    for output in manifest["outputs"]:
        names = published_names(output["stem"])
        missing = {names["run"], names["results"]} - manifest["files"].keys()
        if missing:
            yield f"{', '.join(sorted(missing))}: the manifest does not list it"
            continue
        check = RunCheck(folder / names["run"], folder / names["results"], tag)
        yield from check.faults()
        verdict.lines += check.lines
        verdict.queries += check.queries
        for unit, found in (("queries", check.queries), ("candidates", check.lines)):
            if found != output[unit]:
                yield f"{names['run']}: {found:,} {unit}, not {output[unit]:,}"


def _quarantine(folder: Path, manifest: Fields, report: Fields, verdict: Verdict) -> Iterator[str]:
    """The rows that were set aside are as many, of each reason, as was counted."""
    reasons, found = Counter[str](), Counter[str]()
    if QUARANTINE in manifest["files"]:
        for batch in _batches(folder / QUARANTINE, ["reason", "docid", "candidates"]):
            for row in batch.to_pylist():
                reasons[row["reason"]] += 1
                found["queries"] += row["docid"] is None
                found["candidates"] += row["candidates"]
    verdict.quarantined += reasons.total()
    if dict(reasons) != report["quarantine_reasons"]:
        counted = report["quarantine_reasons"]
        yield f"{QUARANTINE}: {dict(reasons)} by reason, and {counted} in {REPORT}"
    for unit in UNITS:
        count = manifest["counts"][unit]["quarantined"]
        if found[unit] != count:
            yield f"{QUARANTINE}: {found[unit]:,} {unit}, and {count:,} in the manifest"


def _batches(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=_BLOCK) as file:
        yield from file.iter_batches(batch_size=4096, columns=columns)


def _commits(folder: Path, manifest: Fields, plan: Fields, verdict: Verdict) -> Iterator[str]:
    """What commits and parts are still there fits together, and adds up where all are."""
    keys = {shard.key for output in outline(plan) for shard in output.shards}
    counts = list[Mapping[str, Any]]()
    for path, commit in commits(folder):
        stage = path.parent.name
        if commit is None:
            yield f"{path.relative_to(folder)}: it cannot be read"
            continue
        if commit.fingerprint != manifest["fingerprints"].get(stage, commit.fingerprint):
            continue  # of an earlier second stage over the same parts
        for part in commit.files.values():
            if os.path.lexists(folder / part.name):
                yield from _file_fault(folder, part.name, asdict(part))
                verdict.parts += 1
        if stage == "pointwise" and path.stem in keys:
            keys.remove(path.stem)
            counts.append({unit: commit.counts[unit] for unit in UNITS})
    if not keys and add_up(counts) != manifest["counts"]:
        yield "commits/pointwise: the counts of the shards do not add up to the manifest's"
