"""What ONNX Runtime itself refuses; `bundle` refuses the rest before a graph is opened."""

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from dear_batch.errors import ConfigurationError
from dear_batch.pointwise.onnx_scorer import open_session, run


def graph_with_weights_at(location: str, path: Path) -> None:
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4])
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        weight.external_data.add(key=key, value=value)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [value("x", TensorProto.FLOAT, [4])],
        [value("y", TensorProto.FLOAT, [4])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path.write_bytes(model.SerializeToString())


def test_weights_beside_the_graph_are_read(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    graph_with_weights_at("w.bin", tmp_path / "g.onnx")
    session = open_session(tmp_path / "g.onnx", "cpu")
    (found,) = session.run(None, {"x": np.ones(4, np.float32)})
    assert found.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("absolute", [False, True])
def test_weights_outside_the_folder_are_refused(tmp_path: Path, absolute: bool) -> None:
    """External-data paths of a foreign graph are an attack (trap 27)."""
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(16))
    folder = tmp_path / "onnx"
    folder.mkdir()
    graph_with_weights_at(str(secret) if absolute else "../secret", folder / "g.onnx")
    with pytest.raises(Exception, match=r"(?i)external|path|directory"):
        open_session(folder / "g.onnx", "cpu")


@pytest.mark.skipif(
    Path("/proc/driver/nvidia").exists(), reason="this machine has an NVIDIA driver"
)
def test_cuda_without_a_gpu_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(16))
    graph_with_weights_at("w.bin", tmp_path / "g.onnx")
    with pytest.raises(ConfigurationError, match="could not use CUDA"):
        open_session(tmp_path / "g.onnx", "cuda:0")


def test_a_graph_in_bf16_is_no_matter_for_a_cpu(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    inputs = [value(name, TensorProto.BFLOAT16, [2, 2]) for name in "ab"]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["a", "b"], ["y"])],
        "g",
        inputs,
        [value("y", TensorProto.BFLOAT16, [2, 2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    (tmp_path / "g.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ConfigurationError, match="in its precision here") as caught:
        open_session(tmp_path / "g.onnx", "cpu")
    assert "--engine torch" in caught.value.valid


def expanding(path: Path) -> Path:
    """A graph that repeats a number as often as it is asked to."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Expand", ["x", "shape"], ["y"])],
        "g",
        [value("x", TensorProto.FLOAT, [1]), value("shape", TensorProto.INT64, ["k"])],
        [value("y", TensorProto.FLOAT, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def test_memory_that_the_arena_does_not_get(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    session = open_session(expanding(tmp_path / "g.onnx"), "cpu")

    def expand(*shape: int) -> int:
        feeds = {"x": np.ones(1, np.float32), "shape": np.array(shape, np.int64)}
        return int(run(session, "y", feeds, "cpu").sum())

    with pytest.raises(MemoryError, match="Failed to allocate memory for requested buffer"):
        expand(1 << 46)  # 256 TiB, twice what x86-64 can address
    assert expand(1 << 10) == 1 << 10  # the session goes on
    # The same kind of exception, and no shortage: a size that is no number.
    with pytest.raises(RuntimeError, match="Integer overflow"):
        expand(1 << 40, 1 << 40)
    assert capfd.readouterr().err == ""
