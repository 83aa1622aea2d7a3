"""What building a TensorRT engine takes: seconds, memory, and the size of the plan.

Builds ahead of time with TensorRT for RTX, in fp16, with the default profiles: first a bundle,
then random models of the shape of Llama-3.1-8B with ever more layers, as far as memory goes. All
layers are alike, so what a layer adds is told from the last two and drawn out to 32, on paper.
The last line is JSON.

    python benchmarks/tensorrt_build.py BUNDLE [--sm sm_89] [--layers 2 4 8]
"""

import argparse
import gc
import json
import os
import platform
import resource
import tempfile
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import psutil
import tensorrt_rtx
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from dear_batch.bundle import open_bundle
from dear_batch.export.building import built
from dear_batch.export.graphs import onnx_from_torch, packed_graph
from dear_batch.export.tensorrt import Order
from dear_batch.pointwise.profiles import lay_out

LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_labels": 1,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
LAYERS_8B = 32
PEAK = 2.8  # a build held 2.5 times its fp16 weights; they are written from fp32 ones
KEPT_FREE = 4 << 30  # of the machine's memory


@dataclass(frozen=True, slots=True)
class Result:
    """A build; `peak_bytes` is the most that its process held, `cpu_seconds` what it computed."""

    model: str
    layers: int
    sm: str
    seconds: float
    cpu_seconds: float
    plan_bytes: int
    peak_bytes: int
    scratch_bytes: tuple[int, ...]


class PeakOfChildren:
    """The most memory that a child process held at once, while this is entered.

    `getrusage` would count what its parent held when it was forked.
    """

    def __enter__(self) -> Self:
        """Begin to look."""
        self.bytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            for child in psutil.Process().children():
                with suppress(OSError, StopIteration):
                    lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
                    found = next(x for x in lines if x.startswith("VmHWM"))
                    self.bytes = max(self.bytes, int(found.split()[1]) * 1024)


def cpu_seconds() -> float:
    """Of all children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def build(model: str, layers: int, graph: Path, sm: str) -> Result:
    plan = graph.with_name("plan")
    before = cpu_seconds()
    with PeakOfChildren() as held:
        found = built(Order(graph, plan, "tensorrt_rtx", sm, lay_out()), lambda _share: None)
    peak, worked = held.bytes, round(cpu_seconds() - before, 1)
    size = plan.stat().st_size
    plan.unlink()
    result = Result(
        model, layers, sm, round(found.seconds, 1), worked, size, peak, found.scratch_bytes
    )
    print(
        f"{model}, {layers} layers: {result.seconds} s ({worked} s of CPU), "
        f"plan {size / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB",
        flush=True,
    )
    return result


def random_graph(layers: int, folder: Path) -> Path:
    """The packed fp16 graph of random weights of the 8B shape."""
    config = LlamaConfig(**LLAMA_8B, num_hidden_layers=layers)
    with torch.device("meta"):
        model = LlamaForSequenceClassification(config)
    model.to_empty(device="cpu")  # its rotary tables, too, which the graph makes for itself
    for parameter in model.parameters():
        parameter.data.uniform_(-0.03, 0.03)
    onnx_from_torch(model, folder, "last-token", "fp16", [0.0] * layers)
    (folder / "model.onnx").unlink()
    return folder / "packed.onnx"


def drawn_out(first: Result, second: Result) -> dict[str, float]:
    """The figures of all layers, as those of two builds grow from one to the other."""
    figures = {}
    for name in ("seconds", "cpu_seconds", "plan_bytes", "peak_bytes"):
        a, b = getattr(first, name), getattr(second, name)
        layer = (b - a) / (second.layers - first.layers)
        figures[name] = round(b + layer * (LAYERS_8B - second.layers))
    return figures


def available_bytes() -> int:
    """What can be had without swapping, less what is to stay free."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
    return free * 1024 - KEPT_FREE


def parameters(layers: int) -> int:
    with torch.device("meta"):
        model = LlamaForSequenceClassification(LlamaConfig(**LLAMA_8B, num_hidden_layers=layers))
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("--sm", default="sm_89")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8, 12])
    arguments = parser.parse_args()
    bundle = open_bundle(arguments.bundle, task="pointwise")
    results, skipped = list[Result](), {}
    with tempfile.TemporaryDirectory() as folder:
        graph = packed_graph(bundle, "fp16", Path(folder))
        millions = graph.with_name("weights.safetensors").stat().st_size / 2 / 1e6
        layers = int(bundle.manifest.architecture["num_layers"])
        name = f"bundle of {millions:.0f} million parameters"
        results.append(build(name, layers, graph, arguments.sm))
    for layers in arguments.layers:
        needed = max(4, PEAK * 2) * parameters(layers)
        if needed > available_bytes():
            skipped[layers] = f"{needed / 1e9:.0f} GB of memory needed, not there"
            continue
        with tempfile.TemporaryDirectory() as folder:
            graph = random_graph(layers, Path(folder))
            gc.collect()
            results.append(build("8B shape", layers, graph, arguments.sm))
    shapes = [result for result in results if result.model == "8B shape"]
    fields = {
        "tensorrt_rtx": tensorrt_rtx.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU needed",
        "load_average": os.getloadavg()[1],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "profiles": [asdict(profile) for profile in lay_out()],
        "results": [asdict(result) for result in results],
        "not_built": skipped,
    }
    if len(shapes) > 1:
        fields["8B with 32 layers, on paper"] = drawn_out(*shapes[-2:])
    print(json.dumps(fields))


if __name__ == "__main__":
    main()
