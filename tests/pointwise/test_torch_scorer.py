"""In what PyTorch computes, and what it says when memory ran out."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the engine under test")

import torch
from safetensors.torch import load_file, save_file

from dear_batch.bundle import Bundle, open_bundle
from dear_batch.errors import ConfigurationError
from dear_batch.pointwise import torch_scorer
from dear_batch.pointwise.scorer import score_pairs
from dear_batch.pointwise.torch_scorer import TorchScorer, model_from_bundle
from dear_batch.torch_memory import memory_errors
from tests.pointwise.test_scorer import pairs_of
from tests.pointwise.test_selection import bundle_with

MORE_THAN_ADDRESSES = 1 << 60


def test_the_cpu_allocator_that_gave_up() -> None:
    with pytest.raises(MemoryError, match="DefaultCPUAllocator"), memory_errors():
        torch.empty(MORE_THAN_ADDRESSES, dtype=torch.int8)


def test_a_device_that_is_full() -> None:
    with pytest.raises(MemoryError, match="Tried to allocate"), memory_errors():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def test_pythons_own_stays() -> None:
    with pytest.raises(MemoryError), memory_errors():
        bytearray(MORE_THAN_ADDRESSES)


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: an illegal memory access was encountered",
        "mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)",
    ],
)
def test_another_error_is_no_shortage(said: str) -> None:
    error = RuntimeError(said)
    with pytest.raises(RuntimeError) as caught, memory_errors():
        raise error
    assert caught.value is error


def save(bundle: Bundle, folder: Path, dtype: torch.dtype) -> Path:
    """The bundle's weights in another dtype, with what only fp16 graphs have."""
    weights = load_file(bundle.file("onnx/weights.safetensors"))
    stored = {name: tensor.to(dtype) for name, tensor in weights.items()}
    stored["model.layers.0.mlp.down_proj.scale"] = torch.ones(1)
    (folder / "onnx").mkdir()
    shutil.copy(bundle.file("config.json"), folder)
    save_file(stored, folder / "onnx" / "weights.safetensors")
    return folder


@pytest.mark.model
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_16_bits_are_computed_in_fp32_on_a_cpu(
    dtype: torch.dtype, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    opened = open_bundle(bundle("llama31"))
    pairs = pairs_of(opened.folder)
    expected_N = score_pairs(TorchScorer(model_from_bundle(opened), opened.recipe), pairs)
    typed = replace(opened, folder=save(opened, tmp_path, dtype))
    scorer = TorchScorer(model_from_bundle(typed), opened.recipe)
    assert scorer.precision == "fp32"
    found_N = score_pairs(scorer, pairs)
    assert 0 < np.abs(found_N - expected_N).max() < 0.05 * np.std(expected_N)


@pytest.mark.model
def test_bf16_keeps_the_head_and_the_positions_in_fp32(bundle: Callable[..., Path]) -> None:
    """What a GPU computes, on a CPU."""
    opened = open_bundle(bundle("llama31"))
    pairs = pairs_of(opened.folder)
    expected_N = score_pairs(TorchScorer(model_from_bundle(opened), opened.recipe), pairs)
    model = model_from_bundle(opened, "cpu", torch.bfloat16)
    scorer = TorchScorer(model, opened.recipe)
    assert scorer.precision == "bf16"
    assert model.score.weight.dtype == torch.float32
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    found_N = score_pairs(scorer, pairs)
    assert found_N.dtype == np.float32
    assert len(set(found_N.tolist())) == len(set(expected_N.tolist()))  # bf16 scores would tie
    assert np.abs(found_N - expected_N).max() < 0.1 * np.std(expected_N)


@pytest.mark.model
def test_a_gpu_that_is_not_there(bundle: Callable[..., Path]) -> None:
    with pytest.raises(ConfigurationError, match="no GPU for --device cuda:99"):
        TorchScorer.from_bundle(open_bundle(bundle("llama31")), "cuda:99")


@pytest.mark.parametrize(("device", "current"), [("cpu", []), ("cuda:1", [1]), ("cuda", [0])])
def test_the_gpu_is_the_current_one_before_anything_is_on_it(
    device: str, current: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated: a second GPU is needed to see the context on the first."""
    made = list[int]()

    class LoadingError(Exception):
        pass

    def load(*_: object) -> None:
        assert made == current
        raise LoadingError

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    monkeypatch.setattr(torch_scorer, "model_from_bundle", load)
    with pytest.raises(LoadingError):
        TorchScorer.from_bundle(bundle_with(), device)


@pytest.mark.gpu
def test_a_gpu_that_is_really_full() -> None:
    with pytest.raises(MemoryError, match="CUDA out of memory"), memory_errors():
        torch.empty(1 << 45, dtype=torch.int8, device="cuda")
    with memory_errors():
        assert torch.ones(3, device="cuda").sum().item() == 3
