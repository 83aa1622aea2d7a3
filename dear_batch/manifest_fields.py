"""What the fields of a `bundle.json` must be, before anything is made of them.

A manifest comes with its bundle, from whoever made it: a value of a wrong type must end in a
refusal, wherever it would have been used.
"""

import json
import re
from collections.abc import Callable
from typing import Any, get_args

from dear_batch.pointwise.own_pairs import N_OWN_PAIRS
from dear_batch.pointwise.profiles import Profile, layout
from dear_batch.pointwise.recipe import Pooling, RecipeName
from dear_batch.trust import why_no_name

REVISION = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
SM = re.compile(r"sm_\d{2,3}")
# Both are part of commands that people are told to run.
VERSION = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9}){0,5}(\.?(a|b|rc|post|dev)[0-9]{1,9}){0,2}")
PLATFORM = re.compile(r"[a-z0-9]{1,20}-[A-Za-z0-9_]{1,20}")
PLAN = re.compile(r"engines/[a-z0-9_-]+/[0-9a-f]{64}\.plan")
MAX_ID = 2**31 - 1  # token ids are int32
MAX_SCORE = 3e38  # of fp32; NaN is less than nothing
SHOWN = 60  # characters of a wrong value

Check = Callable[[Any], str | None]  # what is wrong, after the path to it; None where nothing is


def misfit(fields: Any) -> str | None:
    """The first field that is not what it must be, and why; None for good ones."""
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return " holds half a surrogate pair, which is no text"
    return (
        _MANIFEST(fields)
        or _names(fields["files"])
        or _lengths(fields["recipe"])
        or _own_scores(fields)
        or _limits(fields["engines"])
    )


def _names(files: dict[str, Any]) -> str | None:
    found = ((name, why_no_name(name)) for name in files)
    return next((f".files: {name!r} {why}" for name, why in found if why), None)


def _lengths(recipe: dict[str, Any] | None) -> str | None:
    if recipe is None:
        return None
    specials = sum(len(recipe[key]) for key in ("head_ids", "middle_ids", "tail_ids"))
    if specials < recipe["max_length"]:
        return None
    return ".recipe.max_length leaves no room beside the fixed ids"


def _own_scores(fields: dict[str, Any]) -> str | None:
    """A pointwise bundle has those of all pairs, or its engines would be compared with nothing."""
    found = len(fields["own_scores"] or ())
    if fields["task"] != "pointwise" or found == N_OWN_PAIRS:
        return None
    return f".own_scores holds {found} scores, not {N_OWN_PAIRS}"


def _limits(engines: list[dict[str, Any]]) -> str | None:
    """Whether an engine takes every batch that is planned within what it says that it takes."""
    for number, engine in enumerate(engines):
        if not engine["profiles"]:
            return f".engines[{number}].profiles is empty"
        found = layout([Profile.from_json(profile) for profile in engine["profiles"]])
        for name in ("row_tokens", "batch_tokens"):
            if engine[name] != getattr(found, name):
                return (
                    f".engines[{number}].{name} is {engine[name]}, and its profiles take "
                    f"{getattr(found, name)}"
                )
    return None


def _span(value: Any) -> str | None:
    why = _SPAN(value)
    if why or value["least"] <= value["best"] <= value["most"]:
        return why
    return f" is not from least to most: {_short(value)}"


def _kind(what: str, good: Callable[[Any], bool]) -> Check:
    return lambda value: None if good(value) else f" is no {what}: {_short(value)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _whole(least: int, most: int) -> Check:
    good = range(least, most + 1)
    return _kind(
        f"whole number of {least} to {most}", lambda value: type(value) is int and value in good
    )


def _optional(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


def _one_of(*values: str) -> Check:
    return _kind(" or ".join(map(repr, values)), lambda value: value in values)


def _list_of(check: Check) -> Check:
    def found(value: Any) -> str | None:
        if not isinstance(value, list):
            return f" is no list: {_short(value)}"
        return next((f"[{i}]{why}" for i, v in enumerate(value) if (why := check(v))), None)

    return found


def _map_of(check: Check) -> Check:
    def found(value: Any) -> str | None:
        if not isinstance(value, dict):
            return f" is no object: {_short(value)}"
        return next((f".{_short(k)}{why}" for k, v in value.items() if (why := check(v))), None)

    return found


def _record(**checks: Check) -> Check:
    def found(value: Any) -> str | None:
        if not isinstance(value, dict):
            return f" is no object: {_short(value)}"
        unknown = sorted(value.keys() - checks.keys())
        if unknown:
            return f" has an unknown field {_short(unknown[0])}"
        missing = sorted(checks.keys() - value.keys())
        if missing:
            return f" has no {missing[0]}"
        wrong = ((key, check(value[key])) for key, check in checks.items())
        return next((f".{key}{why}" for key, why in wrong if why), None)

    return found


_text = _kind("text", lambda value: isinstance(value, str))
_number = _kind("number", lambda value: type(value) in (int, float))
_score = _kind("number", lambda value: type(value) in (int, float) and abs(value) < MAX_SCORE)
_object = _kind("object", lambda value: isinstance(value, dict))
_ids = _list_of(_whole(0, MAX_ID))
_revision = _kind(
    "commit of 40 hex digits", lambda v: isinstance(v, str) and bool(REVISION.fullmatch(v))
)
_SOURCE = _record(
    model=_text,
    revision=_optional(_revision),
    adapter=_optional(_text),
    adapter_revision=_optional(_revision),
    base_checked_by=_optional(_one_of("name", "shapes")),
)
_RECIPE = _record(
    name=_one_of(*get_args(RecipeName)),
    pooling=_one_of(*get_args(Pooling)),
    head_ids=_ids,
    middle_ids=_ids,
    tail_ids=_ids,
    pad_id=_whole(0, MAX_ID),
    max_length=_whole(1, MAX_ID),
    query_tokens=_optional(_whole(0, MAX_ID)),
    document_tokens=_optional(_whole(0, MAX_ID)),
)
_PARITY = _record(
    gate=_map_of(_optional(_number)),
    data=_optional(_text),
    graphs=_map_of(
        _record(
            pairs=_number,
            max_abs_difference=_number,
            relative_difference=_number,
            kendall_tau=_number,
            top10_overlap=_number,
            ties=_number,
            reference_ties=_number,
        )
    ),
)
_sha256 = _kind("sha256", lambda v: isinstance(v, str) and bool(SHA256.fullmatch(v)))
_bytes = _whole(0, 2**63 - 1)
_positive = _whole(1, MAX_ID)
_FILE = _record(bytes=_bytes, sha256=_sha256)
_SPAN = _record(least=_positive, best=_positive, most=_positive)
_ENGINE = _record(
    path=_kind("path", lambda v: isinstance(v, str) and PLAN.fullmatch(v) is not None),
    bytes=_bytes,
    sha256=_sha256,
    flavour=_one_of("tensorrt", "tensorrt_rtx"),
    version=_kind("version", lambda v: isinstance(v, str) and bool(VERSION.fullmatch(v))),
    sm=_kind("SM", lambda v: isinstance(v, str) and bool(SM.fullmatch(v))),
    platform=_kind("platform", lambda v: isinstance(v, str) and bool(PLATFORM.fullmatch(v))),
    precision=_one_of("fp32", "fp16", "bf16"),
    row_tokens=_positive,
    batch_tokens=_positive,
    profiles=_list_of(_record(rows=_span, tokens=_span, documents=_span)),
    build_seconds=_number,
)
_MANIFEST = _record(
    schema_version=_number,
    task=_one_of("pointwise", "listwise"),
    source=_SOURCE,
    precision=_one_of("fp32", "fp16", "bf16"),
    recipe=_optional(_RECIPE),
    architecture=_map_of(_kind("text or number", lambda v: type(v) in (str, int))),
    graphs=_object,
    parity=_optional(_PARITY),
    versions=_map_of(_text),
    created=_text,
    own_scores=_optional(_list_of(_score)),
    peaks=_optional(_list_of(_number)),
    engines=_list_of(_ENGINE),
    files=_map_of(_FILE),
)
