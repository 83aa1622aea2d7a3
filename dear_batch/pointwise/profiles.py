"""The shapes that a TensorRT engine is built for, and the one that a batch of rows takes.

TensorRT tunes a profile at its `best` shape and refuses what lies outside its spans. The
profiles laid out here take every batch that is planned within their `layout`: a full batch,
part of one, and the short rows that are left over have a profile each. Shapes are padded to
few different ones, so that CUDA graphs can be captured once and used again. Knows nothing of
TensorRT itself.

Shapes: R rows of a batch, T tokens of its rows, P documents of the row that has the most.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from dear_batch.pointwise.rows import Layout

ROW_TOKENS = 1024
BATCH_TOKENS = 16384
# A document of MS MARCO in the `readme` recipe, with its share of the prefix. It only says where
# an engine is tuned, which for P is the last layer alone.
DOCUMENT_TOKENS = 100
Shape = tuple[int, int, int]  # R, T, P


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
    """Spans of R, T and P, all of which a batch must fit at once."""

    rows: Span
    tokens: Span
    documents: Span

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """The profile that `dataclasses.asdict` made."""
        return cls(**{name: Span(**span) for name, span in fields.items()})

    @property
    def most_tokens(self) -> int:
        """R * T at the most, padding included: what its memory is for."""
        return self.rows.most * self.tokens.most


def lay_out(
    row_tokens: int = ROW_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
    document_tokens: float = DOCUMENT_TOKENS,
) -> tuple[Profile, ...]:
    """Profiles for all batches of these limits, narrow where most of the time goes.

    Rows that are packed best-fit are more than half full, all but one. No profile is larger
    than `batch_tokens` (a single row apart), so none needs memory for corners nobody uses.
    """
    rows, half = max(1, batch_tokens // row_tokens), row_tokens // 2

    def profile(rows: Span, tokens: Span) -> Profile:
        best = min(tokens.best, round(tokens.best / document_tokens) or 1)
        return Profile(rows, tokens, Span(1, best, tokens.most))

    long = Span(half + 1, row_tokens, row_tokens)
    found = [profile(Span(rows // 2 + 1, rows, rows), long)]
    if rows > 1:
        found.append(profile(Span(1, max(1, rows // 4), rows // 2), long))
    if half:
        found.append(profile(Span(1, rows, rows), Span(1, max(1, half // 2), half)))
    return tuple(found)


def layout(profiles: Sequence[Profile]) -> Layout:
    """The limits within which every planned batch fits one of these profiles."""
    rows = max(profile.rows.most for profile in profiles)
    row_tokens = max(profile.tokens.most for profile in profiles)
    return Layout(True, row_tokens, rows * row_tokens, most_rows=rows)


def fit(profiles: Sequence[Profile], rows: int, tokens: int, documents: int) -> tuple[int, Shape]:
    """The profile that a batch takes, the smallest one, and the shape R, T, P to pad it to.

    T grows by an eighth at most (below 64 by up to 7 tokens), P to a power of two at most.

    Raises:
        ValueError: it fits none; within `layout(profiles)` that does not happen.
    """
    fitting = [
        (profile.most_tokens, index)
        for index, profile in enumerate(profiles)
        if rows in profile.rows and tokens in profile.tokens and documents in profile.documents
    ]
    if not fitting:
        raise ValueError(f"no profile takes {rows} rows of {tokens} tokens, {documents} documents")
    _, index = min(fitting)
    profile = profiles[index]
    return index, (
        rows,
        min(_in_steps(tokens), profile.tokens.most),
        min(1 << (documents - 1).bit_length(), profile.documents.most),
    )


def _in_steps(tokens: int) -> int:
    """The next multiple of 64, or of 32, 16 or 8 where that would add more than an eighth."""
    step = next((size for size in (64, 32, 16) if 8 * size <= tokens), 8)
    return -(-tokens // step) * step
