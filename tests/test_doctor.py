"""What `doctor` says of simulated machines, and of this one."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dear_batch.bundle import write_manifest
from dear_batch.doctor import ZOO, Shape, examine
from dear_batch.errors import ConfigurationError
from dear_batch.machine import Machine, Package, machine
from tests.pointwise.test_selection import (
    CPU_ONLY,
    FULL,
    L4,
    OLD_DRIVER,
    SERVER,
    SMALL,
    bundle_with,
    nothing_wrong,
)

PARAMETERS = {  # of the model cards: meta-llama/Llama-3.1-8B, Llama-3.2-3B, Llama-2-13b
    "dear-8b-reranker-listwise": 8_030_261_248,
    "dear-3b-reranker": 3_212_749_824 + 3072,  # tied there; the score head is ours
    "llama2-13b-rankllama-teacher": 13_015_864_320 - 5120 * 32000 + 5120,
}


def examined(here: Machine, bundle: Path | None = None) -> dict[str, Any]:
    found = examine(here, bundle, fault=nothing_wrong)
    json.dumps(found)
    return found


def engines(here: Machine) -> dict[tuple[str, str], str]:
    return {(e["engine"], e["device"]): e["next"] for e in examined(here)["engines"]}


def test_parameters_of_the_zoo() -> None:
    found = {shape.name: shape.parameters for shape in ZOO}
    assert found.items() >= PARAMETERS.items()


def test_a_server_runs_everything() -> None:
    assert set(engines(SERVER).values()) == {""}


def test_without_a_gpu_the_cpu_runs() -> None:
    found = engines(CPU_ONLY)
    assert found["onnxruntime", "cpu"] == found["torch", "cpu"] == ""
    for engine in ("tensorrt", "onnxruntime", "torch"):
        assert "nvidia-smi" in found[engine, "cuda"]


def test_what_to_install() -> None:
    bare = replace(SERVER, tensorrt=(), onnxruntime=None, torch=None)
    found = engines(bare)
    assert "pip install 'dear-batch[tensorrt]'" in found["tensorrt", "cuda:0"]
    assert found["onnxruntime", "cuda:0"] == "pip install 'onnxruntime-gpu[cuda,cudnn]'"
    assert found["onnxruntime", "cpu"] == "pip install onnxruntime-gpu"
    assert found["torch", "cuda:0"] == "pip install 'dear-batch[export]'"
    old = engines(replace(SERVER, driver=OLD_DRIVER))
    assert {old[e, "cuda:0"] for e in ("tensorrt", "onnxruntime", "torch")} == {
        "update the NVIDIA driver to 580.65.06 or newer"
    }


def test_rtx_and_a_gpu_that_it_does_not_know() -> None:
    assert engines(SMALL)["tensorrt", "cuda:0"] == ""
    hopper = replace(SMALL, driver=SERVER.driver)
    assert "dear-batch[tensorrt]" in engines(hopper)["tensorrt", "cuda:0"]


def test_every_gpu_is_looked_at() -> None:
    gpus = (*SERVER.driver.gpus, replace(L4, number=1))
    two = replace(SERVER, driver=replace(SERVER.driver, gpus=gpus))
    assert {device for _, device in engines(two)} == {"cuda:0", "cuda:1", "cpu"}
    devices = {item["device"] for item in examined(two)["models"]}
    assert devices == {"cuda:0", "cuda:1", "cpu"}


def builds(here: Machine) -> dict[str, tuple[str, ...]]:
    return {item["flavour"]: item["targets"] for item in examined(here)["builds"]}


def test_what_can_be_built() -> None:
    assert builds(SERVER) == {"tensorrt": ("sm_90",), "tensorrt_rtx": ()}
    ahead = replace(CPU_ONLY, tensorrt=(Package("tensorrt_rtx", "1.7", 13),))
    assert builds(ahead)["tensorrt"] == ()
    assert "sm_89" in builds(ahead)["tensorrt_rtx"]


def test_what_is_installed_and_cannot_build() -> None:
    ahead = replace(CPU_ONLY, tensorrt=(Package("tensorrt_rtx", "1.7", 13),))
    broken = examine(ahead, fault=lambda name: f"ImportError: {name}")["builds"][1]
    assert (broken["targets"], broken["why"]) == (
        (),
        "tensorrt_rtx cannot be imported: ImportError: tensorrt_rtx",
    )
    assert broken["next"] == "pip install 'dear-batch[tensorrt-rtx]' --force-reinstall"
    nowhere = examined(replace(SERVER, driver=CPU_ONLY.driver))["builds"][0]
    assert nowhere["targets"] == ()
    assert "nvidia-smi" in nowhere["next"]
    old = examined(replace(SERVER, driver=OLD_DRIVER))["builds"][0]
    assert old["targets"] == ()
    assert "580.65.06 or newer" in old["next"]


def test_what_builds_for_a_second_gpu() -> None:
    gpus = (*SERVER.driver.gpus, replace(L4, number=1))
    two = replace(SERVER, driver=replace(SERVER.driver, gpus=gpus))
    first = examined(two)["builds"][0]
    assert first["targets"] == ("sm_90",)
    assert first["next"] == (
        "CUDA_VISIBLE_DEVICES=1 dear-batch export ... builds for cuda:1 (sm_89)"
    )


def fits(here: Machine, device: str) -> set[tuple[str, str]]:
    models = examined(here)["models"]
    return {(m["model"], m["precision"]) for m in models if m["device"] == device and m["fits"]}


def test_which_models_fit() -> None:
    assert ("llama2-13b-rankllama-teacher", "fp32") in fits(SERVER, "cuda:0")  # 80 GB
    small = fits(SMALL, "cuda:0")  # 24 GB
    assert {("dear-8b-reranker", "fp16"), ("dear-8b-reranker-listwise", "bf16")} <= small
    assert not {name for name, precision in small if precision == "fp32"} - {"dear-3b-reranker"}
    assert fits(CPU_ONLY, "cpu") == set()  # 8 GB
    unknown = examined(replace(CPU_ONLY, memory_bytes=None))["models"]
    assert {item["fits"] for item in unknown} == {None}


def test_what_a_model_needs() -> None:
    shape = Shape("one", 64, 96, 2, 4, 2, 600)
    half, whole = (shape.needed_bytes(precision, "cuda") for precision in ("fp16", "fp32"))
    assert shape.parameters * 2 < half < whole
    generator = replace(shape, generates=True)
    assert generator.needed_bytes("fp16", "cuda") > half


def test_the_engine_of_a_bundle(tmp_path: Path) -> None:
    write_manifest(tmp_path, bundle_with(FULL).manifest)
    found = examined(SERVER, tmp_path)["bundle"]
    assert (found["engine"], found["device"], found["passed_over"]) == ("tensorrt", "cuda:0", [])
    found = examined(SMALL, tmp_path)["bundle"]
    assert found["engine"] == "onnxruntime"
    assert f"dear-batch export {tmp_path}" in found["passed_over"][0]["next_step"]
    found = examined(replace(CPU_ONLY, onnxruntime=None, torch=None), tmp_path)["bundle"]
    assert found["engine"] is None
    assert "not installed" in found["error"]["what"]


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError):
        examined(SERVER, tmp_path)


def test_here() -> None:
    found = examine(machine(thorough=True))
    (onnx,) = (e for e in found["engines"] if (e["engine"], e["device"]) == ("onnxruntime", "cpu"))
    assert onnx["runs"]
