"""Which engine a bundle gets on a machine, and why each better one was passed over.

Decides from facts alone, so that any machine can be simulated; of what it has chosen it finds
out, last of all, whether Python can import it. Opens no plan and no graph.
"""

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from shlex import quote
from typing import Literal

from dear_batch.bundle import Bundle, Engine
from dear_batch.errors import ConfigurationError
from dear_batch.machine import FLAVOURS, LEAST_DRIVER, Gpu, Machine, Package, import_fault

Chosen = Literal["tensorrt", "onnxruntime", "torch"]
EngineName = Literal["auto", "tensorrt", "onnxruntime", "torch"]
Obstacle = tuple[str, str]  # why not, and what helps

DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
DEVICES = "auto, cpu, cuda, or cuda:N with the number of a GPU"
# The best comes first.
ORDER: tuple[tuple[Chosen, str], ...] = (
    ("tensorrt", "cuda"),
    ("onnxruntime", "cuda"),
    ("torch", "cuda"),
    ("onnxruntime", "cpu"),
    ("torch", "cpu"),
)
# What TensorRT for RTX builds for ahead of time; Hopper (sm_90) needs the full TensorRT.
RTX_TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")
NO_GPU = (
    "with an NVIDIA GPU here, install its driver, or start the container with --gpus all; "
    "nvidia-smi shows whether that worked"
)


@dataclass(frozen=True, slots=True)
class PassedOver:
    """An engine that would have come first: `engine` on `device`, "cpu" or "cuda"."""

    engine: Chosen
    device: str
    why: str
    next_step: str

    def __str__(self) -> str:
        """As a line of a log or a table."""
        return f"{self.engine} on {self.device}: {self.why}"


@dataclass(frozen=True, slots=True)
class Choice:
    """The engine to load: on `device`, "cpu" or "cuda:N", from `plan` where it is TensorRT."""

    engine: Chosen
    device: str
    plan: Engine | None = None
    passed_over: tuple[PassedOver, ...] = ()


@dataclass(frozen=True, slots=True)
class _Here:
    """The model, the machine, and what says why a module cannot be imported on it."""

    bundle: Bundle
    machine: Machine
    fault: Callable[[str], str]


def choose(
    bundle: Bundle,
    machine: Machine,
    engine: EngineName = "auto",
    device: str = "auto",
    fault: Callable[[str], str] = import_fault,
) -> Choice:
    """The best engine for a pointwise bundle on a machine.

    `engine` and `device` leave those out that were not asked for; `fault` says why a module
    cannot be imported.

    Raises:
        ConfigurationError: a listwise bundle, or nothing that was asked for can run here.
    """
    if not DEVICE.fullmatch(device):
        raise ConfigurationError(f"There is no device {device!r}.", valid=DEVICES)
    bundle.recipe  # noqa: B018 - raises where there is none
    here = _Here(bundle, machine, fault)
    passed_over = list[PassedOver]()
    for name, kind in ORDER:
        if engine not in ("auto", name) or (kind == "cpu" and device.startswith("cuda")):
            continue
        found = _fit(here, name, kind, device)
        if isinstance(found, Choice):
            return Choice(found.engine, found.device, found.plan, tuple(passed_over))
        passed_over.append(PassedOver(name, kind, *found))
    raise _nothing(here, engine, device, passed_over)


def build_command(bundle: Bundle, machine: Machine, gpu: Gpu) -> str:
    """What makes an engine of the bundle for a GPU of this machine."""
    command = f"dear-batch export {quote(str(bundle.folder))} --engine tensorrt"
    installed = {package.name for package in machine.tensorrt}
    if "tensorrt" in installed:
        return command
    if installed and gpu.sm in RTX_TARGETS:
        return f"{command} --target {gpu.sm}"
    return f"pip install 'dear-batch[tensorrt]', then {command}"


def _fit(here: _Here, engine: Chosen, kind: str, device: str) -> Choice | Obstacle:
    """The engine on that kind of device, or what is in its way."""
    if kind == "cpu":
        return _package_for_cpu(here.machine, engine) or Choice(engine, "cpu")
    gpu = _gpu(here.machine, device)
    if not isinstance(gpu, Gpu):
        return gpu
    device = f"cuda:{gpu.number}"
    if engine == "tensorrt":
        plan = _plan(here, gpu)
        return Choice(engine, device, plan) if isinstance(plan, Engine) else plan
    obstacle = (_onnxruntime if engine == "onnxruntime" else _torch)(here.machine)
    return obstacle or Choice(engine, device)


def _gpu(machine: Machine, device: str) -> Gpu | Obstacle:
    if device == "cpu":
        return "--device cpu was asked for", "leave out --device cpu"
    if not machine.driver.gpus:
        return machine.driver.fault, NO_GPU
    found = machine.gpu("cuda" if device == "auto" else device)
    if found is None:
        numbers = ", ".join(f"cuda:{gpu.number}" for gpu in machine.driver.gpus)
        return f"there is no GPU {device}", f"--device with one of {numbers}"
    return found


def _package_for_cpu(machine: Machine, engine: Chosen) -> Obstacle | None:
    if engine == "onnxruntime" and machine.onnxruntime is None:
        return "it is not installed", "pip install onnxruntime-gpu"
    if engine == "torch" and machine.torch is None:
        return "it is not installed", "pip install 'dear-batch[export]'"
    return None


def _onnxruntime(machine: Machine) -> Obstacle | None:
    """What keeps ONNX Runtime from a GPU."""
    package = machine.onnxruntime
    if package is None:
        return "it is not installed", "pip install 'onnxruntime-gpu[cuda,cudnn]'"
    if package.cuda is None:
        return (
            f"{package.name} {package.version} is a build for CPUs",
            "pip uninstall onnxruntime, then pip install --force-reinstall onnxruntime-gpu",
        )
    if obstacle := _too_old(machine, package):
        return obstacle
    if package.fault:
        return f"its CUDA libraries: {package.fault}", "pip install 'onnxruntime-gpu[cuda,cudnn]'"
    return None


def _torch(machine: Machine) -> Obstacle | None:
    """What keeps PyTorch from a GPU."""
    package = machine.torch
    if package is None:
        return "it is not installed", "pip install 'dear-batch[export]'"
    if package.cuda is None:
        return (
            f"torch {package.version} is a build for CPUs",
            "install one for CUDA: https://pytorch.org/get-started/locally/",
        )
    return _too_old(machine, package)


def _too_old(machine: Machine, package: Package) -> Obstacle | None:
    """What to do where the driver does not know the CUDA that a package was built for."""
    known = machine.driver.cuda
    if known is None or package.cuda is None or known[0] >= package.cuda:
        return None
    needs = f"{package.name} {package.version} needs CUDA {package.cuda}"
    driver = f"the NVIDIA driver {machine.driver.version or ''}".rstrip()
    least = LEAST_DRIVER.get(package.cuda)
    update = "update the NVIDIA driver" + (f" to {least} or newer" if least else "")
    return f"{needs}, and {driver} knows CUDA up to {known[0]}.{known[1]}", update


def _plan(here: _Here, gpu: Gpu) -> Engine | Obstacle:
    """The plan that runs on a GPU, or what is in the way of the one that comes nearest."""
    engines, this = here.bundle.manifest.engines, (gpu.sm, here.machine.platform)
    build = build_command(here.bundle, here.machine, gpu)
    if here.bundle.recipe.pooling == "final-position":
        why = "the recipe pools at the final position, which takes padded rows"
        return why, "export the checkpoint again with --pooling last-token"
    if not engines:
        return "the bundle holds no TensorRT engine", build
    fitting = [engine for engine in engines if (engine.sm, engine.platform) == this]
    if not fitting:
        kinds = ", ".join(sorted({f"{e.sm} ({e.platform})" for e in engines}))
        return f"its engines are for {kinds}; this is {this[0]} ({this[1]})", build
    fitting.sort(key=lambda engine: FLAVOURS.index(engine.flavour))
    installed = {package.name: package for package in here.machine.tensorrt}
    # An engine whose TensorRT is installed comes nearer than one whose is not.
    fitting.sort(key=lambda engine: engine.flavour not in installed)
    obstacles = list[Obstacle]()
    for engine in fitting:
        obstacle = _of_plan(here, engine, installed.get(engine.flavour), build)
        if obstacle is None:
            return engine
        obstacles.append(obstacle)
    return obstacles[0]


def _of_plan(here: _Here, engine: Engine, package: Package | None, build: str) -> Obstacle | None:
    """What is in the way of a plan that is made for this GPU."""
    name = engine.flavour.replace("_", "-")
    install = f"pip install 'dear-batch[{name}]'"
    if package is None:
        pinned = f"{install} {name}=={engine.version}"
        return f"its engine is of {name} {engine.version}, which is not installed", pinned
    if package.version != engine.version:
        why = f"its engine is of {name} {engine.version}, and {package.version} is installed"
        return why, build
    for needed in (package, here.machine.cuda_core):
        if needed is None:
            return "cuda-core, by which Python calls CUDA, is not installed", install
        if obstacle := _too_old(here.machine, needed):
            return obstacle
    for module in (engine.flavour, "cuda.core"):
        if why := here.fault(module):
            return f"{module} cannot be imported: {why}", f"{install} --force-reinstall"
    return None


def _nothing(
    here: _Here, engine: EngineName, device: str, passed_over: list[PassedOver]
) -> ConfigurationError:
    """The error where nothing of what was asked for runs; what would run is in it."""
    options = {"--engine": engine, "--device": device}
    asked = " ".join(f"{name} {value}" for name, value in options.items() if value != "auto")
    reasons = {item.why for item in passed_over}
    valid = ""
    if asked:
        with suppress(ConfigurationError):
            other = choose(here.bundle, here.machine, fault=here.fault)
            kind = other.device.partition(":")[0]
            valid = f"--engine {other.engine} --device {kind}, which runs here"
    what = f"This machine cannot score {here.bundle.folder} with {asked or 'any engine'}"
    return ConfigurationError(
        f"{what}: {passed_over[0].why}.",
        where="; ".join(map(str, passed_over)) if len(reasons) > 1 else "",
        valid=valid,
        next_step=f"{passed_over[0].next_step}; dear-batch doctor shows what is here",
    )
