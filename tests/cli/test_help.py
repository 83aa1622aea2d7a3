"""Help is fast, complete, and loads nothing that it does not need."""

import time

import pytest

from dear_batch import __version__
from dear_batch.cli import main
from tests.cli.commands import COMMANDS, HEAVY, invoke, loaded_by, python, succeed

HELP_SECONDS = 0.4


def best_seconds(*arguments: str) -> float:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        assert python("-m", "dear_batch", *arguments).returncode == 0
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@pytest.mark.parametrize("arguments", [("--help",), ("run", "--help"), ("--version",)])
def test_help_is_fast(arguments: tuple[str, ...]) -> None:
    assert best_seconds(*arguments) < HELP_SECONDS


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_loads_nothing_heavy(command: str) -> None:
    loaded = loaded_by(*filter(None, [command]), "--help")
    assert "click" in loaded
    assert not loaded & (HEAVY | {"pyarrow", "onnxruntime", "numpy", "duckdb", "rich"})


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_it_does_and_shows_an_example(command: str) -> None:
    text = succeed(command, "--help").stdout
    assert "Example" in text
    assert f"dear-batch {command} " in text
    assert invoke(command, "-h").stdout == text
    assert main.commands[command].get_short_help_str()


def test_the_commands_of_the_issue_are_there() -> None:
    names = {"convert", "export", "run", "score", "verify-reference", "evaluate", "inspect"}
    names |= {"status", "verify", "gc", "doctor", "bench"}
    assert names == set(COMMANDS)
    assert all(name in succeed("--help").stdout for name in names)


def test_the_version_is_the_packages() -> None:
    assert __version__ in succeed("--version").stdout
