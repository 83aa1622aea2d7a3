"""Facts of a machine: the real ones here, and those of others by real files of theirs."""

import ctypes
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from dear_batch import machine as module
from dear_batch.machine import Driver, Gpu, Machine, Package, import_fault, machine

ROOT = Path(__file__).parent.parent
NO_GPU = pytest.mark.skipif(bool(module.gpus()), reason="this machine has a GPU")


def test_the_facts_of_this_machine() -> None:
    here = machine()
    assert here.platform.startswith(sys.platform)
    assert here.cpu
    assert here.cores >= 1
    assert here.memory_bytes is None or here.memory_bytes > 1 << 28
    assert here.onnxruntime
    assert here.onnxruntime.version == version(here.onnxruntime.name)
    assert here.torch is None or here.torch.version == version("torch")
    for package in here.tensorrt:
        assert package.version == version(package.name)
    assert bool(here.driver.gpus) != bool(here.driver.fault)
    assert here.providers == ()


def test_the_providers_of_onnx_runtime() -> None:
    assert "CPUExecutionProvider" in machine(thorough=True).providers


@NO_GPU
def test_without_a_gpu_nothing_is_imported() -> None:
    code = (
        "import sys; from dear_batch.machine import machine; machine()\n"
        "heavy = {'torch', 'onnxruntime', 'tensorrt', 'tensorrt_rtx', 'cuda', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@NO_GPU
def test_a_thorough_look_names_the_library_that_is_missing(
    capfd: pytest.CaptureFixture[str],
) -> None:
    package = machine(thorough=True).onnxruntime
    assert package
    if package.cuda is None:
        pytest.skip("a build for CPUs")
    assert package.fault.startswith("lib")
    assert ".so" in package.fault
    assert capfd.readouterr().out == ""


def test_why_a_module_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_native.py").write_text("raise OSError('libcudart.so.13: cannot open')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert import_fault("json") == ""
    assert import_fault("broken_native") == "OSError: libcudart.so.13: cannot open"
    assert "no_such_module" in import_fault("no_such_module")


# Other installations, as real files: an interpreter without site-packages sees these alone.
FACTS = """
import json, sys
from dataclasses import asdict
sys.path[:0] = sys.argv[1:]
from dear_batch.machine import machine
print(json.dumps(asdict(machine())))
"""


def installed(folder: Path, name: str, number: str, files: dict[str, str], *needs: str) -> None:
    """Write what pip leaves of a package."""
    info = folder / f"{name.replace('-', '_')}-{number}.dist-info"
    info.mkdir(parents=True)
    required = "".join(f"Requires-Dist: {need}\n" for need in needs)
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n{required}"
    (info / "METADATA").write_text(text)
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)


def facts_of(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-I", "-S", "-c", FACTS, str(ROOT), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_where_nothing_is_installed(tmp_path: Path) -> None:
    found = facts_of(tmp_path)
    assert found["tensorrt"] == []
    assert [found[name] for name in ("cuda_core", "onnxruntime", "torch")] == [None] * 3


def test_what_packages_were_built_for(tmp_path: Path) -> None:
    built = "package_name = 'onnxruntime-gpu'\ncuda_version = '12.8'\n"
    ort = {"onnxruntime/__init__.py": "", "onnxruntime/capi/build_and_package_info.py": built}
    installed(tmp_path, "onnxruntime-gpu", "1.22.0", ort)
    torch = {"torch/__init__.py": "", "torch/version.py": "cuda: Optional[str] = '13.0'\n"}
    installed(tmp_path, "torch", "2.13.0+cu130", torch)
    trt = {"tensorrt/__init__.py": ""}
    installed(tmp_path, "tensorrt", "10.13.3.9", trt, "tensorrt_cu12==10.13.3.9")
    installed(tmp_path, "cuda-core", "1.0.0", {"cuda/core/__init__.py": ""})
    installed(tmp_path, "cuda-bindings", "12.9.1", {"cuda/bindings/__init__.py": ""})
    found = facts_of(tmp_path)
    for name, (full, number, cuda) in {
        "onnxruntime": ("onnxruntime-gpu", "1.22.0", 12),
        "torch": ("torch", "2.13.0+cu130", 13),
        "cuda_core": ("cuda-core", "1.0.0", 12),
    }.items():
        assert found[name] == {"name": full, "version": number, "cuda": cuda, "fault": ""}
    (trt_found,) = found["tensorrt"]
    assert (trt_found["version"], trt_found["cuda"]) == ("10.13.3.9", 12)


@pytest.mark.parametrize(
    ("module", "package", "cuda"),
    [
        ("tensorrt", "tensorrt-cu12", 12),
        ("tensorrt", "tensorrt_cu13", 13),
        ("tensorrt_rtx", "tensorrt-rtx", None),
        ("tensorrt_rtx", "tensorrt_rtx_cu12", 12),
        ("tensorrt_rtx", "tensorrt-rtx-cu13", 13),
    ],
)
def test_tensorrt_under_any_of_its_names(
    module: str, package: str, cuda: int | None, tmp_path: Path
) -> None:
    installed(tmp_path, package, "10.13.3.9", {f"{module}/__init__.py": ""})
    (found,) = facts_of(tmp_path)["tensorrt"]
    assert found == {"name": module, "version": "10.13.3.9", "cuda": cuda, "fault": ""}


def test_builds_for_cpus(tmp_path: Path) -> None:
    built = "package_name = 'onnxruntime'\n__version__ = '1.22.0'\n"
    ort = {"onnxruntime/__init__.py": "", "onnxruntime/capi/build_and_package_info.py": built}
    installed(tmp_path, "onnxruntime", "1.22.0", ort)
    torch = {"torch/__init__.py": "", "torch/version.py": "cuda: Optional[str] = None\n"}
    installed(tmp_path, "torch", "2.13.0+cpu", torch)
    found = facts_of(tmp_path)
    assert found["onnxruntime"]["cuda"] is None
    assert found["torch"]["cuda"] is None


def test_what_was_left_of_a_package_is_no_package(tmp_path: Path) -> None:
    installed(tmp_path, "torch", "2.13.0", {})
    assert facts_of(tmp_path)["torch"] is None


class FakeCuda:
    """Answers as libcuda does, by the prototypes of cuda.h."""

    def __init__(self, names: list[str], *, init: int = 0, version: int = 12040) -> None:
        self.names, self.init, self.version = names, init, version

    def cuDriverGetVersion(self, answer: Any) -> int:  # noqa: N802
        answer._obj.value = self.version
        return 0

    def cuInit(self, flags: int) -> int:  # noqa: N802
        assert flags == 0
        return self.init

    def cuDeviceGetCount(self, answer: Any) -> int:  # noqa: N802
        answer._obj.value = len(self.names)
        return 0

    def cuDeviceGet(self, answer: Any, number: int) -> int:  # noqa: N802
        answer._obj.value = number + 40  # a handle, not the number
        return 0

    def cuDeviceGetName(self, buffer: Any, size: int, device: ctypes.c_int) -> int:  # noqa: N802
        buffer.value = self.names[device.value - 40].encode()[: size - 1]
        return 0

    def cuDeviceTotalMem_v2(self, answer: Any, device: ctypes.c_int) -> int:  # noqa: N802
        assert isinstance(answer._obj, ctypes.c_size_t)
        answer._obj.value = (80 + device.value - 40) << 30
        return 0

    def cuDeviceGetAttribute(  # noqa: N802
        self, answer: Any, attribute: int, device: ctypes.c_int
    ) -> int:
        assert device.value >= 40
        answer._obj.value = {75: 9, 76: 0}[attribute]
        return 0

    def cuGetErrorName(self, code: int, answer: Any) -> int:  # noqa: N802
        answer._obj.value = {100: b"CUDA_ERROR_NO_DEVICE"}.get(code)
        return 0


def test_the_gpus_that_a_driver_names() -> None:
    found = module._driver_of(FakeCuda(["NVIDIA H100", "NVIDIA H200"]), "550.54.14")
    gpus = (
        Gpu(0, "NVIDIA H100", "sm_90", 80 << 30),
        Gpu(1, "NVIDIA H200", "sm_90", 81 << 30),
    )
    assert found == Driver("550.54.14", (12, 4), gpus)


@pytest.mark.parametrize(
    ("cuda", "fault"),
    [
        (FakeCuda([], init=100), "the NVIDIA driver says CUDA_ERROR_NO_DEVICE to cuInit"),
        (FakeCuda([], init=999), "the NVIDIA driver says 999 to cuInit"),
        (FakeCuda([]), "the NVIDIA driver sees no GPU"),
    ],
)
def test_a_driver_without_gpus(cuda: FakeCuda, fault: str) -> None:
    found = module._driver_of(cuda, "550.54.14")
    assert found == Driver("550.54.14", (12, 4), (), fault)


@NO_GPU
@pytest.mark.parametrize(
    ("visible", "end"),
    [("", ", with CUDA_VISIBLE_DEVICES=''"), ("7", ", with CUDA_VISIBLE_DEVICES='7'"), (None, "")],
)
def test_gpus_that_are_hidden(
    visible: str | None, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: FakeCuda([], init=100))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    driver = machine().driver
    assert driver.visible == visible
    assert driver.fault == f"the NVIDIA driver says CUDA_ERROR_NO_DEVICE to cuInit{end}"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15",
            "535.183.01",
        ),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build",
            "580.65.06",
        ),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86 Thu", "570.86"),
        ("", None),
    ],
)
def test_the_driver_version_as_the_kernel_tells_it(
    line: str, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PROC", tmp_path)
    (tmp_path / "driver" / "nvidia").mkdir(parents=True)
    (tmp_path / "driver" / "nvidia" / "version").write_text(line + "\nGCC version:  gcc 12.3.0\n")
    assert module._driver_version() == expected


@NO_GPU
def test_a_driver_whose_library_is_not_within_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PROC", tmp_path)
    assert "has no NVIDIA driver" in machine().driver.fault
    (tmp_path / "driver" / "nvidia").mkdir(parents=True)
    (tmp_path / "driver" / "nvidia" / "version").write_text("NVRM version: x  550.54.14  y\n")
    assert machine().driver == Driver(
        "550.54.14",
        fault="the NVIDIA driver 550.54.14 is here, but its library libcuda.so.1 is not",
    )


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, 8 << 30),
        ({"memory.max": "max\n"}, 8 << 30),
        ({"memory.max": f"{4 << 30}\n"}, 4 << 30),
        ({"memory/memory.limit_in_bytes": "9223372036854771712\n"}, 8 << 30),
        ({"memory/memory.limit_in_bytes": f"{2 << 30}\n"}, 2 << 30),
    ],
)
def test_the_memory_that_a_container_may_have(
    limits: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PROC", tmp_path)
    monkeypatch.setattr(module, "CGROUP", tmp_path / "cgroup")
    (tmp_path / "meminfo").write_text(f"MemTotal:       {8 << 20} kB\nMemFree: 1 kB\n")
    for name, text in limits.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(text)
    assert machine().memory_bytes == expected


def test_devices_by_name() -> None:
    gpus = (Gpu(0, "NVIDIA L4", "sm_89", 24 << 30), Gpu(1, "NVIDIA L40S", "sm_89", 48 << 30))
    here = Machine("linux-x86_64", "a CPU", 2, None, Driver("580", (13, 0), gpus))
    assert here.gpu("cuda") == here.gpu("cuda:0") == gpus[0]
    assert here.gpu("cuda:7") is None
    assert [here.device_name(d) for d in ("cpu", "cuda:1")] == ["a CPU", "NVIDIA L40S"]
    assert Package("torch", "2").cuda is None
