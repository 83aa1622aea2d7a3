"""What `doctor` found, as tables for one screen."""

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from dear_batch.machine import FLAVOURS, Machine, Package
from dear_batch.show import GB, passed_over


def view(machine: Machine, found: Mapping[str, Any]) -> Group:
    """Machine, engines, models, and the bundle where one was given."""
    tables = [
        _machine(machine),
        _engines(found["engines"]),
        _builds(found["builds"]),
        _models(machine, found["models"]),
    ]
    if bundle := found.get("bundle"):
        tables.append(_bundle(bundle))
    return Group(*tables)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(title), title_justify="left", show_header=bool(columns))
    for column in columns:
        table.add_column(column)
    return table


def _machine(machine: Machine) -> Table:
    table = _table("This machine")
    table.add_row("platform", machine.platform)
    table.add_row("processor", Text(f"{machine.cpu}, {machine.cores} cores to use"))
    table.add_row("memory", _size(machine.memory_bytes))
    driver = machine.driver
    for gpu in driver.gpus:
        table.add_row(
            f"cuda:{gpu.number}", Text(f"{gpu.name}, {gpu.sm}, {_size(gpu.memory_bytes)}")
        )
    if not driver.gpus:
        table.add_row("GPU", Text(f"none: {driver.fault}"))
    if driver.cuda:
        knows = f"{driver.version or 'unknown'}, CUDA up to {driver.cuda[0]}.{driver.cuda[1]}"
        table.add_row("NVIDIA driver", knows)
    for name, text in _packages(machine):
        table.add_row(name, Text(text))
    return table


def _packages(machine: Machine) -> Iterator[tuple[str, str]]:
    flavours = {package.name: package for package in machine.tensorrt}
    yield "TensorRT", _package(flavours.get("tensorrt"))
    yield "TensorRT for RTX", _package(flavours.get("tensorrt_rtx"))
    yield "cuda-core", _package(machine.cuda_core)
    yield "ONNX Runtime", _package(machine.onnxruntime)
    if machine.providers:
        yield "its providers", ", ".join(machine.providers)
    yield "PyTorch", _package(machine.torch)


def _package(package: Package | None) -> str:
    if package is None:
        return "not installed"
    other = "" if package.name in FLAVOURS else ", for CPUs"  # a system's TensorRT does not say
    build = f", for CUDA {package.cuda}" if package.cuda else other
    return f"{package.version}{build}" + (f"; {package.fault}" if package.fault else "")


def _engines(engines: list[Mapping[str, Any]]) -> Table:
    """A line for all engines that the same thing keeps from running."""
    table = _table("Engines, the best first", "engine", "device", "runs", "why not", "what helps")
    kinds = groupby(engines, key=lambda item: (item["device"], item["why"], item["next"]))
    for (device, why, next_step), items in kinds:
        names = ", ".join(item["engine"] for item in items)
        table.add_row(names, device, "no" if why else "yes", Text(why), Text(next_step))
    return table


def _builds(builds: list[Mapping[str, Any]]) -> Table:
    table = _table("TensorRT engines can be built here", "TensorRT", "for", "why not", "what helps")
    for item in builds:
        targets = ", ".join(item["targets"]) or "none"
        table.add_row(item["flavour"], targets, Text(item["why"]), Text(item["next"]))
    return table


def _models(machine: Machine, models: list[Mapping[str, Any]]) -> Table:
    devices = list(dict.fromkeys(item["device"] for item in models))
    title = "Models: memory that weights and one call need, estimated"
    sizes = {"cpu": machine.memory_bytes}
    sizes |= {f"cuda:{gpu.number}": gpu.memory_bytes for gpu in machine.driver.gpus}
    table = _table(title, "model", *(f"{device}, {_size(sizes[device])}" for device in devices))
    for name in dict.fromkeys(item["model"] for item in models):
        own = [item for item in models if item["model"] == name]
        cells = (_fits([item for item in own if item["device"] == device]) for device in devices)
        table.add_row(name, *cells)
    return table


def _fits(items: list[Mapping[str, Any]]) -> str:
    words = {True: "fits", False: "too large", None: "unknown"}
    return "\n".join(
        f"{item['precision']}: {words[item['fits']]}, {_size(item['needed_bytes'])}"
        for item in items
    )


def _bundle(bundle: Mapping[str, Any]) -> Table:
    table = _table(f"Bundle {bundle['folder']}")
    if bundle["engine"] is None:
        for name, text in bundle["error"].items():
            table.add_row(name, Text(text))
        return table
    table.add_row("engine", f"{bundle['engine']} on {bundle['device']}")
    if bundle["plan"]:
        table.add_row("plan", bundle["plan"])
    for line in passed_over(bundle):
        table.add_row("passed over", Text(line))
    for step in dict.fromkeys(item["next_step"] for item in bundle["passed_over"]):
        table.add_row("what helps", Text(step))
    return table


def _size(size: int | None) -> str:
    return "unknown" if size is None else f"{size / GB:.1f} GB"
