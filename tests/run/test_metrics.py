"""`metrics.prom`: OpenMetrics text, by the rules of its specification that concern gauges.

https://github.com/prometheus/OpenMetrics/blob/main/specification/OpenMetrics.md
"""

import re
import time
from pathlib import Path
from typing import Any

import pytest

from dear_batch.run.metrics import write_metrics

# The grammar of the specification's ABNF section, for samples without time stamps.
SAMPLE = re.compile(
    r"(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)"
    r"(\{(?P<labels>[a-zA-Z_][a-zA-Z0-9_]*=\"[^\"\\\n]*\""
    r"(,[a-zA-Z_][a-zA-Z0-9_]*=\"[^\"\\\n]*\")*)\})?"
    r" (?P<value>-?\d+(\.\d+)?([eE][+-]?\d+)?)"
)
REPORT: dict[str, Any] = {
    "status": "too-many-bad",
    "exit_code": 3,
    "queries": {"read": 7, "written": 5, "quarantined": 1, "skipped": 1},
    "candidates": {"read": 70, "written": 60, "quarantined": 10, "skipped": 0},
    "quarantine_reasons": {"null_text": 9, "empty_query": 1},
    "shards": {"pointwise": {"done": 3, "kept": 1}, "listwise": {"done": 1, "kept": 0}},
    "tokens": 12345,
    "seconds": {"score": 1.25, "total": 0.00001},
    "listwise": {"windows": {"total": 4, "ok": 3, "truncated": 0, "kept": 0, "failed": 1}},
}


def parse(text: str) -> dict[str, float]:
    """Samples by name and labels; every rule that the text breaks fails here."""
    *lines, end, nothing = text.split("\n")
    assert (end, nothing) == ("# EOF", "")
    found: dict[str, float] = {}
    described: dict[str, set[str]] = {}
    family = ""
    for line in lines:
        if line.startswith("# "):
            _, kind, name, rest = line.split(" ", 3)
            if name != family:  # families do not interleave, and come once
                assert name not in described
                family = name
            described.setdefault(name, set())
            assert kind not in described[name]
            assert not any(key.startswith(name) for key in found), "before the samples"
            described[name].add(kind)
            assert rest == "gauge" if kind == "TYPE" else rest
            continue
        sample = SAMPLE.fullmatch(line)
        assert sample, line
        assert sample["name"] == family
        key = line.rpartition(" ")[0]
        assert key not in found
        found[key] = float(sample["value"])
    assert all(kinds == {"TYPE", "HELP"} for kinds in described.values())
    return found


def metrics(folder: Path) -> dict[str, float]:
    return parse((folder / "metrics.prom").read_text(encoding="utf-8"))


def test_a_report_becomes_metrics(tmp_path: Path) -> None:
    before = time.time()
    write_metrics(tmp_path, REPORT, success=True)
    found = metrics(tmp_path)
    assert found["dear_batch_last_exit_code"] == 3
    assert found['dear_batch_queries{outcome="written"}'] == 5
    assert found['dear_batch_queries{outcome="skipped"}'] == 1
    assert found['dear_batch_candidates{outcome="quarantined"}'] == 10
    assert found['dear_batch_quarantined{reason="null_text"}'] == 9
    assert found['dear_batch_shards{stage="pointwise",state="done"}'] == 3
    assert found['dear_batch_shards{stage="listwise",state="kept"}'] == 0
    assert found['dear_batch_windows{status="failed"}'] == 1
    assert found["dear_batch_tokens"] == 12345
    assert found['dear_batch_phase_seconds{phase="score"}'] == 1.25
    assert found['dear_batch_phase_seconds{phase="total"}'] == 0.00001
    for name in ("last_run", "last_success"):
        when = found[f"dear_batch_{name}_timestamp_seconds"]
        assert before - 1 <= when <= time.time() + 1
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.prom"]


def test_a_run_that_failed_early_has_metrics_too(tmp_path: Path) -> None:
    write_metrics(tmp_path, {"status": "failed", "exit_code": 65}, success=False)
    found = metrics(tmp_path)
    assert set(found) == {"dear_batch_last_run_timestamp_seconds", "dear_batch_last_exit_code"}
    assert found["dear_batch_last_exit_code"] == 65


def test_the_last_success_moves_on_success_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1_800_000_000.125
    monkeypatch.setattr("time.time", lambda: now)
    success, run = (f"dear_batch_last_{n}_timestamp_seconds" for n in ("success", "run"))
    write_metrics(tmp_path, REPORT, success=True)
    assert metrics(tmp_path)[success] == metrics(tmp_path)[run] == 1_800_000_000.125
    for _ in range(2):  # also where the file of the failure before is all there is
        now += 100.001
        write_metrics(tmp_path, {"exit_code": 75}, success=False)
        assert metrics(tmp_path)[run] == pytest.approx(now, abs=0.001)
        assert metrics(tmp_path)[success] == 1_800_000_000.125
    now += 100
    write_metrics(tmp_path, REPORT, success=True)
    assert metrics(tmp_path)[success] == pytest.approx(now, abs=0.001)


@pytest.mark.parametrize("old", [b"", b"\xff\xfe", b"dear_batch_last_success_timestamp_seconds\n"])
def test_old_metrics_that_say_nothing_are_no_success(old: bytes, tmp_path: Path) -> None:
    (tmp_path / "metrics.prom").write_bytes(old)
    write_metrics(tmp_path, {"exit_code": 1}, success=False)
    assert "dear_batch_last_success_timestamp_seconds" not in metrics(tmp_path)


@pytest.mark.parametrize("value", ["soon", "NaN", "1e400", "-"])
def test_old_metrics_that_are_damaged_do_not_stop_a_report(value: str, tmp_path: Path) -> None:
    text = f"dear_batch_last_success_timestamp_seconds {value}\n# EOF\n"
    (tmp_path / "metrics.prom").write_text(text)
    write_metrics(tmp_path, {"exit_code": 1}, success=False)
    assert "dear_batch_last_success_timestamp_seconds" not in metrics(tmp_path)


def test_the_file_is_replaced_whole(tmp_path: Path) -> None:
    write_metrics(tmp_path, REPORT, success=True)
    before = (tmp_path / "metrics.prom").read_bytes()
    with pytest.raises(KeyError):
        write_metrics(tmp_path, {}, success=False)
    assert (tmp_path / "metrics.prom").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.prom"]


def test_a_damaged_time_of_success_is_none(tmp_path: Path) -> None:
    path = tmp_path / "metrics.prom"
    path.write_text("dear_batch_last_success_timestamp_seconds 17x3\n")
    write_metrics(tmp_path, REPORT, success=False)
    assert "dear_batch_last_success_timestamp_seconds" not in parse(path.read_text())
