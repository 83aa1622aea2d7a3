"""Scores batches with a TensorRT plan, without PyTorch. Knows nothing of how plans are built.

A batch is laid out in pinned memory and copied to the GPU while the one before it is computed.
Work goes through two streams: one copies inputs, the other computes and fetches scores. All
execution contexts share one piece of memory, which is as large as the largest profile used.

Not executed here: needs a GPU. Checked against the libraries' own types; what is written into
the inputs, and the order of batches, are tested without one.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from dear_batch.errors import missing_extra
from dear_batch.pointwise.profiles import Profile, Shape, fit, layout
from dear_batch.pointwise.recipe import Recipe
from dear_batch.pointwise.rows import Batch, packed_arrays, scores_of_documents
from dear_batch.pointwise.scorer import Finish
from dear_batch.pointwise.tensorrt_plan import LoadedPlan, memory_errors, on_gpu, refused

try:
    from cuda.core import Device, LegacyPinnedMemoryResource
except ModuleNotFoundError as error:
    raise missing_extra("cuda-core", "tensorrt", "Scoring with TensorRT") from error

if TYPE_CHECKING:
    import tensorrt_rtx as trt
    from cuda.core import Buffer, Stream
    from cuda.core.graph import Graph

    from dear_batch.bundle import Bundle, Engine, Precision

K = TypeVar("K")
V = TypeVar("V")
ALIGNMENT = 256  # bytes: what TensorRT asks of an address (IExecutionContext::setTensorAddress)
GRAPHS = 32  # kept CUDA graphs; each has an execution context
# The packed graph's inputs in the order of `PackedArrays`, with what fills their padding: a
# token of group -1 belongs to no document (None: the recipe's padding token).
INPUTS = {"tokens": None, "positions": 0, "groups": -1, "segments": 0, "pooled": 0}


def places(shape: Shape) -> tuple[dict[str, int], int]:
    """Where each input of a shape begins within one buffer, and where all end, in bytes."""
    rows, tokens, documents = shape
    offsets, end = dict[str, int](), 0
    for name in INPUTS:
        offsets[name] = end
        end += 4 * rows * (documents if name == "pooled" else tokens)
        end = -(-end // ALIGNMENT) * ALIGNMENT
    return offsets, end


def fill(inputs: NDArray[np.int32], batch: Batch, shape: Shape, pad_id: int) -> None:
    """Lay a batch out for the packed graph in a shape that it fits, at its `places`."""
    rows, tokens, documents = shape
    arrays = packed_arrays(replace(batch, length=tokens), pad_id)
    laid_out = (
        *(arrays.tokens_RT, arrays.positions_RT, arrays.groups_RT, arrays.segments_RT),
        arrays.pooled_RP,
    )
    offsets, _ = places(shape)
    for (name, padding), array in zip(INPUTS.items(), laid_out, strict=True):
        size = rows * (documents if name == "pooled" else tokens)
        place = inputs[offsets[name] // 4 :][:size].reshape(rows, -1)
        place[:] = pad_id if padding is None else padding
        place[: array.shape[0], : array.shape[1]] = array


def as_bytes(pinned: Any) -> NDArray[np.int8]:
    """Memory that the host can reach, as an array over it."""
    return np.from_dlpack(pinned).view(np.int8)


class Recent(Generic[K, V]):
    """The values that were used last, `most` of them; `drop` is called before one goes."""

    def __init__(self, most: int, drop: Callable[[], None]) -> None:
        self._most, self._drop = most, drop
        self._values: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V | None:
        """A value, which is then the last one used."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key]

    def add(self, key: K, value: V) -> None:
        """Keep a value, instead of the one that was not used for longest."""
        if len(self._values) == self._most:
            self._drop()
            self._values.popitem(last=False)
        self._values[key] = value

    def clear(self) -> None:
        """Let all go."""
        self._drop()
        self._values.clear()


class _Slot:
    """Memory of a batch under way, in pinned memory of the host and on the device."""

    def __init__(self, device: Device, stream: "Stream", in_bytes: int, out_bytes: int) -> None:
        pinned = LegacyPinnedMemoryResource()
        self.pinned_in, self.pinned_out = pinned.allocate(in_bytes), pinned.allocate(out_bytes)
        self.device_in = device.allocate(in_bytes, stream=stream)
        self.inputs: NDArray[np.int32] = as_bytes(self.pinned_in).view(np.int32)
        self.scores: NDArray[np.float32] = as_bytes(self.pinned_out).view(np.float32)
        self.copied, self.done = device.create_event(), device.create_event()


class TensorrtScorer:
    """The packed graph, compiled: int32 rows in, one fp32 score a document out."""

    engine = "tensorrt"
    in_flight = 2

    def __init__(
        self,
        loaded: LoadedPlan,
        profiles: tuple[Profile, ...],
        recipe: Recipe,
        device: Device,
        precision: "Precision",
    ) -> None:
        self.layout, self.precision = layout(profiles), precision
        self.device = f"cuda:{device.device_id}"
        self._loaded, self._profiles, self._pad_id = loaded, profiles, recipe.pad_id
        self._device, self._captures = device, loaded.graphs
        self._compute, self._copies = device.create_stream(), device.create_stream()
        in_bytes = max(places(_largest(profile))[1] for profile in profiles)
        out_bytes = 4 * max(p.rows.most * p.documents.most for p in profiles)
        self._inputs = device.allocate(in_bytes, stream=self._compute)
        self._scores = device.allocate(out_bytes, stream=self._compute)
        self._slots = [_Slot(device, self._compute, in_bytes, out_bytes) for _ in range(2)]
        self._compute.sync()
        self._memory: Buffer | None = None
        self._contexts: dict[int, trt.IExecutionContext] = {}
        self._seen: set[tuple[int, Shape]] = set()
        # What still runs must not lose its graph.
        self._graphs = Recent[tuple[int, Shape], "tuple[Graph, trt.IExecutionContext]"](
            GRAPHS, self._compute.sync
        )

    @classmethod
    def from_bundle(cls, bundle: "Bundle", plan: "Engine", device: str) -> Self:
        """Load one of the bundle's plans on `cuda:N`.

        Raises:
            TrustError: the plan is not what the manifest names.
            ConfigurationError: TensorRT refuses it.
            MemoryError: there is not enough for it.
        """
        gpu = Device(int(device.partition(":")[2] or 0))
        gpu.set_current()
        said = list[str]()
        with memory_errors(said):
            with bundle.plan(plan) as data:
                loaded = on_gpu(bundle, plan, data, said)
            return cls(loaded, plan.profiles, bundle.recipe, gpu, plan.precision)

    def start(self, batch: Batch) -> Finish:
        """See `Scorer`."""
        index, shape = fit(self._profiles, len(batch.rows), batch.length, max(batch.counts))
        slot = self._slots[0]
        self._device.set_current()  # this thread may be another one
        try:
            with memory_errors(self._loaded.said):
                self._start(slot, batch, index, shape)
        except MemoryError:
            self._copies.sync()
            self._compute.sync()
            raise
        self._slots.reverse()

        def finish() -> NDArray[np.float32]:
            with memory_errors(self._loaded.said):
                slot.done.sync()
            rows, _, documents = shape
            scores_RP = slot.scores[: rows * documents].reshape(rows, documents)
            return scores_of_documents(scores_RP, batch)

        return finish

    def _start(self, slot: _Slot, batch: Batch, index: int, shape: Shape) -> None:
        slot.done.sync()  # of a batch that nobody waited for
        fill(slot.inputs, batch, shape, self._pad_id)
        slot.pinned_in.copy_to(slot.device_in, stream=self._copies)
        self._copies.record(slot.copied)
        self._compute.wait(slot.copied)
        # Engines read from one place, whatever the slot, so that a shape needs one CUDA graph.
        self._inputs.copy_from(slot.device_in, stream=self._compute)
        self._run(index, shape)
        self._scores.copy_to(slot.pinned_out, stream=self._compute)
        self._compute.record(slot.done)

    def _run(self, index: int, shape: Shape) -> None:
        """Compute a batch: by a CUDA graph from the third of its shape on."""
        key = (index, shape)
        if found := self._graphs.get(key):
            found[0].launch(self._compute)
            return
        memory = self._memory_for(index)
        if self._captures and key in self._seen:
            if self._run_and_capture(key, memory):
                return
            # Graphs are a help alone: without them there is memory as there was before.
            self._captures = False
            self._graphs.clear()
        self._seen.add(key)
        if index not in self._contexts:
            self._contexts[index] = self._new_context(index)
        self._enqueue(self._contexts[index], shape, memory)

    def _run_and_capture(self, key: tuple[int, Shape], memory: "Buffer") -> bool:
        """Compute a batch and keep how as a CUDA graph; False if there is no memory for that.

        A captured graph needs a context of its own, which has run once in that shape (NVIDIA
        TensorRT documentation, "CUDA Graphs").
        """
        try:
            with memory_errors(self._loaded.said):
                context = self._new_context(key[0])
                self._enqueue(context, key[1], memory)
                captured = self._captured(context)
        except MemoryError:
            return False
        self._graphs.add(key, (captured, context))
        return True

    def _new_context(self, index: int) -> "trt.IExecutionContext":
        context = self._loaded.new_context()
        if context is None:
            raise refused(self._loaded.said)
        stream = int(self._compute.handle)
        self._check(done=context.set_optimization_profile_async(index, stream))
        return context

    def _memory_for(self, index: int) -> "Buffer":
        """The memory that all contexts share, large enough for a profile."""
        needed = self._loaded.engine.get_device_memory_size_for_profile_v2(index)
        if self._memory is None or self._memory.size < needed:
            self._graphs.clear()  # they have the old address in them
            if self._memory is not None:
                self._memory.close(self._compute)
                self._memory = None
            self._memory = self._device.allocate(max(needed, ALIGNMENT), stream=self._compute)
        return self._memory

    def _enqueue(self, context: "trt.IExecutionContext", shape: Shape, memory: "Buffer") -> None:
        rows, tokens, documents = shape
        context.set_device_memory(int(memory.handle), memory.size)
        inputs = int(self._inputs.handle)
        for name, offset in places(shape)[0].items():
            sizes = (rows, documents if name == "pooled" else tokens)
            self._check(done=context.set_input_shape(name, sizes))
            self._check(done=context.set_tensor_address(name, inputs + offset))
        self._check(done=context.set_tensor_address("scores", int(self._scores.handle)))
        self._check(done=context.execute_async_v3(int(self._compute.handle)))

    def _captured(self, context: "trt.IExecutionContext") -> "Graph":
        """What the context did last, as a CUDA graph. Captured on a stream of its own."""
        builder = self._device.create_graph_builder()
        try:
            builder.begin_building()
            self._check(done=context.execute_async_v3(int(builder.stream.handle)))
            return builder.end_building().complete()
        finally:
            builder.close()  # type: ignore[no-untyped-call,unused-ignore]

    def _check(self, *, done: bool) -> None:
        if not done:
            raise refused(self._loaded.said)


def _largest(profile: Profile) -> Shape:
    return profile.rows.most, profile.tokens.most, profile.documents.most
