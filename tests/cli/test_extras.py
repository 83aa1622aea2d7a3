"""Without PyTorch: what works, and the install line of what does not."""

import os
from pathlib import Path

import pytest

from tests.cli.commands import WITHOUT_TORCH, Make, left_by_a_failure, python, told


@pytest.mark.model
@pytest.mark.parametrize("command", ["export", "verify-reference", "run", "score"])
def test_a_missing_extra_prints_its_install_line(
    command: str, bundle: Make, checkpoint: Make, lists: Path, tmp_path: Path
) -> None:
    model, folder, out = checkpoint("llama31"), bundle("llama31"), tmp_path / "out"
    arguments: dict[str, tuple[object, ...]] = {
        "export": ("--model", model, "--output", out),
        "verify-reference": (model, "--scores", "8b-ce"),
        "run": ("--engine", "torch", "--input", lists, "--bundle", folder, "--output", out),
        "score": ("--engine", "torch", folder, "who?", "a text"),
    }
    done = python("-c", WITHOUT_TORCH, command, *arguments[command])
    assert done.returncode == 78, done.stderr
    needs = "needs the package 'torch', which is not installed"
    chosen = "with --engine torch: torch is not installed"
    assert (chosen if "--engine" in arguments[command] else needs) in told(done.stderr)
    assert "pip install 'dear-batch[export]'" in told(done.stderr)
    assert "Traceback" not in done.stderr
    assert not out.exists() or left_by_a_failure(out)


@pytest.mark.model
def test_a_run_works_without_the_extra(bundle: Make, lists: Path, tmp_path: Path) -> None:
    common = ("--input", lists, "--bundle", bundle("llama31"), "--output", tmp_path / "out")
    done = python("-c", WITHOUT_TORCH, "run", *common, env={**os.environ, "COLUMNS": "80"})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "run.trec").exists()
