"""The specs that ship load, and each kind of mistake is refused with the message that helps."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from dear_batch.errors import UsageError
from dear_batch.listwise.prompts import load_prompt
from dear_batch.spec_files import load_spec
from dear_batch.specs import (
    ExecutionSpec,
    ExportSpec,
    InputSpec,
    JobSpec,
    ListwiseSpec,
    OutputSpec,
    PointwiseSpec,
)

ROOT = Path(__file__).parents[1]
EXPORTS = sorted(ROOT.glob("export/*.toml"))
JOBS = sorted(ROOT.glob("jobs/*.toml"))

# The model cards of the paper's checkpoints (arXiv 2508.16998, huggingface.co/abdoelsayed).
ZOO = {
    "abdoelsayed/dear-8b-reranker-ce-v1",
    "abdoelsayed/dear-8b-reranker-ce-lora-v1",
    "abdoelsayed/dear-8b-reranker-ranknet-v1",
    "abdoelsayed/dear-8b-reranker-ranknet-lora-v1",
    "abdoelsayed/dear-3b-reranker-ce-v1",
    "abdoelsayed/dear-3b-reranker-ce-lora-v1",
    "abdoelsayed/dear-3b-reranker-ranknet-v1",
    "abdoelsayed/dear-3b-reranker-ranknet-lora-v1",
    "abdoelsayed/dear-8b-reranker-listwise-v1",
    "abdoelsayed/dear-8b-reranker-listwise-lora-v1",
    "abdoelsayed/llama2-13b-rankllama-teacher",
}

JOB = {
    "input": 'paths = ["a.parquet"]',
    "pointwise": 'bundle = "b"',
    "output": 'folder = "o"',
}


def job_text(**tables: str) -> str:
    return "\n".join(f"[{name}]\n{body}" for name, body in {**JOB, **tables}.items())


def refusal(tmp_path: Path, text: str, kind: type = JobSpec) -> UsageError:
    path = tmp_path / "spec.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        load_spec(path, kind)
    assert caught.value.exit_code == 2
    assert caught.value.where.startswith(str(path))
    return caught.value


@pytest.mark.parametrize("path", EXPORTS, ids=lambda path: path.stem)
def test_export_spec_loads(path: Path) -> None:
    spec = load_spec(path, ExportSpec)
    assert spec.output == f"bundles/{path.stem}"
    assert spec.task == ("listwise" if "listwise" in path.stem else "pointwise")
    if spec.adapter is not None:  # the bases of the paper's LoRA checkpoints
        size = "3.2-3B" if "3b" in path.stem else "3.1-8B"
        assert spec.model == f"meta-llama/Llama-{size}"


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_job_spec_loads(path: Path) -> None:
    spec = load_spec(path, JobSpec)
    assert spec.output.folder == f"out/{path.stem}"
    bundles = {e.output: e.task for e in (load_spec(path, ExportSpec) for path in EXPORTS)}
    assert bundles[spec.pointwise.bundle] == "pointwise"
    if path.stem == "nightly":
        assert spec.listwise is None  # in comments, read by the next test
        return
    assert spec.listwise
    assert bundles[spec.listwise.bundle] == "listwise"
    load_prompt(spec.listwise.prompt)
    sizes = (spec.listwise.depth, spec.listwise.window, spec.listwise.step)
    assert sizes == (30, 20, 10)  # arXiv 2508.16998, run_listwise.sh


def test_the_listwise_table_of_the_nightly_job_can_be_switched_on(tmp_path: Path) -> None:
    text = (ROOT / "jobs" / "nightly.toml").read_text(encoding="utf-8")
    switched = re.sub(r"^# (\[listwise\]|\w+ = .+)$", r"\1", text, flags=re.MULTILINE)
    (tmp_path / "job.toml").write_text(switched, encoding="utf-8")
    spec = load_spec(tmp_path / "job.toml", JobSpec)
    default = ListwiseSpec("bundles/dear-8b-listwise")
    assert spec.listwise == replace(default, step=10)  # which is half of the default window
    assert default.stride == 10


def test_zoo_is_complete() -> None:
    specs = [load_spec(path, ExportSpec) for path in EXPORTS]
    assert {spec.adapter or spec.model for spec in specs} == ZOO
    assert len(specs) == len(ZOO)


def test_published_table_is_complete() -> None:
    collections = "dl19 dl20 covid nfcorpus touche dbpedia scifact news robust04 signal noveleval"
    assert {path.stem for path in JOBS} == {"nightly", *collections.split()}


@pytest.mark.parametrize("folder", ["export", "jobs"])
def test_folder_readme_names_every_spec(folder: str) -> None:
    readme = (ROOT / folder / "README.md").read_text(encoding="utf-8")
    missing = [path.name for path in (ROOT / folder).glob("*.toml") if path.name not in readme]
    assert missing == []


def test_defaults(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(job_text(), encoding="utf-8")
    assert load_spec(path, JobSpec) == JobSpec(
        input=InputSpec(paths=("a.parquet",)),
        pointwise=PointwiseSpec(bundle="b", depth=None, interpolate=1.0),
        output=OutputSpec(folder="o", tag="dear-batch", run_per_input=False),
        execution=ExecutionSpec(device="auto", engine="auto", row_tokens=None, batch_tokens=None),
    )


def test_whole_number_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(job_text(pointwise='bundle = "b"\ninterpolate = 0'), encoding="utf-8")
    interpolate = load_spec(path, JobSpec).pointwise.interpolate
    assert interpolate == 0.0
    assert type(interpolate) is float


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:12"])
def test_devices(device: str) -> None:
    assert ExecutionSpec(device=device).device == device


def test_adapter_alone_is_enough() -> None:
    assert ExportSpec(output="o", adapter="a").model is None


def test_unknown_key_names_the_nearest_and_all(tmp_path: Path) -> None:
    error = refusal(tmp_path, job_text(execution="row_token = 512"))
    assert error.what == "Unknown key 'row_token'. Did you mean 'row_tokens'?"
    assert error.where.endswith("spec.toml: execution.row_token")
    assert error.valid == "device, engine, row_tokens, batch_tokens, stall_timeout_s, paranoid"


def test_unknown_table(tmp_path: Path) -> None:
    error = refusal(tmp_path, job_text(pointwize='bundle = "b"'))
    assert "Did you mean 'pointwise'?" in error.what
    assert error.valid == "input, pointwise, output, execution, listwise"


def test_unknown_key_with_nothing_near(tmp_path: Path) -> None:
    error = refusal(tmp_path, 'output = "o"\nmodel = "m"\nzzz = 1', ExportSpec)
    assert error.what == "Unknown key 'zzz'."


def test_missing_key(tmp_path: Path) -> None:
    error = refusal(tmp_path, job_text(output='tag = "t"'))
    assert error.what == "The key 'folder' is missing."
    assert error.where.endswith(": output.folder")


def test_missing_table(tmp_path: Path) -> None:
    error = refusal(tmp_path, '[input]\npaths = ["a"]\n[output]\nfolder = "o"')
    assert error.what == "The key 'pointwise' is missing."
    assert error.valid == "a table with bundle, depth, interpolate"


@pytest.mark.parametrize(
    ("key", "body", "found", "valid"),
    [
        ("input.paths", 'paths = "a"', "a string, 'a'", "a list of strings"),
        ("input.paths", "paths = [1]", "a list, [1]", "a list of strings"),
        ("input.paths", 'paths = [""]', "a list, ['']", "a list of strings"),
        ("pointwise.bundle", "bundle = 7", "a whole number, 7", "a string"),
        ("pointwise.bundle", 'bundle = ""', "a string, ''", "a string that is not empty"),
        ("pointwise.depth", 'bundle = "b"\ndepth = true', "True", "a whole number"),
        ("pointwise.depth", 'bundle = "b"\ndepth = 1.5', "a number, 1.5", "a whole number"),
        ("pointwise.interpolate", 'bundle = "b"\ninterpolate = false', "False", "a number"),
        ("output.run_per_input", 'folder = "o"\nrun_per_input = 1', "1", "true or false"),
        ("output.folder", "folder = 2026-01-01", "a date or time", "a string"),
        ("execution.row_tokens", 'row_tokens = "512"', "'512'", "a whole number"),
        ("execution.engine", 'engine = "onnx"', "'onnx'", "auto, tensorrt, onnxruntime, torch"),
        ("listwise.window", 'bundle = "l"\nwindow = "20"', "'20'", "a whole number"),
        ("listwise.precision", 'bundle = "l"\nprecision = "fp16"', "'fp16'", "auto, fp32, bf16"),
        (
            "listwise.max_failed_windows",
            'bundle = "l"\nmax_failed_windows = 0.01',
            "0.01",
            "a whole number or a string",
        ),
    ],
)
def test_wrong_type(tmp_path: Path, key: str, body: str, found: str, valid: str) -> None:
    error = refusal(tmp_path, job_text(**{key.partition(".")[0]: body}))
    assert error.what.startswith(f"The value of '{key}' is not accepted: found ")
    assert found in error.what
    assert error.where.endswith(f"spec.toml: {key}")
    assert error.valid.startswith(valid)


def test_value_in_place_of_a_table(tmp_path: Path) -> None:
    error = refusal(tmp_path, 'input = "a.parquet"')
    assert error.what == "The key 'pointwise' is missing."
    tables = '[pointwise]\nbundle = "b"\n[output]\nfolder = "o"'
    error = refusal(tmp_path, f'input = "a.parquet"\n{tables}')
    assert error.valid == "a table with paths, max_bad"


@pytest.mark.parametrize(
    ("table", "body", "key"),
    [
        ("input", "paths = []", "paths"),
        ("pointwise", 'bundle = "b"\ndepth = 0', "depth"),
        ("pointwise", 'bundle = "b"\ninterpolate = 1.01', "interpolate"),
        ("pointwise", 'bundle = "b"\ninterpolate = -0.5', "interpolate"),
        ("pointwise", 'bundle = "b"\ninterpolate = nan', "interpolate"),
        ("output", 'folder = "o"\ntag = "two words"', "tag"),
        ("output", 'folder = "o"\ntag = "a\\u00a0b"', "tag"),
        ("output", 'folder = "o"\ntag = "a\\u0007"', "tag"),
        ("execution", 'device = "gpu"', "device"),
        ("execution", 'device = "cuda:"', "device"),
        ("execution", 'device = "cuda:0\\n"', "device"),
        ("execution", "row_tokens = 0", "row_tokens"),
        ("execution", "batch_tokens = -1", "batch_tokens"),
        ("execution", "row_tokens = 512\nbatch_tokens = 511", "batch_tokens"),
        ("listwise", 'bundle = "l"\ndepth = 1', "depth"),
        ("listwise", 'bundle = "l"\nwindow = 1', "window"),
        ("listwise", 'bundle = "l"\nstep = 0', "step"),
        ("listwise", 'bundle = "l"\nwindow = 9\nstep = 10', "step"),
        ("listwise", 'bundle = "l"\nreasoning_tokens = -1', "reasoning_tokens"),
        ("listwise", 'bundle = "l"\nbatch_tokens = 0', "batch_tokens"),
        ("listwise", 'bundle = "l"\nmax_failed_windows = -1', "max_failed_windows"),
        ("listwise", 'bundle = "l"\nmax_failed_windows = "some"', "max_failed_windows"),
        ("listwise", 'bundle = "l"\nmax_failed_windows = "1.5"', "max_failed_windows"),
        ("listwise", 'bundle = "l"\nmax_failed_windows = "101%"', "max_failed_windows"),
    ],
)
def test_range(tmp_path: Path, table: str, body: str, key: str) -> None:
    error = refusal(tmp_path, job_text(**{table: body}))
    assert error.what.startswith(f"The value of '{key}' is out of range: found ")
    assert error.where.endswith(f"spec.toml: {table}.{key}")
    assert error.valid


def test_the_listwise_stage_is_the_published_one(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(job_text(listwise='bundle = "l"'), encoding="utf-8")
    found = load_spec(path, JobSpec).listwise
    assert found == ListwiseSpec("l", "readme", 30, 20, None, 0, "auto", None, 0)
    assert found.stride == 10


@pytest.mark.parametrize(
    ("given", "allowed"),
    [("0", 0), (5, 5), ("5", 5), ("1%", 4), ("0.25%", 1), ("100%", 400), ("0%", 0)],
)
def test_failures_allowed_of_400_windows(given: int | str, allowed: float, tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    text = f'bundle = "l"\nmax_failed_windows = {given!r}'
    path.write_text(job_text(listwise=text), encoding="utf-8")
    found = load_spec(path, JobSpec).listwise
    assert found
    assert found.failures_allowed(400) == pytest.approx(allowed)


def test_an_option_of_a_stage_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(job_text(), encoding="utf-8")
    with pytest.raises(
        UsageError, match="'window' is given, but the job has no listwise stage"
    ) as c:
        load_spec(path, JobSpec, {"listwise.window": 5, "listwise.bundle": None})
    assert "--listwise" in c.value.valid
    both = load_spec(path, JobSpec, {"listwise.window": 10, "listwise.bundle": "l"})
    assert both.listwise == ListwiseSpec("l", window=10)
    path.write_text(job_text(listwise='bundle = "l"'), encoding="utf-8")
    assert load_spec(path, JobSpec, {"listwise.window": 10}).listwise == both.listwise


def test_nothing_to_export(tmp_path: Path) -> None:
    error = refusal(tmp_path, 'output = "o"', ExportSpec)
    assert error.where.endswith("spec.toml: model")


def test_range_without_a_file() -> None:
    with pytest.raises(UsageError) as caught:
        PointwiseSpec(bundle="b", depth=0)
    assert caught.value.where == "depth"


def test_invalid_toml_gives_the_line(tmp_path: Path) -> None:
    assert "at line 2, column 7" in refusal(tmp_path, "[input]\npaths a").what


def test_unreadable_spec(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        load_spec(tmp_path / "absent.toml", JobSpec)
    latin = tmp_path / "latin.toml"
    latin.write_bytes('output = "\xe9"'.encode("latin-1"))
    with pytest.raises(UsageError, match="not UTF-8"):
        load_spec(latin, ExportSpec)


def cron_commands() -> list[str]:
    """The command lines of the crontabs: neither comments nor settings."""
    lines = [
        line
        for path in ROOT.glob("jobs/cron/*.cron")
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    return [line for line in lines if line and not re.match(r"#|\w+=", line)]


def test_cron_escapes_every_percent_sign() -> None:
    """crontab(5): an unescaped % is a newline, and what follows it the command's input."""
    commands = cron_commands()
    assert commands
    for command in commands:
        assert "%" in command
        assert not re.search(r"(?<!\\)%", command)


def test_the_crontab_of_operations_runs_with_the_little_that_cron_gives() -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    commands = re.findall(r"^ {4}[\d*]\S* \S+ \* \* \* (.*)$", text, flags=re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        assert re.match(r"cd /srv/rerank && mkdir -p logs && /\S+/dear-batch run ", command)
        assert not re.search(r"(?<!\\)%", command)


def test_cron_keeps_the_exit_code() -> None:
    for command in cron_commands():
        assert "|" not in command.replace("||", "")  # a pipe ends with the code of its last part
        assert command.endswith("exit $code; }")
