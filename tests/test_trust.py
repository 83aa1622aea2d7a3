"""Hostile files, and real bundles with one byte flipped: refused before anything native opens them.

A job's processes are watched by strace where it is there, and cut off from every network.
"""

import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dear_batch.bundle import MANIFEST, hash_file, open_bundle
from dear_batch.errors import TrustError
from dear_batch.trust import (
    MAX_HEADER_BYTES,
    check_config,
    check_contents,
    check_graph,
    check_safetensors,
    check_suffix,
    why_no_name,
)
from tests.conftest import ROOT
from tests.test_onnx_wire import PLACES

Make = Callable[..., Path]
PATH = Path("bundle/onnx/model.onnx")


# Safetensors


def stored(header: object, data: int = 16) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def tensor(begin: object, end: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [begin, end]}


def checked(path: Path, contents: bytes) -> None:
    path.write_bytes(contents)
    with path.open("rb") as file:
        check_safetensors(path, file)


def test_what_safetensors_writes_is_accepted(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    arrays = {"b": np.zeros((3, 2), np.float32), "a": np.zeros(0, np.float32)}
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "np"})
    with (tmp_path / "x.safetensors").open("rb") as file:
        check_safetensors(tmp_path / "x.safetensors", file)


@pytest.mark.parametrize(
    ("contents", "why"),
    [
        (b"", "longer than the file"),
        (b"\x01\x00\x00", "longer than the file"),
        (struct.pack("<Q", 3) + b"{}", "longer than the file"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "longer than the file"),
        (struct.pack("<Q", 3) + b"{}{", "no JSON"),
        (struct.pack("<Q", 2) + b"\xff\xff", "no JSON"),
        (struct.pack("<Q", 100_000) + b"[" * 100_000, "nested too deep"),
        (stored([]), "no JSON object"),
        (stored({"a": tensor(0, 17)}), "'a' ends outside"),
        (stored({"a": tensor(2**70, 2**71)}), "'a' ends outside"),
        (stored({"a": tensor(0, 8), "b": tensor(7, 16)}), "'b' overlaps"),
        (stored({"a": tensor(-8, 8)}), "data_offsets"),
        (stored({"a": tensor(8, 0)}), "data_offsets"),
        (stored({"a": tensor(0.0, 8)}), "no data_offsets"),
        (stored({"a": tensor(False, True)}), "no data_offsets"),
        (stored({"a": {"data_offsets": [0, 8, 16]}}), "no data_offsets"),
        (stored({"a": 8}), "no data_offsets"),
    ],
)
def test_a_header_that_does_not_describe_its_file(
    contents: bytes, why: str, tmp_path: Path
) -> None:
    with pytest.raises(TrustError, match=why):
        checked(tmp_path / "x.safetensors", contents)


def test_a_header_beyond_any_size(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", MAX_HEADER_BYTES + 1))
    os.truncate(path, MAX_HEADER_BYTES + 100)
    with path.open("rb") as file, pytest.raises(TrustError, match="up to 100000000"):
        check_safetensors(path, file)


# Configs and names


@pytest.mark.parametrize(
    "fields",
    [
        {"auto_map": {"AutoModel": "evil.Model"}},
        {"auto_map": ["evil.Slow", None]},
        {"auto_map": "other/repository--evil.Model"},
        {"text_config": {"auto_map": {"AutoModel": "evil.Model"}}},
        [[{"auto_map": {"AutoModel": "evil.Model"}}]],
        {"attn_implementation": "kernels-community/flash-attn"},
        {"_attn_implementation": {"": "someone/kernel@main"}},
    ],
)
def test_a_config_that_asks_for_code(fields: object) -> None:
    with pytest.raises(TrustError, match="code"):
        check_config(Path("config.json"), fields)


def test_plain_configs() -> None:
    check_config(Path("adapter_config.json"), {"auto_mapping": None, "auto_map": None})
    check_config(Path("added_tokens.json"), {"auto_map": 32001})
    check_config(
        Path("config.json"), {"attn_implementation": "sdpa", "x": [{}, 1, None, "auto_map"]}
    )
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    check_config(Path("model.safetensors.index.json"), index)


@pytest.mark.parametrize(
    "fields",
    [
        {"weight_map": {"a": "../model.safetensors"}},
        {"weight_map": {"a": "/model.safetensors"}},
        {"weight_map": {"a": "sub/model.safetensors"}},
        {"weight_map": {"a": "pytorch_model.bin"}},
        {"weight_map": {"a": 3}},
        {"weight_map": []},
        [],
    ],
)
def test_an_index_of_shards_elsewhere(fields: object) -> None:
    with pytest.raises(TrustError, match="weight"):
        check_config(Path("model.safetensors.index.json"), fields)


def test_names_and_suffixes() -> None:
    assert why_no_name("onnx/model.onnx") is None
    assert why_no_name("weights..safetensors") is None
    for name in ("x.safetensors", "config.json", "tokenizer.model", "chat_template.jinja"):
        check_suffix(Path(name))
    with pytest.raises(TrustError, match="pickled"):
        check_suffix(Path("optimizer.PT"))


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json"])
def test_any_word_may_be_a_token(name: str) -> None:
    contents = io.BytesIO(b'{"auto_map": {"the": 1}}')
    check_contents(Path(name), contents, {}, name)


# Graphs

LISTED = {"onnx/model.onnx", "onnx/weights.safetensors", "onnx/sub/more.safetensors", "other"}
ELSEWHERE = [
    "../x",
    "../other",
    "/etc/passwd",
    "sub/../weights.safetensors",
    "./weights.safetensors",
    "..\\x",
    "",
    "unlisted",
    "weights.safetensors\0",
    "*/_ORT_MEM_ADDR_/*",  # ONNX Runtime's mark for an address in memory
]


@pytest.mark.parametrize("location", ELSEWHERE)
@pytest.mark.parametrize("place", PLACES)
def test_a_graph_that_takes_weights_from_elsewhere(place: str, location: str) -> None:
    graph = PLACES[place](location).SerializeToString()
    with pytest.raises(TrustError, match="it takes weights from"):
        check_graph(PATH, graph, LISTED, "onnx/model.onnx")


@pytest.mark.parametrize("location", ["weights.safetensors", "sub/more.safetensors"])
def test_a_graph_with_listed_weights(location: str) -> None:
    for make in PLACES.values():
        check_graph(PATH, make(location).SerializeToString(), LISTED, "onnx/model.onnx")


@settings(deadline=None)
@given(
    st.binary(max_size=100)
    | st.sampled_from([m("a").SerializeToString() for m in PLACES.values()]).flatmap(
        lambda raw: st.integers(0, len(raw)).map(lambda n: raw[:n])
    )
)
def test_whatever_is_no_graph_is_a_trust_error(raw: bytes) -> None:
    with suppress(TrustError):
        check_graph(PATH, raw, LISTED, "onnx/model.onnx")


# Real bundles and real processes


def strace(folder: Path) -> list[str]:
    """The command that notes every open, or none where there is no strace."""
    found = shutil.which("strace")
    return (
        [found, "-f", "-qq", "-e", "trace=openat,open", "-o", str(folder / "opens")]
        if found
        else []
    )


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dear_batch", *arguments]


def run(words: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        words, capture_output=True, text=True, env=given, check=False, timeout=300
    )


@pytest.fixture(scope="module")
def generator(bundle: Make, checkpoint: Make) -> Path:
    model = checkpoint("llama31", causal=True, max_position_embeddings=1024)
    return bundle("llama31", model=str(model))


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory, texts: tuple[str, ...]) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"qid": f"q{i // 4}", "query": "a river", "docid": f"d{i}", "text": text[:80]}
        for i, text in enumerate(texts[:8])
    ]
    path = tmp_path_factory.mktemp("input") / "in.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.fixture
def job(candidates: str, tmp_path: Path) -> Callable[..., list[str]]:
    """The command of a job with those bundles."""

    def words(bundle: Path, listwise: Path | None = None) -> list[str]:
        spec = {
            "input": {"paths": [candidates]},
            "pointwise": {"bundle": str(bundle)},
            "output": {"folder": str(tmp_path / "out")},
            "execution": {"device": "cpu"},
        }
        if listwise:
            spec["listwise"] = {"bundle": str(listwise), "window": 3, "step": 2, "depth": 4}
        lines = []
        for table, values in spec.items():
            lines += [f"[{table}]", *(f"{k} = {json.dumps(v)}" for k, v in values.items())]
        (tmp_path / "job.toml").write_text("\n".join(lines))
        return command("run", str(tmp_path / "job.toml"))

    return words


def flipped(source: Path, target: Path, name: str) -> Path:
    """A copy with one bit of one file turned, near its middle."""
    shutil.copytree(source, target)
    with (target / name).open("r+b") as file:
        middle = (target / name).stat().st_size // 2
        file.seek(middle)
        (byte,) = file.read(1)
        file.seek(middle)
        file.write(bytes([byte ^ 1]))
    return target


def assert_only_checked(opens: Path, folder: Path) -> None:
    """Each open of a file below the folder is the check's own: nothing else refuses links."""
    lines = [line for line in opens.read_text().splitlines() if "O_DIRECTORY" not in line]
    names = {p.name for p in folder.rglob("*") if p.is_file()}
    seen = [
        line
        for line in lines
        if (found := re.search(r'"([^"]*)"', line))
        and (found[1].startswith(str(folder)) or found[1] in names)
    ]
    assert any(MANIFEST in line for line in seen)
    assert [line for line in seen if "O_NOFOLLOW" not in line] == []


PROBE = """
import sys
from dear_batch.bundle import open_bundle
from dear_batch.errors import TrustError
native = {"onnxruntime", "safetensors", "torch", "transformers"}
for folder in sys.argv[1:]:
    try:
        open_bundle(folder)
    except TrustError as error:
        print(error.exit_code, native & sys.modules.keys() or "")
"""


@pytest.mark.model
@pytest.mark.parametrize("task", ["pointwise", "listwise"])
def test_one_flipped_bit_in_each_file(
    task: str, bundle: Make, generator: Path, tmp_path: Path
) -> None:
    source = bundle("llama31") if task == "pointwise" else generator
    names = [MANIFEST, *open_bundle(source).manifest.files]
    assert len(names) >= 5
    folders = [flipped(source, tmp_path / str(i), name) for i, name in enumerate(names)]
    done = run([*strace(tmp_path), sys.executable, "-c", PROBE, *map(str, folders)])
    assert done.stdout.split("\n")[:-1] == ["77 "] * len(names), done.stderr
    if (tmp_path / "opens").exists():
        for folder in folders:
            assert_only_checked(tmp_path / "opens", folder)


@pytest.mark.model
@pytest.mark.parametrize("stage", ["pointwise", "listwise"])
def test_a_job_with_a_flipped_bit_ends_with_77_and_opens_nothing(
    stage: str, bundle: Make, generator: Path, job: Callable[..., list[str]], tmp_path: Path
) -> None:
    good = bundle("llama31")
    if stage == "pointwise":
        bad = flipped(good, tmp_path / "bad", "onnx/weights.safetensors")
        words = job(bad)
    else:
        bad = flipped(generator, tmp_path / "bad", "model.safetensors")
        words = job(good, bad)
    done = run([*strace(tmp_path), *words])
    assert done.returncode == 77, done.stderr
    assert "its sha256 differs" in done.stderr
    assert not (tmp_path / "out" / "run.trec").exists()
    if (tmp_path / "opens").exists():
        assert_only_checked(tmp_path / "opens", bad)


def relisted(folder: Path, name: str) -> None:
    """The manifest's hash of a changed file is true again: its maker is hostile."""
    fields = json.loads((folder / MANIFEST).read_text())
    fields.pop("sha256", None)
    record = hash_file(folder / name)
    fields["files"][name] = {"bytes": record.bytes, "sha256": record.sha256}
    (folder / MANIFEST).write_text(json.dumps(fields))


@pytest.mark.model
def test_a_graph_of_a_real_bundle_with_weights_elsewhere(bundle: Make, tmp_path: Path) -> None:
    import onnx

    folder = shutil.copytree(bundle("llama31"), tmp_path / "bundle")
    for name in ("onnx/packed.onnx", "onnx/model.onnx"):
        model = onnx.load(folder / name, load_external_data=False)
        found = [t for t in model.graph.initializer if t.external_data]
        (entry,) = (e for e in found[-1].external_data if e.key == "location")
        entry.value = "../../weights.safetensors"
        (folder / name).write_bytes(model.SerializeToString())
        relisted(folder, name)
        with pytest.raises(TrustError, match=r"takes weights from '\.\./\.\./weights"):
            open_bundle(folder)
        entry.value = "weights.safetensors"
        (folder / name).write_bytes(model.SerializeToString())
        relisted(folder, name)
        assert open_bundle(folder).manifest.task == "pointwise"


@pytest.mark.model
@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_weights_that_are_swapped_while_they_are_loaded(
    engine: str, bundle: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dear_batch.pointwise import onnx_scorer, torch_scorer
    from dear_batch.pointwise.scorer import open_scorer
    from dear_batch.pointwise.selection import Choice

    folder = shutil.copytree(bundle("llama31"), tmp_path / "bundle")
    module, name = {
        "onnxruntime": (onnx_scorer, "open_session"),
        "torch": (torch_scorer, "model_from_bundle"),
    }[engine]
    load = getattr(module, name)

    def swapped(*arguments: Any) -> Any:
        weights = folder / "onnx" / "weights.safetensors"
        shutil.copy(weights, folder / "other")
        (folder / "other").replace(weights)
        return load(*arguments)

    monkeypatch.setattr(module, name, swapped)
    with pytest.raises(TrustError, match="changed while it was being loaded"):
        open_scorer(open_bundle(folder), Choice(engine, "cpu"))


@pytest.mark.model
def test_a_listwise_model_that_is_swapped_while_it_is_loaded(
    generator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dear_batch.listwise import ranker
    from dear_batch.specs import ListwiseSpec

    folder = shutil.copytree(generator, tmp_path / "bundle")
    bundle = open_bundle(folder)
    load = ranker.LanguageModel.from_bundle

    def swapped(*arguments: Any) -> Any:
        shutil.copy(folder / "tokenizer.json", folder / "other")
        (folder / "other").replace(folder / "tokenizer.json")
        return load(*arguments)

    monkeypatch.setattr(ranker.LanguageModel, "from_bundle", swapped)
    with pytest.raises(TrustError, match="changed while it was being loaded"):
        ranker.ListwiseRanker.open(bundle, ListwiseSpec(str(folder), window=3, depth=4), "cpu")


# No network

WATCH = """
import os, sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        with open(os.environ["WATCHED"], "a") as file:
            print(event, arguments[1:], file=file)
        raise OSError("there is no network here")
sys.addaudithook(watch)
"""


@pytest.fixture
def watched(tmp_path: Path) -> tuple[dict[str, str], Path]:
    """An environment in which every Python process notes what it connects to, and where."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WATCH)
    log = tmp_path / "connections"
    log.touch()
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    return {"PYTHONPATH": path, "WATCHED": str(log), "HF_HOME": str(tmp_path / "hf")}, log


def no_network() -> list[str]:
    """The prefix that takes all networks away from a process, where this user may."""
    for words in (["unshare", "-n"], ["unshare", "-rn"]):
        if shutil.which("unshare") and run([*words, "true"]).returncode == 0:
            return words
    return []


def test_the_watch_sees_a_connection(watched: tuple[dict[str, str], Path]) -> None:
    environment, log = watched
    code = "import socket; socket.create_connection(('127.0.0.1', 9))"
    assert run([*no_network(), sys.executable, "-c", code], **environment).returncode == 1
    assert "socket.getaddrinfo" in log.read_text()


@pytest.mark.model
def test_a_job_of_two_stages_connects_to_nothing(
    bundle: Make,
    generator: Path,
    job: Callable[..., list[str]],
    watched: tuple[dict[str, str], Path],
    tmp_path: Path,
) -> None:
    environment, log = watched
    done = run([*no_network(), *job(bundle("llama31"), generator)], **environment)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "out" / "run.trec").read_text().splitlines()) == 8
    assert log.read_text() == ""
