import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from dear_batch.pointwise.recipe import (
    PairEncoder,
    Recipe,
    document_text,
    longest_first,
    query_text,
    recipe_from_tokenizer,
)
from tests.conftest import ROOT, STYLES, collection_queries, collection_texts, tokenizer_of


def encoder(style: str, name: str = "readme") -> PairEncoder:
    tokenizer = tokenizer_of(style)
    return PairEncoder(
        tokenizer, recipe_from_tokenizer(tokenizer, name, "last-token", bos_id=1, pad_id=2)
    )


def pair_call(style: str, query: str, title: str, text: str) -> list[int]:
    """`tokenizer(query, document, truncation=True, max_length=228)`: the Rust pair logic."""
    tokenizer: Tokenizer = tokenizer_of(style)
    tokenizer.enable_truncation(228, strategy="longest_first")
    return tokenizer.encode(query_text(query), document_text(title, text)).ids


def cases(seed: int) -> list[tuple[str, list[tuple[str, str]]]]:
    """Short and long queries against short and long documents, some with titles."""
    rng = random.Random(seed)
    texts, queries = collection_texts(), collection_queries()

    def document() -> tuple[str, str]:
        words = " ".join(rng.sample(texts, 3)).split()
        return rng.choice(["", "A Title"]), " ".join(words[: rng.choice([0, 1, 40, 90, 300])])

    long_query = " ".join(" ".join(rng.sample(queries, 8)).split()[: rng.choice([5, 40, 90])])
    return [
        (query, [document() for _ in range(12)])
        for query in (*rng.sample(queries, 3), long_query, long_query * 4)
    ]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("seed", range(3))
def test_readme_ids_equal_the_tokenizers_own_pair_call(style: str, seed: int) -> None:
    lists = cases(seed)
    cut = 0
    for (query, documents), pairs in zip(lists, encoder(style).encode(lists), strict=True):
        for (title, text), pair in zip(documents, pairs, strict=True):
            assert pair.input_ids().tolist() == pair_call(style, query, title, text)
            cut += pair.truncated
    assert cut > 0


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(2, 240))
def test_longest_first_equals_the_rust_library(first: int, second: int, room: int) -> None:
    tokenizer = tokenizer_of("llama32")  # no special tokens: the whole room is for the texts
    word = tokenizer.encode("e").ids
    assert len(word) == 1
    tokenizer.enable_truncation(room, strategy="longest_first")
    encoding = tokenizer.encode(["e"] * first, ["e"] * second, is_pretokenized=True)
    sides = encoding.sequence_ids
    assert longest_first(first, second, room) == (sides.count(0), sides.count(1))


def test_an_empty_title_leaves_two_spaces() -> None:
    assert document_text("", "passage") == "document:  passage"
    assert document_text("Title", "passage") == "document: Title passage"


def test_llama3_pairs_begin_twice() -> None:
    ((pair,),) = encoder("llama31").encode([("a", [("", "b")])])
    ids = pair.input_ids().tolist()
    assert ids[0] == 1
    assert ids.count(1) == 2
    assert pair.prefix_ids[-1] == 1  # the second BOS is shared with the query


@pytest.mark.parametrize("style", STYLES)
def test_paper_script_cuts_each_side(style: str) -> None:
    tokenizer = tokenizer_of(style)
    for query, documents in cases(5):
        (pairs,) = encoder(style, "paper-script").encode([(query, documents)])
        first = tokenizer.encode(query_text(query), add_special_tokens=False).ids[:32]
        for (title, text), pair in zip(documents, pairs, strict=True):
            second = tokenizer.encode(document_text(title, text), add_special_tokens=False).ids
            expected = [1, *first, 1, *second[:193]]
            assert pair.input_ids().tolist() == expected[:228]
            assert len(pair) <= 227  # 1 + 32 + 1 + 193


def test_paper_script_needs_a_bos() -> None:
    with pytest.raises(ValueError, match="BOS"):
        recipe_from_tokenizer(
            tokenizer_of("llama32"), "paper-script", "last-token", bos_id=None, pad_id=2
        )


def test_a_recipe_survives_json() -> None:
    recipe = encoder("llama2", "paper-script").recipe
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_special_tokens_in_text_are_read_as_the_tokenizer_reads_them() -> None:
    text = "a <|end_of_text|> b"
    ((pair,),) = encoder("llama31").encode([("q", [("", text)])])
    assert pair.input_ids().tolist() == pair_call("llama31", "q", "", text)


GOLDEN = [("who baked bread?", [("", "Yeast lifts dough."), ("Bread", "")])]


@pytest.mark.parametrize("name", ["readme", "paper-script"])
@pytest.mark.parametrize("style", STYLES)
def test_golden_ids(style: str, name: str) -> None:
    expected = json.loads((ROOT / "tests" / "data" / "golden_ids.json").read_text())
    (pairs,) = encoder(style, name).encode(GOLDEN)
    assert [pair.input_ids().tolist() for pair in pairs] == expected[f"{style} {name}"]


def test_the_llama3_layout_in_words() -> None:
    tokenizer = tokenizer_of("llama31")
    (pairs,) = encoder("llama31").encode([("who?", [("", "me"), ("T", "")])])
    first, second = (
        tokenizer.decode(pair.input_ids().tolist(), skip_special_tokens=False) for pair in pairs
    )
    assert first == "<|begin_of_text|>query: who?<|begin_of_text|>document:  me"
    assert second == "<|begin_of_text|>query: who?<|begin_of_text|>document: T "
