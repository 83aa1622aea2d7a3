"""Random TOML as a spec: it is one, or a UsageError says why not."""

import datetime as dt
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from dear_batch.errors import UsageError
from dear_batch.run.worker import spec_from_json, spec_to_json
from dear_batch.spec_files import load_spec
from dear_batch.specs import ExportSpec, JobSpec
from tests.fuzz.effort import Effort
from tests.fuzz.strategies import MEGABYTE, Damage, damages, texts

KEYS: dict[str, dict[str, Any]] = {
    "input": {"paths": ["a.parquet"], "max_bad": "1%"},
    "pointwise": {"bundle": "b", "depth": 10, "interpolate": 0.5},
    "output": {"folder": "out", "tag": "t", "run_per_input": True},
    "execution": {
        "device": "cpu",
        "engine": "torch",
        "row_tokens": 512,
        "batch_tokens": 2048,
        "stall_timeout_s": 60,
        "paranoid": True,
    },
    "listwise": {
        "bundle": "g",
        "prompt": "readme",
        "depth": 30,
        "window": 20,
        "step": 10,
        "reasoning_tokens": 0,
        "precision": "bf16",
        "batch_tokens": 4096,
        "max_failed_windows": 3,
    },
}
EXPORT_KEYS: dict[str, Any] = {
    "output": "b",
    "model": "m/m",
    "revision": "main",
    "adapter": "a/a",
    "adapter_revision": "main",
    "task": "pointwise",
    "recipe": "readme",
    "pooling": "last-token",
    "precision": "fp32",
    "parity_data": "p.jsonl",
}
WORDS = sorted({*KEYS, *EXPORT_KEYS, *(key for table in KEYS.values() for key in table)})
NEAR = ["Input", "paths ", "bundles", "depht", "windows", "", " ", "\u00e9", "a.b", "__init__"]


def toml(value: Any) -> str:
    """A value as TOML, in one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, dt.date | dt.time):
        return value.isoformat()
    return str(value).lower() if not isinstance(value, str) else json.dumps(value)


def values() -> SearchStrategy[Any]:
    """Whatever TOML knows, and numbers beyond what anything holds."""
    numbers = [0, 1, -1, 2**31, 2**63, 10**30, 10**5000, 1e308, float("inf"), float("nan"), 0.5]
    words = [
        "1%",
        "100%",
        "101%",
        "5.5%",
        "-1",
        "9" * 400 + "%",
        "\u0661%",
        "cuda:99",
        "cpu",
        "auto",
    ]
    # Python refuses to write integers of more than 4,300 digits, and to read them.
    leaves = st.one_of(
        st.sampled_from([number for number in numbers if number != 10**5000]),
        st.sampled_from([Digits("1" + "0" * 5000), Digits("0x" + "f" * 9000)]),
        st.booleans(),
        st.sampled_from(words) | texts().filter(lambda text: "\x7f" not in text),
        st.sampled_from([dt.date(2026, 11, 23), dt.time(7, 8), dt.datetime(2026, 1, 2, 3, 4)]),  # noqa: DTZ001
    )
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=3)
        ),
        max_leaves=5,
    )


class Digits:
    """A number that is written as it is."""

    def __init__(self, digits: str) -> None:
        self._digits = digits

    def __str__(self) -> str:
        return self._digits

    def __repr__(self) -> str:
        return f"Digits({self._digits[:3]!r}...)"


@dataclass(frozen=True)
class Content:
    """A file, and how long a comment is at its end."""

    toml: bytes
    comment: int = 0

    def write(self, path: Path) -> None:
        path.write_bytes(self.toml + b"\n# " + b"x" * self.comment)


@st.composite
def tables(draw: st.DrawFn, good: dict[str, Any]) -> dict[str, Any]:
    """Some of the real keys, a few of them with other values, and now and then another key."""
    table = {
        key: good[key] for key in good if draw(st.integers(0, 4)) or key in {"paths", "folder"}
    }
    for key in draw(st.lists(st.sampled_from(sorted(good)), max_size=2)):
        table[key] = draw(values())
    if not draw(st.integers(0, 5)):
        table[draw(st.sampled_from([*WORDS, *NEAR]))] = draw(values())
    return table


@st.composite
def job_files(draw: st.DrawFn) -> Content:
    lines = []
    for name in KEYS:
        if not draw(st.integers(0, 8)):
            lines.insert(0, f"{name} = {toml(draw(values()))}")
        elif draw(st.integers(0, 6)):
            lines.append(f"[{name}]" if draw(st.integers(0, 9)) else f"[[{name}]]")
            lines += [f"{json.dumps(k)} = {toml(v)}" for k, v in draw(tables(KEYS[name])).items()]
    return _damaged(draw, "\n".join(lines))


@st.composite
def export_files(draw: st.DrawFn) -> Content:
    table = draw(tables(EXPORT_KEYS))
    return _damaged(draw, "\n".join(f"{json.dumps(k)} = {toml(v)}" for k, v in table.items()))


def _damaged(draw: st.DrawFn, text: str) -> Content:
    content = text.encode("utf-8", "surrogatepass")
    kind = draw(st.integers(0, 60))
    if kind in {1, 2, 3, 4, 5}:
        damage: Damage = draw(damages("flip", "cut", "insert", "empty", "nested"))
        content = damage(content)
    return Content(content, MEGABYTE if kind == 0 else 0)


JOB = b'[input]\npaths=["a"]\n[pointwise]\nbundle="b"\n[output]\nfolder="o"\n'
KNOWN_JOBS = (
    Content(b"\xef\xbb\xbf" + JOB),
    Content(JOB.replace(b"\n", b"\r\n")),
    Content(JOB + b"[execution]\nrow_tokens = 1" + b"0" * 5000),
    Content(JOB + b"[execution]\nrow_tokens = 0x1" + b"0" * 5000),
    Content(JOB + b"[execution]\ndevice = 'cuda:" + b"9" * 5000 + b"'"),
    Content(JOB.replace(b"[pointwise]", b"max_bad = '" + b"9" * 5000 + b"'\n[pointwise]")),
    Content(JOB.replace(b"[pointwise]", b"max_bad = " + b"[" * 5000 + b"\n[pointwise]")),
    Content(JOB.replace(b'"a"', b'"a\\u0000b"')),
)
KNOWN_EXPORTS = (Content(b""),)
OPTIONS: tuple[dict[str, object], ...] = (
    {},
    {"pointwise.depth": 3, "listwise.bundle": "g"},
    {"input.paths": ("x", "y"), "listwise.window": 5},
)


def test_a_job_file_is_a_spec_or_refused(effort: Effort, tmp_path: Path) -> None:
    path = tmp_path / "job.toml"

    def check(content: Content) -> None:
        content.write(path)
        for options in OPTIONS:
            try:
                spec = load_spec(path, JobSpec, options)
            except UsageError as error:
                assert str(path) in error.where  # noqa: PT017 - or it is a spec
            else:
                assert spec.input.bad_allowed(100) >= 0
                assert spec_from_json(json.loads(json.dumps(spec_to_json(spec)))) == spec

    effort.run(check, job_files(), known=KNOWN_JOBS, few=60, share=0.06)


def test_an_export_file_is_a_spec_or_refused(effort: Effort, tmp_path: Path) -> None:
    path = tmp_path / "export.toml"

    def check(content: Content) -> None:
        content.write(path)
        try:
            spec = load_spec(path, ExportSpec, {"precision": "fp32"})
        except UsageError as error:
            assert str(path) in error.where  # noqa: PT017 - or it is a spec
        else:
            assert spec.model or spec.adapter

    effort.run(check, export_files(), known=KNOWN_EXPORTS, few=60, share=0.03)


def test_the_plain_keys_are_a_job(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    tables = (
        f"[{name}]\n" + "".join(f"{key} = {toml(value)}\n" for key, value in table.items())
        for name, table in KEYS.items()
    )
    path.write_text("\n".join(tables))
    assert load_spec(path, JobSpec).listwise is not None
    path.write_text("\n".join(f"{key} = {toml(value)}" for key, value in EXPORT_KEYS.items()))
    assert load_spec(path, ExportSpec).task == "pointwise"
    with pytest.raises(UsageError):
        load_spec(path, JobSpec)
