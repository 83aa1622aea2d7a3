"""The command line as people and schedulers meet it: help, outcomes, exit codes, messages."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from dear_batch import __version__
from dear_batch.cli import main
from dear_batch.specs import ListwiseSpec
from tests.conftest import COLLECTION, collection_queries, collection_texts
from tests.run.fake_ranker import install, listwise_bundle

Make = Callable[..., Path]
COMMANDS = sorted(main.commands)
HEAVY = {"torch", "transformers", "peft", "optimum", "onnx", "onnxscript"}
HELP_SECONDS = 0.4
NO_GPU = not Path("/proc/driver/nvidia").exists() and not Path("/dev/nvidia0").exists()


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


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(rows()), tmp_path / "in.parquet")
    return tmp_path / "in.parquet"


def everything(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


# Help.


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


LOADED = """
import json, sys
from dear_batch.cli import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    assert not stop.code, stop.code
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def loaded_by(*arguments: object) -> set[str]:
    """Top-level modules in memory at the end of a command."""
    done = python("-c", LOADED, *arguments)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


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
    names |= {"status", "verify", "gc"}
    assert names == set(COMMANDS)
    assert all(name in succeed("--help").stdout for name in names)


def test_the_version_is_the_packages() -> None:
    assert __version__ in succeed("--version").stdout


# Outcomes.


@pytest.mark.model
def test_convert_run_evaluate_inspect(bundle: Make, tmp_path: Path) -> None:
    lines = (COLLECTION / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    docids = [json.loads(line)["_id"] for line in lines]
    lines = (COLLECTION / "queries.jsonl").read_text(encoding="utf-8").splitlines()
    qids = [json.loads(line)["_id"] for line in lines]
    bm25 = tmp_path / "first.trec"
    bm25.write_text(
        "".join(
            f"{qid} Q0 {docids[(5 * i + k) % len(docids)]} {k + 1} {20 - k} first\n"
            for i, qid in enumerate(qids)
            for k in range(10)
        )
    )
    candidates, out = tmp_path / "candidates.parquet", tmp_path / "out"
    converted = outcome(succeed("convert", "beir", COLLECTION, bm25, "-o", candidates))
    assert converted["status"] == "ok"
    assert (converted["queries"], converted["candidates"]) == (len(qids), 10 * len(qids))
    assert converted["out"] == str(candidates)

    common = ("--input", candidates, "--bundle", bundle("llama31"), "--output", out)
    ran = outcome(succeed("run", *common, "--tag", "mine"))
    assert (ran["status"], ran["output"]) == ("ok", str(out))
    assert ran["candidates"] == {
        "read": 10 * len(qids),
        "written": 10 * len(qids),
        "quarantined": 0,
    }
    assert json.loads((out / "report.json").read_text())["queries"] == ran["queries"]

    qrels, figures = COLLECTION / "qrels" / "test.tsv", tmp_path / "figures.json"
    run = out / "run.trec"
    result = succeed("evaluate", qrels, run, bm25, "--baseline", bm25, "--json", figures)
    evaluated = outcome(result)
    assert evaluated["average_over"] == "qrels"
    assert len(evaluated["runs"]) == 2
    for measures in evaluated["runs"].values():
        assert 0 <= measures["nDCG@10"] <= 1
    assert len(json.loads(figures.read_text())) == 2
    assert "nDCG@10" in result.stdout.splitlines()[0] + result.stdout

    for path, expected in ((out, "run.trec"), (candidates, "nested"), (bundle("llama31"), "fp32")):
        assert expected in succeed("inspect", path).stdout


@pytest.mark.model
def test_a_pointwise_run_never_imports_torch(bundle: Make, lists: Path, tmp_path: Path) -> None:
    folder = bundle("llama31")
    loaded = loaded_by("run", "--input", lists, "--bundle", folder, "--output", tmp_path / "out")
    assert {"onnxruntime", "pyarrow", "tokenizers"} <= loaded
    assert not loaded & HEAVY
    assert (tmp_path / "out" / "run.trec").stat().st_size > 0
    assert not loaded_by("score", folder, "who?", "a text") & HEAVY


@pytest.mark.model
def test_a_run_without_a_terminal_keeps_stdout_for_the_outcome(
    bundle: Make, lists: Path, tmp_path: Path
) -> None:
    common = ("--input", lists, "--bundle", bundle("llama31"))
    done = python("-m", "dear_batch", "run", *common, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["queries"]["written"] == 3
    assert "queries" in done.stderr
    again = python("-m", "dear_batch", "run", *common, "--output", tmp_path / "out", "--depth", "2")
    assert again.returncode == 78
    (line,) = again.stdout.splitlines()
    assert json.loads(line)["exit_code"] == 78


@pytest.mark.model
def test_a_spec_is_run_and_options_override_it(bundle: Make, lists: Path, tmp_path: Path) -> None:
    spec = tmp_path / "job.toml"
    spec.write_text(
        f'input.paths = ["{lists}"]\n'
        f'[pointwise]\nbundle = "{bundle("llama31")}"\ndepth = 5\n'
        f'[output]\nfolder = "{tmp_path / "from-spec"}"\ntag = "spec"\n'
    )
    assert outcome(succeed("run", spec))["scored_pairs"] == 3 * 5
    options = ("--output", tmp_path / "other", "--depth", "2", "--run-per-input")
    ran = outcome(succeed("run", spec, *options))
    assert ran["scored_pairs"] == 3 * 2
    assert ran["outputs"] == ["in.trec"]
    assert " spec\n" in (tmp_path / "other" / "in.trec").read_text()


# Two stages, the second a fake; the real one is run in tests/listwise.


@pytest.fixture
def generator(tmp_path: Path) -> Path:
    return listwise_bundle(tmp_path / "listwise")


@pytest.fixture
def two_stages(bundle: Make, generator: Path, lists: Path, tmp_path: Path) -> tuple[object, ...]:
    first = ("--input", lists, "--bundle", bundle("llama31"), "--output", tmp_path / "out")
    second = ("--listwise", generator, "--listwise-depth", 5, "--window", 3, "--step", 2)
    return "run", *first, *second


@pytest.mark.model
def test_a_run_of_two_stages(
    two_stages: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = install(monkeypatch)
    options = ("--prompt", "mine", "--reasoning-tokens", 9, "--listwise-precision", "bf16")
    result = succeed(*two_stages, *options, "--max-failed-windows", "1%", "--device", "cpu")
    ran = outcome(result)
    assert (ran["status"], ran["outputs"]) == ("ok", ["run.trec"])
    assert ran["listwise"]["windows"]["ok"] == 3 * 2
    assert "6: 6 ok" in result.stderr
    ((bundle, spec, device),) = fake.opened
    wanted = ListwiseSpec(str(bundle.folder), "mine", 5, 3, 2, 9, "bf16", None, "1%")
    assert (spec, device) == (wanted, "cpu")
    shown = succeed("inspect", tmp_path / "out").stdout
    for text in ("first 5 in windows of 3 by 2, prompt mine", "6: 6 ok", "on cpu, fp32"):
        assert text in shown
    assert bundle.sha256 in shown


@pytest.mark.model
def test_the_stages_one_after_the_other(
    two_stages: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    first = outcome(succeed(*two_stages, "--stage", "pointwise"))
    assert (first["status"], first["outputs"]) == ("listwise-outstanding", [])
    assert "listwise-outstanding" in succeed("inspect", tmp_path / "out").stdout
    assert not (tmp_path / "out" / "run.trec").exists()
    assert outcome(succeed(*two_stages, "--stage", "listwise"))["status"] == "ok"
    assert (tmp_path / "out" / "run.trec").exists()
    message = fail(78, "belongs to another job", *two_stages, "--listwise-depth", "4")
    assert "--stage listwise" in message
    assert parts(message) == {"where", "valid", "next"}
    again = (*two_stages, "--listwise-depth", "4", "--stage", "listwise")
    assert outcome(succeed(*again))["listwise"]["depth"] == 4


@pytest.mark.model
def test_too_many_failed_windows_end_with_exit_3_and_the_run(
    two_stages: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, fails=lambda request: request.window.qid == "q1")
    result = invoke(*two_stages, "--max-failed-windows", 1)
    assert result.exit_code == 3
    assert result.stderr.count("error: ") == 1
    assert "2 of 6 windows failed; their documents keep the order that they had" in result.stderr
    ran = outcome(result)
    assert (ran["status"], ran["exit_code"]) == ("too-many-failed-windows", 3)
    assert ran["outputs"] == ["run.trec"]
    assert ran["error"] in result.stderr
    assert (tmp_path / "out" / "run.trec").stat().st_size > 0
    assert "the prompt does not fit" in succeed("inspect", tmp_path / "out").stdout
    for allowed in ("2", "34%"):
        assert outcome(succeed(*two_stages, "--max-failed-windows", allowed))["status"] == "ok"


@pytest.mark.model
def test_bundles_given_for_each_other_are_refused(
    bundle: Make, generator: Path, lists: Path, tmp_path: Path
) -> None:
    common = ("run", "--input", lists, "--output", tmp_path / "out")
    scorer = bundle("llama31")
    fail(78, "is a listwise model", *common, "--bundle", generator)
    fail(78, "is a pointwise model", *common, "--bundle", scorer, "--listwise", scorer)
    assert not (tmp_path / "out").exists()


@pytest.mark.model
def test_a_missing_listwise_extra_is_told_before_anything_is_scored(
    two_stages: tuple[object, ...], tmp_path: Path
) -> None:
    done = python("-c", WITHOUT_TORCH, *two_stages)
    assert done.returncode == 78, done.stderr
    assert "needs the package 'torch', which is not installed" in done.stderr
    assert "pip install 'dear-batch[listwise]'" in done.stderr
    assert not (tmp_path / "out").exists()
    done = python("-c", WITHOUT_TORCH, *two_stages, "--stage", "pointwise")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "parts" / "pointwise.json").exists()


def scored(result: Result) -> list[tuple[float, int, str]]:
    lines = [json.loads(line) for line in result.stdout.removesuffix("\n").split("\n")]
    return [(line["score"], line["index"], line["document"]) for line in lines]


@pytest.mark.model
def test_score_takes_documents_from_arguments_and_stdin(bundle: Make) -> None:
    documents = [text[:200] for text in collection_texts()[:4]]
    folder = bundle("llama31")
    given = scored(succeed("score", folder, "who?", *documents))
    assert [score for score, _, _ in given] == sorted((s for s, _, _ in given), reverse=True)
    assert [documents[index] for _, index, _ in given] == [text for _, _, text in given]
    piped = scored(succeed("score", folder, "who?", "-", stdin="\n".join(documents) + "\n"))
    assert piped == given
    mixed = succeed("score", folder, "who?", documents[0], "-", stdin="\n".join(documents[1:]))
    assert scored(mixed) == given
    (single,) = scored(succeed("score", folder, "who?", documents[2]))
    assert single[0] == pytest.approx(next(s for s, i, _ in given if i == 2), abs=1e-4)


@pytest.mark.model
def test_only_newlines_part_the_documents_of_stdin(bundle: Make) -> None:
    """str.splitlines would also part at U+2028, form feeds and NEL, which passages do hold."""
    documents = ["one\u2028still one", "two\fstill two", "three\x85still three"]
    found = scored(succeed("score", bundle("llama31"), "who?", "-", stdin="\n".join(documents)))
    assert sorted(text for _, _, text in found) == sorted(documents)


@pytest.mark.model
def test_stdin_that_is_no_text_is_one_clear_error(bundle: Make) -> None:
    command = [sys.executable, "-m", "dear_batch", "score", bundle("llama31"), "who?", "-"]
    done = subprocess.run(command, input=b"caf\xe9\n", capture_output=True, check=False)
    assert done.returncode == 65
    assert done.stderr.startswith(b"error: ")
    assert b"UTF-8" in done.stderr


@pytest.mark.model
def test_score_without_a_document_says_so(bundle: Make) -> None:
    result = invoke("score", bundle("llama31"), "who?", "-", stdin="")
    assert result.exit_code == 2
    assert "document" in result.stderr


@pytest.mark.model
def test_a_dry_run_says_what_an_export_needs_and_writes_nothing(
    checkpoint: Make, tmp_path: Path
) -> None:
    model = checkpoint("llama31")
    result = succeed("export", "--model", model, "--output", tmp_path / "b", "--dry-run")
    needs = outcome(result)
    assert (needs["status"], needs["task"]) == ("dry-run", "pointwise")
    assert needs["memory_bytes"] > 4 * needs["parameters"] > 0
    assert needs["disk_bytes"] > 4 * needs["parameters"]
    assert "memory (fp32 merge)" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.model
def test_an_export_ends_with_its_parity_figures(checkpoint: Make, tmp_path: Path) -> None:
    result = succeed("export", "--model", checkpoint("llama31"), "--output", tmp_path / "bundle")
    exported = outcome(result)
    assert (exported["status"], exported["task"]) == ("ok", "pointwise")
    assert exported["bundle"] == str(tmp_path / "bundle")
    assert exported["parity"]["graphs"]["packed.onnx"]["max_abs_difference"] <= 1e-4
    assert (tmp_path / "bundle" / "bundle.json").is_file()
    assert "exporting the ONNX graphs" in result.stderr


@pytest.mark.model
def test_verify_reference_shows_both_scores(bundle: Make, checkpoint: Make) -> None:
    """A random model does not score as the README printed: a table, and an error."""
    for path in (checkpoint("llama31"), bundle("llama31")):
        result = invoke("verify-reference", path, "--scores", "3b-ce")
        assert result.exit_code == 78, result.output
        assert "differ from the printed ones" in result.stderr
        assert "3b-ce" in result.stdout
        assert "-10.1875" in result.stdout
        fields = outcome(result)
        assert fields["status"] == "different"
        assert len(fields["scores"]) == 5
        assert f"{fields['scores'][0]:.4f}" in result.stdout


@pytest.mark.model
def test_verify_reference_needs_to_know_which_scores(checkpoint: Make) -> None:
    message = fail(2, "does not tell", "verify-reference", checkpoint("llama31"))
    assert "8b-ranknet" in message
    assert parts(message) == {"valid", "next"}


@pytest.mark.model
def test_verify_reference_merges_an_adapter(checkpoint: Make, adapter: Make) -> None:
    base = checkpoint("llama32", causal=True)
    result = invoke(
        "verify-reference", base, "--adapter", adapter("llama32"), "--scores", "3b-ranknet"
    )
    assert result.exit_code == 78, result.output
    assert len(set(outcome(result)["scores"])) > 1


# Bad input: one message with its exit code, and nothing half-written.


def columns(**changed: Any) -> pa.Table:
    fields: dict[str, Any] = {"qid": ["q"], "query": ["?"], "docid": ["d"], "text": ["x"]}
    return pa.table({k: v for k, v in {**fields, **changed}.items() if v is not None})


def bad_input(kind: str, folder: Path) -> Path:
    path = folder / "in.parquet"
    whole = pa.Table.from_pylist(rows())
    match kind:
        case "missing column":
            pq.write_table(columns(text=None, passage=["x"]), path)
        case "missing candidate field":
            pq.write_table(
                pa.table({"qid": ["q"], "query": ["?"], "candidates": [[{"t": 1}]]}), path
            )
        case "wrong type":
            pq.write_table(columns(text=[1.5]), path)
        case "wrong candidates":
            pq.write_table(pa.table({"qid": ["q"], "query": ["?"], "candidates": ["x"]}), path)
        case "no bytes":
            path.touch()
        case "no rows":
            pq.write_table(columns().slice(0, 0), path)
        case "cut":
            pq.write_table(whole, path)
            path.write_bytes(path.read_bytes()[:-50])
        case "no Parquet":
            path.write_text("qid,query,docid\n" * 9)
        case "folder":
            path.mkdir()
    return path


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("missing column", "Missing column: text"),
        ("missing candidate field", "candidates.docid"),
        ("wrong type", "'text' has type double"),
        ("wrong candidates", "'candidates' has type string"),
        ("no bytes", "is empty"),
        ("no rows", "has no rows"),
        ("cut", "is cut"),
        ("no Parquet", "is not a Parquet file"),
        ("folder", "is a folder"),
        ("nothing", "does not exist"),
    ],
)
def test_bad_input_files_are_refused_before_a_model_loads(
    kind: str, match: str, tmp_path: Path
) -> None:
    path = bad_input(kind, tmp_path)
    before = everything(tmp_path)
    arguments = ("--bundle", tmp_path / "no-bundle", "--output", tmp_path / "out")
    message = fail(65, match, "run", "--input", path, *arguments)
    assert parts(message) == {"where", "valid", "next"}
    assert str(path) in message
    assert everything(tmp_path) == before


def test_a_glob_without_files_is_refused(tmp_path: Path) -> None:
    pattern = tmp_path / "day-*.parquet"
    arguments = ("--bundle", "b", "--output", tmp_path / "out")
    message = fail(65, "No file matches", "run", "--input", pattern, *arguments)
    assert str(pattern) in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.model
def test_a_cut_second_file_is_found_before_the_first_is_scored(
    bundle: Make, lists: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "late.parquet"
    cut.write_bytes(lists.read_bytes()[:-50])
    inputs = ("--input", lists, "--input", cut)
    fail(65, "is cut", "run", *inputs, "--bundle", bundle("llama31"), "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.model
def test_interpolation_without_scores_is_refused(bundle: Make, lists: Path, tmp_path: Path) -> None:
    pq.write_table(columns(), lists)
    options = ("--output", tmp_path / "out", "--interpolate", "0.5")
    message = fail(65, "first-stage", "run", "--input", lists, "--bundle", "b", *options)
    assert "--interpolate 1" in message
    assert not (tmp_path / "out").exists()
    assert outcome(succeed("run", "--input", lists, "--bundle", bundle("llama31"), *options[:2]))[
        "candidates"
    ] == {"read": 1, "written": 1, "quarantined": 0}


@pytest.mark.parametrize("what", ["folder", "file", "below a file"])
def test_an_output_that_is_not_ours_is_refused(what: str, lists: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if what == "folder":
        out.mkdir()
        (out / "thesis.tex").write_text("mine")
    else:
        out.write_text("mine")
    target = out / "deeper" if what == "below a file" else out
    before = everything(tmp_path)
    arguments = ("--input", lists, "--bundle", tmp_path / "no-bundle", "--output", target)
    message = fail(73, "out", "run", *arguments)
    assert str(target) in message
    assert everything(tmp_path) == before


@pytest.mark.parametrize("command", ["run", "score"])
def test_a_missing_bundle_is_refused(command: str, lists: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "no-bundle"
    arguments = {
        "run": ("--input", lists, "--bundle", bundle, "--output", tmp_path / "out"),
        "score": (bundle, "who?", "a text"),
    }
    before = everything(tmp_path)
    message = fail(78, "is not a bundle", command, *arguments[command])
    assert "dear-batch export" in message
    assert everything(tmp_path) == before


@pytest.mark.model
@pytest.mark.parametrize("change", ["weights", "missing", "link", "extra graph"])
def test_a_changed_bundle_is_not_trusted(
    change: str, bundle: Make, lists: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle("llama31"), folder)
    weights = folder / "onnx" / "weights.safetensors"
    match change:
        case "weights":
            raw = bytearray(weights.read_bytes())
            raw[-1] ^= 1
            weights.write_bytes(raw)
        case "missing":
            (folder / "tokenizer.json").unlink()
        case "link":
            weights.rename(tmp_path / "elsewhere")
            weights.symlink_to(tmp_path / "elsewhere")
        case "extra graph":
            (folder / "onnx" / "more.onnx").write_bytes(b"x")
    arguments = ("--input", lists, "--bundle", folder, "--output", tmp_path / "out")
    message = fail(77, "not what its manifest says", "run", *arguments)
    assert parts(message) == {"where", "valid", "next"}
    assert not (tmp_path / "out").exists()


@pytest.mark.model
def test_another_jobs_folder_is_refused(bundle: Make, lists: Path, tmp_path: Path) -> None:
    common = ("--input", lists, "--bundle", bundle("llama31"), "--output", tmp_path / "out")
    succeed("run", *common)
    before = everything(tmp_path)
    message = fail(78, "belongs to another job", "run", *common, "--depth", "3")
    assert parts(message) == {"where", "valid", "next"}
    assert everything(tmp_path) == before


@pytest.mark.model
@pytest.mark.skipif(not NO_GPU, reason="this machine has a GPU")
@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_cuda_is_refused_where_there_is_none(
    engine: str, bundle: Make, lists: Path, tmp_path: Path
) -> None:
    common = ("--input", lists, "--bundle", bundle("llama31"), "--output", tmp_path / "out")
    # In a process of its own: libraries write to the terminal past Python's streams.
    options = ("--device", "cuda", "--engine", engine)
    done = python("-m", "dear_batch", "run", *common, *options)
    assert done.returncode == 78, done.stderr
    assert done.stderr.startswith("error: ")
    assert "--device cuda" in done.stderr
    assert "--device cpu" in done.stderr
    assert len(done.stderr.splitlines()) <= 4  # what, where, valid, next: one message
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["exit_code"] == 78
    assert not (tmp_path / "out").exists()


def spec_with(line: str, folder: Path) -> Path:
    spec = folder / "job.toml"
    spec.write_text(
        f'input.paths = ["in.parquet"]\n[output]\nfolder = "out"\n'
        f'[pointwise]\nbundle = "b"\n{line}\n'
    )
    return spec


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("dept = 5", "Did you mean 'depth'?"),
        ("depth = 0", "out of range"),
        ('depth = "all"', "a whole number"),
        ("interpolate = 1.5", "a number from 0 to 1"),
        ("depth =", "not valid TOML"),
    ],
)
def test_a_spec_with_a_fault_is_refused(line: str, match: str, tmp_path: Path) -> None:
    spec = spec_with(line, tmp_path)
    before = everything(tmp_path)
    message = fail(2, match, "run", spec)
    assert str(spec) in message
    assert everything(tmp_path) == before


ONE = ("--input", "in.parquet", "--bundle", "b", "--output", "o")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("run", "no.toml"), "cannot be read"),
        (("run", "--bundle", "b", "--output", "o"), "Missing: --input"),
        (("run", "--input", "in.parquet", "--output", "o"), "Missing: --bundle"),
        (("run", *ONE, "--window", "5"), "'window' is given, but the job has no listwise stage"),
        (("run", *ONE, "--stage", "listwise"), "one stage, so there is no --stage listwise"),
        (("run", *ONE, "--listwise", "l", "--window", "1"), "'window' is out of range"),
        (("run", *ONE, "--listwise", "l", "--max-failed-windows", "few"), "out of range"),
        (("export", "--output", "o"), "Missing: --model or --adapter"),
        (("export", "no.toml"), "cannot be read"),
        (("inspect", "nothing-here"), "does not exist"),
    ],
)
def test_wrong_usage_is_refused(arguments: tuple[str, ...], match: str) -> None:
    fail(2, match, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("rerank",),
        ("run", "--no-such-option"),
        ("run", "--engine", "tensorflow"),
        ("run", "--stage", "third"),
        ("convert", "csv", "in.csv", "-o", "out.parquet"),
        ("score", "bundle", "query"),
    ],
)
def test_clicks_own_usage_errors_exit_with_2(arguments: tuple[str, ...]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("convert", "rankgpt", "no.json", "-o", "out.parquet"), "no.json"),
        (("evaluate", "no-qrels.txt", "no-run.trec"), "no-qrels.txt"),
        (("inspect", "{}/notes.txt"), "not a Parquet file"),
    ],
)
def test_missing_or_foreign_files_are_bad_input(
    arguments: tuple[str, ...], match: str, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    fail(65, match, *(argument.format(tmp_path) for argument in arguments))


# Missing extras.

# Not by `sys.modules["torch"] = None`: libraries look there for what is loaded.
WITHOUT_TORCH = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
hidden = lambda _, name, *rest: None if name.partition(".")[0] == "torch" else find(name, *rest)
PathFinder.find_spec = classmethod(hidden)
from dear_batch.cli import main
main(sys.argv[1:])
"""


@pytest.mark.model
@pytest.mark.parametrize("command", ["export", "verify-reference", "run", "score"])
def test_a_missing_extra_prints_its_install_line(
    command: str, bundle: Make, checkpoint: Make, lists: Path, tmp_path: Path
) -> None:
    model, folder, out = checkpoint("llama31"), bundle("llama31"), tmp_path / "out"
    arguments: dict[str, tuple[object, ...]] = {
        "export": ("--model", model, "--output", out),
        "verify-reference": (model, "--scores", "8b-ce"),
        "run": ("--engine", "torch", "--input", lists, "--bundle", folder, "--output", out),
        "score": ("--engine", "torch", folder, "who?", "a text"),
    }
    done = python("-c", WITHOUT_TORCH, command, *arguments[command])
    assert done.returncode == 78, done.stderr
    assert done.stderr.startswith("error: ")
    assert "needs the package 'torch', which is not installed" in done.stderr
    assert "pip install 'dear-batch[export]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()


@pytest.mark.model
def test_a_run_works_without_the_extra(bundle: Make, lists: Path, tmp_path: Path) -> None:
    common = ("--input", lists, "--bundle", bundle("llama31"), "--output", tmp_path / "out")
    done = python("-c", WITHOUT_TORCH, "run", *common, env={**os.environ, "COLUMNS": "80"})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "run.trec").exists()
