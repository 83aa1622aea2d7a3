"""Tokenizers that merge answers in different ways, and tiny models that write them."""

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from dear_batch.listwise.prompts import Answer
from tests.conftest import collection_texts

ANSWER = Answer("[", "] > [", "]", (" ", "\n", "\n\n"))
# Llama 3's (huggingface/transformers, convert_llama_weights_to_hf.py): digits up to three.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def answers(count: int, passages: int) -> list[str]:
    """Random answers of identifiers from 0."""
    pick = random.Random(3)
    orders = (pick.sample(range(passages), passages) for _ in range(count))
    return [ANSWER.text([str(i) for i in order]) for order in orders]


def _training_texts() -> list[str]:
    return [*collection_texts(), *answers(200, 20)]


def _byte_level(*splits: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not splits)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_texts(), trainer)
    return tokenizer


def _llama3() -> Tokenizer:
    """`]`, ` >`, ` [` and numbers in one piece."""
    return _byte_level(pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"))


def _smollm2() -> Tokenizer:
    """SmolLM2's way: every digit alone."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    return _byte_level(digits, pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"))


def _sentencepiece() -> Tokenizer:
    """Merges across everything, such as `]▁>▁[1`, where training saw it often enough."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens], show_progress=False
    )
    sentences = [part for text in _training_texts() for part in text.split(". ")]
    tokenizer.train_from_iterator(sentences, trainer)
    return tokenizer


MERGES: dict[str, Callable[[], Tokenizer]] = {
    "llama3": cache(_llama3),
    "smollm2": cache(_smollm2),
    "sentencepiece": cache(_sentencepiece),
}


@pytest.fixture(params=MERGES)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return MERGES[request.param]()
