"""PyTorch's ways of saying that memory ran out, as Python's own. Any other error stays as it is."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"  # c10/core/impl/alloc_cpu.cpp


@contextmanager
def memory_errors() -> Iterator[None]:
    """Raise MemoryError where a block ends because a device or the machine has no more memory.

    A device's allocator has by then given back all that it held without need. Errors of CUDA
    itself are no shortage: they last, and the process is lost.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and _CPU_ALLOCATOR not in str(error):
            raise
        raise MemoryError(str(error)) from error
