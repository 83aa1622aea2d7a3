"""A TensorRT plan on the GPU, by whichever of the two libraries it was built with.

What differs between them is here, and so is how they say that memory ran out. Knows nothing of
batches.

Not executed here: needs a GPU. Checked against the libraries' own types.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from shlex import quote
from typing import TYPE_CHECKING, Any

from dear_batch.errors import ConfigurationError

if TYPE_CHECKING:
    import tensorrt_rtx as trt

    from dear_batch.bundle import Bundle, Engine

# What errors of CUDA and of TensorRT say when memory ran out, and only then.
_OUT_OF_MEMORY = ("CUDA_ERROR_OUT_OF_MEMORY", "out of memory", "OutOfMemory")


@dataclass(frozen=True)
class LoadedPlan:
    """A plan on the GPU; what it needs to live; `said` collects what TensorRT calls an error.

    `graphs`: whether CUDA graphs are for us to capture (TensorRT for RTX does it by itself).
    """

    engine: "trt.ICudaEngine"
    new_context: "Callable[[], trt.IExecutionContext | None]"
    graphs: bool
    said: list[str]
    owners: tuple[object, ...] = ()


def on_gpu(bundle: "Bundle", plan: "Engine", data: Any, said: list[str]) -> LoadedPlan:
    """Put `data`, the bytes of one of a bundle's plans, on the current GPU.

    Raises:
        ConfigurationError: TensorRT refuses them.
        RuntimeError: it says that memory ran out, see `memory_errors`.
    """
    if plan.flavour == "tensorrt_rtx":
        import tensorrt_rtx as trt
    else:
        import tensorrt as trt  # type: ignore[no-redef,unused-ignore]

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                said.append(msg)

    logger = Logger()
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        if _is_shortage("; ".join(said)):
            raise refused(said)
        raise ConfigurationError(
            f"TensorRT refuses the engine {plan}.",
            where="; ".join(said),
            next_step=f"dear-batch export {quote(str(bundle.folder))} --engine tensorrt, which "
            "builds it again; --engine onnxruntime does without it",
        )
    user_managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    if plan.flavour == "tensorrt":
        new_context = lambda: engine.create_execution_context(user_managed)  # noqa: E731
        return LoadedPlan(engine, new_context, graphs=True, said=said, owners=(logger, runtime))
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(user_managed)
    config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    # Kernels are compiled where they run: contexts share them.
    config.set_runtime_cache(config.create_runtime_cache())
    new_context = lambda: engine.create_execution_context(config)  # noqa: E731
    return LoadedPlan(
        engine, new_context, graphs=False, said=said, owners=(logger, runtime, config)
    )


@contextmanager
def memory_errors(said: list[str]) -> Iterator[None]:
    """Raise MemoryError where a block ends because the GPU has no more; other errors stay.

    Errors of CUDA itself last: the process is lost, and nothing is tried again in it.
    """
    said.clear()
    try:
        yield
    except Exception as error:
        if not _is_shortage(str(error)):
            raise
        raise MemoryError(str(error)) from error


def _is_shortage(text: str) -> bool:
    return any(sign in text for sign in _OUT_OF_MEMORY)


def refused(said: list[str]) -> RuntimeError:
    """The error for a call that TensorRT did not do."""
    return RuntimeError("TensorRT: " + ("; ".join(said) or "it gave no reason"))
