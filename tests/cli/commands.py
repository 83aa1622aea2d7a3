"""What tests of the command line share: to call it, and to read what it says."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from dear_batch.bundle import Manifest, Source, hash_folder, write_manifest
from dear_batch.cli import main
from dear_batch.pointwise.own_pairs import N_OWN_PAIRS
from dear_batch.pointwise.recipe import Recipe
from dear_batch.run.local import run_job
from dear_batch.run.supervisor import Outcome
from dear_batch.specs import JobSpec
from tests.conftest import collection_queries, collection_texts

Make = Callable[..., Path]
COMMANDS = sorted(main.commands)
HEAVY = {"torch", "transformers", "peft", "optimum", "onnx", "onnxscript"}
HEAVY |= {"tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings", "cuda"}


def invoke(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], input=stdin)


def python(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def outcome(result: Result) -> dict[str, Any]:
    """The JSON object on stdout's last line."""
    fields = json.loads(result.stdout.splitlines()[-1])
    assert isinstance(fields, dict)
    return fields


def succeed(*arguments: object, stdin: str | None = None) -> Result:
    result = invoke(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result


def fail(code: int, match: str, *arguments: object) -> str:
    """The one message of a command that ends with this exit code; it names no internals."""
    result = invoke(*arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    message = told(result.stderr)
    assert match in message
    if arguments[0] == "run":
        fields = outcome(result)
        assert fields["status"] == "failed"
        assert fields["exit_code"] == code
        assert message.startswith(fields["error"])
    return message


def told(stderr: str) -> str:
    """The one error of a command, as a terminal would show it."""
    lines = [json.loads(line) for line in stderr.splitlines() if line.startswith("{")]
    (line,) = [line for line in lines if line["event"] == "error"]
    named = [f"  {name}: {line[name]}" for name in ("where", "valid", "next") if line[name]]
    return "\n".join([line["what"], *named])


def parts(message: str) -> set[str]:
    """Which of `where`, `valid` and `next` a message has."""
    return {line.split(":")[0].strip() for line in message.splitlines()[1:] if line[:2] == "  "}


def rows(count: int = 3) -> list[dict[str, Any]]:
    texts = collection_texts()
    return [
        {
            "qid": f"q{i}",
            "query": query,
            "candidates": [
                {"docid": f"d{k}", "text": texts[(4 * i + k) % len(texts)], "score": 9.0 - k}
                for k in range(6)
            ],
        }
        for i, query in enumerate(collection_queries()[:count])
    ]


def everything(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def left_by_a_failure(folder: Path) -> bool:
    """Whether a folder holds what tells of a job that failed early, and nothing else."""
    return {path.name for path in folder.iterdir()} == {"LOCK", "report.json", "metrics.prom"}


def inputs_only(folder: Path) -> bool:
    """Whether nothing but the inputs and what tells of a failure is there."""
    left = {path.name for path in folder.iterdir()} - {"in.parquet", "bundle", "listwise"}
    return left <= {"out"} and (not left or left_by_a_failure(folder / "out"))


def manifest_of_a_bundle(folder: Path) -> Path:
    """All of a bundle that is looked at before the inputs are."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    recipe = Recipe("readme", "last-token", (1,), (1,), (), 0)
    manifest = Manifest(
        task="pointwise",
        source=Source("some/model", "0" * 40),
        precision="fp32",
        recipe=recipe,
        architecture={"hidden_size": 8},
        graphs={},
        parity=None,
        versions={},
        created="2026-01-01T00:00:00+00:00",
        own_scores=(0.0,) * N_OWN_PAIRS,
        files=hash_folder(folder),
    )
    write_manifest(folder, manifest)
    return folder


IN_PROCESS = """
import dear_batch.run.supervisor as supervisor
from dear_batch.run.local import run_job
def in_process(spec, *, stage, restart, advance, on_loss):
    report = run_job(spec, stage=stage, restart=restart)
    return supervisor.Outcome(report, report["exit_code"])
supervisor.supervise = in_process
"""


LOADED = """
import json, sys
from dear_batch.cli import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    assert not stop.code, stop.code
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def loaded_by(*arguments: object, in_process: bool = False) -> set[str]:
    """Top-level modules in memory at the end of a command."""
    done = python("-c", IN_PROCESS * in_process + LOADED, *arguments)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def run_here(spec: JobSpec, *, stage: Any, restart: bool, **_: object) -> Outcome:
    """In place of `supervise`."""
    report = run_job(spec, stage=stage, restart=restart)
    return Outcome(report, report["exit_code"])


# Not by `sys.modules["torch"] = None`: libraries look there for what is loaded.
WITHOUT_TORCH = (
    """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
hidden = lambda _, name, *rest: None if name.partition(".")[0] == "torch" else find(name, *rest)
PathFinder.find_spec = classmethod(hidden)
"""
    + IN_PROCESS
    + """
from dear_batch.cli import main
main(sys.argv[1:])
"""
)
