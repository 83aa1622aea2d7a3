"""Whose output folder it is; no model loads."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dear_batch.errors import ConfigurationError, InputError, OutputError
from dear_batch.run import plan
from dear_batch.run.folder import (
    check_folder,
    claim_folder,
    listwise_settings,
    plan_listwise,
    replan,
)
from dear_batch.run.plan import plan_job
from dear_batch.specs import ExecutionSpec, JobSpec, ListwiseSpec
from tests.run.test_plan import job, nested


def test_new_and_empty_folders_are_taken(tmp_path: Path) -> None:
    check_folder(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    check_folder(tmp_path / "empty")
    assert not (tmp_path / "new").exists()


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(OutputError, match=r"no plan\.json") as caught:
        check_folder(tmp_path)
    assert caught.value.exit_code == 73
    assert caught.value.where == "thesis.tex"
    assert caught.value.next_step


def test_a_file_is_no_output_folder(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(OutputError, match="is not a folder") as caught:
        check_folder(tmp_path / "out")
    assert caught.value.exit_code == 73


def claim(tmp_path: Path, spec: JobSpec, bundle_sha256: str = "0" * 64) -> None:
    claim_folder(tmp_path / "out", plan_job(spec, tmp_path), spec, bundle_sha256)


def test_the_same_job_may_come_again(tmp_path: Path) -> None:
    spec = job(nested(tmp_path / "in.parquet", ["a"]), folder=str(tmp_path / "out"))
    claim(tmp_path, spec)
    written = (tmp_path / "out" / "plan.json").read_bytes()
    (tmp_path / "out" / "run.trec").touch()
    check_folder(tmp_path / "out")
    claim(tmp_path, spec)
    assert (tmp_path / "out" / "plan.json").read_bytes() == written
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"plan.json", "run.trec"}


def test_the_plan_says_what_decides_the_output(tmp_path: Path) -> None:
    path = nested(tmp_path / "in.parquet", ["a", "b"])
    claim(tmp_path, job(path, folder=str(tmp_path / "out")))
    fields = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert fields["schema_version"] == 1
    assert fields["bundle_sha256"] == "0" * 64
    assert fields["spec"]["pointwise"]["bundle"] == "bundle"
    (described,) = fields["inputs"]
    assert (described["path"], described["rows"]) == (path, 2)
    assert described["bytes"] == Path(path).stat().st_size
    (output,) = fields["outputs"]
    assert (output["stem"], output["queries"], output["regrouped"]) == ("run", 2, False)
    assert len(output["shards"]) == 1


@pytest.mark.parametrize("changed", ["bundle", "setting", "rows", "mtime", "shards", "garbage"])
def test_another_jobs_folder_is_refused(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = nested(tmp_path / "in.parquet", ["a", "b"])
    out = str(tmp_path / "out")
    claim(tmp_path, job(path, folder=out))
    spec, sha256, plan_json = job(path, folder=out), "0" * 64, tmp_path / "out" / "plan.json"
    match changed:
        case "bundle":
            sha256 = "1" * 64
        case "setting":
            spec = job(path, folder=out, interpolate=0.5)
        case "rows":
            nested(Path(path), ["a", "b", "c"])
        case "mtime":
            os.utime(path, (1, 1))
        case "shards":
            monkeypatch.setattr(plan, "SHARD_BYTES", 1)
        case "garbage":
            plan_json.write_text("[1")
    before = plan_json.read_bytes()
    with pytest.raises(ConfigurationError, match="another job") as caught:
        claim(tmp_path, spec, sha256)
    assert caught.value.exit_code == 78
    assert "out" in caught.value.next_step
    assert plan_json.read_bytes() == before


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError) as caught:
        check_folder(tmp_path / "file" / "out")
    assert caught.value.exit_code == 73


# The listwise stage of a plan.

LISTWISE = ListwiseSpec("listwise-bundle")


def plan_of(tmp_path: Path) -> dict[str, Any]:
    fields = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert isinstance(fields, dict)
    return fields


def claim_two(tmp_path: Path, spec: JobSpec, listwise: ListwiseSpec = LISTWISE) -> None:
    settings = listwise_settings(listwise, "2" * 64)
    planned = plan_job(spec, tmp_path)
    claim_folder(tmp_path / "out", planned, spec, "0" * 64, settings)


def go_on(
    tmp_path: Path, spec: JobSpec, listwise: ListwiseSpec = LISTWISE, *, may_differ: bool = True
) -> None:
    out, settings = tmp_path / "out", listwise_settings(listwise, "2" * 64)
    replan(out, plan_listwise(out, spec, settings, may_differ=may_differ))


@pytest.fixture
def planned(tmp_path: Path) -> JobSpec:
    spec = job(nested(tmp_path / "in.parquet", ["a"]), folder=str(tmp_path / "out"))
    claim_two(tmp_path, spec)
    return spec


def test_a_plan_pins_the_listwise_stage(tmp_path: Path) -> None:
    prompt = tmp_path / "mine.toml"
    prompt.write_text("one")
    spec = job(nested(tmp_path / "in.parquet", ["a"]), folder=str(tmp_path / "out"))
    claim_two(tmp_path, spec, replace(LISTWISE, prompt=str(prompt), max_failed_windows="5%"))
    pinned = plan_of(tmp_path)["listwise"]
    assert (pinned["bundle"], pinned["bundle_sha256"]) == ("listwise-bundle", "2" * 64)
    assert (pinned["depth"], pinned["window"], pinned["step"]) == (30, 20, 10)
    assert pinned["prompt_file_sha256"] == hashlib.sha256(b"one").hexdigest()
    # How much may fail decides the exit code, not the order.
    claim_two(tmp_path, spec, replace(LISTWISE, prompt=str(prompt), max_failed_windows=7))
    prompt.write_text("two")
    with pytest.raises(ConfigurationError, match="another job") as caught:
        claim_two(tmp_path, spec, replace(LISTWISE, prompt=str(prompt)))
    assert caught.value.where.endswith("plan.json: listwise")


def test_another_listwise_stage_is_pointed_to_its_own_run(tmp_path: Path, planned: JobSpec) -> None:
    with pytest.raises(ConfigurationError, match="another job") as caught:
        claim_two(tmp_path, planned, replace(LISTWISE, depth=20))
    assert "--stage listwise" in caught.value.next_step
    with pytest.raises(ConfigurationError, match="another job") as caught:
        claim(tmp_path, planned)  # the same without a listwise stage
    assert "--stage" not in caught.value.next_step


def test_the_same_listwise_stage_leaves_its_plan(tmp_path: Path, planned: JobSpec) -> None:
    before = (tmp_path / "out" / "plan.json").stat()
    go_on(tmp_path, planned, may_differ=False)
    assert (tmp_path / "out" / "plan.json").stat() == before


def test_another_listwise_stage_takes_its_place_in_the_plan(
    tmp_path: Path, planned: JobSpec
) -> None:
    before = plan_of(tmp_path)
    go_on(tmp_path, planned, replace(LISTWISE, depth=20))
    after = plan_of(tmp_path)
    assert (before.pop("listwise")["depth"], after.pop("listwise")["depth"]) == (30, 20)
    assert after == before
    with pytest.raises(ConfigurationError, match="another job"):
        go_on(tmp_path, planned, may_differ=False)


@pytest.mark.parametrize("changed", ["input", "inputs", "setting", "tool"])
def test_stage_two_needs_a_stage_one_of_this_job(
    changed: str, tmp_path: Path, planned: JobSpec
) -> None:
    spec, where = planned, "inputs"
    match changed:
        case "input":
            os.utime(tmp_path / "in.parquet", (1, 1))
        case "inputs":
            more = nested(tmp_path / "more.parquet", ["b"])
            spec = job(*planned.input.paths, more, folder=planned.output.folder)
        case "setting":
            spec, where = job(*planned.input.paths, folder=planned.output.folder), "spec"
            spec = replace(spec, pointwise=replace(spec.pointwise, depth=5))
        case "tool":
            fields = {**plan_of(tmp_path), "tool": "dear-batch 0.0.1"}
            (tmp_path / "out" / "plan.json").write_text(json.dumps(fields))
            where = "tool"
    before = plan_of(tmp_path)
    with pytest.raises(ConfigurationError, match="another job") as caught:
        go_on(tmp_path, spec)
    assert caught.value.where.endswith(f"plan.json: {where}")
    assert plan_of(tmp_path) == before


@pytest.mark.parametrize("pattern", ["in.parquet", "i*.parquet"])
def test_stage_two_may_run_where_the_inputs_are_not(pattern: str, tmp_path: Path) -> None:
    nested(tmp_path / "in.parquet", ["a"])
    spec = job(str(tmp_path / pattern), folder=str(tmp_path / "out"))
    claim_two(tmp_path, spec)
    (tmp_path / "in.parquet").unlink()
    before = plan_of(tmp_path)
    go_on(tmp_path, spec)
    assert plan_of(tmp_path) == before
    with pytest.raises(InputError) as caught:
        go_on(tmp_path, spec, may_differ=False)
    assert caught.value.exit_code == 65


@pytest.mark.parametrize("other", ["as it was", "changed", "new", "left out"])
def test_inputs_that_are_there_are_compared(other: str, tmp_path: Path) -> None:
    for name in ("1", "2"):
        nested(tmp_path / f"{name}.parquet", [name])
    spec = job(str(tmp_path / "*.parquet"), folder=str(tmp_path / "out"))
    claim_two(tmp_path, spec)
    (tmp_path / "1.parquet").unlink()
    match other:
        case "changed":
            os.utime(tmp_path / "2.parquet", (1, 1))
        case "new":
            nested(tmp_path / "3.parquet", ["3"])
        case "left out":
            spec = job(str(tmp_path / "1.parquet"), folder=str(tmp_path / "out"))
    if other == "as it was":
        go_on(tmp_path, spec)
        return
    with pytest.raises(ConfigurationError, match="another job") as caught:
        go_on(tmp_path, spec)
    assert caught.value.where.endswith("plan.json: inputs")


def test_stage_two_may_run_on_another_device(tmp_path: Path, planned: JobSpec) -> None:
    before = plan_of(tmp_path)
    elsewhere = replace(planned, execution=ExecutionSpec(device="cuda:1", batch_tokens=4096))
    go_on(tmp_path, elsewhere)
    assert plan_of(tmp_path) == before  # stage 1 is still that of the first device
    with pytest.raises(ConfigurationError, match="another job") as caught:
        go_on(tmp_path, elsewhere, may_differ=False)
    assert caught.value.where.endswith("plan.json: spec")


@pytest.mark.parametrize("plan_text", [None, "[1", "{}"])
def test_stage_two_needs_a_plan_of_two_stages(plan_text: str | None, tmp_path: Path) -> None:
    spec = job(nested(tmp_path / "in.parquet", ["a"]), folder=str(tmp_path / "out"))
    if plan_text is None:
        claim(tmp_path, spec)
    else:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "plan.json").write_text(plan_text)
    with pytest.raises(ConfigurationError, match="no finished stage 1") as caught:
        go_on(tmp_path, spec)
    assert "--stage pointwise" in caught.value.next_step
