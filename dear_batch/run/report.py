"""Counts and times: of a shard in its commit, of a job in `report.json`.

Nothing leaves a job uncounted: read = written + quarantined + skipped, for every shard.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

from dear_batch.data import Permutation, Ranking, Refusal, WindowStatus
from dear_batch.run.admission import SKIPPED
from dear_batch.run.blocks import Work
from dear_batch.run.stopwatch import Stopwatch

SCHEMA_VERSION = 2
OK, OUTSTANDING = "ok", "listwise-outstanding"  # statuses of a report
TOO_MANY_BAD, TOO_MANY_FAILED = "too-many-bad", "too-many-failed-windows"
FAILED, STOPPED = "failed", "stopped"
AMOUNTS = (
    "prompt_tokens",
    "answer_tokens",
    "forwards",
    "overruled",
    "cut_passages",
    "shortened_passages",
    "neutralised_texts",
)
Counts = dict[str, Any]


@dataclass(slots=True)
class Count:
    """Queries and candidates: read = written + quarantined + skipped."""

    read: int = 0
    written: int = 0
    quarantined: int = 0
    skipped: int = 0

    def check(self) -> None:
        """Whether nothing was lost or invented."""
        if self.read != self.written + self.quarantined + self.skipped:
            raise AssertionError(f"counts do not add up: {self}")


@dataclass(slots=True)
class Tally(Stopwatch):
    """Running figures of a shard of the first stage.

    Three threads work at a shard, and each adds to fields and seconds of its own: the one that
    reads to what was read, the engine's to the work, the one that writes to all else.
    """

    queries: Count = field(default_factory=Count)
    candidates: Count = field(default_factory=Count)
    quarantined: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    work: Work = field(default_factory=Work)

    def refused(self, refusal: Refusal) -> None:
        """Count what was set aside or skipped; a refusal without docid is a whole query."""
        if refusal.reason in SKIPPED:
            self.skipped[refusal.reason] += 1
            self.candidates.skipped += refusal.candidates
            self.queries.skipped += refusal.docid is None
        else:
            self.quarantined[refusal.reason] += 1
            self.candidates.quarantined += refusal.candidates
            self.queries.quarantined += refusal.docid is None

    def ranked(self, ranking: Ranking) -> None:
        """Count what was written."""
        self.queries.written += 1
        self.candidates.written += len(ranking.entries)

    def to_json(self) -> Counts:
        """The counts; what was read by the reader is what became of it at the end."""
        self.queries.check()
        self.candidates.check()
        return {
            "queries": asdict(self.queries),
            "candidates": asdict(self.candidates),
            "quarantine_reasons": dict(sorted(self.quarantined.items())),
            "skipped_reasons": dict(sorted(self.skipped.items())),
            **asdict(self.work),
            "seconds": self.rounded(),
        }


@dataclass(slots=True)
class ListwiseTally(Stopwatch):
    """Running figures of a shard of the second stage; `amounts` are sums over all windows."""

    queries: int = 0
    candidates: int = 0
    windows: Counter[str] = field(default_factory=Counter)
    failed_reasons: Counter[str] = field(default_factory=Counter)
    amounts: Counter[str] = field(default_factory=Counter)
    memory_backoffs: int = 0

    def ranked(self, ranking: Ranking) -> None:
        """Count what was written."""
        self.queries += 1
        self.candidates += len(ranking.entries)

    def answered(self, answer: Permutation) -> None:
        """Count a window."""
        self.windows[answer.status] += 1
        self.failed_reasons.update([answer.detail] if answer.status == "failed" else [])
        self.amounts.update({name: getattr(answer, name) for name in AMOUNTS})

    def to_json(self) -> Counts:
        """The counts; windows by status add up to their total."""
        return {
            "queries": self.queries,
            "candidates": self.candidates,
            "windows": {
                "total": self.windows.total(),
                **{status: self.windows[status] for status in get_args(WindowStatus)},
            },
            "failed_reasons": dict(sorted(self.failed_reasons.items())),
            **{name: self.amounts[name] for name in AMOUNTS},
            "memory_backoffs": self.memory_backoffs,
            "seconds": self.rounded(),
        }


def add_up(counts: Iterable[Mapping[str, Any]]) -> Counts:
    """The sum of the counts of shards, number by number, at every depth."""
    total: Counts = {}
    for item in counts:
        for name, value in item.items():
            if isinstance(value, Mapping):
                total[name] = add_up([total.get(name, {}), value])
            else:
                total[name] = total.get(name, 0) + value
    return total


def pointwise_figures(shards: Iterable[Mapping[str, Any]]) -> Counts:
    """The figures of a first stage from those of its shards."""
    empty = Tally().to_json()
    total = add_up([empty, *shards])
    computed, tokens = total.pop("computed_tokens"), total["tokens"]
    scoring, idle = (total["seconds"].get(name, 0.0) for name in ("score", "idle"))
    return {
        "queries": total.pop("queries"),
        "candidates": total.pop("candidates"),
        "quarantine_reasons": total.pop("quarantine_reasons"),
        "skipped_reasons": total.pop("skipped_reasons"),
        "scored_pairs": total.pop("pairs"),
        **total,
        "tokens_per_second": round(tokens / scoring, 1) if scoring else None,
        "padding_share": 1 - tokens / computed if computed else 0.0,
        "idle_share": round(idle / (scoring + idle), 4) if scoring else None,
        "seconds": {name: round(value, 3) for name, value in total["seconds"].items()},
    }


def listwise_figures(shards: Iterable[Mapping[str, Any]]) -> Counts:
    """The figures of a second stage from those of its shards."""
    total = add_up([ListwiseTally().to_json(), *shards])
    total["seconds"] = {name: round(value, 3) for name, value in total["seconds"].items()}
    return total
