"""Two stages on the command line, the second a fake; the real one is run in tests/listwise."""

from pathlib import Path

import pytest

from dear_batch.specs import ListwiseSpec
from tests.cli.commands import (
    WITHOUT_TORCH,
    Make,
    fail,
    invoke,
    left_by_a_failure,
    outcome,
    parts,
    python,
    succeed,
    told,
)
from tests.run.fake_ranker import install


@pytest.mark.model
@pytest.mark.usefixtures("in_process")
def test_a_run_of_two_stages(
    two_stages: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = install(monkeypatch)
    options = ("--prompt", "mine", "--reasoning-tokens", 9, "--listwise-precision", "bf16")
    result = succeed(*two_stages, *options, "--max-failed-windows", "1%", "--device", "cpu")
    ran = outcome(result)
    assert (ran["status"], ran["outputs"]) == ("ok", ["run.trec"])
    assert ran["listwise"]["windows"]["ok"] == 3 * 2
    ((bundle, spec, device),) = fake.opened
    wanted = ListwiseSpec(str(bundle.folder), "mine", 5, 3, 2, 9, "bf16", None, "1%")
    assert (spec, device) == (wanted, "cpu")
    assert outcome(succeed("verify", tmp_path / "out"))["folders"][0]["parts"] == 3
    stages = outcome(succeed("status", tmp_path / "out", "--json"))["stages"]
    assert stages == {name: {"done": 1, "total": 1} for name in ("pointwise", "listwise")}
    shown = succeed("inspect", tmp_path / "out").stdout
    for text in ("first 5 in windows of 3 by 2, prompt mine", "6: 6 ok", "on cpu, fp32"):
        assert text in shown
    assert bundle.sha256 in shown


@pytest.mark.model
@pytest.mark.usefixtures("in_process")
def test_the_stages_one_after_the_other(
    two_stages: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    first = outcome(succeed(*two_stages, "--stage", "pointwise"))
    assert (first["status"], first["outputs"]) == ("listwise-outstanding", [])
    assert "listwise-outstanding" in succeed("inspect", tmp_path / "out").stdout
    assert not (tmp_path / "out" / "run.trec").exists()
    status = outcome(succeed("status", tmp_path / "out", "--json"))
    assert status["state"] == "listwise-outstanding"
    assert status["stages"] == {
        "pointwise": {"done": 1, "total": 1},
        "listwise": {"done": 0, "total": 1},
    }
    assert "is not finished" in fail(75, "is not finished", "verify", tmp_path / "out")
    assert outcome(succeed("gc", tmp_path / "out", "--older-than", "0d"))["freed_bytes"] == 0
    assert outcome(succeed(*two_stages, "--stage", "listwise"))["status"] == "ok"
    assert (tmp_path / "out" / "run.trec").exists()
    message = fail(78, "belongs to another job", *two_stages, "--window", "2")
    assert "--stage listwise" in message
    assert parts(message) == {"where", "valid", "next"}
    again = (*two_stages, "--listwise-depth", "4", "--stage", "listwise")
    assert outcome(succeed(*again))["listwise"]["depth"] == 4
    assert outcome(succeed("verify", tmp_path / "out"))["status"] == "ok"
    assert outcome(succeed("gc", tmp_path / "out"))["freed_bytes"] == 0


@pytest.mark.model
@pytest.mark.usefixtures("in_process")
def test_too_many_failed_windows_end_with_exit_3_and_the_run(
    two_stages: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, fails=lambda request: request.window.qid == "q1")
    result = invoke(*two_stages, "--max-failed-windows", 1)
    assert result.exit_code == 3
    assert "2 of 6 windows failed; their documents keep the order" in told(result.stderr)
    ran = outcome(result)
    assert (ran["status"], ran["exit_code"]) == ("too-many-failed-windows", 3)
    assert ran["outputs"] == ["run.trec"]
    assert ran["error"] in result.stderr
    assert (tmp_path / "out" / "run.trec").stat().st_size > 0
    assert "the prompt does not fit" in succeed("inspect", tmp_path / "out").stdout
    for allowed in ("2", "34%"):
        assert outcome(succeed(*two_stages, "--max-failed-windows", allowed))["status"] == "ok"


@pytest.mark.model
def test_bundles_given_for_each_other_are_refused(
    bundle: Make, generator: Path, lists: Path, tmp_path: Path
) -> None:
    common = ("run", "--input", lists, "--output", tmp_path / "out")
    scorer = bundle("llama31")
    fail(78, "is a listwise model", *common, "--bundle", generator)
    fail(78, "is a pointwise model", *common, "--bundle", scorer, "--listwise", scorer)
    assert left_by_a_failure(tmp_path / "out")


@pytest.mark.model
def test_a_missing_listwise_extra_is_told_before_anything_is_scored(
    two_stages: tuple[object, ...], tmp_path: Path
) -> None:
    done = python("-c", WITHOUT_TORCH, *two_stages)
    assert done.returncode == 78, done.stderr
    assert "needs the package 'torch', which is not installed" in told(done.stderr)
    assert "pip install 'dear-batch[listwise]'" in told(done.stderr)
    assert left_by_a_failure(tmp_path / "out")
    done = python("-c", WITHOUT_TORCH, *two_stages, "--stage", "pointwise")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "out" / "commits" / "pointwise").iterdir())
