"""What a person writes in `export/*.toml` and `jobs/*.toml`, as checked dataclasses.

Reads TOML into frozen dataclasses and refuses what it does not know. It knows nothing of
models or data: that a file exists or a bundle opens is found out by the step that opens it.

A spec is described by its dataclass alone: the fields are the keys, the type hints are the
types, a field without a default is required, and `__post_init__` holds the ranges. Paths in
a spec are relative to the working directory, not to the spec's own folder.
"""

import dataclasses
import difflib
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from dear_batch.errors import UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SpecT = TypeVar("SpecT", bound="DataclassInstance")

_TOML_NAMES: Mapping[type, str] = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a table",
}
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


@dataclass(frozen=True, slots=True)
class ExportSpec:
    """One checkpoint and how it becomes a bundle: a file of `export/`.

    `model` is a local folder or a hub id; with an adapter it may be left out, the adapter's
    own config names its base. A `revision` that is a branch or tag is resolved at export to
    its 40-hex commit. `output` is the bundle's folder. `parity_data` replaces the built-in
    pairs of the parity gate; only figures of it are stored.

    Raises:
        UsageError: neither `model` nor `adapter` is given.
    """

    output: str
    model: str | None = None
    revision: str = "main"
    adapter: str | None = None
    adapter_revision: str = "main"
    task: Literal["auto", "pointwise", "listwise"] = "auto"
    recipe: Literal["readme", "paper-script"] = "readme"
    pooling: Literal["last-token", "final-position"] = "last-token"
    precision: Literal["fp32"] = "fp32"
    parity_data: str | None = None

    def __post_init__(self) -> None:
        """Check that there is something to export."""
        if self.model is None and self.adapter is None:
            raise UsageError(
                "There is nothing to export: neither 'model' nor 'adapter' is given.",
                where="model",
                valid="a local folder or a hub id for 'model', for 'adapter', or for both",
            )


@dataclass(frozen=True, slots=True)
class InputSpec:
    """The candidate lists: Parquet files or globs, in the order in which they are run.

    Raises:
        UsageError: there is no path.
    """

    paths: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check that there is at least one path."""
        if not self.paths:
            _refuse("paths", self.paths, "at least one file or glob")


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
    model; None leaves them to the runner.

    Raises:
        UsageError: a value is out of range, or a batch is smaller than a row.
    """

    device: str = "auto"
    engine: Literal["auto", "onnxruntime", "torch"] = "auto"
    row_tokens: int | None = None
    batch_tokens: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
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


def load_spec(
    path: Path | None, kind: type[SpecT], options: Mapping[str, object] | None = None
) -> SpecT:
    """Read one spec file; command line options override its keys.

    Args:
        path: the file, or None where the options say everything.
        kind: the dataclass to build.
        options: `key` or `table.key` → value; None and empty values leave the file's.

    Raises:
        UsageError: the file cannot be read, is not TOML, or the whole is no valid `kind`.
    """
    values = _read_toml(path) if path else {}
    for key, value in (options or {}).items():
        if value not in {None, ()}:
            table, _, name = key.rpartition(".")
            place = values.setdefault(table, {}) if table else values
            if isinstance(place, dict):  # else the loader says what should stand there
                place[name] = list(value) if isinstance(value, tuple) else value
    return spec_from_dict(values, kind, where=str(path or "command line"))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"The spec cannot be read: {error.strerror}.", where=str(path), valid="a TOML file"
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(
            "The spec is not UTF-8 text.",
            where=str(path),
            valid="a TOML file",
            next_step="candidates go to --input",
        ) from error
    except tomllib.TOMLDecodeError as error:  # its text ends with the line and column
        raise UsageError(f"The spec is not valid TOML: {error}.", where=str(path)) from error


def spec_from_dict(
    values: Mapping[str, object], kind: type[SpecT], *, where: str = "spec", prefix: str = ""
) -> SpecT:
    """Build a spec from parsed TOML.

    Args:
        values: keys and values of one table.
        kind: the dataclass to build.
        where: the file, for error messages.
        prefix: the table's own path with a final dot, "" at the top.

    Raises:
        UsageError: a key is unknown or missing, or a value has the wrong type or range.
    """
    hints = typing.get_type_hints(kind)
    _refuse_unknown_keys(values, tuple(hints), where=where, prefix=prefix)
    _refuse_missing_keys(values, kind, where=where, prefix=prefix)
    fields = {
        key: _convert(value, hints[key], where=where, key=prefix + key)
        for key, value in values.items()
    }
    try:
        return kind(**fields)
    except UsageError as error:  # from `__post_init__`, which knows the field but not the file
        place = f"{where}: {prefix}{error.where}"
        raise UsageError(error.what, where=place, valid=error.valid) from None


def _refuse_unknown_keys(
    values: Mapping[str, object], names: tuple[str, ...], *, where: str, prefix: str
) -> None:
    for key in values:
        if key not in names:
            nearest = difflib.get_close_matches(key, names, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise UsageError(
                f"Unknown key {key!r}.{hint}",
                where=f"{where}: {prefix}{key}",
                valid=", ".join(names),
            )


def _refuse_missing_keys(
    values: Mapping[str, object], kind: type["DataclassInstance"], *, where: str, prefix: str
) -> None:
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        required = item.default is item.default_factory is dataclasses.MISSING
        if required and item.name not in values:
            raise UsageError(
                f"The key {item.name!r} is missing.",
                where=f"{where}: {prefix}{item.name}",
                valid=_expected(hints[item.name]),
            )


def _convert(value: object, hint: Any, *, where: str, key: str) -> Any:
    """The value as the type hint wants it."""
    hint = _without_none(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return spec_from_dict(value, hint, where=where, prefix=f"{key}.")
    if _matches(value, hint):
        if hint is float:
            return float(typing.cast("float", value))
        return tuple(value) if isinstance(value, list) else value
    raise UsageError(
        f"The value of {key!r} is not accepted: found {_found(value)}.",
        where=f"{where}: {key}",
        valid=_expected(hint),
    )


def _matches(value: object, hint: Any) -> bool:
    """Whether a TOML value fits a hint; true and false are no numbers, "" is no name."""
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return isinstance(value, list) and all(_matches(item, str) for item in value)
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint and value != ""


def _without_none(hint: Any) -> Any:
    """`X` of `X | None`: TOML has no null, leaving a key out is the None."""
    if isinstance(hint, types.UnionType):
        return next(option for option in typing.get_args(hint) if option is not types.NoneType)
    return hint


def _expected(hint: Any) -> str:
    hint = _without_none(hint)
    if dataclasses.is_dataclass(hint):
        return "a table with " + ", ".join(item.name for item in dataclasses.fields(hint))
    if typing.get_origin(hint) is Literal:
        return ", ".join(typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return 'a list of strings that are not empty: ["one", "two"]'
    return "a string that is not empty" if hint is str else _TOML_NAMES[hint]


def _found(value: object) -> str:
    return f"{_TOML_NAMES.get(type(value), 'a date or time')}, {value!r}"


def _at_least_one(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        _refuse(name, value, "a whole number from 1")


def _refuse(name: str, value: object, valid: str) -> typing.NoReturn:
    """Refuse a value in `__post_init__`; `spec_from_dict` adds the file and the table."""
    raise UsageError(
        f"The value of {name!r} is out of range: found {value!r}.", where=name, valid=valid
    )
