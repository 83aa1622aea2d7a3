"""Reads `export/*.toml` and `jobs/*.toml` into the dataclasses of `specs`; options override keys.

Refuses what the dataclass does not know, with the nearest key that it does. Knows nothing of
what a spec means: fields, type hints and defaults say it all.
"""

import dataclasses
import difflib
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from dear_batch.errors import UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SpecT = TypeVar("SpecT", bound="DataclassInstance")

_NO_TEXT = re.compile(r"[\0\ud800-\udfff]")  # bytes that are not UTF-8 come as lone surrogates
_TOML_NAMES: Mapping[type, str] = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a table",
}


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
    given = {key: value for key, value in (options or {}).items() if value not in {None, ()}}
    _refuse_orphans(values, given, kind, where=str(path or "command line"))
    for key, value in given.items():
        table, _, name = key.rpartition(".")
        place = values.setdefault(table, {}) if table else values
        if isinstance(place, dict):  # else the loader says what should stand there
            place[name] = list(value) if isinstance(value, tuple) else value
    _refuse_unusable(values, where=str(path or "command line"))
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
    except (ValueError, RecursionError) as error:  # mostly its text ends with line and column
        raise UsageError(f"The spec is not valid TOML: {error}.", where=str(path)) from error


def _refuse_unusable(value: object, *, where: str) -> None:
    """Refuse what no path, file or counter can hold; other messages may then show any value."""
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise UsageError("A number is too large.", where=where, valid="whole numbers of 64 bits")
    if isinstance(value, str) and (
        "\0" in value or value.encode(errors="ignore").decode() != value
    ):
        raise UsageError(
            f"A value or key holds what is no text: {value!r}.",
            where=where,
            valid="text without NUL, and names of files in UTF-8",
        )
    if isinstance(value, dict | list):
        for item in (*value, *(value.values() if isinstance(value, dict) else ())):
            _refuse_unusable(item, where=where)


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


def _refuse_orphans(
    values: Mapping[str, object], options: Mapping[str, object], kind: type, *, where: str
) -> None:
    """Refuse options of a table that may be left out, was, and is not opened by them either."""
    hints = typing.get_type_hints(kind)
    for key in options:
        table, _, name = key.rpartition(".")
        inner = _without_none(hints.get(table))
        if table in values or inner is hints.get(table) or not dataclasses.is_dataclass(inner):
            continue
        needed = [f"{table}.{item.name}" for item in dataclasses.fields(inner) if _required(item)]
        if not options.keys() >= set(needed):
            raise UsageError(
                f"{name!r} is given, but the job has no {table} stage.",
                where=f"{where}: {key}",
                valid=f"--{table}, or a table [{table}] in the spec, beside it",
            )


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
        if _required(item) and item.name not in values:
            raise UsageError(
                f"The key {item.name!r} is missing.",
                where=f"{where}: {prefix}{item.name}",
                valid=_expected(hints[item.name]),
            )


def _required(item: "dataclasses.Field[Any]") -> bool:
    return item.default is item.default_factory is dataclasses.MISSING


def _convert(value: object, hint: Any, *, where: str, key: str) -> Any:
    """The value as the type hint wants it."""
    hint = _without_none(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return spec_from_dict(value, hint, where=where, prefix=f"{key}.")
    if _matches(value, hint):
        if hint is float:
            return float(typing.cast("float", value))
        _refuse_no_text(value, where=where, key=key)
        return tuple(value) if isinstance(value, list) else value
    raise UsageError(
        f"The value of {key!r} is not accepted: found {_found(value)}.",
        where=f"{where}: {key}",
        valid=_expected(hint),
    )


def _refuse_no_text(value: object, *, where: str, key: str) -> None:
    """Refuse names that JSON and Parquet, or the system, cannot hold; argv may bring any bytes."""
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and _NO_TEXT.search(text):
            raise UsageError(
                f"The value of {key!r} is not accepted: {text!a}.",
                where=f"{where}: {key}",
                valid="text in UTF-8 without NUL",
            )


def _matches(value: object, hint: Any) -> bool:
    """Whether a TOML value fits a hint; true and false are no numbers, "" is no name."""
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return isinstance(value, list) and all(_matches(item, str) for item in value)
    if isinstance(hint, types.UnionType):
        return any(_matches(value, option) for option in typing.get_args(hint))
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint and value != ""


def _without_none(hint: Any) -> Any:
    """`X` of `X | None`: TOML has no null, leaving a key out is the None."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if types.NoneType not in options:
        return hint
    return next(option for option in options if option is not types.NoneType)


def _expected(hint: Any) -> str:
    hint = _without_none(hint)
    if dataclasses.is_dataclass(hint):
        return "a table with " + ", ".join(item.name for item in dataclasses.fields(hint))
    if typing.get_origin(hint) is Literal:
        return ", ".join(typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return 'a list of strings that are not empty: ["one", "two"]'
    if isinstance(hint, types.UnionType):
        return " or ".join(map(_expected, typing.get_args(hint)))
    return "a string that is not empty" if hint is str else _TOML_NAMES[hint]


def _found(value: object) -> str:
    return f"{_TOML_NAMES.get(type(value), 'a date or time')}, {value!r}"
