"""The shapes that a TensorRT engine is built for, and the one that a batch of rows takes.

TensorRT tunes a profile at its `best` shape and refuses what lies outside its spans. Knows
nothing of TensorRT itself.

Shapes: R rows of a batch, T tokens of its rows, N documents of the batch.
"""

from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Span:
    """What a dimension may be, and what the engine is tuned for."""

    least: int
    best: int
    most: int

    def __contains__(self, size: int) -> bool:
        """Whether a size lies within."""
        return self.least <= size <= self.most


@dataclass(frozen=True, slots=True)
class Profile:
    """Spans of R, T and N, all of which a batch must fit at once."""

    rows: Span
    tokens: Span
    documents: Span

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """The profile that `dataclasses.asdict` made."""
        return cls(**{name: Span(**span) for name, span in fields.items()})
