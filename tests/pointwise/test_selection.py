"""Which engine simulated machines get, and what their owners are told to do."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dear_batch.bundle import Bundle, Engine, Manifest, Source
from dear_batch.errors import ConfigurationError
from dear_batch.machine import Driver, Gpu, Machine, Package, gpus, machine
from dear_batch.pointwise.obstacles import RTX_TARGETS
from dear_batch.pointwise.own_pairs import N_OWN_PAIRS
from dear_batch.pointwise.profiles import Profile, Span
from dear_batch.pointwise.recipe import Recipe
from dear_batch.pointwise.selection import Choice, PassedOver, choose, refusal, told

SPAN = Span(1, 1, 512)
FULL = Engine(
    path=f"engines/tensorrt-sm_90/{'0' * 64}.plan",
    bytes=1,
    sha256="0" * 64,
    flavour="tensorrt",
    version="10.13.3.9",
    sm="sm_90",
    platform="linux-x86_64",
    precision="fp16",
    row_tokens=512,
    batch_tokens=512,
    profiles=(Profile(Span(1, 1, 1), SPAN, SPAN),),
    build_seconds=1.0,
)
RTX = replace(FULL, flavour="tensorrt_rtx", version="1.7.1.116", sm="sm_89", sha256="1" * 64)

H100, L4 = Gpu(0, "NVIDIA H100", "sm_90", 80 << 30), Gpu(0, "NVIDIA L4", "sm_89", 24 << 30)
CPU_ONLY = Machine(
    "linux-x86_64",
    "a CPU",
    2,
    8 << 30,
    Driver(fault="this machine has no NVIDIA driver"),
    onnxruntime=Package("onnxruntime-gpu", "1.31.1", 13),
    torch=Package("torch", "2.13.0+cpu"),
)
SERVER = replace(
    CPU_ONLY,
    driver=Driver("580.65.06", (13, 0), (H100,)),
    tensorrt=(Package("tensorrt", "10.13.3.9", 13),),
    cuda_core=Package("cuda-core", "1.0.0", 13),
    torch=Package("torch", "2.13.0+cu130", 13),
)
SMALL = replace(
    SERVER,
    driver=Driver("580.65.06", (13, 0), (L4,)),
    tensorrt=(Package("tensorrt_rtx", "1.7.1.116", 13),),
)
OLD = "the NVIDIA driver 535.183.01 knows CUDA up to 12.2"
NEWER = "the NVIDIA driver 580.65.06 knows CUDA up to 13.0"
OLD_DRIVER = Driver("535.183.01", (12, 2), (H100,))


def bundle_with(*engines: Engine, pooling: Any = "last-token", folder: str = "mine") -> Bundle:
    manifest = Manifest(
        task="pointwise",
        source=Source("some/model", None),
        precision="fp32",
        recipe=Recipe("readme", pooling, (1,), (1,), (), 2),
        architecture={},
        graphs={},
        parity=None,
        versions={},
        created="",
        own_scores=(0.0,) * N_OWN_PAIRS,
        engines=engines,
    )
    return Bundle(Path(folder), manifest, "2" * 64)


def nothing_wrong(_module: str) -> str:
    return ""


def chosen(here: Machine, *engines: Engine, **asked: Any) -> Choice:
    return choose(bundle_with(*engines), here, fault=nothing_wrong, **asked)


def refused(here: Machine, *engines: Engine, **asked: Any) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as caught:
        chosen(here, *engines, **asked)
    return caught.value


def why_not(choice: Choice) -> dict[tuple[str, str], str]:
    return {(item.engine, item.device): item.why for item in choice.passed_over}


def test_the_plan_that_fits_this_gpu_comes_first() -> None:
    assert chosen(SERVER, RTX, FULL) == Choice("tensorrt", "cuda:0", FULL)
    assert chosen(SMALL, RTX, FULL) == Choice("tensorrt", "cuda:0", RTX)


def test_of_two_flavours_the_full_one() -> None:
    both = replace(SERVER, tensorrt=(*SERVER.tensorrt, *SMALL.tensorrt))
    rtx = replace(RTX, sm="sm_90")
    assert chosen(both, rtx, FULL).plan == FULL
    # Whatever keeps one from running does not keep the other.
    assert chosen(both, rtx, replace(FULL, version="10.12.0.1")).plan == rtx


def test_a_tensorrt_that_was_packaged_again_is_the_same() -> None:
    again = replace(SERVER, tensorrt=(Package("tensorrt", "10.13.3.9.post1", 13),))
    assert chosen(again, FULL).plan == FULL
    other = replace(SERVER, tensorrt=(Package("tensorrt", "10.13.3.90", 13),))
    assert chosen(other, FULL).engine == "onnxruntime"


def test_without_a_gpu_onnx_runtime_on_the_cpu() -> None:
    choice = chosen(CPU_ONLY, FULL)
    assert (choice.engine, choice.device, choice.plan) == ("onnxruntime", "cpu", None)
    assert why_not(choice) == {
        (engine, "cuda"): "this machine has no NVIDIA driver"
        for engine in ("tensorrt", "onnxruntime", "torch")
    }
    assert all("nvidia-smi" in item.next_step for item in choice.passed_over)


def test_gpus_that_are_hidden_are_to_be_shown() -> None:
    hidden = Driver("580.65.06", (13, 0), fault="no device", visible="")
    step = chosen(replace(SERVER, driver=hidden)).passed_over[0].next_step
    assert step == "unset CUDA_VISIBLE_DEVICES, or name in it a GPU that nvidia-smi -L lists"
    # Without a driver the variable is not what is wrong.
    bare = chosen(replace(SERVER, driver=Driver(fault="no driver", visible="")))
    assert "nvidia-smi" in bare.passed_over[0].next_step
    assert "unset" not in bare.passed_over[0].next_step


def test_without_onnx_runtime_pytorch() -> None:
    choice = chosen(replace(CPU_ONLY, onnxruntime=None))
    assert (choice.engine, choice.device) == ("torch", "cpu")
    assert why_not(choice)["onnxruntime", "cpu"] == "onnxruntime is not installed"
    choice = chosen(replace(SERVER, onnxruntime=None))
    assert (choice.engine, choice.device) == ("torch", "cuda:0")


DEVICES = ("cuda:0", "cuda:1")
EXPORT = "dear-batch export mine --engine tensorrt"


@pytest.mark.parametrize(
    ("here", "engines", "why", "next_step"),
    [
        (SERVER, (), "the bundle holds no TensorRT engine", EXPORT),
        (SMALL, (), "the bundle holds no TensorRT engine", f"{EXPORT} --target sm_89"),
        (
            SERVER,
            (RTX,),
            "its engines are for sm_89 (linux-x86_64); this is sm_90 (linux-x86_64)",
            EXPORT,
        ),
        (
            SERVER,
            (replace(FULL, platform="win32-AMD64"),),
            "its engines are for sm_90 (win32-AMD64); this is sm_90 (linux-x86_64)",
            EXPORT,
        ),
        (
            SERVER,
            (replace(FULL, version="10.13.3.8"),),
            "its engine is of tensorrt 10.13.3.8, and 10.13.3.9 is installed",
            EXPORT,
        ),
        (
            SMALL,
            (replace(RTX, version="1.6.0.1"),),
            "its engine is of tensorrt-rtx 1.6.0.1, and 1.7.1.116 is installed",
            f"{EXPORT} --target sm_89",
        ),
        (
            replace(SERVER, tensorrt=()),
            (FULL,),
            "its engine is of tensorrt 10.13.3.9, which is not installed",
            "pip install 'dear-batch[tensorrt]' tensorrt==10.13.3.9",
        ),
        (
            replace(SERVER, tensorrt=()),
            (),
            "the bundle holds no TensorRT engine",
            f"pip install 'dear-batch[tensorrt]', then {EXPORT}",
        ),
        (  # TensorRT for RTX knows no Hopper
            replace(SMALL, driver=SERVER.driver),
            (),
            "the bundle holds no TensorRT engine",
            f"pip install 'dear-batch[tensorrt]', then {EXPORT}",
        ),
        (
            replace(SERVER, cuda_core=None),
            (FULL,),
            "cuda-core, by which Python calls CUDA, is not installed",
            "pip install 'dear-batch[tensorrt]'",
        ),
        (
            replace(SERVER, driver=OLD_DRIVER),
            (FULL,),
            f"tensorrt 10.13.3.9 needs CUDA 13, and {OLD}",
            "update the NVIDIA driver to 580.65.06 or newer",
        ),
        (
            replace(SERVER, driver=OLD_DRIVER, tensorrt=(Package("tensorrt", FULL.version, 12),)),
            (FULL,),
            f"cuda-core 1.0.0 needs CUDA 13, and {OLD}",
            "update the NVIDIA driver to 580.65.06 or newer",
        ),
    ],
)
def test_what_keeps_tensorrt_from_a_gpu(
    here: Machine, engines: tuple[Engine, ...], why: str, next_step: str
) -> None:
    first = chosen(here, *engines).passed_over[0]
    assert (first.engine, first.device, first.why, first.next_step) == (
        "tensorrt",
        "cuda",
        why,
        next_step,
    )
    error = refused(here, *engines, engine="tensorrt")
    assert error.exit_code == 78
    assert why in error.what
    assert next_step in error.next_step
    assert "which runs here" in error.valid


def test_a_module_that_cannot_be_imported_is_passed_over() -> None:
    faults = {"cuda.core": "ImportError: libcudart.so.13"}
    choice = choose(bundle_with(FULL), SERVER, fault=lambda name: faults.get(name, ""))
    assert (choice.engine, choice.device) == ("onnxruntime", "cuda:0")
    (item,) = choice.passed_over
    assert item.why == "cuda.core cannot be imported: ImportError: libcudart.so.13"


def test_a_plan_that_was_refused_is_passed_over() -> None:
    refused_plan = ConfigurationError(
        "TensorRT refuses the engine.", where="Error Code 1", next_step="build it again"
    )
    refusals = [refusal(chosen(SERVER, FULL), refused_plan)]
    choice = chosen(SERVER, FULL, refusals=refusals)
    assert (choice.engine, choice.device) == ("onnxruntime", "cuda:0")
    why = "TensorRT refuses the engine: Error Code 1"
    assert choice.passed_over == (PassedOver("tensorrt", "cuda", why, "build it again"),)


def test_nothing_is_imported_for_an_engine_that_is_not_chosen() -> None:
    asked = list[str]()
    choose(bundle_with(RTX), SERVER, fault=lambda name: asked.append(name) or "")
    assert asked == []


def test_padded_rows_have_no_engine() -> None:
    final = bundle_with(FULL, pooling="final-position")
    choice = choose(final, SERVER, fault=nothing_wrong)
    assert (choice.engine, choice.device) == ("onnxruntime", "cuda:0")
    assert "final position" in choice.passed_over[0].why


def test_bf16_graphs_run_on_no_cpu() -> None:
    bundle = bundle_with()
    bf16 = replace(bundle, manifest=replace(bundle.manifest, precision="bf16"))
    choice = choose(bf16, CPU_ONLY)
    assert (choice.engine, choice.device) == ("torch", "cpu")
    assert "no products in bf16" in why_not(choice)["onnxruntime", "cpu"]
    assert choose(bf16, SERVER, fault=nothing_wrong).engine == "onnxruntime"
    with pytest.raises(ConfigurationError, match="bf16") as caught:
        choose(bf16, CPU_ONLY, engine="onnxruntime")
    assert caught.value.valid == "--engine torch --device cpu, which runs here"


@pytest.mark.parametrize(
    ("package", "why", "next_step"),
    [
        (
            Package("onnxruntime", "1.31.1"),
            "onnxruntime 1.31.1 is a build for CPUs",
            "pip uninstall onnxruntime",
        ),
        (
            Package("onnxruntime-gpu", "1.31.1", 13, "libcublasLt.so.13: cannot open"),
            "its CUDA libraries: libcublasLt.so.13: cannot open",
            "pip install 'onnxruntime-gpu[cuda,cudnn]'",
        ),
        (
            Package("onnxruntime-gpu", "1.40", 14),
            f"onnxruntime-gpu 1.40 needs CUDA 14, and {NEWER}",
            "update the NVIDIA driver",
        ),
    ],
)
def test_what_keeps_onnx_runtime_from_a_gpu(package: Package, why: str, next_step: str) -> None:
    here = replace(SERVER, onnxruntime=package)
    choice = chosen(here)
    assert (choice.engine, choice.device) == ("torch", "cuda:0")
    assert why_not(choice)["onnxruntime", "cuda"] == why
    error = refused(here, engine="onnxruntime", device="cuda")
    assert why in error.what
    assert next_step in error.next_step
    # Without a GPU of its own it falls back to the CPU, and says so.
    named = chosen(here, engine="onnxruntime")
    assert (named.engine, named.device) == ("onnxruntime", "cpu")
    assert why_not(named) == {("onnxruntime", "cuda"): why}


def test_a_too_old_driver_is_told_of_in_one_message() -> None:
    here = replace(SERVER, driver=OLD_DRIVER)
    choice = chosen(here, FULL)
    assert (choice.engine, choice.device) == ("onnxruntime", "cpu")
    assert all("needs CUDA 13" in item.why for item in choice.passed_over)
    error = refused(here, FULL, device="cuda")
    assert "onnxruntime-gpu 1.31.1 needs CUDA 13" in error.what
    assert "580.65.06 or newer" in error.next_step
    assert error.where.count("needs CUDA 13") == 3


def test_the_cpu_when_it_is_asked_for() -> None:
    choice = chosen(SERVER, FULL, device="cpu")
    assert (choice.engine, choice.device) == ("onnxruntime", "cpu")
    assert set(why_not(choice).values()) == {"--device cpu was asked for"}
    error = refused(SERVER, FULL, engine="tensorrt", device="cpu")
    assert "--device cpu was asked for" in error.what
    assert error.valid == "--engine tensorrt --device cuda, which runs here"


def test_a_gpu_by_its_number() -> None:
    two = replace(SERVER, driver=Driver("580", (13, 0), (H100, replace(L4, number=1))))
    assert chosen(two, FULL).device == "cuda:0"
    assert chosen(two, FULL, device="cuda").device == "cuda:0"
    second = chosen(two, FULL, RTX, device="cuda:1")
    assert (second.engine, second.device) == ("onnxruntime", "cuda:1")
    error = refused(two, FULL, device="cuda:2")
    assert "there is no GPU cuda:2" in error.what
    assert "cuda:0, cuda:1" in error.next_step


TWO = (H100, replace(L4, number=1))


@pytest.mark.parametrize(
    ("visible", "name"), [(None, "1"), ("2,3", "3"), ("GPU-8f1, GPU-5c2", "GPU-5c2")]
)
def test_the_build_for_a_gpu_that_is_not_the_first(visible: str | None, name: str) -> None:
    two = replace(SERVER, driver=Driver("580", (13, 0), TWO, visible=visible))
    advice = {device: chosen(two, device=device).passed_over[0].next_step for device in DEVICES}
    command = f"CUDA_VISIBLE_DEVICES={name} {EXPORT}"
    assert advice == {"cuda:0": EXPORT, "cuda:1": command}
    bare = chosen(replace(two, tensorrt=()), device="cuda:1").passed_over[0].next_step
    assert bare == f"pip install 'dear-batch[tensorrt]', then {command}"


def test_the_build_for_another_gpu_of_the_same_kind_or_ahead_of_time() -> None:
    same = replace(SERVER, driver=Driver("580", (13, 0), (H100, replace(H100, number=1))))
    assert chosen(same, device="cuda:1").passed_over[0].next_step == EXPORT
    rtx = replace(SMALL, driver=Driver("580", (13, 0), TWO))
    step = chosen(rtx, device="cuda:1").passed_over[0].next_step
    assert step == f"{EXPORT} --target sm_89"


def test_no_such_device() -> None:
    assert "cuda:N" in refused(SERVER, device="gpu").valid


def test_nothing_at_all() -> None:
    error = refused(replace(CPU_ONLY, onnxruntime=None, torch=None))
    assert "with any engine" in error.what
    assert "onnxruntime is not installed" in error.what
    assert "pip install onnxruntime-gpu" in error.next_step
    assert "torch is not installed" in error.where


def test_a_named_engine_that_is_not_installed() -> None:
    error = refused(replace(CPU_ONLY, torch=None), engine="torch")
    assert "torch is not installed" in error.what
    assert "pip install 'dear-batch[export]'" in error.next_step


def test_a_listwise_bundle_has_no_engine() -> None:
    listwise = bundle_with()
    listwise = replace(listwise, manifest=replace(listwise.manifest, recipe=None))
    with pytest.raises(ConfigurationError, match="listwise"):
        choose(listwise, SERVER)


def test_paths_in_commands_are_quoted() -> None:
    choice = choose(bundle_with(folder="my bundles/one"), SERVER, fault=nothing_wrong)
    assert "export 'my bundles/one' --engine" in choice.passed_over[0].next_step


def test_a_choice_as_fields() -> None:
    fields = told(chosen(SMALL, RTX))
    assert fields == {
        "engine": "tensorrt",
        "device": "cuda:0",
        "plan": "tensorrt_rtx 1.7.1.116 sm_89 fp16 (linux-x86_64)",
        "passed_over": [],
    }
    assert chosen(SMALL, RTX).engine_version(SMALL) == "1.7.1.116"
    assert chosen(SERVER).engine_version(SERVER) == "1.31.1"
    assert chosen(CPU_ONLY, engine="torch").engine_version(CPU_ONLY) == "2.13.0+cpu"


@pytest.mark.skipif(bool(gpus()), reason="this machine has a GPU")
@pytest.mark.parametrize("asked", [{"engine": "tensorrt"}, {"device": "cuda"}])
def test_here_where_there_is_no_gpu(asked: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        choose(bundle_with(FULL), machine(), **asked)
    assert machine().driver.fault in caught.value.what
    assert "nvidia-smi" in caught.value.next_step
    assert caught.value.where == ""  # the same for every engine: said once


def test_what_tensorrt_for_rtx_builds_for_is_what_it_says() -> None:
    pytest.importorskip("tensorrt_rtx", reason="it is asked")
    from dear_batch.export.tensorrt import ahead_of_time

    assert ahead_of_time("tensorrt_rtx") == RTX_TARGETS
