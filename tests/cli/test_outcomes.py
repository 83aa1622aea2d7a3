"""Jobs from end to end as people and schedulers meet them: what stdout ends with."""

import json
from pathlib import Path

import pytest

from tests.cli.commands import HEAVY, Make, loaded_by, outcome, python, succeed
from tests.conftest import COLLECTION


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
    n = 10 * len(qids)
    assert ran["candidates"] == {"read": n, "written": n, "quarantined": 0, "skipped": 0}
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
    assert not loaded & (HEAVY | {"onnxruntime", "tokenizers"})  # nothing that could crash
    loaded = loaded_by(
        "run", "--input", lists, "--bundle", folder, "--output", tmp_path / "own", in_process=True
    )
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
    assert all(json.loads(line)["event"] for line in done.stderr.splitlines())
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
