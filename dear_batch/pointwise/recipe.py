"""Query and document text to token ids, exactly as the DeAR authors feed their models.

Two recipes exist (github.com/DataScienceUIBK/DeAR-Reranking): `readme` is the model cards'
and the README's text pair; `paper-script` is `run_pointwise.sh`. Both are computed here from
the query's and the document's own ids, without a tokenizer's pair logic, so that a query is
tokenised once a list. Knows nothing of models, rows or files.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

Ids = NDArray[np.int32]
RecipeName = Literal["readme", "paper-script"]
Pooling = Literal["last-token", "final-position"]

MAX_LENGTH = 228  # README: q_max_len 32 + p_max_len 196
PAPER_QUERY_TOKENS = 32  # run_pointwise.sh: --q_max_len 32
PAPER_DOCUMENT_TOKENS = 193  # run_pointwise.sh: 196 less the three ids it reserves


def query_text(query: str) -> str:
    """The query side of the pair."""
    return f"query: {query}"


def document_text(title: str, text: str) -> str:
    """The document side. An empty title leaves two spaces; the models were trained so."""
    return f"document: {title} {text}"


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """One (query, document) input: `prefix_ids` before the document's text, then the rest.

    `prefix_ids` are equal for most documents of a query, which is what rows share.
    """

    prefix_ids: Ids
    document_ids: Ids
    truncated: bool

    def __len__(self) -> int:
        """Tokens of the whole input."""
        return len(self.prefix_ids) + len(self.document_ids)

    def input_ids(self) -> Ids:
        """The ids of the pair scored alone, shape [length]."""
        return np.concatenate([self.prefix_ids, self.document_ids])


class Tokens(NamedTuple):
    """A text as ids: the first ones, as many as a pair can hold, and how many it has in all."""

    ids: Ids
    length: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """How ids are laid out: `head query middle document tail`, at most `max_length`.

    `query_tokens` and `document_tokens` cut each side first (`paper-script`); where they are
    None the longer side gives way until the pair fits (`readme`, "longest first").
    """

    name: RecipeName
    pooling: Pooling
    head_ids: tuple[int, ...]
    middle_ids: tuple[int, ...]
    tail_ids: tuple[int, ...]
    pad_id: int
    max_length: int = MAX_LENGTH
    query_tokens: int | None = None
    document_tokens: int | None = None

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """The recipe that `to_json` wrote into a bundle."""
        lists: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()
        }
        return cls(**lists)

    def to_json(self) -> dict[str, Any]:
        """JSON-able fields."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def lengths(self, query_length: int, document_length: int) -> tuple[int, int]:
        """How many ids of each side are kept, in tokens."""
        specials = len(self.head_ids) + len(self.middle_ids) + len(self.tail_ids)
        room = self.max_length - specials
        if self.query_tokens is None or self.document_tokens is None:
            return longest_first(query_length, document_length, room)
        query = min(query_length, self.query_tokens)
        return query, min(document_length, self.document_tokens, room - query)


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Lengths after `truncation="longest_first"`, in tokens.

    Follows `truncate_encodings` of huggingface/tokenizers (utils/truncation.rs), which the
    tokenizer call of the README runs, its rounding included.
    """
    if first + second <= room:
        return first, second
    short, long = sorted((first, second))
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short = room // 2
        long = short + room % 2
    return (short, long) if first <= second else (long, short)


def recipe_from_tokenizer(
    tokenizer: Tokenizer, name: RecipeName, pooling: Pooling, *, bos_id: int | None, pad_id: int
) -> Recipe:
    """The recipe with the special ids that this tokenizer puts around a pair.

    Raises:
        ValueError: `paper-script` with a tokenizer that has no BOS token.
    """
    if name == "paper-script":
        if bos_id is None:
            raise ValueError("the paper-script recipe begins both sides with BOS")
        return Recipe(
            name,
            pooling,
            head_ids=(bos_id,),
            middle_ids=(bos_id,),
            tail_ids=(),
            pad_id=pad_id,
            query_tokens=PAPER_QUERY_TOKENS,
            document_tokens=PAPER_DOCUMENT_TOKENS,
        )
    head, middle, tail = _template(tokenizer)
    return Recipe(name, pooling, head, middle, tail, pad_id)


def _template(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The special ids before, between and after the two sides of a pair."""
    probe = tokenizer.encode("query", "document")
    ids, sides = probe.ids, probe.sequence_ids
    first, second = sides.index(0), sides.index(1)
    middle = first + sides.count(0)
    end = second + sides.count(1)
    return tuple(ids[:first]), tuple(ids[middle:second]), tuple(ids[end:])


class PairEncoder:
    """Turns candidate texts into `EncodedPair`s by a recipe; thread-safe, releases the GIL."""

    def __init__(self, tokenizer: Tokenizer, recipe: Recipe) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.recipe = recipe

    @classmethod
    def from_file(cls, tokenizer_json: Path, recipe: Recipe) -> Self:
        """An encoder of a bundle's own tokenizer."""
        return cls(Tokenizer.from_file(str(tokenizer_json)), recipe)

    def encode(
        self,
        lists: Iterable[tuple[str, Sequence[tuple[str, str]]]],
        known: dict[str, Tokens] | None = None,
    ) -> list[list[EncodedPair]]:
        """Encode `(query, [(title, text), …])` lists; one list of pairs comes back for each.

        Each text is tokenised once. What is in `known` is not tokenised again, and what was is
        added to it.
        """
        known = {} if known is None else known
        texts = [
            (query_text(query), [document_text(title, text) for title, text in documents])
            for query, documents in lists
        ]
        self._tokenise((text for query, documents in texts for text in (query, *documents)), known)
        return [
            self._pairs(known[query], [known[document] for document in documents])
            for query, documents in texts
        ]

    def _tokenise(self, texts: Iterable[str], known: dict[str, Tokens]) -> None:
        new = [text for text in dict.fromkeys(texts) if text not in known]
        encodings = self._tokenizer.encode_batch_fast(new, add_special_tokens=False)
        most = self.recipe.max_length
        for text, encoding in zip(new, encodings, strict=True):
            ids = encoding.ids
            known[text] = Tokens(np.array(ids[:most], np.int32), len(ids))

    def _pairs(self, query: Tokens, documents: Sequence[Tokens]) -> list[EncodedPair]:
        """The pairs of a list; those whose query is cut alike share their prefix."""
        recipe, tail = self.recipe, np.array(self.recipe.tail_ids, np.int32)
        prefixes = dict[int, Ids]()
        result = []
        for document in documents:
            n_query, n_document = recipe.lengths(query.length, document.length)
            if n_query not in prefixes:
                prefix = (*recipe.head_ids, *query.ids[:n_query], *recipe.middle_ids)
                prefixes[n_query] = np.array(prefix, np.int32)
            ids = document.ids[:n_document]
            result.append(
                EncodedPair(
                    prefixes[n_query],
                    np.concatenate([ids, tail]) if len(tail) else ids,
                    truncated=n_query < query.length or n_document < document.length,
                )
            )
        return result
