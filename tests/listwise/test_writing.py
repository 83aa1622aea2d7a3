import hashlib
import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import Tokenizer

from dear_batch.listwise.grammar import Grammar, Vocabulary, token_texts
from dear_batch.listwise.writing import Speller, Writer
from tests.listwise.conftest import ANSWER, MERGES

GRAMMAR = Grammar(ANSWER)


class RandomModel:
    """Logits that depend on all tokens before, as a model's do, out of a hash.

    `liking` is added to what is grammatical, so that greedy decoding often follows the grammar.
    """

    def __init__(self, tokenizer: Tokenizer, n: int, seed: int, liking: float) -> None:
        self.identifiers = [str(i) for i in range(n)]
        self.texts = token_texts(tokenizer, "[")
        self.vocabulary = Vocabulary.of(tokenizer, GRAMMAR, self.identifiers)
        self.seed, self.liking = seed, liking

    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        """Over the whole vocabulary, behind these tokens."""
        key = hashlib.sha256(f"{self.seed}:{tokens}".encode()).digest()
        values = np.random.default_rng(int.from_bytes(key[:8], "little")).normal(
            0, 2, len(self.texts)
        )
        for token in self.allowed("".join(self.texts[t] for t in tokens)):
            values[token] += self.liking
        return values.astype(np.float32)

    def allowed(self, text: str) -> list[int]:
        state = GRAMMAR.read(GRAMMAR.start(self.identifiers), text)
        if state is None or state.done:
            return []
        return [self.vocabulary.ids[token] for token, _ in self.vocabulary.allowed(state)]

    def reference(self) -> tuple[list[int], list[str], bool]:
        """A forward a token under the mask: tokens, order, and whether plain greedy agrees."""
        tokens: list[int] = []
        plain = True
        while True:
            text = "".join(self.texts[t] for t in tokens)
            state = GRAMMAR.read(GRAMMAR.start(self.identifiers), text)
            assert state is not None
            if state.done:
                return tokens, list(state.chosen), plain
            logits = self.logits(tokens)
            allowed = self.allowed(text)
            tokens.append(max(allowed, key=lambda t: (logits[t], -t)))
            plain &= int(logits.argmax()) in allowed

    def write(self, speller: Speller) -> tuple[Writer, int, int]:
        """The writer at its end, its forwards, and the tokens at which greedy was overruled."""
        writer = Writer(speller, GRAMMAR.start(self.identifiers))
        writer.begin([0])
        context: list[int] = []  # what stands, the given prompt token left out
        forwards = overruled = 0
        while not writer.done:
            feeds = [context + writer.feed[1 : i + 1] for i in range(len(writer.feed))]
            full = np.stack([self.logits(tokens) for tokens in feeds])
            _, new = writer.accept(full[:, self.vocabulary.ids])
            forwards += 1
            chosen = writer.tokens[len(context) :]
            assert len(chosen) == new
            overruled += sum(int(row.argmax()) != t for row, t in zip(full, chosen, strict=False))
            context = list(writer.tokens)
            assert writer.done or writer._forced == GRAMMAR.forced(writer.state)
        return writer, forwards, overruled


@settings(deadline=None, max_examples=60)
@given(
    merges=st.sampled_from(sorted(MERGES)),
    n=st.integers(2, 13),
    seed=st.integers(0, 10_000),
    liking=st.sampled_from([0.0, 4.0, 12.0]),
)
def test_always_the_permutation_that_a_forward_a_token_would_give(
    merges: str, n: int, seed: int, liking: float
) -> None:
    tokenizer = MERGES[merges]()
    model = RandomModel(tokenizer, n, seed, liking)
    speller = Speller(tokenizer, GRAMMAR, model.vocabulary)
    tokens, order, plain = model.reference()
    for _ in range(2):  # the second time with what the first has taught
        writer, forwards, overruled = model.write(speller)
        assert sorted(writer.state.chosen, key=int) == model.identifiers
        assert list(writer.state.chosen) == order
        assert writer.tokens == tokens[: len(writer.tokens)]
        text = "".join(model.texts[t] for t in writer.tokens) + writer.rest
        assert GRAMMAR.read(GRAMMAR.start(model.identifiers), text) == writer.state
        assert len(writer.logprobs) == n
        assert all(p <= 0 for p in writer.logprobs)
        assert forwards <= len(writer.tokens)
        assert not plain or overruled == 0
        speller.remember()


def test_a_forward_a_choice_once_the_spelling_is_known(tokenizer: Tokenizer) -> None:
    """With a model that spells as its tokenizer does, the forced characters cost nothing."""
    n = 12
    order = [str(i) for i in (3, 11, 0, 10, 7, 1, 2, 9, 4, 8, 6, 5)]
    wanted = tokenizer.encode(f"1\n\n{ANSWER.text(order)}", add_special_tokens=False).ids
    texts = token_texts(tokenizer, "[")
    while not "".join(texts[t] for t in wanted).startswith("\n\n["):
        wanted.pop(0)
    model = RandomModel(tokenizer, n, seed=0, liking=0)

    def logits(tokens: list[int]) -> NDArray[np.float32]:
        values = np.zeros(len(texts), np.float32)
        if tokens == wanted[: len(tokens)]:
            values[wanted[len(tokens)]] = 5
        return values

    model.logits = logits  # type: ignore[method-assign]
    speller = Speller(tokenizer, GRAMMAR, model.vocabulary)
    model.write(speller)
    speller.remember()
    writer, forwards, overruled = model.write(speller)
    assert list(writer.state.chosen) == order
    assert overruled == 0
    # One forward a choice, the last free; two more where the first digit was guessed wrongly.
    assert forwards <= n + 2
    assert len(writer.tokens) >= n


def test_log_probabilities_are_those_of_the_choice_among_what_is_left() -> None:
    tokenizer = MERGES["llama3"]()
    model = RandomModel(tokenizer, 3, seed=1, liking=0)
    ids = {text: i for i, text in model.texts.items()}
    scores = {"0": 1.0, "1": 3.0, "2": 2.0, "[": 9.0, "]": 9.0, " >": 9.0, " [": 9.0}

    def logits(_tokens: list[int]) -> NDArray[np.float32]:
        values = np.full(len(model.texts), -50, np.float32)
        for text, score in scores.items():
            values[ids[text]] = score
        return values

    model.logits = logits  # type: ignore[method-assign]
    writer, _, _ = model.write(Speller(tokenizer, GRAMMAR, model.vocabulary))
    assert writer.state.chosen == ("1", "2", "0")
    total = np.log(np.exp([1.0, 3.0, 2.0]).sum())
    np.testing.assert_allclose(
        writer.logprobs, [3 - total, 2 - np.log(np.exp([1.0, 2.0]).sum()), 0], rtol=1e-5
    )


def test_a_model_that_gives_nan_fails_its_window() -> None:
    tokenizer = MERGES["llama3"]()
    vocabulary = Vocabulary.of(tokenizer, GRAMMAR, ["0", "1"])
    writer = Writer(Speller(tokenizer, GRAMMAR, vocabulary), GRAMMAR.start(["0", "1"]))
    writer.begin([0])
    logits = np.full((len(writer.feed), len(vocabulary.ids)), np.nan, np.float32)
    writer.accept(logits)
    assert writer.done
    assert "NaN" in writer.failure


def test_guesses_never_decide(tokenizer: Tokenizer) -> None:
    """A speller that was taught nonsense costs forwards, not the order."""
    model = RandomModel(tokenizer, 5, seed=3, liking=3)
    speller = Speller(tokenizer, GRAMMAR, model.vocabulary)
    _, order, _ = model.reference()
    for segment, tokens in itertools.product(["] > [", "] > [1"], [[5], [7, 9]]):
        speller.learn(segment, [model.vocabulary.ids[t] for t in tokens])
        assert list(model.write(speller)[0].state.chosen) == order
