"""A bundle is trusted file by file. The bundle here is made by hand: no model is needed."""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dear_batch import verified
from dear_batch.bundle import (
    MAX_MANIFEST_BYTES,
    Engine,
    Manifest,
    Source,
    hash_file,
    hash_folder,
    open_bundle,
    write_manifest,
)
from dear_batch.errors import ConfigurationError, TrustError
from dear_batch.files.durable import replacing
from dear_batch.pointwise.own_pairs import N_OWN_PAIRS
from dear_batch.pointwise.profiles import Profile, Span
from dear_batch.pointwise.recipe import Recipe
from dear_batch.verified import FileState

RECIPE = Recipe("readme", "last-token", (1,), (1,), (), 2)
GRAPH = b"\x08\x08"  # a ModelProto of nothing but its ir_version
OTHER_GRAPH = b"\x08\x09"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    (folder / "onnx").mkdir(parents=True)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "onnx" / "packed.onnx").write_bytes(GRAPH)
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
        own_scores=(0.0,) * N_OWN_PAIRS,
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
    (folder / "onnx" / "packed.onnx").write_bytes(OTHER_GRAPH)
    refused(folder, r"packed\.onnx: its sha256 differs")


def test_a_file_of_another_size(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{ }")
    refused(folder, r"tokenizer\.json: 3 bytes, not 2")


def test_a_missing_file(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    refused(folder, r"tokenizer\.json: it is missing")


@pytest.mark.parametrize("name", ["onnx/packed.onnx", "tokenizer.json", "bundle.json"])
def test_a_symlink_with_the_right_contents(name: str, folder: Path) -> None:
    path = folder / name
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")
    refused(folder, f"{name}: it is missing, a link")


def test_a_fifo_does_not_hold_the_job(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    refused(folder, "not a regular file")


def test_a_folder_in_place_of_a_file(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").mkdir()
    refused(folder, r"tokenizer\.json: .* Is a directory")


@pytest.mark.parametrize("name", ["onnx/packed.onnx", "tokenizer.json", "bundle.json"])
def test_a_hard_link(name: str, folder: Path) -> None:
    os.link(folder / name, folder.parent / "elsewhere")
    refused(folder, f"{name}: it is a hard link")


def test_a_file_the_manifest_does_not_list_beside_the_graphs(folder: Path) -> None:
    (folder / "onnx" / "weights.bin").write_bytes(b"")
    refused(folder, "does not list it")


@pytest.mark.parametrize("name", ["modeling.py", "model.safetensors", "deep/er/pytorch_model.bin"])
def test_a_file_the_manifest_does_not_list_anywhere(name: str, folder: Path) -> None:
    """transformers loads what it finds in a folder, listed or not."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).touch()
    top = name.partition("/")[0]
    refused(folder, f"{top}: the manifest does not list it")


def test_an_unlisted_name_that_a_terminal_would_obey(folder: Path) -> None:
    (folder / "\x1b[31mred").touch()
    refused(folder, r"'\\x1b\[31mred': the manifest does not list it")
    (folder / "\x1b[31mred").unlink()
    (folder / os.fsdecode(b"\xff")).touch()
    refused(folder, r"'\\udcff': the manifest does not list it")


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


def edited(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the fields of the manifest as whoever made the bundle could."""
    fields = json.loads((folder / "bundle.json").read_text())
    del fields["sha256"]
    edit(fields)
    (folder / "bundle.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("../elsewhere", "points out of the bundle"),
        ("onnx/../../elsewhere", "points out of the bundle"),
        ("/elsewhere", "points out of the bundle"),
        ("onnx\\packed.onnx", "backslash"),
        ("tokenizer.json\0", "control character"),
        ("./tokenizer.json", "plain path"),
        ("onnx//packed.onnx", "plain path"),
        ("", "plain path"),
    ],
)
def test_a_manifest_that_points_elsewhere(name: str, why: str, folder: Path) -> None:
    (folder.parent / "elsewhere").write_bytes(b"")
    record = {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    edited(folder, lambda fields: fields["files"].update({name: record}))
    refused(folder, why)
    with pytest.raises(TrustError, match=why):  # to be shown, too
        open_bundle(folder, verify=False)


def listed(folder: Path, name: str, contents: bytes) -> None:
    """A file that the manifest lists with its true hash: the maker of the bundle is hostile."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(contents)
    record = {"bytes": len(contents), "sha256": hash_file(path).sha256}
    edited(folder, lambda fields: fields["files"].update({name: record}))


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "a.pt", "a.PTH", "onnx/a.pkl", "a.ckpt", "a.joblib", "m.py"]
)
def test_listed_pickles_and_code(name: str, folder: Path) -> None:
    listed(folder, name, b"whatever")
    refused(folder, "it is code" if name.endswith(".py") else "it is pickled")


@pytest.mark.parametrize(
    "name", ["config.json", "adapter_config.json", "tokenizer_config.json", "sub/processor.json"]
)
def test_a_listed_config_with_auto_map(name: str, folder: Path) -> None:
    listed(folder, name, b'{"a": [{"auto_map": {"AutoModel": "evil.Model"}}]}')
    refused(folder, "auto_map")


def test_a_listed_config_that_is_no_json(folder: Path) -> None:
    listed(folder, "config.json", b"[" * 100_000)
    refused(folder, r"config\.json: it is no JSON")


def test_listed_weights_with_an_oversized_header(folder: Path) -> None:
    listed(folder, "model.safetensors", (2**40).to_bytes(8, "little") + b"{}")
    refused(folder, r"its header of \d+ bytes is longer than the file")


def test_a_listed_file_that_is_no_graph(folder: Path) -> None:
    listed(folder, "onnx/model.onnx", b"graph")
    refused(folder, r"model\.onnx: it is no ONNX graph")


def test_a_linked_onnx_folder(folder: Path) -> None:
    (folder / "onnx").rename(folder.parent / "elsewhere")
    (folder / "onnx").symlink_to(folder.parent / "elsewhere")
    refused(folder, "onnx: it is missing, a link")


def test_a_bundle_reached_through_a_link_is_whole(folder: Path) -> None:
    (folder.parent / "latest").symlink_to(folder)
    bundle = open_bundle(folder.parent / "latest")
    assert bundle.recipe == RECIPE
    bundle.check_unchanged()


def test_only_listed_files_are_handed_out(folder: Path) -> None:
    bundle = open_bundle(folder)
    assert bundle.file("tokenizer.json") == folder / "tokenizer.json"
    with pytest.raises(TrustError, match="does not list it"):
        bundle.file("config.json")


PLAN = b"compiled for one GPU"


def with_engine(folder: Path) -> Engine:
    """Give a bundle an engine; the bytes are no plan, since nothing here deserialises one."""
    sha256 = hashlib.sha256(PLAN).hexdigest()
    path = f"engines/tensorrt_rtx-sm_89/{sha256}.plan"
    (folder / path).parent.mkdir(parents=True)
    (folder / path).write_bytes(PLAN)
    engine = Engine(
        path=path,
        bytes=len(PLAN),
        sha256=sha256,
        flavour="tensorrt_rtx",
        version="1.7.1",
        sm="sm_89",
        platform="linux-x86_64",
        precision="fp16",
        row_tokens=512,
        batch_tokens=1024,
        profiles=(Profile(Span(1, 2, 2), Span(1, 512, 512), Span(1, 8, 1024)),),
        build_seconds=1.5,
    )
    manifest = open_bundle(folder).manifest
    write_manifest(folder, replace(manifest, engines=(engine,)))
    return engine


def test_an_engine_changes_nothing_of_what_a_bundle_is(folder: Path) -> None:
    before = open_bundle(folder).sha256
    engine = with_engine(folder)
    bundle = open_bundle(folder)
    assert (bundle.sha256, bundle.manifest.engines) == (before, (engine,))
    with bundle.plan(engine) as data:
        assert data[:] == PLAN


@pytest.mark.parametrize("paranoid", [False, True])
def test_a_plan_that_is_remembered_is_hashed_again_by_the_paranoid(
    paranoid: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(verified, "SETTLED_NS", -(10**12))  # as if it had lain there for long
    engine = with_engine(folder)
    with open_bundle(folder).plan(engine):
        pass
    before = FileState.of((folder / engine.path).stat())
    with monkeypatch.context() as patch:  # a disk that changed a byte behind the file system
        (folder / engine.path).write_bytes(PLAN[::-1])
        patch.setattr(FileState, "of", lambda _found: before)
        bundle = open_bundle(folder, verify=False, paranoid=paranoid)
        with contextlib.ExitStack() as stack:
            if paranoid:
                stack.enter_context(pytest.raises(TrustError, match="its sha256 differs"))
            with bundle.plan(engine) as data:
                assert data[:] == PLAN[::-1]


def test_what_no_record_names_below_engines_is_never_loaded_and_no_harm(folder: Path) -> None:
    """A crash between the plan's rename and the manifest's leaves it."""
    (folder / "engines/tensorrt-sm_90").mkdir(parents=True)
    (folder / "engines/tensorrt-sm_90/left.plan").write_bytes(b"x")
    open_bundle(folder)


def add_engine(folder: Path) -> None:
    """As an export does: the folder first, the plan later, the manifest replaced last."""
    manifest = open_bundle(folder).manifest
    with_engine(folder)
    with replacing(folder / "bundle.json") as temporary:
        shutil.copyfile(folder / "bundle.json", temporary)
    assert len(open_bundle(folder).manifest.engines) == len(manifest.engines) + 1


def test_an_engine_is_added_to_a_bundle_in_use(folder: Path) -> None:
    bundle = open_bundle(folder)
    (folder / "engines").mkdir()
    bundle.check_unchanged()  # the build may take an hour from here
    (folder / "engines").rmdir()
    add_engine(folder)
    assert (folder / "bundle.json").stat().st_ino != bundle.opened["bundle.json"].inode
    bundle.check_unchanged()
    assert open_bundle(folder).sha256 == bundle.sha256


def other_model(folder: Path) -> None:
    edited(folder, lambda fields: fields.update(created="2026-02-02T00:00:00+00:00"))


def no_manifest(folder: Path) -> None:
    (folder / "bundle.json").write_text("{")


def code_beside(folder: Path) -> None:
    (folder / "modeling.py").touch()


def file_touched(folder: Path) -> None:
    os.utime(folder / "tokenizer.json", ns=(0, 0))


def linked_engines(folder: Path) -> None:
    (folder / "engines").rename(folder.parent / "elsewhere")
    (folder / "engines").symlink_to(folder.parent / "elsewhere")


def weights_beside(folder: Path) -> None:
    (folder / "onnx" / "weights.bin").touch()


def copied_whole(folder: Path) -> None:
    """Only the folder is another one: its files are the very same."""
    folder.rename(folder.parent / "old")
    folder.mkdir()
    for entry in (folder.parent / "old").iterdir():
        entry.rename(folder / entry.name)


@pytest.mark.parametrize(
    "change",
    [
        other_model,
        no_manifest,
        code_beside,
        file_touched,
        linked_engines,
        weights_beside,
        copied_whole,
    ],
)
def test_what_comes_with_an_engine_is_refused(change: Callable[[Path], None], folder: Path) -> None:
    bundle = open_bundle(folder)
    add_engine(folder)
    bundle.check_unchanged()
    time.sleep(0.02)  # a tick of the file system's clock
    change(folder)
    with pytest.raises(TrustError, match="changed while it was being loaded"):
        bundle.check_unchanged()


def test_a_listwise_bundle_in_use_gets_no_engines(folder: Path) -> None:
    edited(folder, lambda fields: fields.update(task="listwise", recipe=None))
    bundle = open_bundle(folder)
    (folder / "engines").mkdir()
    with pytest.raises(TrustError, match="changed while it was being loaded"):
        bundle.check_unchanged()


@pytest.mark.parametrize("how", ["flipped", "longer", "gone", "linked", "hard link"])
def test_a_changed_engine_is_refused_with_the_rebuild_command(
    folder: Path, tmp_path: Path, how: str
) -> None:
    engine = with_engine(folder)
    path = folder / engine.path
    if how == "flipped":
        path.write_bytes(bytes([PLAN[0] ^ 1]) + PLAN[1:])
    elif how == "longer":
        path.write_bytes(PLAN + b"x")
    elif how == "hard link":
        os.link(path, tmp_path / "other")
    else:
        path.rename(tmp_path / "plan")
        if how == "linked":
            path.symlink_to(tmp_path / "plan")
    bundle = open_bundle(folder)  # the engines of other machines are no reason to stop
    with (
        pytest.raises(TrustError, match="is not what its manifest says") as error,
        bundle.plan(engine),
    ):
        pytest.fail("its bytes were handed out")
    assert error.value.next_step.startswith(
        f"dear-batch export {folder} --engine tensorrt --target sm_89 --flavour tensorrt_rtx "
        "--precision fp16 --row-tokens 512 --batch-tokens 1024; or "
    )


def test_a_plan_that_is_written_to_while_it_is_loaded(folder: Path) -> None:
    engine = with_engine(folder)
    bundle = open_bundle(folder)

    def load() -> None:
        with bundle.plan(engine) as data:
            assert data[:] == PLAN
            (folder / engine.path).write_bytes(PLAN[::-1])

    with pytest.raises(TrustError, match="it was written to while it was loaded"):
        load()


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "1",
        "[" * 100_000,
        '{"sha256": 1, "schema_version": 1}',
        '{"schema_version": 3}',
        '{"schema_version": 3, "recipe": null, "files": []}',
    ],
)
def test_a_broken_manifest(folder: Path, text: str) -> None:
    (folder / "bundle.json").write_text(text)
    refused(folder, "cannot be read")


def test_another_schema_version(folder: Path) -> None:
    edited(folder, lambda fields: fields.update(schema_version=99))
    with pytest.raises(ConfigurationError, match="schema version 99"):
        open_bundle(folder)


def test_a_folder_that_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="not a bundle"):
        open_bundle(tmp_path)


def test_one_flipped_bit_anywhere_in_the_manifest(folder: Path) -> None:
    path = folder / "bundle.json"
    whole = path.read_bytes()
    for at, byte in enumerate(whole):
        path.write_bytes(whole[:at] + bytes([byte ^ 1 << at % 8]) + whole[at + 1 :])
        refused(folder, "cannot be read")
    path.write_bytes(whole)
    assert open_bundle(folder).recipe == RECIPE


def test_a_manifest_of_the_first_versions_has_no_hash_of_its_own(folder: Path) -> None:
    edited(folder, lambda _fields: None)
    assert open_bundle(folder).recipe == RECIPE


def test_a_manifest_beyond_any_size(folder: Path) -> None:
    with (folder / "bundle.json").open("ab") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)
    refused(folder, "cannot be read")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("revision", "main"),
        ("revision", "0" * 39),
        ("revision", "A" * 40),
        ("revision", 1),
        ("adapter_revision", "v1.0"),
    ],
)
def test_a_revision_that_pins_nothing(field: str, value: object, folder: Path) -> None:
    edited(folder, lambda fields: fields["source"].update({field: value}))
    refused(folder, f"source.{field} is no commit of 40 hex digits")


# After the files were read


def replace_graph(folder: Path) -> None:
    (folder / "other").write_bytes(GRAPH)
    (folder / "other").replace(folder / "onnx" / "packed.onnx")


def write_graph(folder: Path) -> None:
    (folder / "onnx" / "packed.onnx").write_bytes(OTHER_GRAPH)


def swap_and_back(folder: Path) -> None:
    """The graph is another one while it is read, and the old one again afterwards."""
    (folder / "onnx").rename(folder.parent / "aside")
    (folder / "onnx").mkdir()
    (folder / "onnx").rmdir()
    (folder.parent / "aside").rename(folder / "onnx")


def add_weights(folder: Path) -> None:
    (folder / "onnx" / "weights.bin").touch()


def link_graph(folder: Path) -> None:
    graph = folder / "onnx" / "packed.onnx"
    graph.rename(folder.parent / "elsewhere")
    graph.symlink_to(folder.parent / "elsewhere")


def remove_manifest(folder: Path) -> None:
    (folder / "bundle.json").unlink()


@pytest.mark.parametrize(
    "change",
    [replace_graph, write_graph, swap_and_back, add_weights, link_graph, remove_manifest],
)
def test_a_swap_while_a_library_reads(change: Callable[[Path], None], folder: Path) -> None:
    bundle = open_bundle(folder)
    bundle.check_unchanged()
    time.sleep(0.02)  # a tick of the file system's clock
    change(folder)
    with pytest.raises(TrustError, match="changed while it was being loaded"):
        bundle.check_unchanged()


def test_a_link_to_the_bundle_that_is_moved_meanwhile(folder: Path) -> None:
    latest = folder.parent / "latest"
    latest.symlink_to(folder)
    bundle = open_bundle(latest)
    (folder.parent / "new").mkdir()
    latest.unlink()
    latest.symlink_to(folder.parent / "new")
    with pytest.raises(TrustError, match="changed while it was being loaded"):
        bundle.check_unchanged()


def test_a_bundle_that_was_opened_to_be_shown_may_not_be_loaded(folder: Path) -> None:
    with pytest.raises(TrustError, match="no longer what was checked"):
        open_bundle(folder, verify=False).check_unchanged()


# Hashing once


@pytest.fixture
def hashed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    """Opens the bundle; names of the files whose hash was computed, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    digest = hashlib.file_digest

    def opened(**options: bool) -> list[str]:
        files: list[str] = []

        def counted(file: Any, name: str) -> Any:
            files.append(Path(f"/proc/self/fd/{file.fileno()}").readlink().name)
            return digest(file, name)

        with monkeypatch.context() as patch:
            patch.setattr(hashlib, "file_digest", counted)
            open_bundle(folder, **options)
        return files

    return opened


ALL = ["packed.onnx", "tokenizer.json"]


@pytest.mark.slow
def test_a_file_is_hashed_once_it_has_settled_and_never_again(
    folder: Path, hashed: Callable[..., list[str]]
) -> None:
    assert sorted(hashed()) == ALL
    assert sorted(hashed()) == ALL  # they were written this second, and may be again
    time.sleep(2.1)
    assert sorted(hashed()) == ALL
    assert hashed() == []
    assert sorted(hashed(paranoid=True)) == ALL
    graph = folder / "onnx" / "packed.onnx"
    before = graph.stat()
    graph.write_bytes(OTHER_GRAPH)
    os.utime(graph, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert graph.stat().st_mtime_ns == before.st_mtime_ns
    with pytest.raises(TrustError, match="sha256 differs"):
        hashed()
