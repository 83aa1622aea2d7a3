"""What is remembered of earlier runs, and that nothing about it can fail a job."""

from pathlib import Path

import pytest

from dear_batch.run.rates import KEPT, KEYS, recall, remember


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_median_of_the_last_runs() -> None:
    assert recall("b", "onnxruntime", "cpu") is None
    for rate in (9000, *range(100, 100 + 10 * KEPT, 10)):
        remember("b", "onnxruntime", "cpu", rate)
    assert recall("b", "onnxruntime", "cpu") == 120


def test_runs_of_others_are_of_no_use(monkeypatch: pytest.MonkeyPatch) -> None:
    remember("b", "onnxruntime", "cuda:1", 100)
    assert recall("b", "onnxruntime", "cuda:0") == 100
    assert recall("b", "onnxruntime", "cpu") is None
    assert recall("b", "torch", "cuda") is None
    assert recall("c", "onnxruntime", "cuda") is None
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    assert recall("b", "onnxruntime", "cuda") is None


def test_auto_is_the_device_used_last() -> None:
    remember("b", "torch", "cuda", 900)
    remember("b", "torch", "cpu", 10)
    assert recall("b", "torch") == 10
    remember("b", "torch", "cuda", 900)
    assert recall("b", "torch") == 900


def test_it_does_not_grow() -> None:
    for number in range(KEYS + 3):
        remember(f"b{number}", "torch", "cpu", 1)
    assert recall("b2", "torch", "cpu") is None
    assert recall("b3", "torch", "cpu") == 1


@pytest.mark.parametrize("text", ["", "[]", '{"a": ', "7", '{"x": [null], "y": "z", "w": []}'])
def test_a_broken_cache_is_none(text: str, cache: Path) -> None:
    path = cache / "dear-batch" / "rates.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert recall("b", "torch") is None
    remember("b", "torch", "cpu", 5)
    assert recall("b", "torch") == 5


def test_a_cache_that_cannot_be_written(cache: Path) -> None:
    cache.write_text("a file")
    remember("b", "torch", "cpu", 5)
    assert recall("b", "torch") is None
