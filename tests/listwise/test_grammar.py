import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from dear_batch.listwise.grammar import Grammar, Vocabulary, token_texts
from tests.listwise.conftest import ANSWER

GRAMMAR = Grammar(ANSWER)
IDENTIFIERS = ["1", "2", "10", "12"]
# Every answer, written out: what the grammar is measured against.
ALL = [
    lead + ANSWER.text(order)
    for lead in ANSWER.lead
    for order in itertools.permutations(IDENTIFIERS)
]


def prefixes() -> list[str]:
    return sorted({answer[:i] for answer in ALL for i in range(len(answer) + 1)})


def test_every_answer_is_read_and_gives_its_order() -> None:
    for answer in ALL:
        state = GRAMMAR.read(GRAMMAR.start(IDENTIFIERS), answer)
        assert state is not None
        assert state.done
        assert ANSWER.text(state.chosen) == answer.strip()


@given(st.text(alphabet="[]> \n012x", max_size=12))
def test_nothing_else_is_read(text: str) -> None:
    state = GRAMMAR.read(GRAMMAR.start(IDENTIFIERS), text)
    assert (state is not None) == any(answer.startswith(text) for answer in ALL)


def test_what_is_forced_is_what_all_continuations_share() -> None:
    for prefix in prefixes():
        state = GRAMMAR.read(GRAMMAR.start(IDENTIFIERS), prefix)
        assert state is not None
        rests = [answer[len(prefix) :] for answer in ALL if answer.startswith(prefix)]
        shared = "".join(
            column[0]
            for column in itertools.takewhile(lambda c: len(set(c)) == 1, zip(*rests, strict=False))
        )
        # Before `open` white space may lead, so nothing is forced, though a rest may share it.
        assert GRAMMAR.forced(state) in {shared, ""}
        if not state.pending[1:]:
            assert GRAMMAR.forced(state) == shared


def test_behind_the_end_all_goes() -> None:
    state = GRAMMAR.read(GRAMMAR.start(["7"]), "[7]\n\nand so on")
    assert state is not None
    assert state.chosen == ("7",)


def test_the_allowed_tokens_are_those_that_keep_to_some_answer(tokenizer: Tokenizer) -> None:
    texts = token_texts(tokenizer, "[")
    vocabulary = Vocabulary.of(tokenizer, GRAMMAR, IDENTIFIERS)
    alphabet = set("[]> \n0123456789")
    texts = {i: t for i, t in texts.items() if t and t[0] in alphabet}
    for prefix in prefixes()[::5]:
        state = GRAMMAR.read(GRAMMAR.start(IDENTIFIERS), prefix)
        if state is None or state.done:
            continue
        allowed = {vocabulary.ids[token] for token, _ in vocabulary.allowed(state)}
        expected = {
            i
            for i, text in texts.items()
            if any(
                answer.startswith(prefix + text) or (prefix + text).startswith(answer)
                for answer in ALL
            )
        }
        assert allowed == expected, prefix


def test_token_texts_are_those_inside_an_answer(tokenizer: Tokenizer) -> None:
    texts = token_texts(tokenizer, "[")
    answer = "\n\n[1] > [10] > [12]"
    ids = tokenizer.encode(f"x{answer}", add_special_tokens=False).ids
    assert "".join(texts[i] for i in ids).lstrip(" ") == f"x{answer}"


@pytest.mark.parametrize(
    ("answer", "forced"),
    [
        ("[2", "] > [1"),  # all others begin with it
        ("[1", ""),
        ("[10", "] > ["),
        ("[1]", " > ["),
        ("[2] > [12] > [10", "] > [1]"),
    ],
)
def test_forced_by_hand(answer: str, forced: str) -> None:
    state = GRAMMAR.read(GRAMMAR.start(IDENTIFIERS), answer)
    assert state is not None
    assert GRAMMAR.forced(state) == forced
