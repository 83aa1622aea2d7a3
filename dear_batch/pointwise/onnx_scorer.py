"""Scores batches with ONNX Runtime, on CPU or CUDA. Never imports torch.

Two graphs: `packed.onnx` takes packed rows; `model.onnx` takes one padded pair a row and
serves `final-position` pooling, which reads a padding token.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, RuntimeException

from dear_batch.errors import ConfigurationError
from dear_batch.pointwise.recipe import Recipe
from dear_batch.pointwise.rows import Batch, Layout, packed_arrays, padded_arrays

if TYPE_CHECKING:
    from dear_batch.bundle import Bundle

# A provider that cannot be loaded is told by an error of ours, not by lines of the library's log.
ort.set_default_logger_severity(4)

# (row_tokens, batch_tokens). On CPU one row a call never pads. On a GPU a call must be large to
# fill it. A throughput benchmark has yet to choose both.
BUDGETS = {"cpu": (512, 512), "cuda": (1024, 16384)}

# What the exceptions `Fail` and `RuntimeException` say when memory ran out, and only then: both
# are raised for other faults too.
_OUT_OF_MEMORY = (
    "Failed to allocate memory for requested buffer of size",  # its arena, CPU and CUDA
    "std::bad_alloc",  # what kernels allocate past the arena
    "CUDA failure 2: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


class PackedOnnxScorer:
    """The packed graph: int32 rows in, one fp32 score a document out."""

    engine = "onnxruntime"

    def __init__(self, graph: Path, recipe: Recipe, device: str) -> None:
        self._session, self.device = open_session(graph, device)
        self._pad_id = recipe.pad_id
        row_tokens, batch_tokens = BUDGETS[self.device.split(":")[0]]
        self.layout = Layout(True, row_tokens, batch_tokens)

    def score(self, batch: Batch) -> NDArray[np.float32]:
        """Raw logits, scores_N."""
        arrays = packed_arrays(batch, self._pad_id)
        feeds = {
            "tokens": arrays.tokens_RT,
            "positions": arrays.positions_RT,
            "groups": arrays.groups_RT,
            "segments": arrays.segments_RT,
            "pooled": arrays.pooled_N,
        }
        return run(self._session, "scores", feeds)


class PaddedOnnxScorer:
    """The standard graph: one padded pair a row, pooled inside the graph."""

    engine = "onnxruntime"

    def __init__(self, graph: Path, recipe: Recipe, device: str) -> None:
        self._session, self.device = open_session(graph, device)
        self._pad_id = recipe.pad_id
        row_tokens, batch_tokens = BUDGETS[self.device.split(":")[0]]
        fixed = recipe.max_length if recipe.pooling == "final-position" else None
        self.layout = Layout(False, row_tokens, batch_tokens, fixed)

    def score(self, batch: Batch) -> NDArray[np.float32]:
        """Raw logits, scores_N."""
        input_ids_RT, attention_mask_RT = padded_arrays(batch, self._pad_id)
        feeds = {"input_ids": input_ids_RT, "attention_mask": attention_mask_RT}
        return run(self._session, "logits", feeds)[:, 0]


def run(session: ort.InferenceSession, output: str, feeds: dict[str, Any]) -> NDArray[np.float32]:
    """One output of a session.

    Raises:
        MemoryError: there was not enough; the session can be used again.
    """
    with _memory_errors():
        (found,) = session.run([output], feeds)
    return np.asarray(found, np.float32)


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Raise MemoryError where a block ends because memory ran out; other errors stay."""
    try:
        yield
    except (Fail, RuntimeException) as error:
        if not any(text in str(error) for text in _OUT_OF_MEMORY):
            raise
        raise MemoryError(str(error)) from error


def onnx_scorer(bundle: "Bundle", device: str) -> PackedOnnxScorer | PaddedOnnxScorer:
    """The scorer that the bundle's recipe calls for.

    Raises:
        TrustError: the bundle was changed while it was being loaded.
    """
    recipe = bundle.recipe
    scorer: PackedOnnxScorer | PaddedOnnxScorer
    if recipe.pooling == "final-position":
        scorer = PaddedOnnxScorer(bundle.file("onnx/model.onnx"), recipe, device)
    else:
        scorer = PackedOnnxScorer(bundle.file("onnx/packed.onnx"), recipe, device)
    bundle.check_unchanged()
    return scorer


def open_session(graph: Path, device: str) -> tuple[ort.InferenceSession, str]:
    """An inference session on `auto`, `cpu`, `cuda` or `cuda:N`, and the device it got.

    Raises:
        ConfigurationError: CUDA was asked for and ONNX Runtime could not use it.
        MemoryError: there is not enough for the graph's weights.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what fails is told by an exception
    # Rows differ in length from call to call, so planned memory patterns only pile up.
    options.enable_mem_pattern = False
    cuda = _cuda_device(device)
    if cuda is None:
        return _session(graph, options, ["CPUExecutionProvider"]), "cpu"
    # CUDA libraries that were installed by pip are not on the loader's path. What is missing
    # would be printed to stdout; it goes into the error instead.
    missing = io.StringIO()
    with redirect_stdout(missing):
        ort.preload_dlls()
    # TF32, the default, keeps 10 bits of fp32: the parity gate promises all.
    settings = {"device_id": cuda, "use_tf32": 0}
    providers = [("CUDAExecutionProvider", settings), "CPUExecutionProvider"]
    session = _session(graph, options, providers)
    if session.get_providers()[0] == "CUDAExecutionProvider":
        return session, f"cuda:{cuda}"
    if device == "auto":
        return session, "cpu"
    raise ConfigurationError(
        f"ONNX Runtime could not use CUDA for --device {device}.",
        where=missing.getvalue().partition("\n")[0],
        valid="--device cpu, or a machine with an NVIDIA driver and CUDA libraries",
        next_step='python -c "import onnxruntime as o; print(o.get_available_providers())"',
    )


def _session(
    graph: Path, options: ort.SessionOptions, providers: list[Any]
) -> ort.InferenceSession:
    with _memory_errors():
        return ort.InferenceSession(graph, options, providers=providers)


def _cuda_device(device: str) -> int | None:
    """The CUDA device number to try, or None for the CPU."""
    if device == "cpu":
        return None
    if device == "auto":
        # The GPU wheel lists CUDA on machines without a GPU; trying it there logs an error.
        return 0 if Path("/proc/driver/nvidia").exists() else None
    return int(device.partition(":")[2] or 0)
