import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dear_batch.errors import InputError
from dear_batch.log import MARK, json_line, log, log_error, outcome, redact

SECRETS = {
    "https://ann:s3cr3t-pass@hub.example/x": "s3cr3t-pass",
    "redis://:hunter2@cache:6379": "hunter2",
    "postgres://u:p@ss#word@db/x": "p@ss#word",
    "cloning with hf_abcdefghijklmnopQRSTUVWX now": "hf_abcdefghijklmnopQRSTUVWX",
    "my_hf_abcdefghijklmnopQRSTUVWX": "hf_abcdefghijklmnopQRSTUVWX",
    "key AKIAIOSFODNN7EXAMPLE used": "AKIAIOSFODNN7EXAMPLE",
    "ASIAIOSFODNN7EXAMPLE": "ASIAIOSFODNN7EXAMPLE",
    "Authorization: Basic YWxhZGRpbjpvcGVu": "YWxhZGRpbjpvcGVu",
    "{'Authorization': 'AWS4-HMAC-SHA256 Credential=x/2/s3, Signature=fe5f80'}": "fe5f80",
    "sent bearer eyJhbGciOi.J9-_x here": "eyJhbGciOi.J9-_x",
    "https://s3/x?X-Amz-Signature=abc123def&a=b": "abc123def",
    "https://s3/x?X-Amz-Credential=ME%2F20260101&a=b": "ME%2F20260101",
    "https://blob/x?sv=1&sig=aBc%3D&se=2": "aBc%3D",
    "X-Amz-Security-Token=FQoGZXIvYXdzE": "FQoGZXIvYXdzE",
    "password = 'two words'": "two words",
    "run --password=abc,def": "abc,def",
    'api_key="k-1 2"': "k-1 2",
    "API-KEY=k123": "k123",
    "client_secret=xyz": "xyz",
    '{"token": "t0k3n", "n": 1}': "t0k3n",
    "{'db_password': 't0k3n'}": "t0k3n",
    r"{\"token\": \"t0k3n\"}": "t0k3n",
}
HARMLESS = [
    "batch_tokens=4096 row_tokens: 512, 12 tokens",
    "unexpected token: '<|x|>' in tokenizer.json",
    "abfss://container@account.dfs.core.windows.net/a/b.parquet",
    "s3://bucket/a@b:c/d.parquet",
    "hf_hub_download failed",
    "the passwords of nobody",
]


@pytest.mark.parametrize(("text", "secret"), SECRETS.items())
def test_secrets_are_taken_out_of_texts(text: str, secret: str) -> None:
    found = redact(text)
    assert secret not in found
    assert MARK in found
    assert redact(found) == found


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


def test_what_surrounds_a_secret_stays() -> None:
    assert redact("GET https://a:b@host/x?token=1&page=2 failed") == (
        f"GET https://{MARK}@host/x?token={MARK}&page=2 failed"
    )


def test_values_of_the_environment_are_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {
        "MY_TOKEN": "plain words",
        "db_password": "plain words and more",
        "STORE_CREDENTIALS": "line one is long\nline two as well\nshort",
        "SIGNING_KEY": "0123456789",
        "TOKENIZERS_PARALLELISM": "false",  # too short to be one
        "MONKEYS": "chimpanzee",
        "KEY_NAME": "harmless name",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    text = "plain words and more|plain words|line two as well|short|0123456789|false|chimpanzee"
    assert redact(text) == f"{MARK}|{MARK}|{MARK}|short|{MARK}|false|chimpanzee"
    assert redact("harmless name") == "harmless name"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(JSON, JSON, st.text(max_size=5), st.sampled_from(sorted(SECRETS)))
def test_nested_values_and_keys_are_redacted(
    before: Any, after: Any, padding: str, text: str
) -> None:
    value = {"a": [before, {"b": (padding + " " + text, after)}, {text: before}]}
    found = redact(value)
    assert SECRETS[text] not in json.dumps(found, ensure_ascii=False)
    assert redact(found) == found
    assert json.loads(json_line(found)) == found


def test_the_value_of_a_secret_key_is_redacted_whatever_it_looks_like() -> None:
    fields = {"Authorization": "x y", "hub_token": "abc", "tokens": 12, "token": 3, "max": "m"}
    hidden = {"Authorization": MARK, "hub_token": MARK, "tokens": 12, "token": 3, "max": "m"}
    assert redact(fields) == hidden


def test_a_long_text_does_not_take_long() -> None:
    for piece in ("a", "a://b:", "token ", "authorization", "'", "\\", "= "):
        redact(piece * (200_000 // len(piece)))


def test_a_line_of_json_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    log("died", "warning", by="SIGSEGV", where=Path("a"), rate=float("nan"), text="\udc80\nü")
    log("plain", time="now", event="other", level="info")
    log("bug", token="abc", traceback="password=xyz")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    time = lines[0].pop("time")
    assert len(time) == len("2026-11-23T01:02:03.456Z")
    assert time.endswith("Z")
    assert lines[0] == {
        "level": "warning",
        "event": "died",
        "by": "SIGSEGV",
        "where": "a",
        "rate": "NaN",
        "text": "\udc80\nü",
    }
    assert lines[1]["event"] == "plain"
    assert lines[1]["time"] != "now"
    assert (lines[2]["token"], lines[2]["traceback"]) == (MARK, f"password={MARK}")


def test_an_error_without_a_terminal_is_a_line_with_all_its_parts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log_error(InputError("a token=abc", where="b", valid="c", next_step="d"))
    line = json.loads(capsys.readouterr().err)
    del line["time"]
    assert line == {
        "level": "error",
        "event": "error",
        "exit_code": 65,
        "what": f"a token={MARK}",
        "where": "b",
        "valid": "c",
        "next": "d",
    }


def test_the_outcome_is_one_redacted_line(capsys: pytest.CaptureFixture[str]) -> None:
    outcome({"error": "no https://a:b@c/ü", "n": [float("inf")]})
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == {"error": f"no https://{MARK}@c/ü", "n": ["Infinity"]}


def python(code: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, text=True, check=False, timeout=60, **settings)


def test_nobody_reading_any_more_is_no_failure(tmp_path: Path) -> None:
    code = """
from dear_batch.log import log, outcome
import sys
for _ in range(3):
    log("a line")
outcome({"status": "ok"})
sys.exit(3)
"""
    reading, writing = os.pipe()
    os.close(reading)
    assert python(code, stdout=writing, stderr=writing).returncode == 3
    os.close(writing)
    closed = subprocess.run(
        ["sh", "-c", 'exec "$0" "$@" >&- 2>&-', sys.executable, "-c", code],
        check=False,
        cwd=tmp_path,
        timeout=60,
    )
    assert closed.returncode == 3


def on_a_terminal(code: str) -> str:
    """What appears on a terminal as stderr."""
    ours, theirs = pty.openpty()
    done = python(code, stderr=theirs, env={**os.environ, "TERM": "xterm", "COLUMNS": "100"})
    os.close(theirs)
    shown = b""
    try:
        while data := os.read(ours, 65536):
            shown += data
    except OSError:  # EIO: that was all
        pass
    os.close(ours)
    assert done.returncode == 0
    return shown.decode()


def test_people_on_a_terminal_see_short_lines_without_secrets() -> None:
    shown = on_a_terminal("""
from dear_batch.log import log
log("died", "warning", by="SIGSEGV", stderr=["many", "lines"], traceback="a\\nb", long="x" * 400)
log("stderr", line="\\x1b[2Jcleared? token=abc")
from dear_batch.log import log_error
from dear_batch.errors import InputError
log_error(InputError("no \\x1b[2J", where="token=abc"))
""")
    assert shown.splitlines() == [
        "warning: died by=SIGSEGV",
        f"\\x1b[2Jcleared? token={MARK}",
        "error: no \\x1b[2J",
        f"  where: token={MARK}",
    ]


def test_lines_appear_above_a_running_progress_bar() -> None:
    shown = on_a_terminal("""
from dear_batch.log import log
from dear_batch.show import progress
with progress("queries") as advance:
    advance("pointwise", 1, 10)
    log("one", n=1)
    advance("pointwise", 2, 10)
    log("two", n=2)
""")
    rows = screen(shown)
    assert rows[:2] == ["one n=1", "two n=2"]
    assert rows[2].startswith("pointwise")
    assert "2/10 queries" in rows[2]
    assert rows[3:] == []


def screen(shown: str) -> list[str]:
    """The rows that remain on a terminal after what rich writes: lines, ups and erasures."""
    import re

    rows, at = [""], 0
    for part in re.split(r"(\x1b\[[0-9;?]*[A-Za-z]|\r|\n)", shown):
        if part == "\n":
            at += 1
            rows += [""] * (at + 1 - len(rows))
        elif part == "\r" or part.startswith("\x1b["):
            if part.endswith("A"):
                at -= int(part[2:-1] or 1)
            if part == "\x1b[2K":
                rows[at] = ""
        else:
            rows[at] += part
    return [row.rstrip() for row in rows if row.strip()]
