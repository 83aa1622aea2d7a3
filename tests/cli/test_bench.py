"""The command `bench`: a table or one line of JSON, and nothing left behind."""

import json
import os
from pathlib import Path

import pytest

from dear_batch.pointwise import ceiling
from tests.cli.commands import WITHOUT_TORCH, Make, everything, fail, outcome, python, succeed

FIELDS = {
    "status",
    "bundle",
    "input",
    "engine",
    "device",
    "plan",
    "passed_over",
    "engine_version",
    "precision",
    "device_name",
    "cores",
    "row_tokens",
    "batch_tokens",
    "lists",
    "passes",
    "pairs",
    "truncated_pairs",
    "real_tokens",
    "tokens",
    "computed_tokens",
    "memory_backoffs",
    "load_seconds",
    "seconds",
    "score_seconds",
    "pairs_per_second",
    "real_tokens_per_second",
    "computed_tokens_per_second",
    "prefix_share",
    "padding_share",
    "engine_share",
    "engine_share_in_turn",
    "flops_per_second",
    "ceiling_share",
    "flops_per_token",
    "cpu_side_real_tokens_per_second",
    "cpu_side_real_tokens_per_second_16_cores",
    "ceiling",
    "million",
    "volume",
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "LEAST_S", 0.001)


@pytest.mark.model
def test_one_line_of_json(
    bundle: Make,
    lists: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = bundle("llama31")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    before = everything(folder)
    common = ("--bundle", folder, "--input", lists)
    prices = ("--price-per-hour", 7.2, "--volume", "2.5k")
    done = succeed("bench", *common, "--pairs", 12, *prices, "--json")
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert set(found) == FIELDS
    assert (found["pairs"], found["lists"], found["passes"]) == (12, 2, 3)
    assert found["volume"]["candidates"] == 2500
    hours = found["volume"]["seconds"] / 3600
    assert found["volume"]["cost"] == pytest.approx(7.2 * hours, rel=1e-3)
    assert found["million"]["seconds"] == pytest.approx(400 * found["volume"]["seconds"], rel=1e-3)
    assert 0 < found["engine_share_in_turn"] <= found["engine_share"] <= 1
    assert everything(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["in.parquet"]
    dry = outcome(succeed("run", *common, "--output", tmp_path / "out", "--dry-run"))
    rate = found["tokens"] / found["seconds"]["score"]
    assert dry["rate_from"] == "earlier runs"
    assert dry["tokens_per_second"] == pytest.approx(rate, rel=1e-3)


@pytest.mark.model
def test_a_table_for_people(bundle: Make, lists: Path) -> None:
    folder = bundle("llama31")
    text = succeed("bench", "--bundle", folder, "--input", lists, "--seconds", 1).stdout
    for expected in ("18 pairs of 3 lists", "onnxruntime", "tokens/s", "1,000,000 candidates"):
        assert expected in text
    for row in ("engine's share", "ceiling", "CPU side", "padding", "on 16"):
        assert row in text


@pytest.mark.model
@pytest.mark.process
def test_it_needs_no_pytorch(bundle: Make, lists: Path) -> None:
    arguments = ("--bundle", bundle("llama31"), "--input", lists, "--pairs", 6, "--json")
    done = python("-c", WITHOUT_TORCH, "bench", *arguments, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ceiling"]["by"] == "onnxruntime"


def test_wrong_usage(lists: Path, tmp_path: Path) -> None:
    common = ("bench", "--bundle", tmp_path, "--input", lists)
    fail(2, "do not go together", *common, "--pairs", 5, "--seconds", 5)
    for volume in ("many", "0", "1e6", "-3", "10 M"):
        fail(2, "'--volume' is out of range", *common, f"--volume={volume}")
    fail(2, "out of range", *common, "--device", "tpu")
    fail(78, "is not a bundle", *common)
    fail(65, "does not exist", "bench", "--bundle", tmp_path, "--input", tmp_path / "no.parquet")
