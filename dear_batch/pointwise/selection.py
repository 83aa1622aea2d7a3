"""Which engine a bundle gets on a machine, and why each better one was passed over.

Decides from facts alone, so that any machine can be simulated; of what it has chosen it finds
out, last of all, whether Python can import it. Opens no plan and no graph.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from shlex import quote
from typing import Any, Literal

from dear_batch.bundle import Bundle, Engine
from dear_batch.errors import ConfigurationError
from dear_batch.machine import FLAVOURS, VISIBLE, Gpu, Machine, Package, import_fault
from dear_batch.pointwise.obstacles import RTX_TARGETS, Obstacle, gpu_of, on_cpu, on_cuda, tensorrt

Chosen = Literal["tensorrt", "onnxruntime", "torch"]
EngineName = Literal["auto", "tensorrt", "onnxruntime", "torch"]

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

    def engine_version(self, machine: Machine) -> str | None:
        """The version of the package that runs it."""
        if self.plan:
            return self.plan.version
        package = machine.onnxruntime if self.engine == "onnxruntime" else machine.torch
        return package.version if package else None


@dataclass(frozen=True, slots=True)
class _Here:
    """The model, the machine, and what says why a module cannot be imported on it."""

    bundle: Bundle
    machine: Machine
    fault: Callable[[str], str]
    refusals: Sequence[PassedOver]


def choose(
    bundle: Bundle,
    machine: Machine,
    engine: EngineName = "auto",
    device: str = "auto",
    *,
    fault: Callable[[str], str] = import_fault,
    refusals: Sequence[PassedOver] = (),
) -> Choice:
    """The best engine for a pointwise bundle on a machine.

    `engine` and `device` leave those out that were not asked for; `fault` says why a module
    cannot be imported; `refusals` are engines that were chosen before and did not load.

    Raises:
        ConfigurationError: a listwise bundle, or nothing that was asked for can run here.
    """
    if not DEVICE.fullmatch(device):
        raise ConfigurationError(f"There is no device {device!r}.", valid=DEVICES)
    bundle.recipe  # noqa: B018 - raises where there is none
    here = _Here(bundle, machine, fault, refusals)
    refused = {(item.engine, item.device): (item.why, item.next_step) for item in refusals}
    passed_over = list[PassedOver]()
    for name, kind in ORDER:
        if engine not in ("auto", name) or (kind == "cpu" and device.startswith("cuda")):
            continue
        found = refused.get((name, kind)) or _fit(here, name, kind, device)
        if isinstance(found, Choice):
            return Choice(found.engine, found.device, found.plan, tuple(passed_over))
        passed_over.append(PassedOver(name, kind, *found))
    raise _nothing(here, engine, device, passed_over)


def refusal(choice: Choice, error: ConfigurationError) -> PassedOver:
    """A choice that could not be loaded, as one to pass over when choosing again."""
    why = error.what.rstrip(".") + (f": {error.where}" if error.where else "")
    kind = choice.device.partition(":")[0]
    return PassedOver(choice.engine, kind, why, error.next_step or error.valid)


def told(choice: Choice) -> dict[str, Any]:
    """A choice as fields of a log or a report."""
    return {
        "engine": choice.engine,
        "device": choice.device,
        "plan": choice.plan and str(choice.plan),
        "passed_over": [asdict(item) for item in choice.passed_over],
    }


def build_command(bundle: Bundle, machine: Machine, gpu: Gpu) -> str:
    """What makes an engine of the bundle for a GPU of this machine."""
    command = f"dear-batch export {quote(str(bundle.folder))} --engine tensorrt"
    installed = {package.name for package in machine.tensorrt}
    if "tensorrt" not in installed and installed and gpu.sm in RTX_TARGETS:
        return f"{command} --target {gpu.sm}"
    install = "" if "tensorrt" in installed else "pip install 'dear-batch[tensorrt]', then "
    return f"{install}{alone(machine, gpu)}{command}"


def alone(machine: Machine, gpu: Gpu) -> str:
    """What goes before a command that shall build for a GPU: TensorRT does for the first alone."""
    if gpu.sm == machine.driver.gpus[0].sm:
        return ""
    names = (machine.driver.visible or "").split(",")
    # The numbers are those of the GPUs that are visible now.
    name = names[gpu.number].strip() if gpu.number < len(names) else gpu.number
    return f"{VISIBLE}={name} "


def _fit(here: _Here, engine: Chosen, kind: str, device: str) -> Choice | Obstacle:
    """The engine on that kind of device, or what is in its way."""
    if kind == "cpu":
        if engine == "onnxruntime" and here.bundle.manifest.precision == "bf16":
            why = "onnxruntime has no products in bf16 on a CPU"
            return why, "export the checkpoint again with --precision fp32"
        return on_cpu(here.machine, engine) or Choice(engine, "cpu")
    if device == "cpu":
        return "--device cpu was asked for", "leave out --device cpu"
    gpu = gpu_of(here.machine, device)
    if not isinstance(gpu, Gpu):
        return gpu
    device = f"cuda:{gpu.number}"
    if engine == "tensorrt":
        plan = _plan(here, gpu)
        return Choice(engine, device, plan) if isinstance(plan, Engine) else plan
    return on_cuda(here.machine, engine) or Choice(engine, device)


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
    if package is None:
        install = f"pip install 'dear-batch[{name}]' {name}=={engine.version}"
        return f"its engine is of {name} {engine.version}, which is not installed", install
    if _release(package.version) != _release(engine.version):
        why = f"its engine is of {name} {engine.version}, and {package.version} is installed"
        return why, build
    return tensorrt(here.machine, package, here.fault)


def _release(version: str) -> str:
    """A version as TensorRT itself says it: one packaged again is the same ("10.9.0.34.post1")."""
    return re.sub(r"\.post\d+$", "", version)


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
            other = choose(here.bundle, here.machine, fault=here.fault, refusals=here.refusals)
            kind = other.device.partition(":")[0]
            valid = f"--engine {other.engine} --device {kind}, which runs here"
    # Of those that ask least of the machine: why the CPU, where it was allowed, will not do.
    least = [item for item in passed_over if item.device == passed_over[-1].device]
    first = next((item for item in least if item.engine != "tensorrt"), least[0])
    what = f"This machine cannot score {here.bundle.folder} with {asked or 'any engine'}"
    return ConfigurationError(
        f"{what}: {first.why}.",
        where="; ".join(map(str, passed_over)) if len(reasons) > 1 else "",
        valid=valid,
        next_step=f"{first.next_step}; dear-batch doctor shows what is here",
    )
