"""Commands around a model: `export`, `score`, `verify-reference`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result

from tests.cli.commands import (
    Make,
    fail,
    invoke,
    manifest_of_a_bundle,
    outcome,
    parts,
    succeed,
    told,
)
from tests.conftest import collection_texts


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
    assert "UTF-8" in told(done.stderr.decode())


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
def test_what_does_not_go_with_a_bundle_is_named(tmp_path: Path) -> None:
    folder = manifest_of_a_bundle(tmp_path / "my bundle")
    tensorrt = ("export", folder, "--engine", "tensorrt")
    assert f"dear-batch export '{folder}' --engine tensorrt" in fail(2, "already", *tensorrt[:2])
    fail(2, "is a bundle already; --dry-run is for checkpoints", *tensorrt, "--dry-run")
    fail(2, "already; --model would make another", *tensorrt, "--model", "m", "--dry-run")


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
