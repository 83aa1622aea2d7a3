"""A TensorRT plan from the packed ONNX graph, by either product of that name.

`tensorrt` (10, 11) builds for the GPU that is there; `tensorrt_rtx` builds ahead of time, for the
kinds of GPU that it lists, without one. Their Python modules are alike. Networks are strongly
typed: the graph says which operation runs in which precision, and no flag does (TensorRT 11 has
none). Knows nothing of bundles.

Executed here with `tensorrt_rtx`. The timing cache, which `tensorrt` alone has, is not executed
here: needs a GPU.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from dear_batch.bundle import Flavour
from dear_batch.errors import ConfigurationError
from dear_batch.files.durable import writing
from dear_batch.pointwise.profiles import Profile
from dear_batch.user_cache import read_own, write_own

Advance = Callable[[float], None]  # told the share that is done, 0 to 1

PER_TOKEN = ("tokens", "positions", "groups", "segments")  # inputs of shape [R, T]
PER_DOCUMENT = "pooled"  # of shape [R, P]
SHOWN_ERRORS = 6
# What is logged when memory ran out: by TensorRT, by its parser, by an allocator.
_MEMORY = re.compile(r"OutOfMemory|MEM_ALLOC_FAILED|bad_alloc|out of memory|not be allocated")
_SCRATCH = re.compile(r"Max Scratch Memory: (\d+) bytes")


@dataclass(frozen=True, slots=True)
class Order:
    """A plan to build: out of the file `graph` into the new file `plan`.

    `sm` such as "sm_89"; `level` is TensorRT's optimization level (0 to 5), None for its own;
    `timings` a file that remembers how fast each kernel was, from build to build (its name
    gets the version).
    """

    graph: Path
    plan: Path
    flavour: Flavour
    sm: str
    profiles: tuple[Profile, ...]
    level: int | None = None
    timings: Path | None = None


@dataclass(frozen=True, slots=True)
class Built:
    """What a build came to; `scratch_bytes` is what each profile's kernels need at most."""

    version: str
    seconds: float
    scratch_bytes: tuple[int, ...]


@dataclass(slots=True)
class _Said:
    """What TensorRT said, as far as it matters."""

    errors: list[str] = field(default_factory=list)
    scratch_bytes: list[int] = field(default_factory=list)

    def hear(self, text: str, *, error: bool) -> None:
        if error:
            self.errors.append(text.strip())
        elif found := _SCRATCH.search(text):
            self.scratch_bytes.append(int(found[1]))


def ahead_of_time(flavour: Flavour) -> tuple[str, ...]:
    """The kinds of GPU for which an installed product builds where there is none."""
    names = dir(getattr(import_module(flavour), "ComputeCapability", None))
    numbers = (name.removeprefix("SM") for name in names if name.startswith("SM"))
    return tuple(f"sm_{number}" for number in sorted(numbers, key=int))


def plan_from_onnx(order: Order, advance: Advance) -> Built:
    """Build a plan.

    Raises:
        ConfigurationError: TensorRT refuses the graph, a profile or the target.
        MemoryError: there is too little of it.
        OutputError: the disk is full.
    """
    start = time.monotonic()
    building = _Building(order)
    building.parse()
    building.configure(advance)
    with writing(order.plan):
        building.write()
    building.keep_timings()
    seconds = time.monotonic() - start
    return Built(building.trt.__version__, seconds, tuple(building.said.scratch_bytes))


class _Building:
    """TensorRT's objects of one build. The parser owns the weights, so it lives as long."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.said = _Said()
        self.trt: Any = import_module(order.flavour)
        self._logger = _logger(self.trt, self.said)
        self._builder = self.trt.Builder(self._logger)
        self.network = self._builder.create_network(
            1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        )
        self._parser = self.trt.OnnxParser(self.network, self._logger)
        self._config = self._builder.create_builder_config()

    def parse(self) -> None:
        """Read the graph from its path: the weights lie beside it."""
        good = self._parser.parse_from_file(str(self.order.graph))
        found = [self._parser.get_error(number) for number in range(self._parser.num_errors)]
        if found:  # the parser's own words say more than what it logged
            self.said.errors[:] = [
                f"{e.node_operator()} {e.node_name()}: {e.desc()} ({e.code()})".strip()
                for e in found
            ]
        self._check(good and not found, "does not take the graph")
        inputs = {self.network.get_input(n).name for n in range(self.network.num_inputs)}
        if inputs != {*PER_TOKEN, PER_DOCUMENT}:
            self.said.errors.append(f"inputs {', '.join(sorted(inputs))}")
            self._check(False, "was given another graph than the packed one")

    def configure(self, advance: Advance) -> None:
        """Set target, profiles and what else there is to set."""
        order, config = self.order, self._config
        self._monitor = config.progress_monitor = _monitor(self.trt, advance)
        if hasattr(self.trt.BuilderFlag, "TF32"):
            # On by default: 10 bits of mantissa in the fp32 products, which are the score head
            # and the angles of the rotary tables.
            config.clear_flag(self.trt.BuilderFlag.TF32)
        if order.level is not None:
            config.builder_optimization_level = order.level
        if hasattr(self.trt, "ComputeCapability"):  # else the GPU that is there is the target
            config.num_compute_capabilities = 1
            known = getattr(self.trt.ComputeCapability, order.sm.replace("sm_", "SM"), None)
            good = known is not None and config.set_compute_capability(known, 0)
            self._check(good, f"does not build for {order.sm}")
        elif order.timings:
            set_timings(config, read_own(self._timings_file()) or b"")
        for profile in order.profiles:
            number = config.add_optimization_profile(self._shapes(profile))
            self._check(number >= 0, "does not take a profile")

    def write(self) -> None:
        """Optimise, and write the plan piece by piece where the product can."""
        with self.order.plan.open("xb") as file:
            if hasattr(self._builder, "build_serialized_network_to_stream"):
                writer = _writer(self.trt, file)
                good = self._builder.build_serialized_network_to_stream(
                    self.network, self._config, writer
                )
                if writer.fault:
                    raise writer.fault
            else:
                plan = self._builder.build_serialized_network(self.network, self._config)
                good = plan is not None and file.write(plan)
        self._check(good, "could not build a plan")

    def keep_timings(self) -> None:
        """Remember how fast each kernel was."""
        keeps = self.order.timings and not hasattr(self.trt, "ComputeCapability")
        if keeps and (timings := timings_of(self._config)):
            write_own(self._timings_file(), timings)

    def _timings_file(self) -> Path | None:
        """Each version has its own: they do not read one another's."""
        path = self.order.timings
        return path and path.with_name(f"{path.name}-{self.trt.__version__}")

    def _shapes(self, profile: Profile) -> Any:
        shapes = self._builder.create_optimization_profile()
        spans = dict.fromkeys(PER_TOKEN, profile.tokens) | {PER_DOCUMENT: profile.documents}
        for name, span in spans.items():
            sizes = [
                (getattr(profile.rows, edge), getattr(span, edge))
                for edge in ("least", "best", "most")
            ]
            shapes.set_shape(name, *sizes)
        return shapes

    def _check(self, good: object, refusal: str) -> None:
        """Raise what TensorRT said, all of it in one error.

        Raises:
            ConfigurationError: it refused.
            MemoryError: it had too little memory.
        """
        if good:
            return
        said = list(dict.fromkeys(self.said.errors))
        shown = "; ".join(said[-SHOWN_ERRORS:]) or "it does not say why"
        if _MEMORY.search(shown):
            raise MemoryError(shown)
        raise ConfigurationError(
            f"{self.order.flavour} {self.trt.__version__} {refusal}.",
            where=f"{self.order.sm}: {shown}",
            valid="a packed graph that this version of dear-batch wrote",
            next_step="try another version or --flavour of TensorRT; else run the bundle with "
            "--engine onnxruntime",
        )


def set_timings(config: Any, known: bytes) -> None:
    """Give a build what earlier ones found out, nothing where it is of another kind."""
    for timings in (known, b""):
        cache = config.create_timing_cache(timings)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return


def timings_of(config: Any) -> bytes:
    """What a build has found out; empty where it keeps no timings."""
    cache = config.get_timing_cache()
    timings = None if cache is None else cache.serialize()
    return b"" if timings is None else bytes(timings)


def _logger(trt: Any, said: _Said) -> Any:
    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind11 wants it called by its name

        def log(self, severity: Any, msg: str) -> None:
            said.hear(msg, error=severity <= trt.ILogger.ERROR)

    return Logger()


def _writer(trt: Any, file: Any) -> Any:
    class Writer(trt.IStreamWriter):
        fault: OSError | None = None

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: Any) -> int:
            try:
                return int(file.write(data))
            except OSError as error:  # the native caller only knows that too little was written
                self.fault = error
                return 0

    return Writer()


def _monitor(trt: Any, advance: Advance) -> Any:
    """Turns TensorRT's nested phases into one share of the whole, which only grows."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases = dict[str, tuple[str | None, int]]()  # its parent, and its steps
            self.done = dict[str, int]()
            self.most = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases[phase_name] = (parent_phase, max(1, num_steps))
            self.done[phase_name] = 0

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.done[phase_name] = step + 1
            name, share = phase_name, 0.0
            while name in self.phases:
                parent, steps = self.phases[name]
                share = min(1.0, (self.done[name] + share) / steps)
                name = parent or ""
            if share > self.most:
                self.most = share
                advance(share)
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.phases.pop(phase_name, None)

    return Monitor()
