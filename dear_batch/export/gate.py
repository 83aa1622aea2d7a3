"""The parity gate: no bundle without proof that its graphs score as PyTorch does.

The reference is Hugging Face's own model, fp32, one padded pair a row; the ids are those of
the Hugging Face tokenizer. Text is the package's own and, if given, the user's.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from dear_batch.bundle import Bundle, Precision
from dear_batch.errors import ConfigurationError
from dear_batch.export.graph_edits import DATA_TYPES, emulated
from dear_batch.export.typed import DTYPES
from dear_batch.parity import GATES, Parity, compare
from dear_batch.pointwise.onnx_scorer import PackedOnnxScorer
from dear_batch.pointwise.own_pairs import TextList, own_pairs
from dear_batch.pointwise.recipe import (
    EncodedPair,
    PairEncoder,
    Recipe,
    document_text,
    query_text,
)
from dear_batch.pointwise.scorer import Scorer, score_pairs


def check_ids(
    tokenizer: Any, recipe: Recipe, lists: Sequence[TextList], encoded: Sequence[list[EncodedPair]]
) -> None:
    """Compare every pair's ids with what the Hugging Face tokenizer makes of it.

    Raises:
        ConfigurationError: they differ, so this tokenizer lays pairs out in a way of its own.
    """
    for (query, documents), pairs in zip(lists, encoded, strict=True):
        for (title, text), pair in zip(documents, pairs, strict=True):
            expected = _huggingface_ids(tokenizer, recipe, query, title, text)
            if pair.input_ids().tolist() != expected:
                raise ConfigurationError(
                    "The token ids of a parity pair differ from the Hugging Face tokenizer's.",
                    where=f"query {query[:60]!r}, document {text[:60]!r}",
                    valid="a tokenizer that puts fixed special tokens around a pair",
                )


def _huggingface_ids(
    tokenizer: Any, recipe: Recipe, query: str, title: str, text: str
) -> list[int]:
    first, second = query_text(query), document_text(title, text)
    if recipe.name == "readme":  # tokenizer(query, document, truncation=True, max_length=228)
        ids = tokenizer(first, second, truncation=True, max_length=recipe.max_length)["input_ids"]
    else:
        bos = [tokenizer.bos_token_id]
        query_ids = tokenizer(first, add_special_tokens=False)["input_ids"][: recipe.query_tokens]
        ids = tokenizer(second, add_special_tokens=False)["input_ids"][: recipe.document_tokens]
        ids = (bos + query_ids + bos + ids)[: recipe.max_length]
    return list(ids)


@contextmanager
def runnable(graph: Path, precision: Precision) -> Iterator[Path]:
    """A graph that ONNX Runtime computes on a CPU as a GPU computes the given one.

    Its own CPU kernels know no bf16, and do not round products in fp16.
    """
    if precision == "fp32":
        yield graph
        return
    path = graph.with_name(f"emulated-{graph.name}")
    try:
        ir.save(emulated(ir.load(graph), DATA_TYPES[DTYPES[precision]]), path)
        yield path
    finally:
        path.unlink(missing_ok=True)


def scores_of(scorer: Scorer, encoded: Sequence[list[EncodedPair]]) -> list[NDArray[np.float32]]:
    """Score lists of pairs, all in one plan as a job would; one array a list comes back."""
    scores_N = score_pairs(scorer, [pair for pairs in encoded for pair in pairs])
    ends = np.cumsum([len(pairs) for pairs in encoded])
    return np.split(scores_N, ends[:-1])


def gate(
    reference: Sequence[NDArray[np.float32]],
    candidates: Mapping[str, Sequence[NDArray[np.float32]]],
    precision: Precision,
) -> dict[str, Any]:
    """Figures of every graph for the manifest.

    Raises:
        ConfigurationError: a graph is beyond the gate of its precision.
    """
    figures = {name: compare(reference, scores) for name, scores in candidates.items()}
    for name, parity in figures.items():
        why = GATES[precision].misses(parity)
        if why is not None:
            raise _beyond(name, parity, precision, why)
    return {
        "gate": asdict(GATES[precision]),
        "graphs": {name: asdict(parity) for name, parity in figures.items()},
    }


def check_packed(bundle: Bundle, graph: Path, precision: Precision) -> Parity:
    """Score the package's own pairs with a packed graph made from a bundle, on the CPU.

    Raises:
        ConfigurationError: it is beyond the gate of its precision, or of the bundle's, whose
            weights stay as rounded as they are stored.
    """
    encoder = PairEncoder.from_file(bundle.file("tokenizer.json"), bundle.recipe)
    encoded = encoder.encode(own_pairs())
    with runnable(graph, precision) as path:
        scores = scores_of(PackedOnnxScorer(path, bundle.recipe, "cpu"), encoded)
    ends = np.cumsum([len(pairs) for pairs in encoded])[:-1]
    reference = np.split(np.array(bundle.manifest.own_scores, np.float32), ends)
    parity = compare(reference, scores)
    coarser = max(precision, bundle.manifest.precision, key=list(GATES).index)
    why = GATES[coarser].misses(parity)
    if why is not None:
        raise _beyond(graph.name, parity, coarser, why)
    return parity


def _beyond(name: str, parity: Parity, precision: Precision, why: str) -> ConfigurationError:
    report = (
        "report it with the checkpoint's config.json: this is a bug or an architecture that "
        "dear-batch does not know"
    )
    return ConfigurationError(
        f"The graph {name} does not score as PyTorch does; nothing was written.",
        where=f"{why} ({precision}, {parity.pairs} pairs); max |Δscore| "
        f"{parity.max_abs_difference:.3g}, Kendall τ {parity.kendall_tau:.4f}",
        valid=f"{precision} within its gate: {GATES[precision]}",
        next_step=report if precision == "fp32" else "the same command with --precision fp32",
    )
