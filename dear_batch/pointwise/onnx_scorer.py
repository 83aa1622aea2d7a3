"""Scores batches with ONNX Runtime, on CPU or CUDA. Never imports torch.

Two graphs: `packed.onnx` takes packed rows; `model.onnx` takes one padded pair a row and
serves `final-position` pooling, which reads a padding token. Inputs and outputs of a graph are
the same in every precision.

CUDA is not executed here: needs a GPU.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, RuntimeException
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NotImplementedByOrt

from dear_batch.errors import ConfigurationError
from dear_batch.pointwise.recipe import Recipe
from dear_batch.pointwise.rows import (
    Batch,
    Layout,
    packed_arrays,
    padded_arrays,
    scores_of_documents,
)
from dear_batch.pointwise.scorer import OneAtATime

if TYPE_CHECKING:
    from dear_batch.bundle import Bundle, Precision

# A provider that cannot be loaded is told by an error of ours, not by lines of the library's log.
ort.set_default_logger_severity(4)

# (row_tokens, batch_tokens), where `run/budgets.py` finds no better ones. On CPU one row a call
# never pads. On a GPU a call must be large to fill it.
BUDGETS = {"cpu": (256, 256), "cuda": (1024, 16384)}

# What the exceptions `Fail`, `RuntimeException` and, from bound inputs, `RuntimeError` say when
# memory ran out, and only then: all are raised for other faults too.
_OUT_OF_MEMORY = (
    "Failed to allocate memory for requested buffer of size",  # its arena, CPU and CUDA
    "std::bad_alloc",  # what kernels allocate past the arena
    "CUDA failure 2: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


class PackedOnnxScorer(OneAtATime):
    """The packed graph: int32 rows in, one fp32 score a document out."""

    engine = "onnxruntime"

    def __init__(
        self, graph: Path, recipe: Recipe, device: str, precision: "Precision" = "fp32"
    ) -> None:
        self._session = open_session(graph, device)
        self.device, self.precision = device, precision
        self._pad_id = recipe.pad_id
        row_tokens, batch_tokens = BUDGETS[_kind(device)]
        self.layout = Layout(True, row_tokens, batch_tokens)

    def score(self, batch: Batch) -> NDArray[np.float32]:
        """Raw logits, scores_N."""
        arrays = packed_arrays(batch, self._pad_id)
        feeds = {
            "tokens": arrays.tokens_RT,
            "positions": arrays.positions_RT,
            "groups": arrays.groups_RT,
            "segments": arrays.segments_RT,
            "pooled": arrays.pooled_RP,
        }
        return scores_of_documents(run(self._session, "scores", feeds, self.device), batch)


class PaddedOnnxScorer(OneAtATime):
    """The standard graph: one padded pair a row, pooled inside the graph."""

    engine = "onnxruntime"

    def __init__(
        self, graph: Path, recipe: Recipe, device: str, precision: "Precision" = "fp32"
    ) -> None:
        self._session = open_session(graph, device)
        self.device, self.precision = device, precision
        self._pad_id = recipe.pad_id
        row_tokens, batch_tokens = BUDGETS[_kind(device)]
        fixed = recipe.max_length if recipe.pooling == "final-position" else None
        self.layout = Layout(False, row_tokens, batch_tokens, fixed)

    def score(self, batch: Batch) -> NDArray[np.float32]:
        """Raw logits, scores_N."""
        input_ids_RT, attention_mask_RT = padded_arrays(batch, self._pad_id)
        feeds = {"input_ids": input_ids_RT, "attention_mask": attention_mask_RT}
        return run(self._session, "logits", feeds, self.device)[:, 0]


def run(
    session: ort.InferenceSession, output: str, feeds: dict[str, Any], device: str
) -> NDArray[np.float32]:
    """One output of a session on that device; `feeds` are copied to it first.

    On a CPU that takes the time of `session.run`.

    Raises:
        MemoryError: there was not enough; the session can be used again.
    """
    kind, number = _kind(device), _number(device)
    with memory_errors():
        binding = session.io_binding()
        for name, array in feeds.items():
            value = ort.OrtValue.ortvalue_from_numpy(array, kind, number)
            binding.bind_ortvalue_input(name, value)
        binding.bind_output(output, "cpu")
        session.run_with_iobinding(binding)
        return np.array(binding.get_outputs()[0].numpy(), np.float32)


@contextmanager
def memory_errors() -> Iterator[None]:
    """Raise MemoryError where a block ends because memory ran out; other errors stay."""
    try:
        yield
    except (Fail, RuntimeException, RuntimeError) as error:
        if not any(text in str(error) for text in _OUT_OF_MEMORY):
            raise
        raise MemoryError(str(error)) from error


def onnx_scorer(bundle: "Bundle", device: str) -> PackedOnnxScorer | PaddedOnnxScorer:
    """The scorer that the bundle's recipe calls for, on `cpu` or `cuda:N`.

    Raises:
        ConfigurationError: ONNX Runtime could not use CUDA.
        TrustError: the bundle was changed while it was being loaded.
        MemoryError: there is not enough for the graph's weights.
    """
    recipe, precision = bundle.recipe, bundle.manifest.precision
    scorer: PackedOnnxScorer | PaddedOnnxScorer
    if recipe.pooling == "final-position":
        scorer = PaddedOnnxScorer(bundle.file("onnx/model.onnx"), recipe, device, precision)
    else:
        scorer = PackedOnnxScorer(bundle.file("onnx/packed.onnx"), recipe, device, precision)
    bundle.check_unchanged()
    return scorer


def open_session(graph: Path, device: str) -> ort.InferenceSession:
    """An inference session on `cpu` or `cuda:N`.

    Raises:
        ConfigurationError: ONNX Runtime could not use CUDA, or has no products in bf16 there.
        MemoryError: there is not enough for the graph's weights.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what fails is told by an exception
    # Rows differ in length from call to call, so planned memory patterns only pile up.
    options.enable_mem_pattern = False
    if _kind(device) == "cpu":
        return _session(graph, options, ["CPUExecutionProvider"])
    # CUDA libraries that were installed by pip are not on the loader's path. What is missing
    # would be printed to stdout; it goes into the error instead.
    missing = io.StringIO()
    with redirect_stdout(missing):
        ort.preload_dlls()
    providers = [("CUDAExecutionProvider", cuda_options(device)), "CPUExecutionProvider"]
    session = _session(graph, options, providers)
    if session.get_providers()[0] == "CUDAExecutionProvider":
        return session
    raise ConfigurationError(
        f"ONNX Runtime could not use CUDA for --device {device}.",
        where=missing.getvalue().partition("\n")[0],
        valid="--device cpu, or a machine with an NVIDIA driver and CUDA libraries",
        next_step="dear-batch doctor",
    )


def cuda_options(device: str) -> dict[str, str | int]:
    """The settings of ONNX Runtime's CUDA provider."""
    return {
        "device_id": _number(device),
        # TF32, the default, keeps 10 bits of fp32: the parity gate promises all.
        "use_tf32": 0,
        # The default doubles with every growth: it would take what the next batch needs.
        "arena_extend_strategy": "kSameAsRequested",
    }


def _session(
    graph: Path, options: ort.SessionOptions, providers: list[Any]
) -> ort.InferenceSession:
    try:
        with memory_errors():
            return ort.InferenceSession(graph, options, providers=providers)
    except NotImplementedByOrt as error:  # no products in bf16 on a CPU
        raise ConfigurationError(
            f"ONNX Runtime cannot compute {graph} in its precision here.",
            where=str(error).splitlines()[0],
            valid="a GPU, --engine torch, or a bundle exported with --precision fp32 or fp16",
        ) from error


def _kind(device: str) -> Literal["cpu", "cuda"]:
    return "cpu" if device == "cpu" else "cuda"


def _number(device: str) -> int:
    return int(device.partition(":")[2] or 0)
