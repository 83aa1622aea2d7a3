"""`metrics.prom`: what a monitoring system reads of a job, in the OpenMetrics text format.

https://github.com/prometheus/OpenMetrics/blob/main/specification/OpenMetrics.md
The time of the last success moves on success only.
"""

import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dear_batch.files.durable import replacing
from dear_batch.run.folder import METRICS

_LAST = re.compile(
    r"^dear_batch_last_success_timestamp_seconds (\d+(?:\.\d+)?)$", re.MULTILINE | re.ASCII
)
HELP = {
    "last_run_timestamp_seconds": "When the last run of this folder ended.",
    "last_success_timestamp_seconds": "When the last run that published ended.",
    "last_exit_code": "Exit code of the last run.",
    "queries": "Queries of the job by what became of them.",
    "candidates": "Candidates of the job by what became of them.",
    "quarantined": "Refusals by reason.",
    "windows": "Listwise windows by status.",
    "shards": "Shards by stage and whether they are done.",
    "tokens": "Real tokens that the pointwise stage scored.",
    "phase_seconds": "Wall time of the job by what took it.",
}


def write_metrics(folder: Path, report: Mapping[str, Any], *, success: bool) -> None:
    """Write the metrics of a run that ended, however it did.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    now = time.time()
    last = now if success else _last_success(folder / METRICS)
    with replacing(folder / METRICS) as temporary:
        text = "".join(f"{line}\n" for line in _lines(report, now, last))
        temporary.write_text(text, encoding="utf-8")


def _last_success(path: Path) -> float | None:
    try:
        found = _LAST.search(path.read_text(encoding="utf-8"))
        return float(found[1]) if found else None
    except (OSError, ValueError):
        return None


def _lines(report: Mapping[str, Any], now: float, last: float | None) -> Iterator[str]:
    listwise = report.get("listwise") or {}
    families: dict[str, dict[str, Any]] = {
        "last_run_timestamp_seconds": {"": round(now, 3)},
        "last_success_timestamp_seconds": {} if last is None else {"": last},
        "last_exit_code": {"": report["exit_code"]},
        "queries": _by("outcome", report.get("queries", {})),
        "candidates": _by("outcome", report.get("candidates", {})),
        "quarantined": _by("reason", report.get("quarantine_reasons", {})),
        "windows": _by("status", listwise.get("windows", {})),
        "shards": {
            f'{{stage="{stage}",state="{state}"}}': count
            for stage, states in report.get("shards", {}).items()
            for state, count in states.items()
        },
        "tokens": {"": report["tokens"]} if "tokens" in report else {},
        "phase_seconds": _by("phase", report.get("seconds", {})),
    }
    for name, samples in families.items():
        if samples:
            yield f"# TYPE dear_batch_{name} gauge"
            yield f"# HELP dear_batch_{name} {HELP[name]}"
            for labels, value in samples.items():
                yield f"dear_batch_{name}{labels} {value}"
    yield "# EOF"


def _by(label: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f'{{{label}="{name}"}}': value for name, value in values.items()}
