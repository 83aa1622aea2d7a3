"""One answer while it is written, and the guesses that make it cheap. Knows nothing of models.

A forward brings, behind the token chosen last, a guess at the tokens that follow: what the
grammar forces (`] > [`), in the spelling that the model used before. A guessed token is kept
where the model, choosing greedily among what the grammar allows, chooses it itself; so the
answer is the one that a forward a token would give, whatever the guesses are
(speculative decoding with greedy verification; Leviathan et al. 2023, arXiv 2211.17192).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from dear_batch.listwise.grammar import Grammar, State, Vocabulary

Logits = NDArray[np.float32]
# A guessed token makes a step about an eighth dearer and, when it is right, saves one
# (benchmarks/results/listwise-cache.json: milliseconds by tokens a step).
SHARED_START = 1 / 8


class Speller:
    """Guesses spellings for the answers of one batch, and learns from those accepted."""

    def __init__(self, tokenizer: Tokenizer, grammar: Grammar, vocabulary: Vocabulary) -> None:
        self.grammar = grammar
        self.vocabulary = vocabulary
        self.texts = dict(zip(vocabulary.ids, vocabulary.texts, strict=True))
        self._tokenizer = tokenizer
        self._standard: dict[str, tuple[int, ...]] = {}
        self._taught: dict[str, tuple[int, ...]] = {}
        self._learned: dict[str, tuple[int, ...]] = {}

    def remember(self) -> None:
        """Let every later batch begin with what this one learned."""
        self._taught = dict(self._learned)

    def forget(self) -> None:
        """Begin another batch, whose course shall not depend on those before it."""
        self._learned = dict(self._taught)

    def learn(self, segment: str, tokens: Sequence[int]) -> None:
        """Keep how a segment was spelled: a forced text, or whatever comes before `open`."""
        self._learned[segment] = tuple(tokens)

    def guess(self, state: State, forced: str, spelled: Sequence[int]) -> list[int]:
        """Tokens that probably follow; `spelled` are those of the identifier being typed."""
        text = self._expected(state, forced, tuple(spelled))
        path = self._learned.get(segment(state, forced) or text) or self._spelling(text)
        following = self.grammar.read(state, "".join(self.texts[token] for token in path))
        return [*path, *self._shared_start(following)] if following else list(path)

    def read(self, tokens: Sequence[int]) -> str:
        """The text of some tokens."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=False)
        return text

    def _expected(self, state: State, forced: str, spelled: tuple[int, ...]) -> str:
        if state.pending[1:]:
            return state.pending[0]
        if forced or state.typed not in state.unused:
            return forced
        # Whole, unless a longer identifier begins with these very tokens.
        longer = [u for u in state.unused if u.startswith(state.typed) and u != state.typed]
        if any(
            self._spelling(u, self.grammar.answer.open)[: len(spelled)] == spelled for u in longer
        ):
            return ""
        return self.grammar.answer.between

    def _shared_start(self, state: State) -> list[int]:
        """The token with which many of the unused identifiers begin, where several do."""
        if state.done or state.typed or state.pending:
            return []
        behind = self.grammar.answer.open
        starts = Counter(self._spelling(u, behind)[:1] for u in state.unused)
        start, count = starts.most_common(1)[0]
        return list(start) if count > max(1, SHARED_START * len(state.unused)) else []

    def _spelling(self, text: str, behind: str = "1") -> tuple[int, ...]:
        """The tokenizer's own spelling behind some text; empty where it merges with that."""
        if text not in self._standard:
            ids = self._tokenizer.encode(behind + text, add_special_tokens=False).ids
            path: list[int] = []
            while ids and len("".join(self.texts.get(i, "") for i in path)) < len(text):
                path.insert(0, ids.pop())
            found = "".join(self.texts.get(i, "") for i in path)
            self._standard[text] = tuple(path) if found == text else ()
        return self._standard[text]


def segment(state: State, forced: str) -> str:
    """What is to be learned of a place in an answer: its start, or what is forced there."""
    return "\0".join(state.pending) if state.pending[1:] else forced


@dataclass(slots=True)
class Writer:
    """An answer in the making.

    `feed` goes into the next forward: `given` tokens that stand, then a guess. `tokens` are
    all tokens of the answer so far, in order; `rest` is the end that needed none.
    """

    speller: Speller
    state: State
    feed: list[int] = field(default_factory=list)
    given: int = 1
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    failure: str = ""
    rest: str = ""
    _forced: str = ""  # behind `state`
    _logprob: float = 0.0
    _spelled: list[int] = field(default_factory=list)
    _segment: str = ""
    _path: list[int] = field(default_factory=list)

    def begin(self, given: Sequence[int], state: State | None = None) -> None:
        """Write behind these tokens, which stand; `state` is where they leave the answer."""
        self.state = state or self.state
        self._forced = self.speller.grammar.forced(self.state)
        self._go_on(given)

    def _go_on(self, given: Sequence[int]) -> None:
        self.feed = [*given, *self.speller.guess(self.state, self._forced, self._spelled)]
        self.given = len(given)

    @property
    def done(self) -> bool:
        """Whether the order is decided: what is left to write leaves no choice."""
        return bool(self.failure) or self.state.done

    def accept(self, logits_TV: Logits) -> tuple[int, int]:
        """Choose by the logits behind each token of the feed.

        Returns how many tokens of the feed stand, and how many were chosen: the first behind
        the last given one.
        """
        kept, before = self.given, len(self.tokens)
        for logits_V in logits_TV[self.given - 1 :]:
            if not np.isfinite(logits_V).all():
                self.failure = "the model gave NaN or infinity"
                break
            self._choose(logits_V)
            if self.done or kept == len(self.feed) or self.feed[kept] != self.tokens[-1]:
                break
            kept += 1
        if not self.done:
            self._go_on([self.tokens[-1]])
        return kept, len(self.tokens) - before

    def _choose(self, logits_V: Logits) -> None:
        """Take the best token that the grammar allows."""
        vocabulary = self.speller.vocabulary
        allowed = vocabulary.allowed(self.state)
        values_A = logits_V[[token for token, _ in allowed]]
        token, following = allowed[int(values_A.argmax())]
        before, self.state = self.state, following
        self.tokens.append(vocabulary.ids[token])
        self._note(before, vocabulary.ids[token], vocabulary.texts[token], values_A)
        self._skip_to_the_end()

    def _note(self, before: State, token: int, text: str, values_A: Logits) -> None:
        """Keep the books: log-probabilities of identifiers, and spellings of segments."""
        forced, after = self._forced, self.state
        # Behind a forced text stands a choice, so what is left of it is all that is forced.
        within = bool(forced) and forced.startswith(text)
        self._forced = forced[len(text) :] if within else self.speller.grammar.forced(after)
        chose = not within and (before.typed, before.chosen) != (after.typed, after.chosen)
        if chose:
            self._logprob -= float(np.log(np.exp(values_A - values_A.max()).sum()))
        new = len(after.chosen) - len(before.chosen)
        if new:
            self.logprobs += [self._logprob, *[0.0] * (new - 1)]
            self._logprob, self._spelled = 0.0, []
        if after.typed:
            self._spelled.append(token)
        self._learn(segment(before, forced), token, chose=chose)

    def _learn(self, place: str, token: int, *, chose: bool) -> None:
        """Gather the tokens of a segment until an identifier begins."""
        self._segment = self._segment or place
        if self._segment and not chose:
            self._path.append(token)
        if self._segment and (chose or not self.state.pending):
            self.speller.learn(self._segment, self._path)
            self._segment, self._path = "", []

    def _skip_to_the_end(self) -> None:
        """The last identifier is free: where all the rest is forced, it is as good as written."""
        grammar = self.speller.grammar
        if not self.state.done and not self._forced.endswith(grammar.answer.close):
            return
        end = grammar.read(self.state, self._forced)
        if end is not None and end.done:
            free = len(end.chosen) - len(self.logprobs)
            self.logprobs += [self._logprob, *[0.0] * (free - 1)][:free]
            self.state, self.rest = end, self._forced
