"""Engines added to real bundles, built again, interrupted, and recorded last."""

import fcntl
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from dear_batch.bundle import Bundle, Engine, hash_file, open_bundle
from dear_batch.errors import (
    ConfigurationError,
    OutputError,
    TryAgainError,
    UsageError,
)
from dear_batch.export import engines
from dear_batch.export.engines import add_engines
from dear_batch.pointwise.profiles import layout
from dear_batch.specs import EngineSpec
from tests.cli.commands import fail, outcome, succeed, told

pytestmark = pytest.mark.model
Make = Callable[..., Path]
# The bundle's own graph is in fp16, so that nothing has to be traced.
QUICK = EngineSpec(targets=("sm_89",), precision="fp16", row_tokens=256, batch_tokens=256, level=0)
SECONDS = 60.0


@pytest.fixture
def own(bundle: Make, tmp_path: Path) -> Path:
    """A bundle of a test's own."""
    return Path(shutil.copytree(bundle("llama31", precision="fp16"), tmp_path / "bundle"))


def add(folder: Path, **changes: object) -> tuple[Engine, ...]:
    from dataclasses import replace

    silent: list[str] = []
    return add_engines(folder, replace(QUICK, **changes), silent.append, lambda *_: None)


def left(folder: Path) -> list[str]:
    """What lies in the folder of the engines, the lock apart."""
    found = (path.relative_to(folder) for path in (folder / "engines").rglob("*"))
    return sorted(str(path) for path in found if path.name != ".lock" and path.suffix != "")


def check(bundle: Bundle) -> None:
    """Every plan is what its record says, and there is no other."""
    for engine in bundle.manifest.engines:
        with bundle.plan(engine) as data:
            assert len(data) == engine.bytes
        assert hash_file(bundle.folder / engine.path).sha256 == engine.sha256
    assert left(bundle.folder) == sorted(engine.path for engine in bundle.manifest.engines)


def test_a_bundle_gets_engines_and_stays_the_same_model(own: Path) -> None:
    before = open_bundle(own)
    (built,) = add(own)
    after = open_bundle(own, "pointwise")
    assert after.manifest.engines == (built,)
    assert after.sha256 == before.sha256
    assert (built.flavour, built.sm, built.precision) == ("tensorrt_rtx", "sm_89", "fp16")
    assert built.path == f"engines/tensorrt_rtx-sm_89/{built.sha256}.plan"
    assert built.platform == "linux-x86_64"
    assert (built.row_tokens, built.batch_tokens) == (256, 256)
    assert layout(built.profiles).row_tokens == 256
    assert built.build_seconds > 0
    check(after)


def test_building_again_replaces_and_adds(own: Path) -> None:
    (first,) = add(own, targets=("sm_89",))
    (second,) = add(own, targets=("sm_120",))
    (again,) = add(own, targets=("sm_89",), row_tokens=512, batch_tokens=512)
    bundle = open_bundle(own)
    assert bundle.manifest.engines == (again, second)
    assert again.sha256 != first.sha256
    check(bundle)


def test_half_precision_is_made_from_the_bundle_alone(bundle: Make, tmp_path: Path) -> None:
    own = Path(shutil.copytree(bundle("llama31"), tmp_path / "bundle"))
    (built,) = add(own, precision="auto", targets=("sm_80",))
    assert built.precision == "fp16"
    assert built.bytes > 0
    check(open_bundle(own))


@pytest.mark.parametrize("step", ["_graph", "_engine", "_record", "write_manifest", "replacing"])
def test_an_end_at_any_step_leaves_a_bundle_that_opens(
    step: str, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first,) = add(own)

    def die(*_: object) -> None:
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(engines, step, die)
        with pytest.raises(InterruptedError):
            add(own, row_tokens=512, batch_tokens=512)
    (engine,) = open_bundle(own).manifest.engines
    assert engine == first
    assert engine.path in left(own)
    add(own)
    check(open_bundle(own))


def test_what_was_left_after_the_record_goes_next_time(own: Path) -> None:
    add(own)
    orphan = own / "engines" / "tensorrt_rtx-sm_80" / f"{'0' * 64}.plan"
    orphan.parent.mkdir()
    orphan.write_bytes(b"of an export that was killed")
    add(own, targets=("sm_120",))
    check(open_bundle(own))


def test_a_failure_of_one_target_leaves_none_of_the_others(own: Path) -> None:
    sizes = {"row_tokens": 256, "batch_tokens": 256}

    def report(step: str) -> None:
        if "building for sm_120" in step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        add_engines(own, EngineSpec(("sm_89", "sm_120"), "fp16", **sizes), report, lambda *_: None)
    assert left(own) == []
    assert open_bundle(own).manifest.engines == ()


@contextmanager
def exporting(folder: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """The command at work, in the middle of a build."""
    command = [sys.executable, "-m", "dear_batch", "export", str(folder)]
    command += ["--engine", "tensorrt", "--target", "sm_89", "--precision", "fp16"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stderr
        while b"building for" not in process.stderr.readline():
            assert process.poll() is None
        while not any(path.suffix == ".log" for path in (folder / "engines").rglob("*")):
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.process
def test_ctrl_c_ends_it_at_once_and_leaves_nothing(own: Path) -> None:
    before = (own / "bundle.json").read_bytes()
    with exporting(own) as process:
        children = psutil.Process(process.pid).children()
        assert children
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=SECONDS)
        assert time.monotonic() - start < 5
    assert process.returncode == 75
    assert "was stopped by Ctrl-C" in told(stderr.decode())
    assert "Traceback" not in stderr.decode()
    _, left_over = psutil.wait_procs(children, timeout=5)
    # Whoever inherits it may be slow to take note of its end.
    assert all(child.status() == psutil.STATUS_ZOMBIE for child in left_over)
    assert (own / "bundle.json").read_bytes() == before
    assert left(own) == []
    open_bundle(own)


@pytest.mark.process
def test_a_killed_export_takes_its_builder_along_and_is_swept_by_the_next(own: Path) -> None:
    with exporting(own) as process:
        (child,) = psutil.Process(process.pid).children()
        process.kill()
        process.wait()
        child.wait(5)
    assert left(own)
    assert open_bundle(own).manifest.engines == ()
    add(own)
    check(open_bundle(own))


def test_one_export_at_a_time(own: Path) -> None:
    (own / "engines").mkdir()
    with (own / "engines" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(TryAgainError, match="Another export is at work"):
            add(own)
    add(own)


def test_a_full_disk_is_told_before_anything_is_built(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(own)._replace(free=100)
    monkeypatch.setattr(engines.shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(OutputError, match="too small for 2 more engines"):
        add(own, targets=("sm_89", "sm_80"))
    assert left(own) == []


@pytest.mark.parametrize("thing", ["link", "file"])
def test_something_else_in_the_place_of_the_folder_is_refused(
    thing: str, own: Path, tmp_path: Path
) -> None:
    if thing == "link":
        (own / "engines").symlink_to(tmp_path)
    else:
        (own / "engines").write_text("in the way")
    with pytest.raises(OutputError, match=f"is a {thing}"):
        add(own)


def test_nothing_behind_a_link_is_swept_or_written(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "other.plan").write_bytes(b"of another bundle")
    (own / "engines").mkdir()
    (own / "engines" / "tensorrt_rtx-sm_89").symlink_to(elsewhere)
    (own / "engines" / "link").symlink_to(elsewhere)
    monkeypatch.setattr(engines, "_engine", lambda *_: pytest.fail("it was built"))
    with pytest.raises(OutputError, match="tensorrt_rtx-sm_89 is a link"):
        add(own)
    engines._sweep(own, ())
    assert [path.name for path in elsewhere.iterdir()] == ["other.plan"]


def test_models_without_packed_rows_are_refused(bundle: Make, generator: Path) -> None:
    unpacked = bundle("llama31", pooling="final-position")
    with pytest.raises(ConfigurationError, match="no packed graph"):
        add(unpacked)
    with pytest.raises(ConfigurationError, match="listwise"):
        add(generator)
    assert not (unpacked / "engines").exists()


def test_rows_must_hold_the_longest_pair(own: Path) -> None:
    with pytest.raises(ConfigurationError, match="Rows of 100 tokens cannot hold a pair of 228"):
        add(own, row_tokens=100)


def test_targets_are_named_or_listed(own: Path) -> None:
    with pytest.raises(UsageError, match="has no GPU") as caught:
        add(own, targets=())
    assert "sm_89" in caught.value.valid
    with pytest.raises(ConfigurationError, match="cannot build for sm_90"):
        add(own, targets=("sm_90",))
    with pytest.raises(ConfigurationError, match="'tensorrt', which is not installed") as caught:
        add(own, flavour="tensorrt")
    assert "pip install 'dear-batch[tensorrt]'" in caught.value.next_step


def test_the_command_adds_engines(own: Path) -> None:
    sizes = ("--row-tokens", 256, "--batch-tokens", 256, "--level", 0)
    common = ("export", own, "--engine", "tensorrt", "--precision", "fp16", *sizes)
    result = succeed(*common, "--target", "sm_80,sm_89")
    fields = outcome(result)
    assert fields["status"] == "ok"
    assert [engine["sm"] for engine in fields["engines"]] == ["sm_80", "sm_89"]
    assert "building for sm_80 with tensorrt_rtx in fp16" in result.stderr
    assert "sm_75" in fail(2, "has no GPU", *common)


def test_what_does_not_fit_a_bundle_is_refused(own: Path) -> None:
    message = fail(2, "is a bundle already", "export", own)
    assert f"dear-batch export {own} --engine tensorrt" in message
    fail(2, "--model would make another", "export", own, "--engine", "tensorrt", "--model", "m")
    fail(2, "out of range: found 'hopper'", "export", own, "--engine=tensorrt", "--target=hopper")
    fail(2, "out of range", "export", own, "--engine", "tensorrt", "--level", 9)


def test_keys_of_engines_without_an_engine_are_refused(tmp_path: Path) -> None:
    common = ("export", "--model", "m", "--output", tmp_path / "out")
    fail(2, "no engine is asked for", *common, "--target", "sm_89")
    fail(2, "no engine is asked for", *common, "--calibrate", "c.parquet")


def test_a_checkpoint_is_exported_with_engines(checkpoint: Make, tmp_path: Path) -> None:
    spec = tmp_path / "spec.toml"
    spec.write_text(
        f'model = "{checkpoint("llama31")}"\noutput = "{tmp_path / "out"}"\nengine = "tensorrt"\n'
        'targets = ["sm_89"]\nprecision = "fp16"\nrow_tokens = 256\nbatch_tokens = 256\n'
    )
    fields = outcome(succeed("export", spec))
    bundle = open_bundle(tmp_path / "out")
    assert bundle.manifest.precision == "fp16"
    (engine,) = bundle.manifest.engines
    assert engine.precision == "fp16"
    assert fields["engines"][0]["sha256"] == engine.sha256
    check(bundle)


def test_engines_that_cannot_be_built_are_told_before_the_export(
    checkpoint: Make, tmp_path: Path
) -> None:
    common = ("export", "--model", checkpoint("llama31"), "--output", tmp_path / "out")
    fail(2, "has no GPU", *common, "--engine", "tensorrt")
    more = ("--engine", "tensorrt", "--target", "sm_89", "--pooling", "final-position")
    fail(78, "no packed graph", *common, *more)
    assert not (tmp_path / "out").exists()
