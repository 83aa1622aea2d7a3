"""kill -9 at calls that change the disk and at random moments: run again, nothing is missing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.model


def kills(settings_file: Path, folder: Path, how: str, amount: int) -> dict[str, Any]:
    folder.mkdir()
    found = subprocess.run(
        [sys.executable, "-m", "tests.faults.kills", settings_file, folder, how, str(amount)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    result: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return result


def test_killed_at_calls_that_change_the_disk(settings_file: Path, tmp_path: Path) -> None:
    result = kills(settings_file, tmp_path / "kills", "every", 14)
    assert result["faults"] == []
    assert result["kills"] >= 6
    assert result["kept"] > 0


def test_a_job_that_is_begun_anew_is_killed(settings_file: Path, tmp_path: Path) -> None:
    result = kills(settings_file, tmp_path / "kills", "restart", 20)
    assert result["faults"] == []
    assert result["kills"] >= 6


@pytest.mark.slow
def test_a_job_that_is_begun_anew_is_killed_everywhere(settings_file: Path, tmp_path: Path) -> None:
    result = kills(settings_file, tmp_path / "kills", "restart", 1)
    assert result["faults"] == []
    assert result["kills"] > 100


@pytest.mark.slow
def test_killed_at_every_call_that_changes_the_disk(settings_file: Path, tmp_path: Path) -> None:
    result = kills(settings_file, tmp_path / "kills", "every", 1)
    assert result["faults"] == []
    assert result["kills"] > 100


@pytest.mark.slow
def test_killed_at_200_random_moments(settings_file: Path, tmp_path: Path) -> None:
    result = kills(settings_file, tmp_path / "kills", "random", 200)
    assert result["faults"] == []
    assert result["kills"] == 200
