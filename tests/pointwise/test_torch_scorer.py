"""What PyTorch says when memory ran out, told from all else that it says."""

import pytest

pytest.importorskip("torch", reason="the engine under test")

import torch

from dear_batch.torch_memory import memory_errors

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


@pytest.mark.gpu
def test_a_gpu_that_is_really_full() -> None:
    with pytest.raises(MemoryError, match="CUDA out of memory"), memory_errors():
        torch.empty(1 << 45, dtype=torch.int8, device="cuda")
    with memory_errors():
        assert torch.ones(3, device="cuda").sum().item() == 3
