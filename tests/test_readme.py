"""The README says what is there: its commands parse, its tables and its tree are complete."""

import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from dear_batch.cli import main
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
PAGES = [
    README,
    *((ROOT / n / "README.md").read_text(encoding="utf-8") for n in ("export", "jobs")),
    OPERATIONS,
]
# A backslash at its end continues a command on the next line.
LINES = [line.strip() for page in PAGES for line in page.replace("\\\n", "").splitlines()]
COMMANDS = [line for line in LINES if line.startswith("dear-batch ")]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_line_parses(line: str) -> None:
    """Options and choices exist; files need not."""
    _, name, *arguments = shlex.split(line, comments=True)
    command = main.commands[name]
    arguments = [argument.replace("SPEC", "SPEC.toml") for argument in arguments]
    parent = click.Context(main, help_option_names=["-h", "--help"])
    with command.make_context(name, arguments, parent=parent) as context:
        assert context.params


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) >= 8


def test_the_table_lists_every_command() -> None:
    listed = re.findall(r"^\| `dear-batch (\S+)", README, flags=re.MULTILINE)
    assert sorted(listed) == sorted(main.commands)


def test_every_command_has_help_with_an_example() -> None:
    for name in main.commands:
        text = CliRunner().invoke(main, [name, "--help"]).output
        assert "Example" in text, name
        assert f"dear-batch {name}" in text, name
        assert r"\b" not in text, name
    assert r"\b" not in CliRunner().invoke(main, ["--help"]).output


def test_the_tree_names_every_module() -> None:
    tree = README[README.index("## The tree") :]
    modules = [p for p in (ROOT / "dear_batch").rglob("*.py") if not p.name.startswith("__")]
    assert [m.name for m in modules if m.name not in tree] == []


def test_the_cron_line_is_the_one_of_the_readme_in_spirit() -> None:
    """Both run jobs/nightly.toml into a folder a night, with every % escaped."""
    cron = (ROOT / "jobs" / "cron" / "nightly.cron").read_text(encoding="utf-8")
    for text in (cron, README):
        (line,) = [x for x in text.splitlines() if x.strip().startswith("0 2 * * *")]
        assert "run jobs/nightly.toml --output" in line
        assert re.findall(r"(?<!\\)%", line) == []


def test_the_units_of_systemd_are_valid(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    blocks = OPERATIONS[OPERATIONS.index("## systemd") :].split("# /etc/systemd/system/")[1:]
    names = [tmp_path / block.splitlines()[0] for block in blocks]
    for path, block in zip(names, blocks, strict=True):
        lines = [x.removeprefix("    ") for x in block.splitlines()[1:] if x[:4] in ("    ", "")]
        text = "\n".join(lines).replace("exec /srv/rerank/.venv/bin/dear-batch", "exec true")
        path.write_text(text + "\n", encoding="utf-8")
    found = subprocess.run(
        ["systemd-analyze", "verify", *names], capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stderr) == (0, "")


def test_every_exit_code_is_explained() -> None:
    """In the operators' page, in the jobs' README, and in the help of `run`."""
    texts = [OPERATIONS, PAGES[2], CliRunner().invoke(main, ["run", "--help"]).output]
    for code in (0, 1, 2, 3, 65, 73, 75, 77, 78, 99):
        for text in texts:
            assert re.search(rf"^[| ]+{code} [| ]", text, flags=re.MULTILINE), code


def test_the_core_has_no_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    core = " ".join(project["dependencies"])
    assert not re.search(r"torch|transformers|peft|optimum|onnxscript", core)
