"""The command `doctor`, on this machine."""

import json
from pathlib import Path

import pytest

from dear_batch.bundle import write_manifest
from dear_batch.machine import machine
from tests.cli.commands import fail, outcome, python, succeed
from tests.pointwise.test_selection import FULL, bundle_with


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_manifest(tmp_path, bundle_with(FULL).manifest)
    return tmp_path


def test_tables_for_people(folder: Path) -> None:
    text = succeed("doctor", "--bundle", folder).stdout
    here = machine()
    assert here.onnxruntime
    for expected in (here.cpu, here.onnxruntime.version, "dear-8b-reranker", "passed over"):
        assert expected in text
    assert "CPUExecutionProvider" in text
    if not here.driver.gpus:
        assert here.driver.fault in text
        assert "nvidia-smi" in text


def test_one_line_of_json(folder: Path) -> None:
    done = python("-m", "dear_batch", "doctor", "--json", "--bundle", folder)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert set(found) == {"machine", "engines", "builds", "models", "bundle"}
    assert found["machine"]["platform"] == machine().platform
    assert "CPUExecutionProvider" in found["machine"]["providers"]
    assert done.stderr == ""


def test_without_a_bundle() -> None:
    assert "bundle" not in outcome(succeed("doctor", "--json"))


def test_no_bundle(tmp_path: Path) -> None:
    fail(78, "is not a bundle", "doctor", "--bundle", tmp_path)
