"""The small two-stage job that the fault tests disturb."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.run.fake_ranker import listwise_bundle
from tests.run.test_local import _rows, nested

Settings = dict[str, Any]


@pytest.fixture
def settings(bundle: Callable[..., Path], tmp_path: Path) -> Settings:
    """Three shards of two queries each, one candidate of which is set aside, in two stages."""
    rows = [{**row, "candidates": [*row["candidates"]]} for row in _rows()[:6]]
    rows[2]["candidates"][3] = {**rows[2]["candidates"][3], "text": None}
    path = nested(tmp_path / "in.parquet", rows)
    generator = listwise_bundle(tmp_path / "generator")
    return {
        "spec": {
            "input": {"paths": [path], "max_bad": 1},
            "pointwise": {"bundle": str(bundle("llama31"))},
            "output": {"folder": "set by each run"},
            "listwise": {"bundle": str(generator), "depth": 6, "window": 4},
        },
        "shard_bytes": 8000,
        "least_queries": 3,
    }


@pytest.fixture
def settings_file(settings: Settings, tmp_path: Path) -> Path:
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(settings))
    return path
