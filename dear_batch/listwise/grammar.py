"""The answer grammar: which characters, and by them which tokens, may come next.

An answer is `lead open identifier (between identifier)* close` with every identifier once.
The grammar walks characters, so every way in which a tokenizer can cut an answer is allowed
and none is preferred. Knows nothing of models.
"""

import os.path
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Self

from tokenizers import Tokenizer

from dear_batch.listwise.prompts import Answer


@dataclass(frozen=True, slots=True)
class State:
    """Where an answer stands: `pending` text, then an identifier of which `typed` is written.

    `pending` holds alternatives at the start of an answer, where white space may lead; one
    text elsewhere. `unused` and `chosen` are identifiers as they are written.
    """

    pending: tuple[str, ...]
    typed: str
    unused: tuple[str, ...]
    chosen: tuple[str, ...] = ()

    @property
    def done(self) -> bool:
        """Whether the answer is whole."""
        return not self.unused and not self.pending


@dataclass(frozen=True, slots=True)
class Grammar:
    """What a prompt's answers look like, whatever their identifiers."""

    answer: Answer

    def start(self, identifiers: Sequence[str]) -> State:
        """Before the first character."""
        return State(
            tuple(lead + self.answer.open for lead in self.answer.lead), "", tuple(identifiers)
        )

    def following(self, state: State) -> dict[str, State]:
        """The state behind each character that may come next; none behind the end."""
        if state.pending:
            firsts = {
                p[0]: tuple(q[1:] for q in state.pending if q[0] == p[0]) for p in state.pending
            }
            return {c: self._behind(rest, state) for c, rest in firsts.items()}
        typed, size = state.typed, len(state.typed)
        nexts = {u[size] for u in state.unused if len(u) > size and u.startswith(typed)}
        found = {c: State((), typed + c, state.unused, state.chosen) for c in nexts}
        if typed in state.unused:
            text = self._closing(state)
            unused = tuple(u for u in state.unused if u != typed)
            chosen = State((), "", unused, (*state.chosen, typed))
            found[text[0]] = self._behind((text[1:],), chosen)
        return found

    def read(self, state: State, text: str) -> State | None:
        """The state after a text, None where it breaks the grammar; after the end all goes."""
        for character in text:
            if state.done:
                return state
            following = self.following(state).get(character)
            if following is None:
                return None
            state = following
        return state

    def forced(self, state: State) -> str:
        """The text that must come before the next choice; all the rest where none is left."""
        if state.done or len(state.pending) > 1:
            return ""
        candidates = [u for u in state.unused if u.startswith(state.typed)]
        pending = "".join(state.pending)
        if len(candidates) != 1:
            common = os.path.commonprefix(candidates)  # noqa: RUF071 - characters, not paths
            return pending + common[len(state.typed) :]
        text = pending + candidates[0][len(state.typed) :] + self._closing(state)
        unused = tuple(u for u in state.unused if u != candidates[0])
        return text + self.forced(State((), "", unused))

    def _closing(self, state: State) -> str:
        """What comes behind the identifier that is typed."""
        return self.answer.between if len(state.unused) > 1 else self.answer.close

    @staticmethod
    def _behind(pending: tuple[str, ...], state: State) -> State:
        return State(() if "" in pending else pending, "", state.unused, state.chosen)


@dataclass(slots=True)
class _Node:
    """A node of the trie of token texts; `tokens` end here, as indices of the vocabulary."""

    children: dict[str, "_Node"] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)


class Vocabulary:
    """The tokens of which answers can be made, with their texts inside an answer.

    `ids[i]` and `texts[i]` belong together; states name tokens by `i`.
    """

    def __init__(self, texts: dict[int, str], grammar: Grammar) -> None:
        self._grammar = grammar
        self.ids = sorted(texts)
        self.texts = [texts[i] for i in self.ids]
        self._root = _Node()
        for index, text in enumerate(self.texts):
            node = self._root
            for character in text:
                node = node.children.setdefault(character, _Node())
            node.tokens.append(index)

    @classmethod
    def of(cls, tokenizer: Tokenizer, grammar: Grammar, identifiers: Sequence[str]) -> Self:
        """Look through a tokenizer for the tokens that answers of these identifiers can hold."""
        texts = token_texts(tokenizer, grammar.answer.open)
        return cls({i: t for i, t in texts.items() if _usable(t, grammar, identifiers)}, grammar)

    def allowed(self, state: State) -> list[tuple[int, State]]:
        """Tokens that keep to the grammar, by index, each with the state behind it."""
        return sorted(self._walk(self._root, state), key=itemgetter(0))

    def _walk(self, node: _Node, state: State) -> Iterator[tuple[int, State]]:
        following = (
            dict.fromkeys(node.children, state) if state.done else self._grammar.following(state)
        )
        for character, behind in following.items():
            child = node.children.get(character)
            if child is not None:
                for token in child.tokens:
                    yield token, behind
                if child.children:
                    yield from self._walk(child, behind)


def token_texts(tokenizer: Tokenizer, before: str) -> dict[int, str]:
    """What each token adds to a text that has begun with `before`.

    A decoder may treat the first token of a text specially (SentencePiece drops its space), so
    every token is decoded behind another one.
    """
    anchor = tokenizer.encode(before, add_special_tokens=False).ids
    start = len(tokenizer.decode(anchor, skip_special_tokens=False))
    ids = sorted(tokenizer.get_vocab(with_added_tokens=True).values())
    decoded = tokenizer.decode_batch([[*anchor, i] for i in ids], skip_special_tokens=False)
    return {i: text[start:] for i, text in zip(ids, decoded, strict=True)}


def _usable(text: str, grammar: Grammar, identifiers: Sequence[str]) -> bool:
    """Whether a token can stand in an answer, at any place; one may reach beyond the end."""
    answer = grammar.answer
    alphabet = set("".join([*answer.lead, answer.open, answer.between, answer.close]))
    alphabet.update(*identifiers)
    inside = text[: next((i for i, c in enumerate(text) if c not in alphabet), len(text))]
    if not inside or (inside != text and answer.close[-1] not in inside):
        return False
    digits = "".join(c if c.isdigit() else " " for c in inside).split()
    return all(any(run in identifier for identifier in identifiers) for run in digits)
