"""Which engine a bundle gets on a machine, and why each better one was passed over.

Decides from facts alone, so that any machine can be simulated. Loads nothing.
"""

from dataclasses import dataclass
from typing import Literal

from dear_batch.bundle import Engine

Chosen = Literal["tensorrt", "onnxruntime", "torch"]


@dataclass(frozen=True, slots=True)
class PassedOver:
    """An engine that would have come first: `engine` on `device`, "cpu" or "cuda"."""

    engine: Chosen
    device: str
    why: str
    next_step: str

    def __str__(self) -> str:
        """As a line of a log or a table."""
        return f"{self.engine} on {self.device}: {self.why}"


@dataclass(frozen=True, slots=True)
class Choice:
    """The engine to load: on `device`, "cpu" or "cuda:N", from `plan` where it is TensorRT."""

    engine: Chosen
    device: str
    plan: Engine | None = None
    passed_over: tuple[PassedOver, ...] = ()
