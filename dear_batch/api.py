"""The Python API: score or rerank a few documents from a notebook or a shell.

    from dear_batch import Reranker

    reranker = Reranker.load("bundles/dear-8b-ce")
    reranker.rerank("who wrote Emma?", ["Jane Austen wrote Emma.", "Emma is a name."])

Whole candidate sets belong in `dear-batch run`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from dear_batch.pointwise.recipe import PairEncoder
from dear_batch.pointwise.scorer import Scorer, score_pairs
from dear_batch.pointwise.selection import EngineName
from dear_batch.run.loading import load_pointwise
from dear_batch.specs import ExecutionSpec

Document = str | tuple[str, str]  # text, or (title, text)


@dataclass(frozen=True, slots=True)
class Reranked:
    """A document in its new place: `index` is where it stood in the list that was given."""

    index: int
    score: float
    document: Document


class Reranker:
    """A pointwise bundle, loaded. Scores are raw logits: higher is better, no sigmoid."""

    def __init__(self, scorer: Scorer, encoder: PairEncoder) -> None:
        self._scorer = scorer
        self._encoder = encoder

    @classmethod
    def load(cls, bundle: str | Path, *, engine: EngineName = "auto", device: str = "auto") -> Self:
        """Open a bundle.

        Raises:
            UsageError: there is no engine or device of that name.
            ConfigurationError, TrustError, TryAgainError: see `load_pointwise`.
        """
        loaded = load_pointwise(bundle, ExecutionSpec(engine=engine, device=device))
        return cls(loaded.scorer, loaded.encoder)

    def score(self, query: str, documents: Sequence[Document]) -> list[float]:
        """Logits of the documents, in their order.

        Raises:
            TypeError: a single text in place of a list.
        """
        if isinstance(documents, str):
            raise TypeError("documents is one text; give a list of texts")
        split = [("", d) if isinstance(d, str) else d for d in documents]
        (pairs,) = self._encoder.encode([(query, split)])
        scores: list[float] = score_pairs(self._scorer, pairs).tolist()
        return scores

    def rerank(
        self, query: str, documents: Sequence[Document], *, top_k: int | None = None
    ) -> list[Reranked]:
        """The documents, best first; ties keep their order."""
        scores = self.score(query, documents)
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        return [Reranked(i, scores[i], documents[i]) for i in order[:top_k]]
