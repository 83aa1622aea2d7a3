"""Plans built for real by TensorRT for RTX, which needs no GPU to build."""

import resource
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tensorrt_rtx as trt

from dear_batch.bundle import open_bundle
from dear_batch.errors import ConfigurationError, OutputError, TryAgainError
from dear_batch.export import building
from dear_batch.export.building import built
from dear_batch.export.graphs import packed_graph
from dear_batch.export.tensorrt import (
    Order,
    _Building,
    ahead_of_time,
    plan_from_onnx,
    set_timings,
    timings_of,
)
from dear_batch.pointwise.profiles import Profile, Span, lay_out
from tests.conftest import ROOT

pytestmark = pytest.mark.model
Make = Callable[..., Path]
PROFILES = lay_out(256, 512)[:1]
CASES = [("llama31", sm) for sm in ("sm_80", "sm_86", "sm_89", "sm_120")]
CASES += [("llama32", "sm_89")]


def order(graph: Path, tmp_path: Path, sm: str = "sm_89", **settings: Any) -> Order:
    return Order(graph, tmp_path / "plan", "tensorrt_rtx", sm, PROFILES, **settings)


def parsed(graph: Path) -> tuple[Any, ...]:
    """The network that TensorRT makes of a graph, and what it must not outlive."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(graph))
    return network, parser, builder


def layer_types(network: Any) -> dict[str, Counter[str]]:
    """Kind of layer → the types of what it takes and gives; shape arithmetic left out."""
    found: dict[str, Counter[str]] = {}
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        tensors = [layer.get_input(n) for n in range(layer.num_inputs)] + [layer.get_output(0)]
        kinds = {t.dtype for t in tensors if t is not None}
        kinds &= {trt.float32, trt.float16, trt.bfloat16}
        if kinds:
            names = "+".join(sorted(kind.name for kind in kinds))
            found.setdefault(layer.type.name, Counter())[names] += 1
    return found


@pytest.mark.parametrize(("style", "sm"), CASES)
def test_fp16_graphs_build_ahead_of_time(style: str, sm: str, packed: Make, tmp_path: Path) -> None:
    shares: list[float] = []
    found = plan_from_onnx(order(packed(style), tmp_path, sm), shares.append)
    assert found.version == trt.__version__
    assert found.seconds > 0
    assert (tmp_path / "plan").stat().st_size > packed(style).with_name(
        "weights.safetensors"
    ).stat().st_size
    assert shares == sorted(shares)
    assert 0 < shares[0] < 0.1
    assert 0.8 < shares[-1] <= 1


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fp16 graph of a real model, out of the demo's bundle."""
    folder = ROOT / ".demo" / "bundle"
    if not (folder / "bundle.json").is_file():
        pytest.skip("there is no bundle of SmolLM2-135M (make demo)")
    return packed_graph(open_bundle(folder), "fp16", tmp_path_factory.mktemp("smollm2"))


@pytest.mark.parametrize("sm", ["sm_80", "sm_86", "sm_89", "sm_120"])
def test_smollm2_builds_ahead_of_time(sm: str, smollm2: Path, tmp_path: Path) -> None:
    built(order(smollm2, tmp_path, sm), lambda _share: None)
    weights = smollm2.with_name("weights.safetensors").stat().st_size
    assert 0.95 * weights < (tmp_path / "plan").stat().st_size < 1.3 * weights


def test_smollm2_is_typed_layer_by_layer(smollm2: Path) -> None:
    network, *_alive = parsed(smollm2)
    found = layer_types(network)
    products = found.pop("MATRIX_MULTIPLY")
    assert products.pop("HALF") == 9 * 30
    assert set(products) == {"FLOAT"}
    for kind in ("SOFTMAX", "REDUCE", "UNARY", "ELEMENTWISE", "SELECT"):
        assert set(found[kind]) == {"FLOAT"}, kind


@pytest.mark.parametrize(("precision", "half"), [("fp16", "HALF"), ("bf16", "BF16")])
def test_products_are_16_bit_and_all_else_is_fp32(precision: str, half: str, packed: Make) -> None:
    """Traps 4 and 5: norms, residual stream, softmax, rotary tables and head stay fp32."""
    network, *_alive = parsed(packed("llama31", precision))
    found = layer_types(network)
    products = found.pop("MATRIX_MULTIPLY")
    layers = 2
    # Seven projections and attention's two a layer; the head, and the rotary angles, are fp32.
    assert products.pop(half) == 9 * layers
    assert set(products) == {"FLOAT"}
    assert 1 <= products["FLOAT"] <= 2
    for kind in ("SOFTMAX", "REDUCE", "UNARY", "ELEMENTWISE", "SELECT"):
        assert set(found[kind]) == {"FLOAT"}, kind
    assert network.num_outputs == 1
    assert network.get_output(0).dtype == trt.float32
    inputs = [network.get_input(n) for n in range(network.num_inputs)]
    assert {tensor.dtype for tensor in inputs} == {trt.int32}


def test_attention_is_one_kernel(bundle: Make, tmp_path: Path) -> None:
    """Else its scores go to memory: fp32 before the softmax and fp16 after it."""
    rows, heads, tokens = 16, 4, 1024
    profile = Profile(Span(1, rows, rows), Span(1, tokens, tokens), Span(1, 10, tokens))
    scratch = {}
    for precision in ("fp16", "fp32"):
        folder, plan = tmp_path / precision, tmp_path / f"{precision}.plan"
        folder.mkdir()
        graph = packed_graph(open_bundle(bundle("llama31")), precision, folder)
        found = plan_from_onnx(
            Order(graph, plan, "tensorrt_rtx", "sm_89", (profile,)), lambda _share: None
        )
        (scratch[precision],) = found.scratch_bytes
    unfused = rows * heads * tokens * tokens * 6
    assert scratch["fp16"] < unfused / 2, scratch
    assert scratch["fp32"] > unfused / 2, scratch  # so that the figure is known to tell


def test_the_list_of_targets_is_the_modules_own() -> None:
    assert {"sm_75", "sm_80", "sm_86", "sm_89", "sm_120"} <= {*ahead_of_time("tensorrt_rtx")}


def test_a_graph_that_is_not_the_packed_one_is_refused(
    bundle: Make, packed: Make, tmp_path: Path
) -> None:
    other = bundle("llama31") / "onnx" / "model.onnx"
    with pytest.raises(ConfigurationError, match="another graph than the packed one") as caught:
        plan_from_onnx(order(other, tmp_path), lambda _share: None)
    assert "attention_mask, input_ids" in caught.value.where
    with pytest.raises(ConfigurationError, match="does not build for sm_90"):
        plan_from_onnx(order(packed("llama31"), tmp_path, "sm_90"), lambda _share: None)
    assert list(tmp_path.iterdir()) == []


def test_what_the_parser_does_not_take_is_told_in_one_error(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in ("a", "c")]
    nodes = [
        helper.make_node("StringNormalizer", ["a"], ["b"]),
        helper.make_node("NoSuchOperator", ["b"], ["c"], name="odd one"),
    ]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph), tmp_path / "odd.onnx")
    with pytest.raises(ConfigurationError, match="does not take the graph") as caught:
        built(order(tmp_path / "odd.onnx", tmp_path), lambda _share: None)
    for word in ("sm_89", "StringNormalizer", "NoSuchOperator odd one", "UNSUPPORTED_NODE"):
        assert word in caught.value.where


def test_a_damaged_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"no graph")
    with pytest.raises(ConfigurationError, match="does not take the graph"):
        built(order(tmp_path / "x.onnx", tmp_path), lambda _share: None)


def test_the_process_imports_nothing_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.onnx").write_bytes(b"no graph")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "json.py").write_text("import os; os._exit(7)")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ConfigurationError, match="does not take the graph"):
        built(order(tmp_path / "x.onnx", tmp_path), lambda _share: None)


def test_the_process_builds_the_same(packed: Make, tmp_path: Path) -> None:
    shares: list[float] = []
    found = built(order(packed("llama31"), tmp_path, level=1), shares.append)
    assert found.version == trt.__version__
    assert len(found.scratch_bytes) == len(PROFILES)
    assert (tmp_path / "plan").stat().st_size > 0
    assert 1 < len(shares) <= 100


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("os.kill(os.getpid(), 9)", "signal 9"),
        ("print('last words', file=sys.stderr); sys.stderr.flush(); os._exit(3)", "exit code 3"),
    ],
)
def test_a_process_that_dies_is_worth_another_try(
    body: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexec {building.sys.executable} -c 'import os, sys; {body}'\n")
    python.write_text(python.read_text().replace("'last words'", '"last words"'))
    python.chmod(0o755)
    monkeypatch.setattr(building.sys, "executable", str(python))
    with pytest.raises(TryAgainError, match=expected) as caught:
        built(order(tmp_path / "x.onnx", tmp_path), lambda _share: None)
    assert ("more memory" in caught.value.next_step) == (expected == "signal 9")
    assert expected == "signal 9" or caught.value.where == "last words"


def test_too_little_memory_is_worth_another_try(tmp_path: Path) -> None:
    said = "Error Code 2: OutOfMemory (Requested size was 17179869184 bytes.)"
    with pytest.raises(TryAgainError, match="not enough memory to build a plan for sm_89"):
        building._built(order(tmp_path, tmp_path), {"memory": said})


def test_a_full_disk_is_told_as_such(packed: Make, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(OutputError, match="Cannot write plan: File too large"):
            plan_from_onnx(order(packed("llama31"), tmp_path), lambda _share: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_fp32_products_are_not_tf32(packed: Make, tmp_path: Path) -> None:
    build = _Building(order(packed("llama31"), tmp_path))
    assert build._config.get_flag(trt.BuilderFlag.TF32)
    build.parse()
    build.configure(lambda _share: None)
    assert not build._config.get_flag(trt.BuilderFlag.TF32)


def test_memory_is_told_from_other_errors(packed: Make, tmp_path: Path) -> None:
    """TensorRT says so in its log alone; the words are its own."""
    build = _Building(order(packed("llama31"), tmp_path))
    build.said.hear("Error Code 2: OutOfMemory (no further information)", error=True)
    with pytest.raises(MemoryError, match="OutOfMemory"):
        build._check(False, "could not build a plan")


class Timings:
    """A builder's configuration as `tensorrt` has it: it refuses what it does not like."""

    def __init__(self, *taken: bytes) -> None:
        self.taken = taken
        self.cache: Any = None

    def create_timing_cache(self, known: bytes) -> Any:
        return None if known == b"unreadable" else SimpleNamespace(serialize=lambda: known)

    def set_timing_cache(self, cache: Any, *, ignore_mismatch: bool) -> bool:
        good = not ignore_mismatch and cache.serialize() in self.taken
        self.cache = cache if good else self.cache
        return good

    def get_timing_cache(self) -> Any:
        return self.cache


@pytest.mark.parametrize(
    ("known", "taken", "kept"),
    [
        (b"of this GPU", (b"of this GPU", b""), b"of this GPU"),
        (b"of another GPU", (b"",), b""),
        (b"unreadable", (b"",), b""),
        (b"of another GPU", (), b""),
    ],
)
def test_timings_that_are_refused_do_not_fail_a_build(
    known: bytes, taken: tuple[bytes, ...], kept: bytes
) -> None:
    config = Timings(*taken)
    set_timings(config, known)
    assert (config.cache is None) == (not taken)
    assert timings_of(config) == kept
