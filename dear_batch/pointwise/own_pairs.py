"""The pairs that the package brings: what a bundle's graphs and engines are tried on.

Text of the project's own. A bundle holds PyTorch's scores of them, so that an engine can be
compared with PyTorch on a machine that has none. Knows nothing of models.
"""

import json
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from dear_batch.errors import InputError

N_OWN_PAIRS = 64
TextList = tuple[str, list[tuple[str, str]]]  # query, (title, text) of each document


def own_pairs() -> list[TextList]:
    """`N_OWN_PAIRS` pairs in lists, the same in every version of a bundle's schema."""
    return read_pairs(files("dear_batch.pointwise") / "parity_pairs.jsonl")


def read_pairs(source: Path | Traversable) -> list[TextList]:
    """Lists of pairs: JSON lines {query, documents: [{title, text}]}.

    Raises:
        InputError: the file cannot be read as that, or holds no pairs.
    """
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
