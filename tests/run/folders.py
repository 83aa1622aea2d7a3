"""Output folders written by hand in the form that a job leaves, for what reads them."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dear_batch.files.results import QUARANTINE_SCHEMA, RESULTS_SCHEMA
from dear_batch.run.folder import sealed
from dear_batch.run.report import Tally

FINGERPRINT = "ab" * 32
UUID = "0123456789abcdef" * 2
KEYS = ("00000-000000000000", "00000-000000000002")
PIN = {
    "path": "in.parquet",
    "bytes": 9,
    "mtime_ns": 1,
    "footer_sha256": "cd" * 32,
    "rows": 4,
    "layout": "nested",
}


def dump(path: Path, fields: Any) -> None:
    """Write JSON; a plan with its own hash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name == "plan.json":
        fields = sealed({name: value for name, value in fields.items() if name != "sha256"})
    path.write_text(json.dumps(fields) + "\n", encoding="utf-8")


def record(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    return {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}


def count(read: int, quarantined: int = 0, skipped: int = 0) -> dict[str, int]:
    written = read - quarantined - skipped
    return {"read": read, "written": written, "quarantined": quarantined, "skipped": skipped}


@dataclass
class Folder:
    """A job of two shards, four lists read: three of three candidates and one without any.

    One candidate is set aside. `write` leaves a finished folder, the other methods its parts.
    """

    path: Path
    listwise: bool = False
    rankings: dict[str, list[str]] = field(
        default_factory=lambda: {"q1": ["a", "b", "c"], "q2": ["b", "a"], "q3": ["c", "b", "a"]}
    )

    @property
    def lines(self) -> list[str]:
        return [
            f"{qid} Q0 {docid} {rank} {1 / rank:.9g} dear-batch\n"
            for qid, docids in self.rankings.items()
            for rank, docid in enumerate(docids, 1)
        ]

    def plan(self) -> None:
        shards = [
            {"first_row": 2 * i, "n_rows": 2, "n_queries": 2, "key": key}
            for i, key in enumerate(KEYS)
        ]
        source = {"inputs": [0], "regrouped": False, "kept_rows": {}, "shards": shards}
        fields = {
            "schema_version": 2,
            "job": {"inputs": [PIN], "output": {"tag": "dear-batch"}},
            "listwise": {"depth": 2} if self.listwise else None,
            "runtime": {"pointwise": {"engine": "onnxruntime"}, "listwise": None},
            "fingerprints": {
                "pointwise": FINGERPRINT,
                "listwise": FINGERPRINT if self.listwise else None,
            },
            "outputs": [{"stem": "run", "queries": 4, "sources": [source]}],
        }
        dump(self.path / "plan.json", fields)

    def commit(self, number: int, stage: str = "pointwise", **changed: Any) -> Path:
        key = KEYS[number]
        name = f"parts/{key}-{FINGERPRINT[:12]}-{UUID}.parquet"
        (self.path / "parts").mkdir(exist_ok=True)
        (self.path / name).write_text(f"the part of shard {number}")
        counts = [
            {"queries": count(2), "candidates": count(6, 1)},
            {"queries": count(2, 0, 1), "candidates": count(3)},
        ][number]
        empty = Tally().to_json()
        fields = {
            "schema_version": 1,
            "stage": stage,
            "shard": key,
            "fingerprint": FINGERPRINT,
            "input_sha256": "cd" * 32,
            "files": {"part": {"name": name, **record(self.path / name)}},
            "counts": {**empty, **counts},
            "attempt": UUID,
            "created": "2026-11-23T00:00:00+00:00",
            **changed,
        }
        path = self.path / "commits" / stage / f"{key}.json"
        dump(path, sealed(fields))
        return path

    def lock(self, host: str = "elsewhere", pid: int = 1) -> Path:
        start = "2026-11-23T00:00:00+00:00"
        dump(self.path / "LOCK", {"host": host, "pid": pid, "start": start})
        return self.path / "LOCK"

    def report(self, status: str = "ok", **fields: Any) -> None:
        reasons = {"null_text": 1}
        counts = {"queries": count(4, 0, 1), "candidates": count(9, 1)}
        common = {"schema_version": 2, "status": status, "exit_code": 0, "outputs": ["run.trec"]}
        every = {**common, **counts, "quarantine_reasons": reasons, **fields}
        dump(self.path / "report.json", every)

    def publish(self) -> None:
        (self.path / "run.trec").write_text("".join(self.lines), encoding="utf-8")
        rows = [
            {"qid": q, "docid": d, "rank": r, "logit": 1.0, "first_score": None, "first_rank": r}
            for q, docids in self.rankings.items()
            for r, d in enumerate(docids, 1)
        ]
        pq.write_table(pa.Table.from_pylist(rows, RESULTS_SCHEMA), self.path / "results.parquet")
        aside = [
            {"reason": "null_text", "qid": "q2", "docid": "c", "candidates": 1},
        ]
        table = pa.Table.from_pylist(aside, QUARANTINE_SCHEMA)
        pq.write_table(table, self.path / "quarantine.parquet")

    def seal(self) -> None:
        """Write the manifest of what is there, and `_SUCCESS`."""
        names = ["run.trec", "results.parquet", "quarantine.parquet", "plan.json", "report.json"]
        plan = json.loads((self.path / "plan.json").read_text())
        fields = {
            "schema_version": 1,
            "tool": "dear-batch 0.1.0",
            "created": "2026-11-23T01:00:00+00:00",
            **{n: plan[n] for n in ("job", "listwise", "runtime", "fingerprints")},
            "inputs": [{**PIN, "sha256": "ef" * 32}],
            "outputs": [{"stem": "run", "queries": 3, "candidates": 8}],
            "files": {n: record(self.path / n) for n in names if (self.path / n).exists()},
            "counts": {"queries": count(4, 0, 1), "candidates": count(9, 1)},
        }
        dump(self.path / "manifest.json", fields)
        self.success()

    def success(self) -> None:
        sha256 = record(self.path / "manifest.json")["sha256"]
        (self.path / "_SUCCESS").write_text(f"{sha256}\n")

    def write(self) -> "Folder":
        """All of it."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock()
        self.plan()
        for number in range(len(KEYS)):
            self.commit(number)
        self.publish()
        self.report()
        (self.path / "metrics.prom").write_text("# EOF\n")
        self.seal()
        return self
