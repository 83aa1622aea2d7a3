"""The first run of an engine on a machine, with tiny real bundles and simulated faults."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dear_batch.bundle import Bundle, open_bundle
from dear_batch.errors import ConfigurationError
from dear_batch.machine import Driver, Gpu, Machine, Package, gpus, machine
from dear_batch.pointwise.rows import Batch
from dear_batch.pointwise.selection import Choice
from dear_batch.run import first_run
from dear_batch.run.first_run import check_first_run
from dear_batch.run.loading import Loaded, load_pointwise
from dear_batch.run.watch import StoppedError, Watch
from dear_batch.specs import ExecutionSpec
from tests.pointwise.test_selection import FULL, SERVER

pytestmark = pytest.mark.model
Make = Callable[..., Path]
H100 = Gpu(0, "NVIDIA H100", "sm_90", 80 << 30)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dear-batch" / "parity.json"


class Listening(Watch):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.told = list[tuple[str, dict[str, Any]]]()

    def log(self, event: str, **fields: object) -> None:
        self.told.append((event, fields))


class Altered:
    """A real scorer that counts its batches, and moves or loses a score of each."""

    def __init__(self, scorer: Any, move: float = 0.0) -> None:
        for name in ("layout", "engine", "device", "precision", "in_flight"):
            setattr(self, name, getattr(scorer, name))
        self._scorer, self._move = scorer, move
        self.batches = 0

    def start(self, batch: Batch) -> Callable[[], Any]:
        self.batches += 1
        wait = self._scorer.start(batch)

        def finish() -> Any:
            scores_N = np.array(wait())
            scores_N[0] += self._move
            return scores_N

        return finish


@pytest.fixture
def loaded(bundle: Make) -> Loaded:
    return load_pointwise(bundle("llama31"))


def checked(loaded: Loaded, *, move: float = 0.0, told: Any = None, **changes: Any) -> int:
    """How many batches a check took; `told` is what the scorer says of itself."""
    scorer: Any = Altered(loaded.scorer, move)
    for name, value in (told or {}).items():
        setattr(scorer, name, value)
    parts = {name: getattr(loaded, name) for name in ("bundle", "choice", "machine")} | changes
    bundle, choice, machine = (parts[name] for name in ("bundle", "choice", "machine"))
    check_first_run(bundle, scorer, loaded.encoder, choice, machine, watch=Watch())
    return int(scorer.batches)


@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
@pytest.mark.parametrize("recipe", ["readme", "paper-script"])
def test_engines_agree_with_the_export(engine: Any, recipe: str, bundle: Make, cache: Path) -> None:
    folder, watch = bundle("llama31", recipe=recipe), Listening()
    for _ in range(2):
        load_pointwise(folder, ExecutionSpec(engine=engine), watch)
    told = watch.told
    events = [event for event, _ in told]
    assert events == ["engine", "first-run", "first-run-parity", "engine"]
    assert told[2][1]["pairs"] == 64
    assert told[2][1]["max_abs_difference"] < 1e-4
    (entry,) = json.loads(cache.read_text())["agreed"].values()
    assert entry["engine"] == engine
    assert entry["bundle_sha256"] == open_bundle(folder).sha256
    assert entry["precision"] == "fp32"
    assert cache.stat().st_mode & 0o777 == 0o600


def test_what_agreed_is_not_scored_again(loaded: Loaded) -> None:
    assert checked(loaded) == 0


def test_what_could_change_scores_is_checked_again(loaded: Loaded) -> None:
    gpu = replace(loaded.machine, driver=Driver("580.65.06", (13, 0), (H100,)))
    other = replace(loaded.bundle, sha256="0" * 64)
    newer = loaded.machine.onnxruntime
    assert newer
    changes: list[dict[str, Any]] = [
        {"bundle": other},
        {"machine": replace(loaded.machine, cpu="another CPU")},
        {"machine": replace(loaded.machine, onnxruntime=replace(newer, version="9.9"))},
        {"choice": Choice("tensorrt", "cuda:0", FULL), "machine": gpu},
        {"choice": Choice("tensorrt", "cuda:0", replace(FULL, sha256="1" * 64)), "machine": gpu},
    ]
    for change in changes:
        assert checked(loaded, **change) > 0
        assert checked(loaded, **change) == 0


def test_machines_that_share_a_home_are_checked_each(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    assert checked(loaded) > 0
    assert checked(loaded) == 0
    monkeypatch.setattr(first_run, "__version__", "99.0")
    assert checked(loaded) > 0


def test_what_an_engine_runs_by_matters(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    here = replace(loaded.machine, cuda_core=Package("cuda-core", "1.0.0", 13))
    newer = replace(here, cuda_core=Package("cuda-core", "1.1.0", 13))
    plan = Choice("tensorrt", "cuda:0", FULL)
    assert checked(loaded, choice=plan, machine=here) > 0
    assert checked(loaded, choice=plan, machine=newer) > 0
    assert checked(loaded, choice=plan, machine=here) == 0
    torch = Choice("torch", "cpu")
    assert checked(loaded, choice=torch) > 0
    assert checked(loaded, choice=torch) == 0
    monkeypatch.setattr(first_run, "version", lambda _package: "99.0")
    assert checked(loaded, choice=torch) > 0
    assert checked(loaded) == 0  # ONNX Runtime runs by nothing else


def test_the_driver_matters_on_a_gpu_alone(loaded: Loaded) -> None:
    def on(driver: Driver, device: str) -> int:
        here = replace(loaded.machine, driver=driver)
        return checked(loaded, machine=here, told={"device": device})

    old, new = Driver("550.1", (12, 4), (H100,)), Driver("580.1", (13, 0), (H100,))
    assert (on(old, "cpu"), on(new, "cpu")) == (0, 0)
    assert on(old, "cuda:0") > 0
    assert on(new, "cuda:0") > 0
    assert on(old, "cuda:0") == 0


@pytest.mark.parametrize("move", [0.01, float("nan"), float("inf")])
def test_wrong_scores_stop_the_run_and_are_never_remembered(
    move: float, loaded: Loaded, cache: Path
) -> None:
    before = cache.read_text()
    elsewhere = replace(loaded.machine, cpu="a broken CPU")
    for _ in range(2):
        with pytest.raises(ConfigurationError) as caught:
            checked(loaded, move=move, machine=elsewhere)
        assert caught.value.exit_code == 78
        assert loaded.machine.onnxruntime
        assert f"onnxruntime {loaded.machine.onnxruntime.version} (fp32)" in caught.value.what
        assert caught.value.where.startswith("a broken CPU: max |Δscore|")
        assert caught.value.next_step == "use another engine: --engine torch"
    assert cache.read_text() == before


def test_what_helps_where_a_plan_is_wrong(loaded: Loaded) -> None:
    here = Machine("linux-x86_64", "", 1, None, Driver("580.65.06", (13, 0), (H100,)))
    told = {"device": "cuda:0", "engine": "tensorrt"}
    choice = Choice("tensorrt", "cuda:0", FULL)
    with pytest.raises(ConfigurationError) as caught:
        checked(loaded, move=1.0, told=told, machine=here, choice=choice)
    error = caught.value
    assert "tensorrt 10.13.3.9" in error.what
    assert error.where.startswith("NVIDIA H100, NVIDIA driver 580.65.06: max |Δscore|")
    assert "--engine onnxruntime" in error.next_step
    assert "update the NVIDIA driver" in error.next_step
    assert "dear-batch export" in error.next_step


def test_precisions_have_gates_of_their_own(loaded: Loaded) -> None:
    spread = float(np.std(loaded.bundle.manifest.own_scores or ()))
    elsewhere = replace(loaded.machine, cpu="another CPU")
    told = {"precision": "fp16"}
    assert checked(loaded, move=0.01 * spread, told=told, machine=elsewhere) > 0
    with pytest.raises(ConfigurationError, match="fp16"):
        checked(loaded, move=0.1 * spread, told=told, machine=replace(elsewhere, cpu="a third"))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("engine", ["auto", "torch"])
def test_bundles_of_every_precision_pass(engine: Any, precision: Any, bundle: Make) -> None:
    folder = bundle("llama31", precision=precision)
    loaded = load_pointwise(folder, ExecutionSpec(engine=engine))
    assert loaded.bundle.manifest.precision == precision
    with pytest.raises(ConfigurationError):
        checked(loaded, move=10.0, machine=replace(loaded.machine, cpu="another CPU"))


@pytest.mark.parametrize(
    "text", ["", "[]", '{"schema_version": 1}', '{"schema_version": 1, "agreed": []}']
)
def test_a_broken_cache_is_as_none(text: str, loaded: Loaded, cache: Path) -> None:
    cache.write_text(text)
    assert checked(loaded) > 0
    assert checked(loaded) == 0


def test_a_cache_that_others_can_write_is_not_believed(loaded: Loaded, cache: Path) -> None:
    cache.chmod(0o666)
    assert checked(loaded) > 0


def test_the_check_can_be_stopped(bundle: Make) -> None:
    watch = Watch()

    watch.stop.set()
    with pytest.raises(StoppedError):
        load_pointwise(bundle("llama31"), watch=watch)
    assert load_pointwise(bundle("llama31"))


def test_a_bundle_without_scores_has_nothing_to_compare(loaded: Loaded) -> None:
    manifest = replace(loaded.bundle.manifest, own_scores=None)
    bare = Bundle(loaded.bundle.folder, manifest, "0" * 64)
    assert checked(loaded, bundle=bare) == 0


def test_the_machine_is_this_one(loaded: Loaded) -> None:
    assert loaded.machine == machine()


# A GPU as the driver tells it, of which ONNX Runtime and PyTorch find nothing when they load.
NO_GPU = pytest.mark.skipif(bool(gpus()), reason="this machine has a GPU")
PROMISED = replace(SERVER, tensorrt=())


@NO_GPU
def test_engines_that_refuse_to_load_are_passed_over(bundle: Make) -> None:
    watch = Listening()
    loaded = load_pointwise(bundle("llama31"), watch=watch, here=lambda: PROMISED)
    assert (loaded.choice.engine, loaded.choice.device) == ("onnxruntime", "cpu")
    why = {(item.engine, item.device): item.why for item in loaded.choice.passed_over}
    assert why["onnxruntime", "cuda"].startswith("ONNX Runtime could not use CUDA")
    assert why["torch", "cuda"] == "PyTorch finds no GPU for --device cuda:0"
    assert {item.next_step for item in loaded.choice.passed_over[1:]} == {"dear-batch doctor"}
    events = [(event, fields.get("engine")) for event, fields in watch.told]
    assert events == [
        ("engine", "onnxruntime"),
        ("engine-refused", "onnxruntime"),
        ("engine", "torch"),
        ("engine-refused", "torch"),
        ("engine", "onnxruntime"),
        ("first-run", None),
        ("first-run-parity", None),
    ]


@NO_GPU
def test_a_named_engine_that_refuses_to_load_is_an_error(bundle: Make) -> None:
    with pytest.raises(ConfigurationError, match="could not use CUDA"):
        load_pointwise(
            bundle("llama31"), ExecutionSpec(engine="onnxruntime"), here=lambda: PROMISED
        )


@NO_GPU
def test_where_every_engine_refuses_all_are_told(bundle: Make) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_pointwise(bundle("llama31"), ExecutionSpec(device="cuda"), here=lambda: PROMISED)
    assert "with --device cuda" in caught.value.what
    assert "PyTorch finds no GPU" in caught.value.where
    assert caught.value.valid == "--engine onnxruntime --device cpu, which runs here"


def test_settings_that_are_wrong_are_no_refusal(bundle: Make) -> None:
    with pytest.raises(ConfigurationError, match="cannot hold a pair"):
        load_pointwise(bundle("llama31"), ExecutionSpec(row_tokens=8))
