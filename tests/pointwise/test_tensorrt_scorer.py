"""What the TensorRT scorer does without a GPU: inputs, graphs that are kept, the order of work.

Real packed arrays and real profiles; in place of CUDA and the engine stands a small queue that
does its work when it is waited for, so that anything read too early is wrong. Whether the real
calls are spelt right is for `test_native_types`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

pytest.importorskip("cuda.core", reason="the scorer calls it")

from cuda.core import Buffer, MemoryResource

from dear_batch.errors import TryAgainError
from dear_batch.pointwise import tensorrt_scorer
from dear_batch.pointwise.profiles import fit, lay_out, layout
from dear_batch.pointwise.recipe import EncodedPair
from dear_batch.pointwise.rows import Batch, batches, packed_arrays
from dear_batch.pointwise.scorer import score_pairs
from dear_batch.pointwise.tensorrt_plan import LoadedPlan, memory_errors
from dear_batch.pointwise.tensorrt_scorer import (
    ALIGNMENT,
    INPUTS,
    Recent,
    TensorrtScorer,
    as_bytes,
    fill,
    places,
)
from tests.run.test_blocks import RECIPE

PROFILES = lay_out(256, 1024)


def pairs_of(lengths: list[int], prefixes: int = 3) -> list[EncodedPair]:
    """Pairs of these document lengths, no two of them equal."""
    rng = np.random.default_rng(0)
    return [
        EncodedPair(
            np.full(5 + n % prefixes, 10 + n % prefixes, np.int32),
            rng.integers(100, 10_000, length, dtype=np.int32),
            truncated=False,
        )
        for n, length in enumerate(lengths)
    ]


# What is written into the inputs.


@given(st.lists(st.integers(1, 200), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_a_batch_in_its_shape_is_the_batch_and_padding(lengths: list[int]) -> None:
    for batch in batches(pairs_of(lengths), layout(PROFILES)):
        _, shape = fit(PROFILES, len(batch.rows), batch.length, max(batch.counts))
        rows, tokens, documents = shape
        offsets, end = places(shape)
        inputs = np.full(end // 4, -7, np.int32)
        fill(inputs, batch, shape, pad_id=2)
        found = read(inputs, shape)
        plain = packed_arrays(batch, pad_id=2)
        (r, t), p = plain.tokens_RT.shape, max(batch.counts)
        for name in ("tokens", "positions", "groups", "segments"):
            np.testing.assert_array_equal(found[name][:r, :t], getattr(plain, f"{name}_RT"))
        padding = np.ones((rows, tokens), bool)
        padding[:r, :t] = False
        assert set(found["tokens"][padding].tolist()) <= {2}
        assert set(found["groups"][padding].tolist()) <= {-1}
        np.testing.assert_array_equal(found["pooled"][:, :p], plain.pooled_RP)
        assert not found["pooled"][:, p:].any()
        assert found["pooled"].shape == (rows, documents)
        assert all(offset % ALIGNMENT == 0 for offset in offsets.values())


def read(inputs: NDArray[np.int32], shape: tuple[int, int, int]) -> dict[str, NDArray[np.int32]]:
    """The inputs as an engine of that shape reads them."""
    rows, tokens, documents = shape
    offsets, _ = places(shape)
    sizes = {name: (rows, documents if name == "pooled" else tokens) for name in INPUTS}
    return {
        name: inputs[offsets[name] // 4 :][: int(np.prod(size))].reshape(size)
        for name, size in sizes.items()
    }


class HostMemory(MemoryResource):
    """Memory of this process behind cuda.core's own buffers."""

    is_device_accessible = False
    is_host_accessible = True
    device_id = -1

    def allocate(self, size: int, *, stream: Any = None) -> Buffer:
        del stream
        array = np.zeros(size, np.uint8)
        self.arrays = [*getattr(self, "arrays", []), array]
        return Buffer.from_handle(array.ctypes.data, size, mr=self)

    def deallocate(self, ptr: Any, size: int, *, stream: Any = None) -> None:
        pass


def test_arrays_over_pinned_memory_can_be_written() -> None:
    memory = HostMemory()
    array = as_bytes(memory.allocate(64)).view(np.int32)
    array[3] = 7
    assert memory.arrays[0].view(np.int32).tolist() == [0, 0, 0, 7] + [0] * 12


# What is kept.


def test_what_was_used_last_is_kept() -> None:
    dropped: list[int] = []
    recent = Recent[str, int](2, lambda: dropped.append(1))
    recent.add("a", 1)
    recent.add("b", 2)
    assert recent.get("a") == 1
    recent.add("c", 3)
    assert dropped == [1]
    assert (recent.get("a"), recent.get("b"), recent.get("c")) == (1, None, 3)
    recent.clear()
    assert recent.get("a") is None
    assert dropped == [1, 1]


@pytest.mark.parametrize(
    "text",
    [
        "CUDA_ERROR_OUT_OF_MEMORY: The API call failed because it was unable to allocate enough",
        "TensorRT: Error Code 2: OutOfMemory (Requested size was 8589934592 bytes.)",
        "TensorRT: Error Code 1: Cuda Runtime (cudaError 2: out of memory)",
    ],
)
def test_a_shortage_is_told_from_all_else(text: str) -> None:
    with pytest.raises(MemoryError), memory_errors([]):
        raise RuntimeError(text)
    error = RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access")
    with pytest.raises(RuntimeError) as caught, memory_errors([]):
        raise error
    assert caught.value is error


# The order of work.


class Stream:
    """Work that is done when it is waited for."""

    handle = 1

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []

    def sync(self) -> None:
        while self.work:
            self.work.pop(0)()

    def record(self, event: "Event") -> "Event":
        event.upto(self, len(self.work))
        return event

    def wait(self, event: "Event") -> None:
        self.work.append(event.sync)


class Event:
    """A point of a stream's work."""

    def __init__(self) -> None:
        self._passed: list[bool] = [True]
        self._stream: Stream | None = None

    def upto(self, stream: Stream, _at: int) -> None:
        self._stream, passed = stream, [False]
        self._passed = passed
        stream.work.append(lambda: passed.__setitem__(0, True))

    def sync(self) -> None:
        while self._stream and not self._passed[0]:
            self._stream.work.pop(0)()


@dataclass
class Memory:
    """A buffer with an address."""

    array: NDArray[np.uint8]

    @property
    def handle(self) -> int:
        return self.array.ctypes.data

    @property
    def size(self) -> int:
        return len(self.array)

    def copy_to(self, other: "Memory", *, stream: Stream) -> None:
        stream.work.append(lambda: np.copyto(other.array, self.array))

    def copy_from(self, other: "Memory", *, stream: Stream) -> None:
        other.copy_to(self, stream=stream)

    def close(self, stream: Stream) -> None:
        del stream

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.view(np.int8).__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


@dataclass
class Gpu:
    """A device, and the engine on it: a document's score is its last token plus its position.

    `room`: bytes that contexts may use; beyond `computable` tokens a batch finds no memory when
    it is computed; `most_contexts` and `most_graphs` find memory.
    """

    room: int = 10**9
    computable: int = 10**9
    most_contexts: int = 10**9
    most_graphs: int = 10**9
    device_id: int = 0
    launched: int = 0
    captured: int = 0
    builders_closed: int = 0
    contexts: list["Context"] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)
    most_waiting: int = 0

    def set_current(self) -> None:
        pass

    def create_stream(self) -> Stream:
        self.streams.append(Stream())
        return self.streams[-1]

    def create_event(self) -> Event:
        return Event()

    def allocate(self, size: int, *, stream: Any = None) -> Memory:
        del stream
        if size > self.room:
            raise RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: no room")
        return Memory(np.full(size, 0x55, np.uint8))

    def create_graph_builder(self) -> "Builder":
        return Builder(self)

    def get_device_memory_size_for_profile_v2(self, index: int) -> int:
        return 1000 * PROFILES[index].most_tokens

    def new_context(self) -> "Context":
        if len(self.contexts) == self.most_contexts:
            raise RuntimeError("Error Code 2: OutOfMemory (Requested size was 8 bytes.)")
        self.contexts.append(Context(self))
        return self.contexts[-1]


class Context:
    """An execution context."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self.sizes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.index, self.memory = -1, 0

    def set_optimization_profile_async(self, index: int, _stream: int) -> bool:
        self.index = index
        return True

    def set_device_memory(self, _address: int, size: int) -> None:
        self.memory = size

    def set_input_shape(self, name: str, sizes: tuple[int, ...]) -> bool:
        profile = PROFILES[self.index]
        spans = (profile.rows, profile.documents if name == "pooled" else profile.tokens)
        self.sizes[name] = sizes
        return all(size in span for size, span in zip(sizes, spans, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name == "scores" or address % 4 == 0

    def work(self) -> Callable[[], None]:
        addresses, sizes = dict(self.addresses), dict(self.sizes)

        def compute() -> None:
            tokens, positions, pooled = (
                at(addresses[name], sizes[name]) for name in ("tokens", "positions", "pooled")
            )
            found = (np.take_along_axis(array, pooled, 1) for array in (tokens, positions))
            scores = next(found) + next(found) / 1000
            at(addresses["scores"], pooled.shape, np.float32)[:] = scores

        return compute

    def execute_async_v3(self, stream: int) -> bool:
        if stream == Builder.handle:
            return True
        assert self.memory >= self._gpu.get_device_memory_size_for_profile_v2(self.index)
        if np.prod(self.sizes["tokens"]) > self._gpu.computable:
            raise RuntimeError("Error Code 1: Cuda Runtime (cudaError 2: out of memory)")
        self._gpu.streams[0].work.append(self.work())
        return True


class Builder:
    """Captures what the last context does."""

    handle = 2

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self.stream = self

    def begin_building(self) -> "Builder":
        return self

    def end_building(self) -> "Builder":
        return self

    def close(self) -> None:
        self._gpu.builders_closed += 1

    def complete(self) -> "Builder":
        if self._gpu.captured == self._gpu.most_graphs:
            raise RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: The API call failed")
        self._gpu.captured += 1
        self._work = self._gpu.contexts[-1].work()
        return self

    def launch(self, stream: Stream) -> None:
        self._gpu.launched += 1
        stream.work.append(self._work)


def at(address: int, sizes: tuple[int, ...], dtype: Any = np.int32) -> NDArray[Any]:
    """The memory at an address."""
    count = int(np.prod(sizes))
    import ctypes

    raw = (ctypes.c_char * (4 * count)).from_address(address)
    return np.frombuffer(raw, dtype).reshape(sizes)


def scorer_on(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> TensorrtScorer:
    class Pinned:
        def allocate(self, size: int) -> Memory:
            return Memory(np.full(size, 0x55, np.uint8))

    monkeypatch.setattr(tensorrt_scorer, "LegacyPinnedMemoryResource", Pinned)
    device: Any = gpu
    loaded = LoadedPlan(device, device.new_context, graphs=True, said=[])
    return TensorrtScorer(loaded, PROFILES, replace(RECIPE, pad_id=2), device, "fp16")


def expected(pairs: list[EncodedPair]) -> list[float]:
    return [
        pytest.approx(pair.document_ids[-1] + (len(pair) - 1) / 1000, abs=1e-2) for pair in pairs
    ]


LENGTHS = [17 + 13 * n % 200 for n in range(120)]


def test_scores_come_in_order_from_batches_that_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu()
    scorer = scorer_on(gpu, monkeypatch)
    pairs, seen = pairs_of(LENGTHS), list[Batch]()
    assert (scorer.device, scorer.precision, scorer.in_flight) == ("cuda:0", "fp16", 2)
    found = score_pairs(scorer, pairs, seen.append)
    assert found.tolist() == expected(pairs)
    assert len(seen) > 6
    assert {context.index for context in gpu.contexts} <= set(range(len(PROFILES)))


def test_shapes_that_repeat_are_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu()
    scorer = scorer_on(gpu, monkeypatch)
    pairs = pairs_of([200] * 40)
    for _ in range(4):
        assert score_pairs(scorer, pairs).tolist() == expected(pairs)
    assert gpu.launched > 10
    # One context a profile, and one for each captured graph.
    assert len(gpu.contexts) == len(scorer._contexts) + len(scorer._graphs._values)


@pytest.mark.parametrize("most_graphs", [0, 1])
def test_graphs_without_memory_are_done_without(
    most_graphs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, limits = Gpu(most_graphs=most_graphs), list[int]()
    scorer = scorer_on(gpu, monkeypatch)
    pairs = pairs_of(LENGTHS)
    for _ in range(4):
        assert score_pairs(scorer, pairs, backed_off=limits.append).tolist() == expected(pairs)
    assert limits == []
    assert (gpu.captured, gpu.builders_closed) == (most_graphs, most_graphs + 1)
    assert not scorer._graphs._values
    assert not any(stream.work for stream in gpu.streams)


def test_contexts_of_graphs_without_memory_are_done_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu, limits = Gpu(), list[int]()
    scorer = scorer_on(gpu, monkeypatch)
    pairs = pairs_of([200] * 40)
    score_pairs(scorer, pairs[:1])
    monkeypatch.setattr(scorer, "_captures", False)
    score_pairs(scorer, pairs)  # every profile that is needed has its context
    monkeypatch.setattr(scorer, "_captures", True)
    gpu.most_contexts = len(gpu.contexts)
    for _ in range(3):
        assert score_pairs(scorer, pairs, backed_off=limits.append).tolist() == expected(pairs)
    assert limits == []
    assert gpu.captured == 0


def test_abandoned_batches_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = scorer_on(Gpu(), monkeypatch)
    pairs = pairs_of(LENGTHS)
    for batch in [*batches(pairs, scorer.layout)][:5]:
        scorer.start(batch)
    assert score_pairs(scorer, pairs).tolist() == expected(pairs)


def test_memory_that_runs_out_halves_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, limits = Gpu(computable=600), list[int]()
    scorer = scorer_on(gpu, monkeypatch)
    pairs = pairs_of(LENGTHS)
    assert score_pairs(scorer, pairs, backed_off=limits.append).tolist() == expected(pairs)
    assert limits == [512]
    assert not any(stream.work for stream in gpu.streams)


def test_a_profile_without_memory_leaves_the_smaller_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    most = sorted(profile.most_tokens for profile in PROFILES)
    gpu, limits = Gpu(room=1000 * most[0]), list[int]()
    scorer = scorer_on(gpu, monkeypatch)
    pairs = pairs_of([100] * 30)
    assert score_pairs(scorer, pairs, backed_off=limits.append).tolist() == expected(pairs)
    assert limits


def test_without_memory_for_any_the_job_may_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = scorer_on(Gpu(room=10**5), monkeypatch)
    with pytest.raises(TryAgainError, match="tensorrt on cuda:0") as caught:
        score_pairs(scorer, pairs_of([100]))
    assert caught.value.exit_code == 75


def test_another_error_is_raised_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu()
    scorer = scorer_on(gpu, monkeypatch)
    monkeypatch.setattr(Context, "execute_async_v3", lambda *_: False)
    with pytest.raises(RuntimeError, match="TensorRT: it gave no reason"):
        score_pairs(scorer, pairs_of([100]))
