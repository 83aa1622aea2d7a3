"""What a folder's plan lets in and what it refuses; bundles are manifests, no model loads."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from dear_batch.bundle import Manifest, Source, hash_folder, open_bundle, write_manifest
from dear_batch.errors import ConfigurationError, InputError
from dear_batch.pointwise.own_pairs import N_OWN_PAIRS
from dear_batch.pointwise.recipe import Recipe
from dear_batch.run.folder import read_plan, write_plan
from dear_batch.run.identity import asked, digest, job_fields, listwise_settings
from dear_batch.run.inputs import Hashes, Pin
from dear_batch.run.ledger import Ledger
from dear_batch.run.planning import (
    Wanted,
    fitting_plan,
    new_plan,
    outline,
    plan_again,
    wanted_now,
    with_runtime,
)
from dear_batch.run.watch import StoppedError, Watch
from dear_batch.specs import ExecutionSpec, JobSpec, ListwiseSpec
from tests.run.fake_ranker import listwise_bundle
from tests.run.test_plan import flat, job, nested

RUNTIME = {"engine": "onnxruntime", "device": "cpu"}


def pointwise_bundle(folder: Path, model: str = "some/model") -> Path:
    """A manifest, and nothing to load."""
    folder.mkdir()
    manifest = Manifest(
        task="pointwise",
        source=Source(model, "0" * 40),
        precision="fp32",
        recipe=Recipe("readme", "last-token", (1,), (1,), (), 2),
        architecture={},
        graphs={},
        parity=None,
        versions={},
        created="2026-01-01T00:00:00+00:00",
        own_scores=(0.0,) * N_OWN_PAIRS,
        files=hash_folder(folder),
    )
    write_manifest(folder, manifest)
    return folder


@pytest.fixture
def one(tmp_path: Path) -> JobSpec:
    """A job of one stage over one list."""
    pointwise_bundle(tmp_path / "bundle")
    path = nested(tmp_path / "in.parquet", ["a", "b"])
    spec = job(path, folder=str(tmp_path / "out"))
    return replace(spec, pointwise=replace(spec.pointwise, bundle=str(tmp_path / "bundle")))


@pytest.fixture
def two(one: JobSpec, tmp_path: Path) -> JobSpec:
    """The same with a second stage."""
    return replace(one, listwise=ListwiseSpec(str(listwise_bundle(tmp_path / "listwise"))))


def listwise(spec: JobSpec, **settings: Any) -> JobSpec:
    assert spec.listwise
    return replace(spec, listwise=replace(spec.listwise, **settings))


def folder_of(spec: JobSpec) -> Path:
    Path(spec.output.folder).mkdir(exist_ok=True)
    return Path(spec.output.folder)


def planned(spec: JobSpec) -> dict[str, Any]:
    """Plan a job in its folder, as a run does before it scores."""
    folder = folder_of(spec)
    wanted = wanted_now(spec, "all", folder)
    _, fields = new_plan(spec, wanted, Ledger(folder), Watch())
    fields = with_runtime(fields, "pointwise", RUNTIME)
    write_plan(folder, fields)
    return fields


def let_in(spec: JobSpec, stage: str = "all") -> dict[str, Any] | None:
    folder = folder_of(spec)
    return fitting_plan(folder, wanted_now(spec, stage, folder), stage)


def refused(spec: JobSpec, stage: str = "all") -> ConfigurationError:
    before = (folder_of(spec) / "plan.json").read_bytes()
    with pytest.raises(ConfigurationError, match="another job") as caught:
        let_in(spec, stage)
    assert caught.value.exit_code == 78
    assert (folder_of(spec) / "plan.json").read_bytes() == before
    return caught.value


def where(error: ConfigurationError) -> str:
    return error.where.partition("plan.json: ")[2]


# A plan of one stage.


def test_a_folder_without_a_plan_takes_any(one: JobSpec) -> None:
    assert let_in(one) is None


def test_the_same_job_may_come_again(one: JobSpec) -> None:
    fields = planned(one)
    assert let_in(one) == json.loads(json.dumps(fields))


def test_the_plan_says_what_decides_the_output(one: JobSpec, tmp_path: Path) -> None:
    planned(one)
    fields = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert set(fields) == {
        "schema_version", "job", "listwise", "runtime", "fingerprints", "outputs", "passed_over",
        "sha256",
    }  # fmt: skip
    assert (fields["schema_version"], fields["listwise"]) == (2, None)
    assert fields["job"]["bundle_sha256"] == open_bundle(tmp_path / "bundle", verify=False).sha256
    (described,) = fields["job"]["inputs"]
    path = tmp_path / "in.parquet"
    assert (described["path"], described["rows"]) == (str(path), 2)
    assert described["bytes"] == path.stat().st_size
    assert described["mtime_ns"] == path.stat().st_mtime_ns
    assert len(described["footer_sha256"]) == 64
    (output,) = fields["outputs"]
    assert (output["stem"], output["queries"]) == ("run", 2)
    (source,) = output["sources"]
    assert (source["inputs"], source["regrouped"], source["kept_rows"]) == ([0], False, {})
    shard = {"first_row": 0, "n_rows": 2, "n_queries": 2, "key": "00000-000000000000"}
    assert source["shards"] == [shard]
    assert fields["runtime"] == {"pointwise": RUNTIME, "listwise": None}
    assert len(fields["fingerprints"]["pointwise"]) == 64


def test_an_outline_has_all_shards_in_order(one: JobSpec, tmp_path: Path) -> None:
    more = nested(tmp_path / "more.parquet", ["c", "d", "e"])
    spec = replace(one, input=replace(one.input, paths=(*one.input.paths, more)))
    (output,) = outline(planned(spec))
    assert output.stem == "run"
    assert [(s.key, s.n_queries, s.inputs) for s in output.shards] == [
        ("00000-000000000000", 2, (0,)),
        ("00001-000000000000", 3, (1,)),
    ]
    apart = replace(
        spec, output=replace(spec.output, folder=str(tmp_path / "apart"), run_per_input=True)
    )
    assert [o.stem for o in outline(planned(apart))] == ["in", "more"]


Change = Callable[[JobSpec, Path], JobSpec]


def other_bundle(spec: JobSpec, folder: Path) -> JobSpec:
    bundle = pointwise_bundle(folder / "other", "other/model")
    return replace(spec, pointwise=replace(spec.pointwise, bundle=str(bundle)))


def rewritten(spec: JobSpec, folder: Path) -> JobSpec:
    nested(folder / "in.parquet", ["a", "b", "c"])
    return spec


def touched(spec: JobSpec, folder: Path) -> JobSpec:
    os.utime(folder / "in.parquet", (1, 1))
    return spec


def one_more(spec: JobSpec, folder: Path) -> JobSpec:
    more = nested(folder / "more.parquet", ["c"])
    return replace(spec, input=replace(spec.input, paths=(*spec.input.paths, more)))


CHANGES: dict[str, tuple[str, Change]] = {
    "bundle": ("job.bundle_sha256", other_bundle),
    "interpolate": (
        "job.pointwise",
        lambda s, _: replace(s, pointwise=replace(s.pointwise, interpolate=0.5)),
    ),
    "depth": ("job.pointwise", lambda s, _: replace(s, pointwise=replace(s.pointwise, depth=5))),
    "rows": ("job.inputs", rewritten),
    "time": ("job.inputs", touched),
    "inputs": ("job.inputs", one_more),
    "tag": ("job.output", lambda s, _: replace(s, output=replace(s.output, tag="other"))),
    "budgets": (
        "job.batch_tokens",
        lambda s, _: replace(s, execution=ExecutionSpec(batch_tokens=4096)),
    ),
}


@pytest.mark.parametrize("changed", CHANGES)
def test_another_job_is_refused_by_what_differs(changed: str, one: JobSpec, tmp_path: Path) -> None:
    planned(one)
    expected, change = CHANGES[changed]
    error = refused(change(one, tmp_path))
    assert where(error) == expected
    assert "--restart" in error.next_step


def test_what_does_not_decide_the_bytes_may_differ(one: JobSpec, tmp_path: Path) -> None:
    """Another path to the same bundle, other limits; another folder is another plan anyway."""
    planned(one)
    (tmp_path / "bundle").rename(tmp_path / "moved")
    spec = replace(
        one,
        pointwise=replace(one.pointwise, bundle=str(tmp_path / "moved")),
        input=replace(one.input, max_bad="10%"),
        execution=ExecutionSpec(device="cpu", engine="onnxruntime", stall_timeout_s=5),
    )
    assert let_in(spec)


@pytest.mark.parametrize("text", ["[1", "{}", '{"schema_version": 1}'])
def test_a_plan_of_another_version_is_refused(text: str, one: JobSpec) -> None:
    (folder_of(one) / "plan.json").write_text(text)
    with pytest.raises(ConfigurationError, match="damaged, or of another version") as caught:
        let_in(one)
    assert "--restart" in caught.value.next_step


def test_planning_stops_when_asked_to(one: JobSpec, tmp_path: Path) -> None:
    watch = Watch()
    watch.stop.set()
    folder = folder_of(one)
    spec = replace(one, input=replace(one.input, paths=(flat(tmp_path / "f", ["a", "b", "a"]),)))
    with pytest.raises(StoppedError):
        new_plan(spec, wanted_now(spec, "all", folder), Ledger(folder), watch)
    left = [path for path in folder.rglob("*") if path.is_file()]
    assert left == []


# A plan that is taken as it stands.


def recorded(wanted: Wanted, ledger: Ledger) -> None:
    with Hashes(wanted.pins, ledger) as hashes:
        hashes.check()


def test_a_plan_comes_back_without_reading_the_inputs(one: JobSpec) -> None:
    folder = folder_of(one)
    ledger, wanted = Ledger(folder), wanted_now(one, "all", folder)
    plan, fields = new_plan(one, wanted, ledger, Watch())
    assert plan_again(json.loads(json.dumps(fields)), wanted, ledger, Watch()) == plan


def test_regrouped_rows_outlive_a_crash(one: JobSpec, tmp_path: Path) -> None:
    paths = (
        flat(tmp_path / "1.parquet", ["a", "b", "a"]),
        flat(tmp_path / "2.parquet", ["b", "c"]),
    )
    spec = replace(one, input=replace(one.input, paths=paths))
    folder = folder_of(spec)
    ledger, wanted = Ledger(folder), wanted_now(spec, "all", folder)
    plan, fields = new_plan(spec, wanted, ledger, Watch())
    (made,) = (folder / "parts").iterdir()
    assert made.name.endswith(".regrouped.parquet")
    commit = ledger.found("regroup", "00000")
    assert commit
    assert ledger.path_of(commit.files["part"]) == made
    recorded(wanted, ledger)
    inode = made.stat().st_ino
    later = Ledger(folder)
    assert plan_again(fields, wanted, later, Watch()) == plan
    assert later.found("regroup", "00000") == commit
    assert [path.stat().st_ino for path in (folder / "parts").iterdir()] == [inode]
    raw = bytearray(made.read_bytes())
    raw[60] ^= 1
    made.write_bytes(raw)  # and one that is damaged is made again, to the same rows
    again = plan_again(fields, wanted, later, Watch())
    (found,), (source,) = again.outputs[0].sources, plan.outputs[0].sources
    assert found.file.path != source.file.path
    assert replace(found.file, path="") == replace(source.file, path="")


# The listwise stage of a plan.


def test_a_plan_pins_the_listwise_stage(two: JobSpec, tmp_path: Path) -> None:
    prompt = tmp_path / "mine.toml"
    prompt.write_text("one")
    spec = listwise(two, prompt=str(prompt), max_failed_windows="5%")
    pinned = planned(spec)["listwise"]
    assert pinned["bundle_sha256"] == open_bundle(tmp_path / "listwise", verify=False).sha256
    assert (pinned["depth"], pinned["window"], pinned["step"]) == (30, 20, 10)
    assert pinned["prompt_file_sha256"] == hashlib.sha256(b"one").hexdigest()
    # How much may fail decides the exit code, not the order.
    assert let_in(listwise(spec, max_failed_windows=7))
    prompt.write_text("two")
    assert where(refused(spec)) == "listwise.prompt_file_sha256"


def test_a_step_that_is_the_default_is_the_same_as_none(two: JobSpec) -> None:
    planned(two)
    assert let_in(listwise(two, step=10))
    assert where(refused(listwise(two, step=9))) == "listwise.step"


def test_another_listwise_stage_is_pointed_to_its_own_run(two: JobSpec) -> None:
    planned(two)
    error = refused(listwise(two, window=12))
    assert where(error) == "listwise.window, listwise.step"
    assert "--stage listwise" in error.next_step
    one = refused(replace(two, listwise=None))  # the same without a listwise stage
    assert "--stage" not in one.next_step
    assert "listwise" in where(one)


def test_another_listwise_stage_may_follow_the_same_first(two: JobSpec) -> None:
    fields = planned(two)
    for stage in ("pointwise", "listwise"):
        assert let_in(listwise(two, window=12), stage) == json.loads(json.dumps(fields))
    assert let_in(listwise(two, depth=20), "listwise")


@pytest.mark.parametrize("changed", CHANGES)
def test_stage_two_needs_a_stage_one_of_this_job(
    changed: str, two: JobSpec, tmp_path: Path
) -> None:
    planned(two)
    expected, change = CHANGES[changed]
    assert where(refused(change(two, tmp_path), "listwise")) == expected


@pytest.mark.parametrize("pattern", ["in.parquet", "i*.parquet"])
def test_stage_two_may_run_where_the_inputs_are_not(
    pattern: str, two: JobSpec, tmp_path: Path
) -> None:
    spec = replace(two, input=replace(two.input, paths=(str(tmp_path / pattern),)))
    fields = planned(spec)
    (tmp_path / "in.parquet").unlink()
    assert let_in(spec, "listwise") == json.loads(json.dumps(fields))
    with pytest.raises(InputError) as caught:
        let_in(spec)
    assert caught.value.exit_code == 65


@pytest.mark.parametrize("other", ["as it was", "changed", "new", "left out"])
def test_inputs_that_are_there_are_compared(other: str, two: JobSpec, tmp_path: Path) -> None:
    (tmp_path / "in.parquet").unlink()
    for name in ("1", "2"):
        nested(tmp_path / f"{name}.parquet", [name])
    spec = replace(two, input=replace(two.input, paths=(str(tmp_path / "*.parquet"),)))
    planned(spec)
    (tmp_path / "1.parquet").unlink()
    match other:
        case "changed":
            os.utime(tmp_path / "2.parquet", (1, 1))
        case "new":
            nested(tmp_path / "3.parquet", ["3"])
        case "left out":
            paths = (str(tmp_path / "1.parquet"),)
            spec = replace(spec, input=replace(spec.input, paths=paths))
    if other == "as it was":
        assert let_in(spec, "listwise")
    else:
        assert where(refused(spec, "listwise")) == "job.inputs"


@pytest.mark.parametrize("plan_text", [None, "one stage", "[1", "{}"])
def test_stage_two_needs_a_plan_of_two_stages(plan_text: str | None, two: JobSpec) -> None:
    if plan_text == "one stage":
        planned(replace(two, listwise=None))
    elif plan_text:
        (folder_of(two) / "plan.json").write_text(plan_text)
    with pytest.raises(ConfigurationError, match="no finished stage 1") as caught:
        let_in(two, "listwise")
    assert "--stage pointwise" in caught.value.next_step


def test_stage_two_reaches_no_deeper_than_the_text_in_the_parts(two: JobSpec) -> None:
    planned(two)
    with pytest.raises(ConfigurationError, match="first 30 candidates") as caught:
        let_in(listwise(two, depth=31), "listwise")
    assert caught.value.valid == "a listwise depth of 2 to 30"


def test_stage_one_may_run_where_the_listwise_bundle_is_not(two: JobSpec, tmp_path: Path) -> None:
    far = listwise(two, bundle=str(tmp_path / "elsewhere"))
    wanted = wanted_now(far, "pointwise", folder_of(far))
    assert wanted.listwise
    assert wanted.listwise["bundle_sha256"] is None
    with pytest.raises(ConfigurationError, match="is not a bundle"):
        wanted_now(far, "all", folder_of(far))


# Identity.


def test_a_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({"a": 1}, {}) != digest({"a": 1})
    assert digest("å") == hashlib.sha256('["å"]'.encode()).hexdigest()


def test_the_fingerprint_of_stage_two_builds_on_that_of_stage_one(two: JobSpec) -> None:
    fields = planned(two)
    first = fields["fingerprints"]["pointwise"]
    one = with_runtime(fields, "listwise", RUNTIME, first)["fingerprints"]
    other = with_runtime(fields, "listwise", RUNTIME, "0" * 64)["fingerprints"]
    newer = with_runtime(fields, "listwise", {**RUNTIME, "torch": "9"}, first)["fingerprints"]
    assert one["pointwise"] == other["pointwise"] == first
    assert len({one["listwise"], other["listwise"], newer["listwise"]}) == 3


def test_auto_asks_for_nothing() -> None:
    assert asked(ExecutionSpec()) == {}
    asked_for = asked(ExecutionSpec(engine="torch", device="cuda:1"))
    assert asked_for == {"engine": "torch", "device": "cuda"}


def test_job_fields_are_json(two: JobSpec) -> None:
    wanted = wanted_now(two, "all", folder_of(two))
    assert two.listwise
    fields = job_fields(two, wanted.pins, "0" * 64)
    assert json.loads(json.dumps(fields)) == fields
    assert [Pin(**pin) for pin in fields["inputs"]] == list(wanted.pins)
    assert fields["inputs"] == [asdict(pin) for pin in wanted.pins]
    settings = listwise_settings(two.listwise, "0" * 64)
    assert json.loads(json.dumps(settings)) == settings
    assert read_plan(folder_of(two)) is None
