"""What this machine has to run a model with: GPUs, driver, packages, memory. Plain facts.

None of them needs PyTorch, TensorRT or ONNX Runtime to be imported: GPUs are asked for at the
driver's own library, packages at their metadata. Whether a package's native libraries load is
found out for the one that is to be used, and by `dear-batch doctor`. Decides nothing.

What a GPU's driver answers is not executed here: needs a GPU.
"""

import ctypes
import io
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

Answer = TypeVar("Answer", ctypes.c_int, ctypes.c_size_t)
VISIBLE = "CUDA_VISIBLE_DEVICES"
PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")
FLAVOURS = ("tensorrt", "tensorrt_rtx")  # the better one first
# The least NVIDIA driver of a CUDA major version on Linux: CUDA Toolkit release notes, "CUDA
# Driver", minor version compatibility.
LEAST_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
# The attributes of cuDeviceGetAttribute (cuda.h).
_CC_MAJOR, _CC_MINOR = 75, 76


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as CUDA numbers it; `sm` such as "sm_90"."""

    number: int
    name: str
    sm: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Driver:
    """The NVIDIA driver: its version, the newest CUDA that it knows, and its GPUs.

    `fault` says why there are none, `visible` is CUDA_VISIBLE_DEVICES where that is set.
    """

    version: str | None = None
    cuda: tuple[int, int] | None = None
    gpus: tuple[Gpu, ...] = ()
    fault: str = ""
    visible: str | None = None


@dataclass(frozen=True, slots=True)
class Package:
    """An installed package: `cuda` is the major version that it was built for, None for none.

    `fault` says why its native libraries do not load, as far as that was looked at.
    """

    name: str
    version: str
    cuda: int | None = None
    fault: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    """All of it. `platform` such as "linux-x86_64"; packages that are not installed are None."""

    platform: str
    cpu: str
    cores: int
    memory_bytes: int | None
    driver: Driver = field(default_factory=Driver)
    tensorrt: tuple[Package, ...] = ()
    cuda_core: Package | None = None
    onnxruntime: Package | None = None
    torch: Package | None = None
    providers: tuple[str, ...] = ()  # ONNX Runtime's, as far as that was looked at

    def gpu(self, device: str) -> Gpu | None:
        """The GPU of "cuda" or "cuda:N", None for one that is not there."""
        number = int(device.partition(":")[2] or 0)
        return next((gpu for gpu in self.driver.gpus if gpu.number == number), None)

    def device_name(self, device: str) -> str:
        """The model of a device."""
        gpu = None if device == "cpu" else self.gpu(device)
        return gpu.name if gpu else self.cpu


def machine(*, thorough: bool = False) -> Machine:
    """The facts of this machine.

    Whether CUDA loads in ONNX Runtime is looked at where there is a GPU, and with `thorough`,
    which also imports TensorRT and asks ONNX Runtime for its providers.
    """
    driver = _driver()
    return Machine(
        platform=f"{sys.platform}-{platform.machine()}",
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1,
        memory_bytes=_memory_bytes(),
        driver=driver,
        tensorrt=tuple(_tensorrt(thorough=thorough)),
        cuda_core=_cuda_core(),
        onnxruntime=_onnxruntime(loads_cuda=thorough or bool(driver.gpus)),
        torch=_torch(),
        providers=_providers() if thorough else (),
    )


def gpus() -> tuple[Gpu, ...]:
    """The GPUs of this machine."""
    return _driver().gpus


def import_fault(name: str) -> str:
    """Why a module cannot be imported; empty where it can."""
    try:
        import_module(name)
    except (ImportError, OSError, RuntimeError) as error:  # a native library is missing or unfit
        return f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return ""


def _driver() -> Driver:
    known = _driver_version()
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        if known is None:
            return Driver(fault="this machine has no NVIDIA driver")
        fault = f"the NVIDIA driver {known} is here, but its library libcuda.so.1 is not"
        return Driver(known, fault=fault)
    found, visible = _driver_of(cuda, known), os.environ.get(VISIBLE)
    why = f"{found.fault}, with {VISIBLE}={visible!r}" if visible is not None else found.fault
    return replace(found, fault=found.fault and why, visible=visible)


def _driver_of(cuda: Any, known: str | None) -> Driver:
    newest = None
    try:
        number = _asked(cuda, "cuDriverGetVersion", ctypes.c_int())
        newest = (number.value // 1000, number.value % 1000 // 10)  # 12040 is 12.4
        _call(cuda, "cuInit", 0)
        count = _asked(cuda, "cuDeviceGetCount", ctypes.c_int())
        found = tuple(_gpu(cuda, n) for n in range(count.value))
    except OSError as error:
        return Driver(known, newest, fault=f"the NVIDIA driver says {error}")
    return Driver(known, newest, found, "" if found else "the NVIDIA driver sees no GPU")


def _gpu(cuda: Any, number: int) -> Gpu:
    device = _asked(cuda, "cuDeviceGet", ctypes.c_int(), number)
    name = ctypes.create_string_buffer(256)
    _call(cuda, "cuDeviceGetName", name, len(name), device)
    memory = _asked(cuda, "cuDeviceTotalMem_v2", ctypes.c_size_t(), device)
    major = _asked(cuda, "cuDeviceGetAttribute", ctypes.c_int(), _CC_MAJOR, device)
    minor = _asked(cuda, "cuDeviceGetAttribute", ctypes.c_int(), _CC_MINOR, device)
    sm = f"sm_{major.value}{minor.value}"
    return Gpu(number, name.value.decode(errors="replace"), sm, memory.value)


def _asked(cuda: Any, function: str, answer: Answer, *arguments: Any) -> Answer:
    """What a function of the driver answers through its first argument."""
    _call(cuda, function, ctypes.byref(answer), *arguments)
    return answer


def _call(cuda: Any, function: str, *arguments: Any) -> None:
    """Call a function of the driver.

    Raises:
        OSError: it did not succeed.
    """
    code = getattr(cuda, function)(*arguments)
    if code:
        name = ctypes.c_char_p()
        cuda.cuGetErrorName(code, ctypes.byref(name))
        raise OSError(f"{name.value.decode() if name.value else code} to {function}")


def _driver_version() -> str | None:
    """As the kernel module tells it: its line names the module, then its version."""
    line = _text(PROC / "driver" / "nvidia" / "version").partition("\n")[0]
    found = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", line)
    return found[1] if found else None


def _tensorrt(*, thorough: bool) -> Iterator[Package]:
    for name in FLAVOURS:
        # The first is empty but for its needs, the second or third; each can be there alone.
        for package in (name, f"{name}_cu13", f"{name}_cu12"):
            if number := _version(package, name):
                built = re.search(r"[_-]cu(\d+)", " ".join((package, *(requires(package) or ()))))
                fault = import_fault(name) if thorough else ""
                yield Package(name, number, int(built[1]) if built else None, fault)
                break


def _cuda_core() -> Package | None:
    """CUDA for Python, built for the CUDA of its bindings."""
    number, bindings = _version("cuda-core", "cuda"), _version("cuda-bindings", "cuda")
    return Package("cuda-core", number, _major(bindings)) if number and bindings else None


def _onnxruntime(*, loads_cuda: bool) -> Package | None:
    known = {name: _version(name, "onnxruntime") for name in ("onnxruntime-gpu", "onnxruntime")}
    name, number = next(((n, v) for n, v in known.items() if v), ("", None))
    if number is None:
        return None
    # `onnxruntime` beside `onnxruntime-gpu` overwrites its files, these among them.
    cuda = _major(_constant("onnxruntime", "capi/build_and_package_info.py", "cuda_version"))
    fault = _missing_library() if cuda and loads_cuda else ""
    return Package(name, number, cuda, fault)


def _providers() -> tuple[str, ...]:
    """What ONNX Runtime was built to compute with, the best first, whether or not it loads."""
    with suppress(ImportError, OSError):
        import onnxruntime

        return tuple(onnxruntime.get_available_providers())
    return ()


def _missing_library() -> str:
    """The first of CUDA's libraries that ONNX Runtime does not find, in its own words."""
    told = io.StringIO()
    try:
        import onnxruntime

        with redirect_stdout(told):
            onnxruntime.preload_dlls()
    except (ImportError, OSError) as error:
        return str(error)
    lines = told.getvalue().splitlines()
    failed = (line.partition(": ")[2] for line in lines if line.startswith("Failed to load"))
    return next(failed, "")


def _torch() -> Package | None:
    number = _version("torch", "torch")
    if number is None:
        return None
    return Package("torch", number, _major(_constant("torch", "version.py", "cuda")))


def _constant(package: str, file: str, name: str) -> str | None:
    """A text that a module of a package sets, read without importing it."""
    spec = find_spec(package)
    folders = (spec and spec.submodule_search_locations) or ()
    for folder in folders:
        pattern = rf"^{name}\b[^=\n]*=\s*['\"]([^'\"]*)"
        found = re.search(pattern, _text(Path(folder) / file), re.MULTILINE)
        if found:
            return found[1]
    return None


def _major(text: str | None) -> int | None:
    found = re.match(r"\d+", text or "")
    return int(found[0]) if found else None


def _version(package: str, module: str) -> str | None:
    """The version of an installed package, None where it or its module is not there."""
    with suppress(PackageNotFoundError):
        return version(package) if find_spec(module) else None
    return None


def _cpu() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _text(PROC / "cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def _memory_bytes() -> int | None:
    """The machine's memory, or what a container may have of it."""
    found = re.search(r"^MemTotal:\s*(\d+) kB", _text(PROC / "meminfo"), re.MULTILINE)
    limits = [int(found[1]) * 1024] if found else []
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroup v2, v1
        text = _text(CGROUP / name).strip()
        limits += [int(text)] if text.isdecimal() else []
    return min(limits, default=None)


def _text(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(errors="replace")
    return ""
