"""The parity gate: no bundle without proof that its graphs score as PyTorch does.

The reference is Hugging Face's own model, fp32, one padded pair a row; the ids are those of
the Hugging Face tokenizer. Text is the project's own unless the user gives some.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dear_batch.errors import ConfigurationError, InputError
from dear_batch.parity import Parity, compare
from dear_batch.pointwise.recipe import EncodedPair, Recipe, document_text, query_text
from dear_batch.pointwise.scorer import Scorer, score_pairs

TOLERANCE = {"fp32": 1e-4}  # absolute, in logits
TextList = tuple[str, list[tuple[str, str]]]


def parity_lists(path: str | None) -> list[TextList]:
    """The 64 pairs shipped here, or a user's: JSON lines {query, documents: [{title, text}]}.

    Raises:
        InputError: the file cannot be read as that.
    """
    source = Path(path) if path else files("dear_batch.export") / "parity_pairs.jsonl"
    lists: list[TextList] = []
    try:
        for line in source.read_text(encoding="utf-8").strip("\n").split("\n"):
            item = json.loads(line)
            documents = [(d.get("title") or "", d["text"]) for d in item["documents"]]
            lists.append((item["query"], documents))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"The parity data {source} cannot be read: {error!r}.",
            where=f"line {len(lists) + 1}",
            valid='lines such as {"query": "…", "documents": [{"title": "", "text": "…"}]}',
        ) from error
    if not any(documents for _, documents in lists):
        raise InputError(f"The parity data {source} holds no pairs.")
    return lists


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


def scores_of(scorer: Scorer, encoded: Sequence[list[EncodedPair]]) -> list[NDArray[np.float32]]:
    """Score lists of pairs, all in one plan as a job would; one array a list comes back."""
    scores_N = score_pairs(scorer, [pair for pairs in encoded for pair in pairs])
    ends = np.cumsum([len(pairs) for pairs in encoded])
    return np.split(scores_N, ends[:-1])


def gate(
    reference: Sequence[NDArray[np.float32]],
    candidates: Mapping[str, Sequence[NDArray[np.float32]]],
    precision: str,
) -> dict[str, Any]:
    """Figures of every graph for the manifest.

    Raises:
        ConfigurationError: a graph is beyond the tolerance of its precision.
    """
    figures = {name: compare(reference, scores) for name, scores in candidates.items()}
    for name, parity in figures.items():
        if not parity.max_abs_difference <= TOLERANCE[precision]:
            raise _beyond(name, parity, precision)
    return {
        "tolerance": TOLERANCE[precision],
        "graphs": {name: asdict(parity) for name, parity in figures.items()},
    }


def _beyond(name: str, parity: Parity, precision: str) -> ConfigurationError:
    return ConfigurationError(
        f"The graph {name} does not score as PyTorch does; no bundle was written.",
        where=f"max |Δscore| {parity.max_abs_difference:.3g}, "
        f"Kendall τ {parity.kendall_tau:.4f}, {parity.pairs} pairs",
        valid=f"max |Δscore| up to {TOLERANCE[precision]:g} ({precision})",
        next_step="report it with the checkpoint's config.json: this is a bug or an "
        "architecture that dear-batch does not know",
    )
