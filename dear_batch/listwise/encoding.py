"""A window's query and passages to token ids, special tokens once and never from the texts.

Prompts that are too long lose text at the ends of their longest passages, never any of the
instruction. Knows nothing of how passages are chosen or answers are read.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from dear_batch.bundle import Bundle
from dear_batch.errors import ConfigurationError, missing_extra
from dear_batch.listwise.grammar import token_texts
from dear_batch.listwise.prompts import Message, Prompt

Request = tuple[str, Sequence[str]]
Render = Callable[[Sequence[Message]], str]

# Llama 3.2's chat template writes today's date unless it is given one, so a job resumed on
# the next day would not repeat its prompts; this is the date that 3.1 and 3.2 fall back to.
DATE = "26 Jul 2024"


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """The ids of one prompt, and what its texts lost or gained on the way.

    `cut_passages` were longer than the prompt's own limit, `shortened_passages` lost more to fit
    into the context; `neutralised_texts`, of query and passages, spelled special tokens.
    """

    ids: NDArray[np.int32]
    cut_passages: int
    shortened_passages: int
    neutralised_texts: int

    @property
    def sha256(self) -> str:
        """Of the ids, little-endian."""
        return hashlib.sha256(self.ids.astype("<i4").tobytes()).hexdigest()


@dataclass(slots=True)
class _Search:
    """For the longest passages of a request that fit: `high` is too long, `best` fits.

    A longer text can have fewer tokens, so what is found is a cap that fits while the next one
    does not.
    """

    request: Request
    high: int
    low: int = 0
    best: EncodedPrompt | None = None

    @property
    def cap(self) -> int:
        """The next one to try."""
        return (self.low + self.high) // 2

    def learn(self, tried: EncodedPrompt, max_tokens: int) -> None:
        """Take in the prompt at `cap`."""
        if len(tried.ids) <= max_tokens:
            self.low, self.best = self.cap, tried
        else:
            self.high = self.cap


class PromptEncoder:
    """Turns windows into ids of at most `max_tokens`.

    `render` lays out a chat prompt's turns with all special tokens; a plain prompt has none
    and gets the tokenizer's own.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Prompt, max_tokens: int, render: Render | None = None
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._render = render or _joined
        self._neutral = _Neutraliser(tokenizer)
        self.prompt = prompt
        self.max_tokens = max_tokens

    @classmethod
    def from_bundle(cls, bundle: Bundle, prompt: Prompt, max_tokens: int) -> Self:
        """With the bundle's tokenizer and, for a chat prompt, its chat template.

        Raises:
            ConfigurationError: a chat prompt, and the model has no chat template or one that
                refuses such a conversation.
            TrustError: the bundle's manifest lists no tokenizer.
        """
        tokenizer = Tokenizer.from_file(str(bundle.file("tokenizer.json")))
        render = _chat_template(bundle, prompt) if prompt.is_chat else None
        encoder = cls(tokenizer, prompt, max_tokens, render)
        encoder._smallest(2)  # a template that refuses the conversation does so here
        return encoder

    def encode(self, requests: Sequence[Request]) -> list[EncodedPrompt | None]:
        """Encode `(query, passages)` requests; thread-safe, releases the GIL.

        None where even one character of every passage does not fit.
        """
        whole = self._encode(requests, [None] * len(requests))
        searches = {
            i: self._search(requests[i])
            for i, prompt in enumerate(whole)
            if len(prompt.ids) > self.max_tokens
        }
        self._shorten([*searches.values()])
        return [searches[i].best if i in searches else prompt for i, prompt in enumerate(whole)]

    def least_tokens(self, n: int) -> int:
        """The tokens of a prompt of n passages of one character each, without a query."""
        return len(self._smallest(n).ids)

    def check_identifiers(self, n: int) -> None:
        """Check that the tokenizer can write every answer over n passages.

        Every character of an answer must be a token: then the identifiers can be spelled apart,
        and no choice of tokens leads to where none can follow.

        Raises:
            ConfigurationError: some are not.
        """
        answer, identifiers = self.prompt.answer, self.prompt.identifiers(n)
        tokens = set(token_texts(self._tokenizer, answer.open).values())
        lost = [text for text in identifiers if not tokens.issuperset(text)]
        around = sorted(set(answer.open + answer.between + answer.close) - tokens)
        if lost or around:
            what = f"identifiers: {', '.join(lost)}" if lost else f"characters: {' '.join(around)}"
            raise ConfigurationError(
                f"The model's tokenizer cannot write these {what}.",
                where=f"prompt {self.prompt.name}: {answer.text(identifiers)}",
                valid="a tokenizer that has a token for every character of an answer",
                next_step="use another model, or a prompt with an answer that it can write",
            )

    def _smallest(self, n: int) -> EncodedPrompt:
        (prompt,) = self._encode([("", ["a"] * n)], [None])
        return prompt

    def _search(self, request: Request) -> _Search:
        return _Search(request, max(len(self.prompt.cut(passage)) for passage in request[1]))

    def _shorten(self, searches: Sequence[_Search]) -> None:
        """Bisect all caps in step, one call of the tokenizer a round."""
        while searches := [s for s in searches if s.high - s.low > 1]:
            tried = self._encode([s.request for s in searches], [s.cap for s in searches])
            for search, prompt in zip(searches, tried, strict=True):
                search.learn(prompt, self.max_tokens)

    def _encode(
        self, requests: Sequence[Request], caps: Sequence[int | None]
    ) -> list[EncodedPrompt]:
        """Encode with passages of at most each request's cap of characters, come what may."""
        laid_out = [
            self._lay_out(request, cap) for request, cap in zip(requests, caps, strict=True)
        ]
        encodings = self._tokenizer.encode_batch_fast(
            [text for text, _ in laid_out], add_special_tokens=not self.prompt.is_chat
        )
        return [
            EncodedPrompt(np.array(encoding.ids, np.int32), *counts)
            for encoding, (_, counts) in zip(encodings, laid_out, strict=True)
        ]

    def _lay_out(self, request: Request, cap: int | None) -> tuple[str, tuple[int, int, int]]:
        """The prompt's text, and the counts of an `EncodedPrompt`."""
        query, passages = request
        cut = [self.prompt.cut(passage) for passage in passages]
        shown = [passage[:cap] for passage in cut]
        safe_query, *safe = neutral = [self._neutral(text) for text in (query, *shown)]
        counts = (
            sum(self.prompt.units(passage) > self.prompt.limit for passage in passages),
            sum(map(str.__ne__, cut, shown)),
            sum(map(str.__ne__, neutral, (query, *shown))),
        )
        return self._render(self.prompt.messages(safe_query, safe)), counts


class _Neutraliser:
    """Puts a space into every special token that a text spells, so that it stays text.

    A token of one character, or of white space, cannot be taken apart; it ends no turn either.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokens = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        literals = sorted((t for t in tokens if len("".join(t.split())) > 1), key=len, reverse=True)
        self._literal = re.compile("|".join(map(re.escape, literals)) or r"(?!)")

    def __call__(self, text: str) -> str:
        """Again until none is left: one can begin within another."""
        while (split := self._literal.sub(_with_space, text)) != text:
            text = split
        return text


def _with_space(literal: re.Match[str]) -> str:
    """Behind the first visible character: behind leading white space the token would remain."""
    text = literal[0]
    at = len(text) - len(text.lstrip()) + 1
    return f"{text[:at]} {text[at:]}"


def _joined(messages: Sequence[Message]) -> str:
    return "".join(message.content for message in messages)


def _chat_template(bundle: Bundle, prompt: Prompt) -> Render:
    """The bundle's chat template, as transformers renders it."""
    try:
        from jinja2 import TemplateError
        from transformers import AutoTokenizer
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "transformers", "listwise", "A chat prompt") from error
    tokenizer = AutoTokenizer.from_pretrained(bundle.folder, local_files_only=True)
    if tokenizer.chat_template is None:
        raise _does_not_fit(bundle, prompt, "the model has no chat template", "")

    def render(messages: Sequence[Message]) -> str:
        conversation = [{"role": m.role, "content": m.content} for m in messages]
        try:
            text: str = tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=True, date_string=DATE
            )
        except TemplateError as error:
            why = "the model's chat template refuses the conversation"
            raise _does_not_fit(bundle, prompt, why, f": {error}") from error
        return text

    return render


def _does_not_fit(bundle: Bundle, prompt: Prompt, why: str, where: str) -> ConfigurationError:
    return ConfigurationError(
        f"The chat prompt {prompt.name} cannot be used: {why}.",
        where=f"{bundle.folder}{where}",
        valid="a model whose chat template takes the prompt's turns, or a plain prompt",
        next_step='use the prompt "readme", which is plain text',
    )
