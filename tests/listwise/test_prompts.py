"""The built-in prompts to the character, and what is refused in a user's own."""

import json
from pathlib import Path
from typing import Any

import pytest

from dear_batch.errors import UsageError
from dear_batch.listwise.prompts import BUILT_IN, Answer, load_prompt, passage_text
from tests.conftest import ROOT

DATA = ROOT / "tests" / "data" / "listwise"
QUERY = "who baked {bread}?"
PASSAGES = ("Yeast lifts dough.", "Bread {query} of  {passage}", "")

PLAIN = """
name = "mine"
first_identifier = 0
passage_words = 8
before.text = "Of {n} passages"
passage.text = "<{identifier}> {passage}"
after.text = "which is about {query}?"
answer = {open = "<", between = ">, <", close = ">"}
"""


def prompt_file(folder: Path, *changes: tuple[str, str]) -> str:
    """A prompt of a user's, changed."""
    text = PLAIN
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "mine.toml").write_text(text)
    return str(folder / "mine.toml")


def messages(name: str) -> list[Any]:
    prompt = load_prompt(name)
    cut = [prompt.cut(passage) for passage in PASSAGES]
    return [[m.role, m.content] for m in prompt.messages(QUERY, cut)]


def test_readme_is_the_readmes_prompt_to_the_character() -> None:
    """Written out by hand from the README's example."""
    found = messages("readme")
    assert {role for role, _ in found} == {"text"}
    assert "".join(text for _, text in found) == (DATA / "readme.txt").read_text()


def test_rankllm_chat_is_rankllms_conversation_to_the_character() -> None:
    """Written out by hand from run_listwise.sh's prompt."""
    assert messages("rankllm-chat") == json.loads((DATA / "rankllm-chat.json").read_text())


def test_readme_cuts_characters_and_begins_at_0() -> None:
    prompt = load_prompt("readme")
    assert (prompt.first_identifier, prompt.limit, prompt.unit) == (0, 300, "character")
    assert not prompt.is_chat
    text = "ab  \n" * 100
    assert prompt.cut(text) == text[:300]
    assert prompt.units(text) == 500
    assert prompt.identifiers(3) == ["0", "1", "2"]


def test_rankllm_chat_cuts_words_and_begins_at_1() -> None:
    prompt = load_prompt("rankllm-chat")
    assert (prompt.first_identifier, prompt.limit, prompt.unit) == (1, 300, "word")
    assert prompt.is_chat
    text = " one\ttwo\u00a0three \n" * 200
    assert prompt.cut(text) == " ".join(["one", "two", "three"] * 100)
    assert prompt.units(text) == 600
    assert prompt.identifiers(3) == ["1", "2", "3"]


@pytest.mark.parametrize("path", sorted(BUILT_IN.iterdir()), ids=lambda path: path.name)
def test_every_built_in_prompt_is_called_as_its_file(path: Path) -> None:
    prompt = load_prompt(path.stem)
    assert prompt.name == path.stem
    assert prompt.answer == Answer("[", "] > [", "]", (" ", "\n", "\n\n"))
    assert prompt.answer.lead == ("", " ", "\n", "\n\n")
    assert prompt.answer.text(["4", "1", "0"]) == "[4] > [1] > [0]"
    assert prompt.reasoning is not None
    assert prompt.reasoning.close == "</think>"


def test_only_a_title_that_is_there_is_shown() -> None:
    assert passage_text("Bread", "of yeast") == "Bread of yeast"
    assert passage_text("", "of yeast") == "of yeast"


def test_a_prompt_of_ones_own(tmp_path: Path) -> None:
    prompt = load_prompt(prompt_file(tmp_path))
    assert [m.content for m in prompt.messages("{n}", ["{identifier}", "{}"])] == [
        "Of 2 passages",
        "<0> {identifier}",
        "<1> {}",
        "which is about {n}?",
    ]
    assert prompt.answer == Answer("<", ">, <", ">", ("",))
    assert prompt.reasoning is None


def test_braces_that_are_no_placeholder_stay(tmp_path: Path) -> None:
    path = prompt_file(tmp_path, ("Of {n} passages", 'Of {n} like {\\"a\\": {}}'))
    assert load_prompt(path).messages("q", [])[0].content == 'Of 0 like {"a": {}}'


REFUSED = {
    "unknown key": (("passage_words", "pasage_words"), "Did you mean 'passage_words'", ""),
    "unknown role": (("before.text", "before.texts"), "Did you mean 'text'", "before.texts"),
    "missing part": (("after.text", "before.user"), "'after' is missing", "after"),
    "empty part": (('before.text = "Of {n} passages"', "before = {}"), "is empty", "before"),
    "mixed": (("before.text", "before.user"), "mixes plain text", "passage.text"),
    "identifier": (("identifier = 0", "identifier = 2"), "begin at 2", "first_identifier"),
    "no cut": (("passage_words = 8", ""), "characters or by words", "passage_characters"),
    "two cuts": (
        ("passage_words = 8", "passage_words = 8\npassage_characters = 8"),
        "characters or by words",
        "passage_words",
    ),
    "cut to nothing": (("words = 8", "words = 0"), "cut to 0 words", "passage_words"),
    "unknown placeholder": (("{n} passages", "{m} passages"), "placeholder {m}", "before"),
    "identifier outside": (("about {query}", "{identifier}"), "placeholder {identifier}", "after"),
    "no identifier": (("<{identifier}>", "-"), "{identifier} is missing", "passage"),
    "no passage": (("> {passage}", ">"), "{passage} is missing", "passage"),
    "no query": (("about {query}", "best"), "{query} is missing", "after"),
    "open with digit": (('open = "<"', 'open = "1"'), "'open' ends with", "answer.open"),
    "between ends so": (('">, <"', '">, 0"'), "'between' ends with", "answer.between"),
    "between begins so": (('">, <"', '"0, <"'), "'between' begins with", "answer.between"),
    "close with digit": (('close = ">"', 'close = "9>"'), "'close' begins with", "answer.close"),
    "no close": (('close = ">"', 'close = ""'), "'answer.close' is not accepted", "answer.close"),
    "lead": (('close = ">"', 'close = ">", lead = ["-"]'), "white space", "answer.lead"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_with_its_place(name: str, tmp_path: Path) -> None:
    change, what, where = REFUSED[name]
    with pytest.raises(UsageError) as error:
        load_prompt(prompt_file(tmp_path, change))
    assert what in error.value.what
    assert error.value.where.startswith(f"{tmp_path / 'mine.toml'}: {where}")
    assert error.value.valid


def test_an_unknown_name_lists_those_that_exist() -> None:
    with pytest.raises(UsageError, match=r"no prompt 'readmee'. Did you mean 'readme'") as error:
        load_prompt("readmee")
    assert error.value.valid.startswith("rankllm-chat, readme, or a file")
    assert "readme.toml" in error.value.next_step


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no prompt"):
        load_prompt(str(tmp_path / "none.toml"))
