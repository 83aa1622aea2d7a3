"""Whether a finished folder is what its manifest says, offline and in bounded memory.

Every published file by size and sha256; the run by the rules of TREC evaluators and against
its results, line by line; the counts against the lines. Knows nothing of models.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from os import fstat
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dear_batch.errors import TrustError, TryAgainError
from dear_batch.files.results import published_names
from dear_batch.run.published import (
    PLAN,
    REPORT,
    STAGES,
    SUCCESS,
    Fields,
    commits,
    open_regular,
    read_fields,
    read_plan,
    sealed_manifest,
    shard_keys,
)
from dear_batch.run.verify_run import RunCheck

FIRST = 5  # faults that an error names
PUBLISHED = ("ok", "too-many-bad", "too-many-failed-windows")
SKIPPED = "empty_list"  # nothing to rank, and not bad
NAMES = frozenset("/\\\0")
_BLOCK = 1 << 20


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
        InputError: it was written by another version.
    """
    verdict = Verdict(str(folder))
    try:
        manifest = sealed_manifest(folder)
        plan = read_plan(folder)
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
    verdict.faults += _files(folder, manifest, verdict)
    if verdict.ok:
        verdict.faults += _contents(folder, manifest, plan or {}, verdict)
    return verdict


def _contents(folder: Path, manifest: Fields, plan: Fields, verdict: Verdict) -> Iterator[str]:
    """What is wrong with files that are, byte by byte, those that were published."""
    try:
        report = read_fields(folder / REPORT) or {}
        yield from _same_job(manifest, plan)
        yield from _counts(manifest, report)
        yield from _runs(folder, manifest, verdict)
        yield from _quarantine(folder, manifest, report, verdict)
        yield from _commits(folder, manifest, plan, verdict)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        yield f"the manifest, plan or report lacks something: {error!r}"
    except pa.ArrowException as error:
        yield f"a Parquet file cannot be read: {error}"


def _files(folder: Path, manifest: Fields, verdict: Verdict) -> Iterator[str]:
    for name, record in manifest["files"].items():
        if NAMES.intersection(name) or name in {"", ".", ".."}:
            yield f"{name!r}: no name of a file of ours"
            continue
        yield from _file_fault(folder, name, record)
        verdict.files += 1
        verdict.bytes += record["bytes"]
    missing = {PLAN, REPORT} - manifest["files"].keys()
    yield from (f"{name}: the manifest does not list it" for name in sorted(missing))


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
        size = fstat(file.fileno()).st_size
        if size != record["bytes"]:
            yield f"{name}: {size:,} bytes, not {record['bytes']:,}"
        elif hashlib.file_digest(file, "sha256").hexdigest() != record["sha256"]:
            yield f"{name}: its sha256 differs"


def _same_job(manifest: Fields, plan: Fields) -> Iterator[str]:
    """The manifest and the plan tell of one job."""
    for name in ("job", "fingerprints"):
        if manifest[name] != plan[name]:
            yield f"manifest.json: its {name} is not that of {PLAN}"
    planned = {item["path"]: item["bytes"] for item in plan["inputs"]}
    if {item["path"]: item["bytes"] for item in manifest["inputs"]} != planned:
        yield f"manifest.json: its inputs are not those of {PLAN}"
    if [o["stem"] for o in manifest["outputs"]] != [o["stem"] for o in plan["outputs"]]:
        yield f"manifest.json: its outputs are not those of {PLAN}"


def _counts(manifest: Fields, report: Fields) -> Iterator[str]:
    """Read = written + quarantined + skipped, the same in the report and over all outputs."""
    if report["status"] not in PUBLISHED:
        yield f"{REPORT}: its status is {report['status']}"
    for unit in ("queries", "candidates"):
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
    name = "quarantine.parquet"
    reasons, found = Counter[str](), Counter[str]()
    if name in manifest["files"]:
        for batch in _batches(folder / name, ["reason", "docid", "candidates"]):
            for row in batch.to_pylist():
                reasons[row["reason"]] += 1
                kind = "skipped" if row["reason"] == SKIPPED else "quarantined"
                found[f"queries {kind}"] += row["docid"] is None
                found[f"candidates {kind}"] += row["candidates"]
    verdict.quarantined += reasons.total()
    if dict(reasons) != report["quarantine_reasons"]:
        yield f"{name}: {dict(reasons)} by reason, and {report['quarantine_reasons']} in {REPORT}"
    for unit in ("queries", "candidates"):
        for kind in ("quarantined", "skipped"):
            count, rows = manifest["counts"][unit][kind], found[f"{unit} {kind}"]
            if count != rows:
                yield f"{name}: {rows:,} {unit} {kind}, and {count:,} in the manifest"


def _batches(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=_BLOCK) as file:
        yield from file.iter_batches(batch_size=4096, columns=columns)


def _commits(folder: Path, manifest: Fields, plan: Fields, verdict: Verdict) -> Iterator[str]:
    """What commits and parts are still there fits together, and adds up where all are."""
    keys, read = set(shard_keys(plan)), Counter[str]()
    for path, commit in commits(folder):
        stage = path.parent.name
        place = path.relative_to(folder)
        if commit is None:
            yield f"{place}: it cannot be read"
            continue
        if commit["fingerprint"] != manifest["fingerprints"].get(stage, commit["fingerprint"]):
            continue  # of an earlier listwise stage over the same parts
        for part in commit["files"].values():
            if (folder / part["name"]).exists() or (folder / part["name"]).is_symlink():
                yield from _file_fault(folder, part["name"], part)
                verdict.parts += 1
        if stage == STAGES[2] and path.stem in keys:
            keys.remove(path.stem)
            for unit in ("queries", "candidates"):
                for kind, count in commit["counts"][unit].items():
                    read[f"{unit} {kind}"] += count
    counts = manifest["counts"]
    wanted = {f"{u} {k}": counts[u][k] for u in ("queries", "candidates") for k in counts[u]}
    if not keys and {name: read[name] for name in wanted} != wanted:
        yield "commits/pointwise: the counts of the shards do not add up to the manifest's"
