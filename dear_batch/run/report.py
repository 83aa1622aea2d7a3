"""Counts and times of a job, and `report.json`. Nothing leaves a job uncounted."""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dear_batch.data import Ranking, Refusal
from dear_batch.files.durable import replacing
from dear_batch.run.blocks import Work

SCHEMA_VERSION = 1


@dataclass(slots=True)
class Count:
    """Queries and candidates: read = written + quarantined."""

    read: int = 0
    written: int = 0
    quarantined: int = 0


@dataclass(slots=True)
class Tally:
    """Running figures of one job."""

    queries: Count = field(default_factory=Count)
    candidates: Count = field(default_factory=Count)
    reasons: Counter[str] = field(default_factory=Counter)
    work: Work = field(default_factory=Work)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def refused(self, refusal: Refusal) -> None:
        """Count what was set aside; a refusal without docid is a whole query."""
        self.reasons[refusal.reason] += 1
        self.candidates.quarantined += refusal.candidates
        self.queries.quarantined += refusal.docid is None

    def ranked(self, ranking: Ranking) -> None:
        """Count what was written."""
        self.queries.written += 1
        self.candidates.written += len(ranking.entries)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the block's wall time to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - start

    def to_json(self) -> dict[str, Any]:
        """The counts; what was read by the reader is what became of it at the end."""
        for count in (self.queries, self.candidates):
            if count.read != count.written + count.quarantined:
                raise AssertionError(f"counts do not add up: {count}")
        work = self.work
        scoring = self.seconds["score"]
        return {
            "queries": asdict(self.queries),
            "candidates": asdict(self.candidates),
            "quarantine_reasons": dict(sorted(self.reasons.items())),
            "scored_pairs": work.pairs,
            "truncated_pairs": work.truncated_pairs,
            "tokens": work.tokens,
            "tokens_per_second": round(work.tokens / scoring, 1) if scoring else None,
            "padding_share": 1 - work.tokens / work.computed_tokens
            if work.computed_tokens
            else 0.0,
            "seconds": {stage: round(s, 3) for stage, s in self.seconds.items()},
        }


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write `report.json`."""
    text = json.dumps({"schema_version": SCHEMA_VERSION, **report}, indent=2, ensure_ascii=False)
    with replacing(folder / "report.json") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
