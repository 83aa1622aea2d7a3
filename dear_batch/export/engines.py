"""Adds TensorRT engines to a bundle that is there, or builds them again.

The manifest is replaced last: whatever happens before, the bundle opens as it did, and what was
left behind is swept by the next export. Plans that no record names go after that.
"""

import fcntl
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import get_args

from dear_batch.bundle import (
    MANIFEST,
    Bundle,
    Engine,
    Flavour,
    Precision,
    Task,
    hash_file,
    open_bundle,
    write_manifest,
)
from dear_batch.bundle_files import ENGINES
from dear_batch.errors import ConfigurationError, OutputError, TryAgainError, missing_extra
from dear_batch.export.building import built
from dear_batch.export.calibrate import calibrate
from dear_batch.export.targets import targets
from dear_batch.export.tensorrt import Order, ahead_of_time
from dear_batch.files.durable import (
    make_folder,
    refuse_other,
    replacing,
    scratch_folder,
    sync,
    writing,
)
from dear_batch.machine import gpus, import_fault
from dear_batch.pointwise.profiles import BATCH_TOKENS, ROW_TOKENS, Profile, lay_out, layout
from dear_batch.pointwise.recipe import Pooling
from dear_batch.specs import EngineSpec
from dear_batch.user_cache import cache_file
from dear_batch.verified import opened_folder

Report = Callable[[str], None]  # told each step
Advance = Callable[[str, float, int], None]  # (target, percent, 100)

BYTES: dict[Precision, int] = {"fp32": 4, "fp16": 2, "bf16": 2}
WEIGHTS = "onnx/weights.safetensors"
PACKED = "onnx/packed.onnx"
LOCK = ".lock"
PLAN = ".plan"
SCRATCH = "build"  # of the temporary folder
EXTRA_DISK = 64 << 20  # graphs, and kernels beside the weights of a plan


def add_engines(
    folder: str | Path, wanted: EngineSpec, report: Report, advance: Advance
) -> tuple[Engine, ...]:
    """Build an engine for each target, in place of those for the same product and GPU.

    Raises:
        ConfigurationError: no pointwise bundle with packed rows, or nothing builds for that GPU.
        UsageError: which GPU is not known.
        OutputError: the bundle's disk is full or read-only, or a link is in place of a folder.
        TryAgainError: there is too little memory, or another export is at work on the bundle.
        TrustError: the bundle is not what its manifest says.
    """
    folder = Path(folder)
    found = open_bundle(folder, "pointwise", verify=False)
    check_buildable(str(folder), found.manifest.task, found.recipe.pooling)
    flavour, kinds = planned(wanted)
    with _locked(folder / ENGINES):
        bundle = open_bundle(folder)
        precision = wanted.precision_for(bundle.manifest.precision)
        _sweep(folder, bundle.manifest.engines)
        for sm in kinds:
            refuse_other(folder / _place(flavour, sm))  # before the hour that a build may take
        _check_space(bundle, precision, len(kinds))
        profiles = _profiles(bundle, wanted, report)
        with scratch_folder(folder / ENGINES / SCRATCH) as scratch:
            graph = _graph(bundle, precision, scratch, report)
            order = Order(graph, scratch / "plan", flavour, "", profiles, wanted.level)
            engines = [_engine(replace(order, sm=sm), precision, report, advance) for sm in kinds]
            bundle.check_unchanged()
            _record(bundle, engines, scratch)
        _sweep(folder, _kept(bundle, engines))
    return tuple(engines)


def planned(wanted: EngineSpec) -> tuple[Flavour, tuple[str, ...]]:
    """The product to build with and the kinds of GPU to build for, on this machine.

    Raises:
        ConfigurationError: nothing that is installed builds for them.
        UsageError: there is no GPU here, and no target.
    """
    return targets(
        wanted.targets,
        None if wanted.flavour == "auto" else wanted.flavour,
        [gpu.sm for gpu in gpus()],
        {name: ahead_of_time(name) for name in get_args(Flavour) if not import_fault(name)},
    )


def check_buildable(name: str, task: Task, pooling: Pooling) -> None:
    """See that a model has the packed graph that engines are built from.

    Raises:
        ConfigurationError: it has not.
    """
    if task != "pointwise" or pooling != "last-token":
        raise ConfigurationError(
            f"{name} has no packed graph to build a TensorRT engine from.",
            where=f"task {task}, pooling {pooling}",
            valid='a pointwise model with pooling = "last-token"',
        )


@contextmanager
def _locked(engines: Path) -> Iterator[None]:
    """The folder of the engines, made if need be, for one export at a time; swept first."""
    make_folder(engines)
    path = engines / LOCK
    with writing(path):
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o666)
    try:
        with writing(path):
            _lock(descriptor, engines)
        for left in engines.glob(f".{SCRATCH}.*"):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, engines: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise TryAgainError(
            f"Another export is at work on the engines of {engines.parent}.",
            valid="one at a time",
            next_step="wait for it, then run the same command again",
        ) from None


def _check_space(bundle: Bundle, precision: Precision, n_plans: int) -> None:
    """A plan holds the weights once more, and so does a graph of another precision."""
    manifest = bundle.manifest
    weights = manifest.files[WEIGHTS].bytes * BYTES[precision] // BYTES[manifest.precision]
    copies = n_plans + (precision != manifest.precision)
    needed, free = copies * (weights + EXTRA_DISK), shutil.disk_usage(bundle.folder).free
    if free < needed:
        raise OutputError(
            f"The disk of {bundle.folder} is too small for {n_plans} more engines.",
            where=f"{free / 1e9:.1f} GB free",
            valid=f"about {needed / 1e9:.1f} GB",
            next_step="free space, or give fewer targets at a time",
        )


def _profiles(bundle: Bundle, wanted: EngineSpec, report: Report) -> tuple[Profile, ...]:
    batch_tokens = wanted.batch_tokens or BATCH_TOKENS
    longest = bundle.recipe.max_length
    if wanted.calibrate is not None:
        found = calibrate(bundle, Path(wanted.calibrate), batch_tokens)
        costs = ", ".join(f"{tokens}: {cost:.3f}" for tokens, cost in found.costs.items())
        report(f"rows of {found.row_tokens} tokens, by {found.pairs} pairs (cost of {costs})")
        row_tokens, document_tokens = found.row_tokens, found.document_tokens
    else:
        row_tokens, document_tokens = max(ROW_TOKENS, longest), longest / 2
    row_tokens = wanted.row_tokens or row_tokens
    if row_tokens < longest:
        raise ConfigurationError(
            f"Rows of {row_tokens} tokens cannot hold a pair of {longest}.",
            valid=f"row_tokens of {longest} or more",
        )
    return lay_out(row_tokens, max(row_tokens, batch_tokens), document_tokens)


def _graph(bundle: Bundle, precision: Precision, scratch: Path, report: Report) -> Path:
    """The packed graph in that precision, seen to score as PyTorch; the bundle's own if it fits.

    That of an fp32 bundle never does: TensorRT has no kernel for its attention.

    Raises:
        ConfigurationError: it is beyond the gate of its precision.
    """
    if precision == bundle.manifest.precision != "fp32":
        return bundle.file(PACKED)
    try:
        from dear_batch.export.gate import check_packed
        from dear_batch.export.graphs import packed_graph
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "torch", "export", "Building engines") from error
    report(f"writing the packed graph in {precision}")
    graph = scratch / "graph"
    graph.mkdir()
    path = packed_graph(bundle, precision, graph)
    report("scoring the package's own pairs with it")
    parity = check_packed(bundle, path, precision)
    report(
        f"{precision}: max |Δscore| {parity.relative_difference:.2g} of the spread, "
        f"Kendall τ {parity.kendall_tau:.4f}"
    )
    return path


def _engine(order: Order, precision: Precision, report: Report, advance: Advance) -> Engine:
    """Build one; its plan stays in the temporary folder, named by its GPU."""
    order = replace(order, timings=cache_file(f"timings-{order.flavour}-{order.sm}"))
    report(f"building for {order.sm} with {order.flavour} in {precision}")
    found = built(order, lambda share: advance(order.sm, 100 * share, 100))
    file = hash_file(order.plan)
    order.plan.rename(order.plan.with_name(f"{order.sm}{PLAN}"))
    report(f"{order.sm}: {file.bytes / 1e6:.0f} MB in {found.seconds:.0f} s")
    limits = layout(order.profiles)
    return Engine(
        path=f"{_place(order.flavour, order.sm)}/{file.sha256}{PLAN}",
        bytes=file.bytes,
        sha256=file.sha256,
        flavour=order.flavour,
        version=found.version,
        sm=order.sm,
        platform=f"{sys.platform}-{platform.machine()}",
        precision=precision,
        row_tokens=limits.row_tokens,
        batch_tokens=limits.batch_tokens,
        profiles=order.profiles,
        build_seconds=round(found.seconds, 1),
    )


def _place(flavour: Flavour, sm: str) -> str:
    """The folder of a bundle's plans for a product and a kind of GPU."""
    return f"{ENGINES}/{flavour}-{sm}"


def _kept(bundle: Bundle, engines: Sequence[Engine]) -> tuple[Engine, ...]:
    """The records with new ones in place of those for the same product, GPU and platform."""

    def key(engine: Engine) -> tuple[str, ...]:
        return engine.flavour, engine.sm, engine.platform

    both = {key(engine): engine for engine in (*bundle.manifest.engines, *engines)}
    return tuple(both.values())


def _record(bundle: Bundle, engines: Sequence[Engine], scratch: Path) -> None:
    """Put the plans into their places, then replace the manifest: that is what makes them count."""
    for engine in engines:
        path = bundle.folder / engine.path
        make_folder(path.parent)
        plan = scratch / f"{engine.sm}{PLAN}"
        with writing(path):
            sync(plan)
            plan.replace(path)
            sync(path.parent)
    write_manifest(scratch, replace(bundle.manifest, engines=_kept(bundle, engines)))
    with replacing(bundle.folder / MANIFEST) as temporary:
        shutil.copyfile(scratch / MANIFEST, temporary)


def _sweep(folder: Path, named: Sequence[Engine]) -> None:
    """Remove plans that no record names; what lies behind a link is not ours."""
    paths = {engine.path for engine in named}
    with opened_folder(folder) as top, opened_folder(ENGINES, top) as engines:
        for name in _names(engines, folders=True):
            with opened_folder(name, engines) as plans:
                for plan in _names(plans, folders=False):
                    if plan.endswith(PLAN) and f"{ENGINES}/{name}/{plan}" not in paths:
                        os.unlink(plan, dir_fd=plans)


def _names(folder: int, *, folders: bool) -> list[str]:
    """What lies in an opened folder: the folders or the rest, links among it."""
    with os.scandir(folder) as found:
        return [entry.name for entry in found if entry.is_dir(follow_symlinks=False) == folders]
