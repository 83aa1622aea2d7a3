"""Trains the tiny tokenizers of this folder on the example collection.

Run once; the files are committed, so that golden ids stay what they are:
python tests/data/make_tokenizers.py
"""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

HERE = Path(__file__).parent
CORPUS = HERE.parent.parent / "examples" / "collection" / "corpus.jsonl"


def collection_texts() -> list[str]:
    return [json.loads(line)["text"] for line in CORPUS.read_text(encoding="utf-8").splitlines()]


def byte_level_tokenizer() -> Tokenizer:
    """Llama 3's kind: byte-level BPE; the template gives both sides of a pair a BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["!", "<|begin_of_text|>", "<|end_of_text|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(collection_texts(), trainer)
    bos = ("<|begin_of_text|>", 1)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{bos[0]} $A", pair=f"{bos[0]} $A {bos[0]}:1 $B:1", special_tokens=[bos]
            ),
        ]
    )
    return tokenizer


def sentencepiece_tokenizer() -> Tokenizer:
    """Llama 2's kind: Metaspace BPE with byte fall-back and a BOS on both sides."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens], show_progress=False
    )
    sentences = [part for text in collection_texts() for part in text.split(". ")]
    tokenizer.train_from_iterator(sentences, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def bare_tokenizer() -> Tokenizer:
    """SmolLM2's kind: byte-level BPE, no template at all."""
    tokenizer = byte_level_tokenizer()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


for style, make in {
    "llama31": byte_level_tokenizer,
    "llama32": bare_tokenizer,
    "llama2": sentencepiece_tokenizer,
}.items():
    make().save(str(HERE / f"{style}-tokenizer.json"))
