"""How fast a device multiplies the matrices of a model's layers, by the engine that scores.

That rate is a ceiling: a scorer does the same products, and more beside them. The weights are
random. Knows nothing of text or files beyond the model's config.

Shapes: M tokens at once, K inputs and N outputs of a product.

CUDA is not executed here: needs a GPU.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dear_batch.errors import ConfigurationError
from dear_batch.onnx_wire import LENGTH, MORE

# Tokens of a call: a GPU needs many to be busy. The best of them is the ceiling.
TOKENS = {"cpu": (256, 512, 1024), "cuda": (4096, 8192, 16384)}
LEAST_S, LEAST_RUNS = 0.5, 3  # of timing each product
# TensorProto.DataType and the fields of messages: onnx/onnx.proto.
ELEMENTS = {"fp32": 1, "fp16": 10, "bf16": 16}
IR_VERSION, OPSET = 8, 17

Products = Mapping[tuple[int, int], int]  # (K, N): how many of them a layer has
Multiply = Callable[[int], None]  # M tokens through one product, to the end


@dataclass(frozen=True, slots=True)
class Ceiling:
    """The best rate in operations a second, with `tokens` at once in `precision`.

    `flops` is None where it could not be measured, and `why` says why. `by` is the library.
    """

    flops: float | None
    by: str
    precision: str
    tokens: int | None = None
    why: str = ""


def layer_products(config: Mapping[str, Any]) -> Products:
    """The products of one Llama layer by its config: queries, keys, values, output and MLP."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    wide, narrow = heads * size, (config.get("num_key_value_heads") or heads) * size
    return Counter(
        [
            *((hidden, wide), (hidden, narrow), (hidden, narrow), (wide, hidden)),
            *((hidden, inner), (hidden, inner), (inner, hidden)),
        ]
    )


def flops_per_token(config: Mapping[str, Any], *, packed: bool = False) -> int:
    """Operations of a token's matrix products in all layers: 2 for each weight.

    `packed` graphs compute but keys and values of most tokens in the last layer. Attention itself
    is left aside, and so are the embeddings and the head.
    """
    weights = sum(K * N * count for (K, N), count in layer_products(config).items())
    layers = int(config["num_hidden_layers"])
    if not packed:
        return 2 * layers * weights
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    keys = config["hidden_size"] * size * (config.get("num_key_value_heads") or heads)
    return int(2 * ((layers - 1) * weights + 2 * keys))


def measure_ceiling(
    engine: str, device: str, precision: str, products: Products, beat: Callable[[], None]
) -> Ceiling:
    """Time each product of a layer at several numbers of tokens; `beat` is called in between.

    TensorRT has no products to try without a build, so ONNX Runtime does them on its GPU.
    8-bit weights are held against products in fp32.
    """
    precision = precision if precision in ELEMENTS else "fp32"
    by = "torch" if engine == "torch" else "onnxruntime"
    opened = _by_torch if by == "torch" else _by_onnxruntime
    kind = device.partition(":")[0]
    seconds = dict.fromkeys(TOKENS[kind], 0.0)
    try:
        for (K, N), count in products.items():
            with opened(K, N, device, precision) as multiply:
                for M in seconds:
                    seconds[M] += count * _best_seconds(multiply, M)
                    beat()
    except ConfigurationError as error:
        why = f"{by} has no products in {precision} on {device} ({error.where})"
        return Ceiling(None, by, precision, why=why)
    except MemoryError:
        return Ceiling(None, by, precision, why="there is no memory for it beside the model")
    flops = {M: M * 2 * sum(K * N * n for (K, N), n in products.items()) for M in seconds}
    best = max(seconds, key=lambda M: flops[M] / seconds[M])
    return Ceiling(flops[best] / seconds[best], by, precision, best)


def _best_seconds(multiply: Multiply, M: int) -> float:
    """The shortest of several runs: others may be at work on the machine."""
    multiply(M)
    found = list[float]()
    while len(found) < LEAST_RUNS or sum(found) < LEAST_S:
        start = time.perf_counter()
        multiply(M)
        found.append(time.perf_counter() - start)
    return min(found)


def _random(shape: tuple[int, int], precision: str) -> NDArray[Any]:
    """Normal numbers; 16-bit ones as the integers that have their bits, since numpy lacks bf16."""
    values = np.random.default_rng(0).standard_normal(shape, np.float32)
    if precision == "fp32":
        return values
    if precision == "fp16":
        return values.astype(np.float16).view(np.uint16)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


@contextmanager
def _by_onnxruntime(K: int, N: int, device: str, precision: str) -> Iterator[Multiply]:
    """A session of one product, its weight a constant, as in the graph of a model."""
    from onnxruntime import OrtValue

    from dear_batch.pointwise.onnx_scorer import memory_errors, open_session

    with TemporaryDirectory() as folder:
        path = Path(folder) / "product.onnx"
        path.write_bytes(product_graph(_random((K, N), precision), precision))
        session = open_session(path, device)
    kind, _, number = device.partition(":")

    def multiply(M: int) -> None:
        if M not in bound:
            inputs = _random((M, K), precision)
            value = OrtValue.ortvalue_from_numpy_with_onnx_type(inputs, ELEMENTS[precision])
            binding = session.io_binding()
            binding.bind_ortvalue_input("a", value)
            binding.bind_output("c", kind, int(number or 0))
            bound[M] = binding, value
        session.run_with_iobinding(bound[M][0])
        bound[M][0].synchronize_outputs()

    bound = dict[int, Any]()
    with memory_errors():
        yield multiply


@contextmanager
def _by_torch(K: int, N: int, device: str, precision: str) -> Iterator[Multiply]:
    """The same by PyTorch."""
    import torch

    from dear_batch.pointwise.torch_scorer import NAMES
    from dear_batch.torch_memory import memory_errors

    dtype = next(dtype for dtype, name in NAMES.items() if name == precision)
    with memory_errors(), torch.inference_mode():
        weight_NK = torch.randn(N, K, device=device, dtype=dtype)
        inputs = dict[int, Any]()

        def multiply(M: int) -> None:
            if M not in inputs:
                inputs[M] = torch.randn(M, K, device=device, dtype=dtype)
            torch.nn.functional.linear(inputs[M], weight_NK)
            if device != "cpu":
                torch.cuda.synchronize(device)

        yield multiply


def product_graph(weight_KN: NDArray[Any], precision: str) -> bytes:
    """An ONNX model `c = a @ w` with the weight in it, written without the onnx package."""
    K, N = weight_KN.shape
    kind = ELEMENTS[precision]
    node = _field(1, b"a") + _field(1, b"w") + _field(2, b"c") + _field(4, b"MatMul")
    weight = _field(1, K) + _field(1, N) + _field(2, kind) + _field(8, b"w")
    weight += _field(9, weight_KN.tobytes())
    graph = _field(1, node) + _field(2, b"product") + _field(5, weight)
    graph += _field(11, _value(b"a", kind, K)) + _field(12, _value(b"c", kind, N))
    opset = _field(1, b"") + _field(2, OPSET)
    return _field(1, IR_VERSION) + _field(7, graph) + _field(8, opset)


def _value(name: bytes, kind: int, size: int) -> bytes:
    """A ValueInfoProto of `tokens` rows of that size."""
    dimensions = _field(1, _field(2, b"tokens")) + _field(1, _field(1, size))
    tensor = _field(1, kind) + _field(2, dimensions)
    return _field(1, name) + _field(2, _field(1, tensor))


def _field(number: int, value: int | bytes) -> bytes:
    """A field of protobuf's wire format: a varint, or bytes with their length before them."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | LENGTH) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    parts = []
    while value >= MORE:
        parts.append(value % MORE | MORE)
        value >>= 7
    return bytes([*parts, value])
