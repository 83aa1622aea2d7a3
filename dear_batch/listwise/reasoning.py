"""Free text before an answer, up to its closing tag or a limit. Knows nothing of models.

Only what follows the closing tag is a ranking: reasoning holds digits and brackets too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import nan

from tokenizers import Tokenizer

from dear_batch.listwise.writing import Writer


@dataclass(frozen=True, slots=True)
class Rules:
    """What ends reasoning: its closing tag, `limit` tokens, or the end of the text."""

    tokenizer: Tokenizer
    close: str
    limit: int
    end_ids: frozenset[int]

    def close_ids(self) -> list[int]:
        """The closing tag as tokens, where it has to be put in."""
        ids: list[int] = self.tokenizer.encode(self.close, add_special_tokens=False).ids
        return ids

    def behind_close(self, tokens: Sequence[int]) -> str | None:
        """The text behind the closing tag, None while there is none."""
        tail = len(self.close.encode()) + 1  # a token a byte at most, and one that reaches beyond
        text = self.tokenizer.decode(tokens[-tail:], skip_special_tokens=False)
        _, close, behind = text.rpartition(self.close)
        return behind if close else None


@dataclass(slots=True)
class Reasoning:
    """One row's reasoning; when it is over, `writer` goes on."""

    rules: Rules
    writer: Writer
    feed: list[int]
    tokens: list[int] = field(default_factory=list)
    over: bool = False
    truncated: bool = False
    detail: str = ""

    def take(self, token: int) -> None:
        """Add the model's next token."""
        ended = token in self.rules.end_ids
        if not ended:
            self.tokens.append(token)
            self.feed = [token]
            behind = self.rules.behind_close(self.tokens)
            if behind is not None:
                self._answer(behind)
        if not self.over and (ended or len(self.tokens) >= self.rules.limit):
            self._stop(token, ended=ended)

    def _answer(self, behind: str) -> None:
        """What the last token says beyond the tag is the answer's, if the grammar takes it."""
        state = self.writer.speller.grammar.read(self.writer.state, behind)
        self.writer.begin(self.feed, state)
        self.over = True

    def _stop(self, token: int, *, ended: bool) -> None:
        """Take a text that is an answer and nothing else; close any other for the model."""
        self.over = True
        text = self.rules.tokenizer.decode(self.tokens, skip_special_tokens=False).strip()
        grammar = self.writer.speller.grammar
        answered = grammar.read(self.writer.state, text)
        if ended and answered and answered.done and text == grammar.answer.text(answered.chosen):
            self.writer.state = answered
            self.writer.logprobs = [nan] * len(answered.chosen)
            return
        self.truncated = True
        self.detail = "the text ended unclosed" if ended else "the reasoning reached its limit"
        close = self.rules.close_ids()
        self.tokens += close
        self.writer.begin([*([] if ended else [token]), *close])
