"""What this machine can do, what is missing and how to install it, which models fit.

Reads facts and does sums; loads no model.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dear_batch.bundle import Bundle, open_bundle
from dear_batch.errors import ConfigurationError
from dear_batch.log import error_parts
from dear_batch.machine import FLAVOURS, Gpu, Machine, import_fault
from dear_batch.pointwise import obstacles
from dear_batch.pointwise.selection import ORDER, alone, choose, told

Fields = dict[str, Any]
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
# Tokens of one call of a model: what a GPU takes to be busy, and a CPU at most.
TOKENS = {"cuda": 16384, "cpu": 2048}
INSTALL = {
    "tensorrt": "on a machine with a GPU: pip install 'dear-batch[tensorrt]'",
    "tensorrt_rtx": "pip install 'dear-batch[tensorrt-rtx]'",
}
RESERVE_BYTES = 1 << 30  # what CUDA, or Python with its libraries, takes for itself


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama of the model zoo, by the config of its base; `generates` is a listwise one."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    generates: bool = False

    @property
    def parameters(self) -> int:
        """With a score head, or with the matrix that makes tokens."""
        kv = self.hidden // self.heads * self.kv_heads
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * kv
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        head = self.hidden * (self.vocabulary if self.generates else 1)
        return self.vocabulary * self.hidden + self.layers * layer + self.hidden + head

    def needed_bytes(self, precision: str, kind: str) -> int:
        """Weights and what a call needs beside them: an estimate, for "cuda" or "cpu".

        Of each token: residual stream, norm and attention in fp32, the MLP's two inner vectors
        and their product, and for a generator the keys and values of every layer.
        """
        token = 12 * self.hidden + 3 * BYTES[precision] * self.intermediate
        if self.generates:
            kv = self.hidden // self.heads * self.kv_heads
            token += 2 * self.layers * kv * BYTES[precision]
        return self.parameters * BYTES[precision] + TOKENS[kind] * token + RESERVE_BYTES


LLAMA_8B = (4096, 14336, 32, 32, 8, 128256)  # Llama-3.1-8B
ZOO = (
    Shape("dear-3b-reranker", 3072, 8192, 28, 24, 8, 128256),  # Llama-3.2-3B
    Shape("dear-8b-reranker", *LLAMA_8B),
    Shape("dear-8b-reranker-listwise", *LLAMA_8B, generates=True),
    Shape("llama2-13b-rankllama-teacher", 5120, 13824, 40, 40, 40, 32000),  # Llama-2-13B
)


def examine(
    machine: Machine, bundle: Path | None = None, fault: Callable[[str], str] = import_fault
) -> Fields:
    """Everything that `doctor` tells, JSON-able.

    Raises:
        ConfigurationError, TrustError: `bundle` is no pointwise bundle.
    """
    facts: Fields = {
        "machine": asdict(machine),
        "engines": list(_engines(machine, fault)),
        "builds": list(_builds(machine, fault)),
        "models": list(_models(machine)),
    }
    if bundle:
        facts["bundle"] = _choice(open_bundle(bundle, "pointwise", verify=False), machine, fault)
    return facts


def _engines(machine: Machine, fault: Callable[[str], str]) -> Iterator[Fields]:
    """Every engine on every kind of device: whether it runs, else why not and what helps."""
    for engine, kind in ORDER:
        devices = [f"cuda:{gpu.number}" for gpu in machine.driver.gpus] or ["cuda"]
        for device in devices if kind == "cuda" else ["cpu"]:
            found = _obstacle(machine, engine, device, fault)
            why, next_step = found or ("", "")
            state = {"runs": found is None, "why": why, "next": next_step}
            yield {"engine": engine, "device": device, **state}


def _obstacle(
    machine: Machine, engine: str, device: str, fault: Callable[[str], str]
) -> obstacles.Obstacle | None:
    if device == "cpu":
        return obstacles.on_cpu(machine, engine)
    gpu = obstacles.gpu_of(machine, device)
    if not isinstance(gpu, Gpu):
        return gpu
    if engine == "tensorrt":
        return _tensorrt(machine, gpu, fault)
    return obstacles.on_cuda(machine, engine)


def _tensorrt(machine: Machine, gpu: Gpu, fault: Callable[[str], str]) -> obstacles.Obstacle | None:
    """What keeps every flavour from a GPU: of several, what keeps the best."""
    installed = {package.name: package for package in machine.tensorrt}
    found = list[obstacles.Obstacle]()
    for name in (name for name in FLAVOURS if name in installed):
        if name == "tensorrt_rtx" and gpu.sm not in obstacles.RTX_TARGETS:
            why = f"TensorRT for RTX does not know {gpu.sm}"
            found.append((why, INSTALL["tensorrt"]))
        elif obstacle := obstacles.tensorrt(machine, installed[name], fault):
            found.append(obstacle)
        else:
            return None
    return found[0] if found else ("tensorrt is not installed", INSTALL["tensorrt"])


def _builds(machine: Machine, fault: Callable[[str], str]) -> Iterator[Fields]:
    """What GPUs each TensorRT can build engines for here: CUDA's first one, or any of a list."""
    installed = {package.name: package for package in machine.tensorrt}
    for name in FLAVOURS:
        package = installed.get(name)
        if package is None:
            found: obstacles.Obstacle | None = ("it is not installed", INSTALL[name])
        else:
            found = obstacles.building(machine, package, fault)
        targets: tuple[str, ...] = ()
        why, next_step = found or ("", "")
        if found is None and name == "tensorrt":
            targets, next_step = (machine.driver.gpus[0].sm,), _for_others(machine)
        elif found is None:
            targets = obstacles.RTX_TARGETS
        yield {"flavour": name, "targets": targets, "why": why, "next": next_step}


def _for_others(machine: Machine) -> str:
    """How to build for GPUs of other kinds than the first."""
    others = {gpu.sm: (alone(machine, gpu), gpu) for gpu in machine.driver.gpus}
    return "; ".join(
        f"{setting}dear-batch export ... builds for cuda:{gpu.number} ({gpu.sm})"
        for setting, gpu in others.values()
        if setting
    )


def _models(machine: Machine) -> Iterator[Fields]:
    """What each model of the zoo needs on each device, and whether that is there."""
    devices = {f"cuda:{gpu.number}": gpu.memory_bytes for gpu in machine.driver.gpus}
    for shape in ZOO:
        for device, there in {**devices, "cpu": machine.memory_bytes}.items():
            kind = device.partition(":")[0]
            for precision in _precisions(shape, kind):
                needed = shape.needed_bytes(precision, kind)
                yield {
                    "model": shape.name,
                    "device": device,
                    "precision": precision,
                    "needed_bytes": needed,
                    "fits": None if there is None else needed <= there,
                }


def _precisions(shape: Shape, kind: str) -> tuple[str, ...]:
    if shape.generates:
        return ("fp32", "bf16")
    return ("fp32", "fp16", "bf16") if kind == "cuda" else ("fp32",)


def _choice(bundle: Bundle, machine: Machine, fault: Callable[[str], str]) -> Fields:
    """The engine that the bundle would get, or why there is none."""
    try:
        return {"folder": str(bundle.folder), **told(choose(bundle, machine, fault=fault))}
    except ConfigurationError as error:
        return {"folder": str(bundle.folder), "engine": None, "error": error_parts(error)}
