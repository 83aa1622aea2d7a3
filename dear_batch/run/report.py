"""Counts and times of each stage, and `report.json`. Nothing leaves a job uncounted."""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from dear_batch.data import Permutation, Ranking, Refusal, WindowStatus
from dear_batch.files.durable import replacing
from dear_batch.run.blocks import Work

SCHEMA_VERSION = 1
AMOUNTS = (
    "prompt_tokens",
    "answer_tokens",
    "forwards",
    "overruled",
    "cut_passages",
    "shortened_passages",
    "neutralised_texts",
)


@dataclass(slots=True)
class Count:
    """Queries and candidates: read = written + quarantined."""

    read: int = 0
    written: int = 0
    quarantined: int = 0


@dataclass(slots=True)
class Stopwatch:
    """Wall time by the name of what took it."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the block's wall time to a name."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def rounded(self) -> dict[str, float]:
        """Seconds for people."""
        return {name: round(seconds, 3) for name, seconds in self.seconds.items()}


@dataclass(slots=True)
class Tally(Stopwatch):
    """Running figures of a job, or of the first stage of two."""

    queries: Count = field(default_factory=Count)
    candidates: Count = field(default_factory=Count)
    reasons: Counter[str] = field(default_factory=Counter)
    work: Work = field(default_factory=Work)

    def refused(self, refusal: Refusal) -> None:
        """Count what was set aside; a refusal without docid is a whole query."""
        self.reasons[refusal.reason] += 1
        self.candidates.quarantined += refusal.candidates
        self.queries.quarantined += refusal.docid is None

    def ranked(self, ranking: Ranking) -> None:
        """Count what was written."""
        self.queries.written += 1
        self.candidates.written += len(ranking.entries)

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
            "seconds": self.rounded(),
        }


@dataclass(slots=True)
class ListwiseTally(Stopwatch):
    """Running figures of the second stage; `amounts` are sums over all windows."""

    queries: int = 0
    candidates: int = 0
    windows: Counter[str] = field(default_factory=Counter)
    failed_reasons: Counter[str] = field(default_factory=Counter)
    amounts: Counter[str] = field(default_factory=Counter)

    def ranked(self, ranking: Ranking) -> None:
        """Count what was written."""
        self.queries += 1
        self.candidates += len(ranking.entries)

    def answered(self, answer: Permutation) -> None:
        """Count a window."""
        self.windows[answer.status] += 1
        self.failed_reasons.update([answer.detail] if answer.status == "failed" else [])
        self.amounts.update({name: getattr(answer, name) for name in AMOUNTS})

    def check(self, pointwise: dict[str, Any]) -> None:
        """Whether all that stage 1 left was written."""
        left = {name: pointwise[name]["written"] for name in ("queries", "candidates")}
        if left != {"queries": self.queries, "candidates": self.candidates}:
            raise AssertionError(f"counts do not add up: {left}, {self}")

    def to_json(self) -> dict[str, Any]:
        """The counts; windows by status add up to their total."""
        return {
            "queries": self.queries,
            "windows": {
                "total": self.windows.total(),
                **{status: self.windows[status] for status in get_args(WindowStatus)},
            },
            "failed_reasons": dict(sorted(self.failed_reasons.items())),
            **{name: self.amounts[name] for name in AMOUNTS},
            "seconds": self.rounded(),
        }


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write `report.json`."""
    text = json.dumps({"schema_version": SCHEMA_VERSION, **report}, indent=2, ensure_ascii=False)
    with replacing(folder / "report.json") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
