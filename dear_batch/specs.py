"""What a person may write in `export/*.toml` and `jobs/*.toml`: checked dataclasses.

A spec is described by its dataclass alone: the fields are the keys, the type hints are the
types, a field without a default is required, and `__post_init__` holds the ranges. Paths in
a spec are relative to the working directory, not to the spec's own folder. `spec_files`
reads them; that a file exists or a bundle opens is found out by the step that opens it.
"""

import math
import re
from dataclasses import dataclass, field, fields, replace
from typing import Literal, NoReturn

from dear_batch.errors import UsageError

_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,4})?")
_SM = re.compile(r"sm_\d{2,3}")
_LIMIT = re.compile(r"(?P<count>\d{1,18})|(?P<percent>\d{1,3}(\.\d{1,9})?)%")
ALL = 100  # percent


@dataclass(frozen=True, slots=True)
class ExportSpec:
    """One checkpoint and how it becomes a bundle: a file of `export/`.

    `model` is a local folder or a hub id; with an adapter it may be left out, the adapter's
    own config names its base. A `revision` that is a branch or tag is resolved at export to
    its 40-hex commit. `output` is the bundle's folder. `parity_data` replaces the built-in
    pairs of the parity gate; only figures of it are stored. `precision` auto is fp32 for the
    graphs, fp16 for engines; those that `engine = "tensorrt"` adds, and the keys from
    `targets` on, are described at `EngineSpec`.

    Raises:
        UsageError: neither `model` nor `adapter` is given, or a value is out of range.
    """

    output: str
    model: str | None = None
    revision: str = "main"
    adapter: str | None = None
    adapter_revision: str = "main"
    task: Literal["auto", "pointwise", "listwise"] = "auto"
    recipe: Literal["readme", "paper-script"] = "readme"
    pooling: Literal["last-token", "final-position"] = "last-token"
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    parity_data: str | None = None
    engine: Literal["onnxruntime", "tensorrt"] = "onnxruntime"
    targets: tuple[str, ...] = ()
    flavour: Literal["auto", "tensorrt", "tensorrt_rtx"] = "auto"
    calibrate: str | None = None
    row_tokens: int | None = None
    batch_tokens: int | None = None
    level: int | None = None

    def __post_init__(self) -> None:
        """Check that there is something to export."""
        wanted = self.engines()
        if self.engine != "tensorrt" and replace(wanted, precision="auto") != EngineSpec():
            raise UsageError(
                "Keys of engines are given, but no engine is asked for.",
                where="engine",
                valid='"tensorrt" beside ' + ", ".join(f.name for f in fields(EngineSpec)),
            )
        if self.model is None and self.adapter is None:
            raise UsageError(
                "There is nothing to export: neither 'model' nor 'adapter' is given.",
                where="model",
                valid="a local folder or a hub id for 'model', for 'adapter', or for both",
            )

    @property
    def graph_precision(self) -> Literal["fp32", "fp16", "bf16"]:
        """What the bundle's own graphs compute in."""
        return "fp32" if self.precision == "auto" else self.precision

    def engines(self) -> "EngineSpec":
        """The engines to build once the bundle is there."""
        names = (item.name for item in fields(EngineSpec))
        return EngineSpec(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """TensorRT engines for a bundle.

    `targets` are kinds of GPU such as "sm_89", by default the one that is there. `flavour` is
    the product to build with; auto takes TensorRT for the GPU that is there, and TensorRT for
    RTX to build ahead of time. `calibrate` is a Parquet file of candidates from which the length
    of rows is chosen; `row_tokens` and `batch_tokens` are the most that the engines will take.
    `level` is TensorRT's optimization level.

    Raises:
        UsageError: a value is out of range.
    """

    targets: tuple[str, ...] = ()
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    flavour: Literal["auto", "tensorrt", "tensorrt_rtx"] = "auto"
    calibrate: str | None = None
    row_tokens: int | None = None
    batch_tokens: int | None = None
    level: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in self.targets:
            if not _SM.fullmatch(name):
                _refuse("targets", name, 'a kind of GPU such as "sm_89" (compute capability 8.9)')
        _at_least_one("row_tokens", self.row_tokens)
        _at_least_one("batch_tokens", self.batch_tokens)
        if self.level is not None and self.level not in range(6):
            _refuse("level", self.level, "a whole number from 0 to 5")

    def precision_for(
        self, graphs: Literal["fp32", "fp16", "bf16"]
    ) -> Literal["fp32", "fp16", "bf16"]:
        """What the engines of a bundle compute in: auto is 16 bits, its own where it has any."""
        if self.precision != "auto":
            return self.precision
        return "fp16" if graphs == "fp32" else graphs


@dataclass(frozen=True, slots=True)
class InputSpec:
    """The candidate lists: Parquet files or globs, in the order in which they are run.

    `max_bad` is how many candidates may be quarantined before the job, done and published,
    ends with exit code 3: a count, such as 5, or a share of those read, such as "1%".

    Raises:
        UsageError: there is no path, or a value is out of range.
    """

    paths: tuple[str, ...]
    max_bad: int | str = 0

    def __post_init__(self) -> None:
        """Check that there is at least one path."""
        if not self.paths:
            _refuse("paths", self.paths, "at least one file or glob")
        self.bad_allowed(0)

    def bad_allowed(self, candidates: int) -> float:
        """How many of so many candidates may be quarantined."""
        return _allowed("max_bad", self.max_bad, candidates)


@dataclass(frozen=True, slots=True)
class PointwiseSpec:
    """The pointwise stage: every candidate gets a score, the list is ordered by it.

    `depth` candidates from the top are scored (all when None), the rest keeps its order below
    them. `interpolate` is the weight of the logits against the first-stage scores, both
    z-scored; at 1 the logits decide alone.

    Raises:
        UsageError: a value is out of range.
    """

    bundle: str
    depth: int | None = None
    interpolate: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        _at_least_one("depth", self.depth)
        if not 0 <= self.interpolate <= 1:
            _refuse("interpolate", self.interpolate, "a number from 0 to 1")


@dataclass(frozen=True, slots=True)
class ListwiseSpec:
    """The listwise stage: a generator re-orders the top of each list, window by window.

    The windows of `window` places move up by `step`, half a window if not said, from place
    `depth` to the top; the defaults are the published setting (arXiv 2508.16998). `prompt` is the
    name of one that is built in, or a TOML file. `reasoning_tokens` limits what the model may
    write before its answer; at 0 it answers at once. `precision` auto is bf16 on a GPU, else fp32.
    `max_failed_windows` is a count, such as 5, or a share of all windows, such as "1%".

    Raises:
        UsageError: a value is out of range.
    """

    bundle: str
    prompt: str = "readme"
    depth: int = 30
    window: int = 20
    step: int | None = None
    reasoning_tokens: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    batch_tokens: int | None = None
    max_failed_windows: int | str = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, least in (("depth", 2), ("window", 2), ("reasoning_tokens", 0)):
            if getattr(self, name) < least:
                _refuse(name, getattr(self, name), f"a whole number from {least}")
        if not 1 <= self.stride <= self.window:
            _refuse("step", self.step, f"a whole number from 1 to the window, {self.window}")
        _at_least_one("batch_tokens", self.batch_tokens)
        self.failures_allowed(0)

    @property
    def stride(self) -> int:
        """The places by which windows move up."""
        return self.window // 2 if self.step is None else self.step

    @property
    def passages(self) -> int:
        """The most passages that a prompt shows."""
        return min(self.window, self.depth)

    def failures_allowed(self, windows: int) -> float:
        """How many of so many windows may fail before the job ends with exit code 3."""
        return _allowed("max_failed_windows", self.max_failed_windows, windows)


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """The output folder and the last column of the run file.

    Raises:
        UsageError: the tag would break the format of the run file.
    """

    folder: str
    tag: str = "dear-batch"
    run_per_input: bool = False

    def __post_init__(self) -> None:
        """Check that the tag is one column; `isprintable` leaves the space as the only one."""
        if not self.tag or " " in self.tag or not self.tag.isprintable():
            _refuse("tag", self.tag, "text without white space or control characters")


@dataclass(frozen=True, slots=True)
class ExecutionSpec:
    """Where and in what portions the work is done; scores move by rounding at most.

    `row_tokens` is the length of a packed row, `batch_tokens` the tokens of one call of the
    model; None leaves them to the runner. A job in which nothing moves for `stall_timeout_s`
    seconds is ended. `paranoid` hashes every file of a bundle, however lately it was hashed.

    Raises:
        UsageError: a value is out of range, or a batch is smaller than a row.
    """

    device: str = "auto"
    engine: Literal["auto", "tensorrt", "onnxruntime", "torch"] = "auto"
    row_tokens: int | None = None
    batch_tokens: int | None = None
    stall_timeout_s: int = 900
    paranoid: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        _at_least_one("stall_timeout_s", self.stall_timeout_s)
        if not _DEVICE.fullmatch(self.device):
            _refuse("device", self.device, "auto, cpu, cuda, or cuda:N with the number of a GPU")
        _at_least_one("row_tokens", self.row_tokens)
        _at_least_one("batch_tokens", self.batch_tokens)
        if self.row_tokens and self.batch_tokens and self.batch_tokens < self.row_tokens:
            valid = f"at least row_tokens, which is {self.row_tokens}"
            _refuse("batch_tokens", self.batch_tokens, valid)


@dataclass(frozen=True, slots=True)
class JobSpec:
    """One reranking job: a file of `jobs/`, a TOML table for each field."""

    input: InputSpec
    pointwise: PointwiseSpec
    output: OutputSpec
    execution: ExecutionSpec = field(default_factory=ExecutionSpec)
    listwise: ListwiseSpec | None = None


def _allowed(name: str, limit: int | str, total: int) -> float:
    """A limit that is a count or a share of `total`, as a count."""
    found = _LIMIT.fullmatch(str(limit))
    percent = float(found["percent"] or 0) if found else math.inf
    if found is None or percent > ALL:
        _refuse(name, limit, 'a count such as 5, or a share from "0%" to "100%"')
    return int(found["count"]) if found["count"] else total * percent / ALL


def _at_least_one(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        _refuse(name, value, "a whole number from 1")


def _refuse(name: str, value: object, valid: str) -> NoReturn:
    """Refuse a value in `__post_init__`; `spec_from_dict` adds the file and the table."""
    raise UsageError(
        f"The value of {name!r} is out of range: found {value!r}.", where=name, valid=valid
    )
