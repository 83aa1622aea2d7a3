"""A bundle is trusted file by file. The bundle here is made by hand: no model is needed."""

import json
import os
from pathlib import Path

import pytest

from dear_batch.bundle import Manifest, Source, hash_folder, open_bundle, write_manifest
from dear_batch.errors import ConfigurationError, TrustError
from dear_batch.pointwise.recipe import Recipe

RECIPE = Recipe("readme", "last-token", (1,), (1,), (), 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    (folder / "onnx").mkdir(parents=True)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "onnx" / "packed.onnx").write_bytes(b"graph")
    manifest = Manifest(
        task="pointwise",
        source=Source("some/model", "0" * 40),
        precision="fp32",
        recipe=RECIPE,
        architecture={"hidden_size": 8},
        graphs={},
        parity=None,
        versions={},
        created="2026-01-01T00:00:00+00:00",
        files=hash_folder(folder),
    )
    write_manifest(folder, manifest)
    return folder


def test_a_whole_bundle_opens(folder: Path) -> None:
    bundle = open_bundle(folder)
    assert bundle.recipe == RECIPE
    assert set(bundle.manifest.files) == {"tokenizer.json", "onnx/packed.onnx"}
    assert Manifest.from_json(json.loads(json.dumps(bundle.manifest.to_json()))) == bundle.manifest


def refused(folder: Path, match: str) -> None:
    with pytest.raises(TrustError, match=match) as caught:
        open_bundle(folder)
    assert caught.value.exit_code == 77


def test_a_changed_file(folder: Path) -> None:
    (folder / "onnx" / "packed.onnx").write_bytes(b"grapH")
    refused(folder, r"packed\.onnx: its sha256 differs")


def test_a_file_of_another_size(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{ }")
    refused(folder, r"tokenizer\.json: 3 bytes, not 2")


def test_a_missing_file(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    refused(folder, "missing")


def test_a_symlink_with_the_right_contents(folder: Path) -> None:
    graph = folder / "onnx" / "packed.onnx"
    graph.rename(folder.parent / "elsewhere")
    graph.symlink_to(folder.parent / "elsewhere")
    refused(folder, "not a regular file")


def test_a_hard_link_in_the_onnx_folder(folder: Path) -> None:
    os.link(folder / "onnx" / "packed.onnx", folder.parent / "elsewhere")
    refused(folder, "hard link")


def test_a_file_the_manifest_does_not_list_beside_the_graphs(folder: Path) -> None:
    (folder / "onnx" / "weights.bin").write_bytes(b"")
    refused(folder, "does not list it")


@pytest.mark.parametrize("name", ["modeling.py", "model.safetensors", "deep/er/pytorch_model.bin"])
def test_a_file_the_manifest_does_not_list_anywhere(name: str, folder: Path) -> None:
    """transformers loads what it finds in a folder, listed or not."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).touch()
    refused(folder, f"{name}: the manifest does not list it")


def test_a_link_the_manifest_does_not_list(folder: Path) -> None:
    (folder / "adapter").symlink_to(folder.parent)
    refused(folder, "adapter: the manifest does not list it")


def test_hidden_files_are_left_alone_except_beside_the_graphs(folder: Path) -> None:
    (folder / ".DS_Store").touch()
    (folder / ".cache").mkdir()
    (folder / ".cache" / "config.json").touch()
    assert open_bundle(folder).recipe == RECIPE
    (folder / "onnx" / ".weights").touch()
    refused(folder, r"onnx/\.weights: the manifest does not list it")


def test_a_bundle_of_the_other_task_is_refused_unread(folder: Path) -> None:
    assert open_bundle(folder, task="pointwise").recipe == RECIPE
    (folder / "tokenizer.json").unlink()  # which would be found later
    with pytest.raises(
        ConfigurationError, match="pointwise model, given as the listwise"
    ) as caught:
        open_bundle(folder, task="listwise")
    assert caught.value.valid == "a listwise bundle"


def test_a_manifest_that_points_outside(folder: Path) -> None:
    fields = json.loads((folder / "bundle.json").read_text())
    (folder.parent / "elsewhere").write_bytes(b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # sha256 of b""
    fields["files"]["../elsewhere"] = {"bytes": 0, "sha256": empty}
    (folder / "bundle.json").write_text(json.dumps(fields))
    refused(folder, "not a regular file")


def test_a_linked_onnx_folder(folder: Path) -> None:
    (folder / "onnx").rename(folder.parent / "elsewhere")
    (folder / "onnx").symlink_to(folder.parent / "elsewhere")
    refused(folder, "not a regular file")


def test_a_bundle_reached_through_a_link_is_whole(folder: Path) -> None:
    (folder.parent / "latest").symlink_to(folder)
    assert open_bundle(folder.parent / "latest").recipe == RECIPE


def test_only_listed_files_are_handed_out(folder: Path) -> None:
    bundle = open_bundle(folder)
    assert bundle.file("tokenizer.json") == folder / "tokenizer.json"
    with pytest.raises(TrustError, match="does not list it"):
        bundle.file("config.json")


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"schema_version": 1}', '{"schema_version": 1, "recipe": null, "files": []}'],
)
def test_a_broken_manifest(folder: Path, text: str) -> None:
    (folder / "bundle.json").write_text(text)
    refused(folder, "cannot be read")


def test_another_schema_version(folder: Path) -> None:
    fields = json.loads((folder / "bundle.json").read_text())
    (folder / "bundle.json").write_text(json.dumps({**fields, "schema_version": 99}))
    with pytest.raises(ConfigurationError, match="schema version 99"):
        open_bundle(folder)


def test_a_folder_that_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="not a bundle"):
        open_bundle(tmp_path)
