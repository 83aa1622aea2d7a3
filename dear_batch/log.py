"""Lines for those who run a job: JSON without a terminal, short text on one; no secrets in either.

Knows nothing of jobs. Lines go through `sys.stderr` as it is at that moment, which a running
progress bar replaces: so they appear above the bar. Nobody reading any more (a closed pipe or
terminal) is no reason to fail.
"""

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

from dear_batch.errors import DearBatchError

MARK = "[redacted]"
SHORTEST_SECRET = 8  # characters of an environment variable's value; "true" is no secret
LONGEST_SHOWN = 300  # characters of a field on a terminal

_NAME = (
    r"signature|token|secret|password|passwd|credentials?|api[_-]?key|access[_-]?key"
    r"|secret[_-]?key|private[_-]?key"
)
_SECRET_KEY = re.compile(rf"(?i).*(?:{_NAME}|authorization)", re.DOTALL)
_SECRETS = (
    (re.compile(r"(://)[^\s/:@\"']*:[^\s/\"']*@"), rf"\1{MARK}@"),
    (re.compile(r"()(?<![A-Za-z0-9])hf_[A-Za-z0-9]{16,}"), rf"\1{MARK}"),
    (re.compile(r"()(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z0-9]{12,}"), rf"\1{MARK}"),
    (re.compile(r"(?i)(\bauthorization\\*[\"']?\s*[:=]\s*\\*[\"']?)[^\r\n\"'\\]+"), rf"\1{MARK}"),
    (re.compile(r"(?i)(\bbearer\s+)[\w.~+/=-]{6,}"), rf"\1{MARK}"),
    (  # a parameter: name=value
        re.compile(
            rf"(?i)((?:{_NAME}|(?<![a-z])sig)\s*=\s*)(?:\"[^\"]*\"|'[^']*'|[\"']?[^\s&\"']+)"
        ),
        rf"\1{MARK}",
    ),
    (  # a JSON object or a dict within a text: "name": "value"
        re.compile(rf"(?i)((?:{_NAME})\\*[\"']\s*:\s*\\*[\"'])[^\"'\\]+"),
        rf"\1{MARK}",
    ),
)
_SECRET_VARIABLE = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|_KEY$")
_UNPRINTABLE = re.compile(r"[^\x20-\x7e\xa0-\U0010ffff]")


def log(event: str, /, level: str = "info", **fields: object) -> None:
    """Write one line: JSON, or on a terminal what a person wants to know."""
    line: dict[str, Any] = {"time": _now(), "level": level, "event": event}
    line |= {name: value for name, value in fields.items() if name not in line}
    line = redact(line)
    _write(sys.stderr, _short(line) if is_terminal(sys.stderr) else json_line(line))


def log_error(error: DearBatchError) -> None:
    """Write the error with which a command ends, all its parts."""
    if is_terminal(sys.stderr):
        lines = f"error: {redact(str(error))}".splitlines()
        _write(sys.stderr, "\n".join(map(_printable, lines)))
    else:
        log("error", "error", exit_code=error.exit_code, **error_parts(error))


def error_parts(error: DearBatchError) -> dict[str, str]:
    """An error as fields of a log, a report or an outcome."""
    parts = ("what", error.what), ("where", error.where), ("valid", error.valid)
    return {name: redact(text) for name, text in (*parts, ("next", error.next_step))}


def outcome(fields: Mapping[str, Any]) -> None:
    """Write the one line of JSON with which a command ends to stdout."""
    _write(sys.stdout, json_line(redact(fields)))


def json_line(value: Any) -> str:
    """Strict JSON without a line break: NaN as text, what JSON does not know by its `str`."""
    try:
        return json.dumps(value, default=str, allow_nan=False)
    except ValueError:
        return json.dumps(json.loads(json.dumps(value, default=str), parse_constant=str))


def redact(value: Any) -> Any:
    """The same JSON-able value with every secret in it replaced, those in keys as well."""
    return _redacted(value, tuple(_secret_values()))


def silence(stream: TextIO) -> None:
    """Point a stream that nobody reads any more at nothing.

    What it still holds would otherwise fail once more when Python ends, as exit code 120.
    """
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def _redacted(value: Any, secrets: tuple[str, ...]) -> Any:
    if isinstance(value, str):
        return _redacted_text(value, secrets)
    if isinstance(value, Mapping):
        return {
            _redacted(key, secrets): MARK
            if isinstance(item, str) and _SECRET_KEY.fullmatch(str(key))
            else _redacted(item, secrets)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_redacted(item, secrets) for item in value]
    return value


def _redacted_text(text: str, secrets: tuple[str, ...]) -> str:
    for secret in secrets:
        text = text.replace(secret, MARK)
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def _secret_values() -> list[str]:
    """What the environment holds in secret, longest first: one may be part of another."""
    values = (v for name, v in os.environ.items() if _SECRET_VARIABLE.search(name.upper()))
    lines = {line for value in values for line in _lines(value)}
    return sorted(lines, key=len, reverse=True)


def _lines(value: str) -> Iterator[str]:
    """The lines of a value: a private key reaches a log line by line."""
    return (line for line in value.splitlines() if len(line) >= SHORTEST_SECRET)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person reads a stream."""
    return stream is not None and not stream.closed and stream.isatty()


def _short(line: Mapping[str, Any]) -> str:
    """A line for people: no dates, and nothing that takes more than a line."""
    if line["event"] == "stderr":
        return _printable(str(line["line"]))
    facts = {k: v for k, v in line.items() if k not in {"time", "level", "event"}}
    shown = [f"{name}={value}" for name, value in facts.items() if _is_short(value)]
    level = "" if line["level"] == "info" else f"{line['level']}: "
    return _printable(" ".join([level + line["event"], *shown]))


def _is_short(value: Any) -> bool:
    text = str(value)
    return not isinstance(value, list) and "\n" not in text and len(text) <= LONGEST_SHOWN


def _printable(text: str) -> str:
    """Without what could steer a terminal."""
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def _write(stream: TextIO | None, text: str) -> None:
    if stream is None or stream.closed:  # started with the descriptor closed
        return
    try:
        stream.write(text + "\n")
        stream.flush()
    except OSError:
        silence(stream)
