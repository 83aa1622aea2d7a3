"""Permutation decoding beside Hugging Face's `generate` on real, tiny, trained models."""

import copy
import random
from functools import cache
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the listwise stage needs PyTorch")
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from dear_batch.listwise.decoding import PermutationDecoder, Row
from dear_batch.listwise.grammar import Grammar, State, Vocabulary, token_texts
from dear_batch.listwise.model import LanguageModel
from dear_batch.listwise.reasoning import Reasoning, Rules
from dear_batch.listwise.writing import Speller, Writer
from tests.listwise.conftest import ANSWER, MERGES

pytestmark = pytest.mark.model

GRAMMAR = Grammar(ANSWER)
N, PROMPTS, BOS, EOS = 12, 6, 1, 2
IDENTIFIERS = [str(i) for i in range(N)]
WORDS = ["alpha", "beta", "gamma", "delta", "river", "mountain", "library", "engine", "winter"]
CLOSE = "</think>"


def examples(tokenizer: Tokenizer, thought: str = "") -> list[tuple[list[int], list[int]]]:
    """(prompt ids, answer ids) pairs of differing lengths and leads."""
    pick = random.Random(5)
    found = []
    for i in range(PROMPTS):
        words = " ".join(pick.choices(WORDS, k=3 + 5 * i))
        order = pick.sample(IDENTIFIERS, N)
        prompt = tokenizer.encode(f"Rank {words}:", add_special_tokens=False).ids
        # The answer as it stands behind the prompt, not as a text of its own would be cut.
        whole = f"Rank {words}:{thought}{['', ' ', chr(10)][i % 3]}{ANSWER.text(order)}"
        ids = tokenizer.encode(whole, add_special_tokens=False).ids
        shared = sum(1 for _ in _while_equal(prompt, ids))
        found.append(([BOS, *ids[:shared]], [*ids[shared:], EOS]))
    return found


def _while_equal(a: list[int], b: list[int]) -> Any:
    for x, y in zip(a, b, strict=False):
        if x != y:
            return
        yield x


@cache
def trained(merges: str, steps: int, thought: str = "", kv_heads: int = 2) -> Any:
    """A tiny Llama that has been taught those answers for so many steps."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=MERGES[merges]().get_vocab_size(),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    model = LlamaForCausalLM(config)
    pairs = examples(MERGES[merges](), thought)
    longest = max(len(p) + len(a) for p, a in pairs)
    ids = torch.zeros((len(pairs), longest), dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(pairs):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(steps):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def generate(model: Any, prompt: list[int], **settings: Any) -> list[int]:
    model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=120, **settings
        )
    return output[0, len(prompt) :].tolist()


def decode(model: Any, tokenizer: Tokenizer, prompts: list[list[int]], **rules: Any) -> list[Row]:
    vocabulary = Vocabulary.of(tokenizer, GRAMMAR, IDENTIFIERS)
    speller = Speller(tokenizer, GRAMMAR, vocabulary)
    decoder = PermutationDecoder(LanguageModel(model), speller, rules.pop("prefill_tokens", 64))
    rows = []
    for prompt in prompts:
        writer = Writer(speller, GRAMMAR.start(IDENTIFIERS))
        ids = np.array(prompt, np.int32)
        if rules:
            reasoning = Rules(tokenizer, CLOSE, end_ids=frozenset({EOS}), **rules)
            rows.append(Row(ids, writer, Reasoning(reasoning, writer, [prompt[-1]])))
        else:
            writer.begin([prompt[-1]])
            rows.append(Row(ids, writer))
    decoder.decode(rows)
    return rows


def read(tokenizer: Tokenizer, tokens: list[int]) -> State | None:
    texts = token_texts(tokenizer, "[")
    text = "".join(texts[t] for t in tokens if t != EOS)
    return GRAMMAR.read(GRAMMAR.start(IDENTIFIERS), text)


@pytest.mark.parametrize("merges", MERGES)
@pytest.mark.parametrize("prefill_tokens", [1, 10_000])
def test_where_plain_generate_follows_the_grammar_ours_is_identical(
    merges: str, prefill_tokens: int
) -> None:
    tokenizer, model = MERGES[merges](), trained(merges, 150)
    prompts = [prompt for prompt, _ in examples(tokenizer)]
    plain = [generate(model, prompt) for prompt in prompts]
    rows = decode(model, tokenizer, prompts, prefill_tokens=prefill_tokens)
    for row, tokens in zip(rows, plain, strict=True):
        state = read(tokenizer, tokens)
        assert state is not None, "the tiny model was meant to learn its answers"
        assert state.done
        assert row.writer.state.chosen == state.chosen
        assert row.writer.tokens == tokens[: len(row.writer.tokens)]
        assert row.overruled == 0
        assert row.forwards <= min(len(tokens), N + 3)  # a forward a choice, and a few to learn


@pytest.mark.parametrize("merges", MERGES)
@pytest.mark.parametrize("steps", [0, 20, 45])
def test_ours_is_generate_under_a_mask_and_always_a_permutation(merges: str, steps: int) -> None:
    """The reference is Hugging Face's own: a forward a token, one prompt at a time."""
    tokenizer, model = MERGES[merges](), trained(merges, steps)
    vocabulary = Vocabulary.of(tokenizer, GRAMMAR, IDENTIFIERS)
    texts = dict(zip(vocabulary.ids, vocabulary.texts, strict=True))
    prompts = [prompt for prompt, _ in examples(tokenizer)]

    def allowed(length: int) -> Any:
        def found(_batch: int, ids: torch.Tensor) -> list[int]:
            text = "".join(texts[t] for t in ids[length:].tolist())
            state = GRAMMAR.read(GRAMMAR.start(IDENTIFIERS), text)
            assert state is not None
            return (
                [EOS] if state.done else [vocabulary.ids[t] for t, _ in vocabulary.allowed(state)]
            )

        return found

    valid = 0
    for row, prompt in zip(decode(model, tokenizer, prompts), prompts, strict=True):
        masked = generate(model, prompt, prefix_allowed_tokens_fn=allowed(len(prompt)))
        state = read(tokenizer, masked)
        assert state is not None
        assert row.writer.state.chosen == state.chosen
        assert sorted(row.writer.state.chosen, key=int) == IDENTIFIERS
        plain = generate(model, prompt)
        own = read(tokenizer, plain)
        valid += own is not None and own.done
        if own is not None and own.done:
            assert row.writer.state.chosen == own.chosen
            assert row.overruled == 0
        # Not overruled means: plain greedy wrote the same, up to the last identifier.
        written = row.writer.tokens
        assert (row.overruled == 0) == (plain[: len(written)] == written)
    if steps == 0:
        assert valid == 0  # so the grammar had work to do


@pytest.mark.parametrize("merges", MERGES)
def test_identical_in_bf16_where_the_model_is_sure(merges: str) -> None:
    """Ties of bf16 logits, which we choose by in fp32, do not occur in a model this sure."""
    tokenizer, model = MERGES[merges](), copy.deepcopy(trained(merges, 150)).to(torch.bfloat16)
    prompts = [prompt for prompt, _ in examples(tokenizer)]
    for row, prompt in zip(decode(model, tokenizer, prompts), prompts, strict=True):
        state = read(tokenizer, generate(model, prompt))
        assert state is not None
        assert state.done
        assert row.writer.state.chosen == state.chosen


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_other_numbers_of_key_value_heads(kv_heads: int) -> None:
    tokenizer, model = MERGES["llama3"](), trained("llama3", 150, kv_heads=kv_heads)
    prompts = [prompt for prompt, _ in examples(tokenizer)]
    for row, prompt in zip(decode(model, tokenizer, prompts), prompts, strict=True):
        state = read(tokenizer, generate(model, prompt))
        assert state is not None
        assert row.writer.state.chosen == state.chosen


def test_windows_of_different_sizes_leave_when_they_are_done() -> None:
    tokenizer, model = MERGES["smollm2"](), trained("smollm2", 20)
    vocabulary = Vocabulary.of(tokenizer, GRAMMAR, IDENTIFIERS)

    def alone_or_together(groups: list[list[int]]) -> list[tuple[str, ...]]:
        orders = []
        for sizes in groups:
            speller = Speller(tokenizer, GRAMMAR, vocabulary)
            decoder = PermutationDecoder(LanguageModel(model), speller, 64)
            rows = []
            for size in sizes:
                writer = Writer(speller, GRAMMAR.start(IDENTIFIERS[:size]))
                prompt = examples(tokenizer)[size % PROMPTS][0]
                writer.begin([prompt[-1]])
                rows.append(Row(np.array(prompt, np.int32), writer))
            decoder.decode(rows)
            orders += [row.writer.state.chosen for row in rows]
        return orders

    sizes = [2, 12, 3, 7, 2, 12, 5]
    assert alone_or_together([sizes]) == alone_or_together([[size] for size in sizes])


def test_guesses_at_the_start_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was guessed and kept with a prompt stays, though the next feed is shorter."""
    tokenizer, model = MERGES["llama3"](), trained("llama3", 150)
    prompts = [prompt for prompt, _ in examples(tokenizer)]
    expected = [row.writer.state.chosen for row in decode(model, tokenizer, prompts)]
    spelled = tokenizer.encode("\n[", add_special_tokens=False).ids  # right for the longest prompt

    def guess(_self: Speller, state: State, *_: Any) -> list[int]:
        return spelled if state.pending[1:] else []

    monkeypatch.setattr(Speller, "guess", guess)
    assert [row.writer.state.chosen for row in decode(model, tokenizer, prompts)] == expected


def test_more_slots_are_made_when_a_batch_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, model = MERGES["smollm2"](), trained("smollm2", 150)
    prompts = [prompt for prompt, _ in examples(tokenizer)]
    before = [row.writer.state.chosen for row in decode(model, tokenizer, prompts)]
    monkeypatch.setattr("dear_batch.listwise.decoding.SPARE_SLOTS", 0)
    assert [row.writer.state.chosen for row in decode(model, tokenizer, prompts)] == before


def test_nan_weights_fail_every_window_and_nothing_hangs() -> None:
    tokenizer, model = MERGES["llama3"](), trained("llama3", 0, kv_heads=1)
    weight = model.model.norm.weight
    kept = weight.data.clone()
    weight.data.fill_(float("nan"))
    rows = decode(model, tokenizer, [[BOS, 5, 6]])
    weight.data = kept
    assert "NaN" in rows[0].writer.failure


THOUGHT = "[3] is better than [1] </think>"


@pytest.mark.parametrize("merges", MERGES)
def test_reasoning_up_to_its_closing_tag_and_then_the_answer(merges: str) -> None:
    tokenizer, model = MERGES[merges](), trained(merges, 150, THOUGHT)
    prompts = [prompt for prompt, _ in examples(tokenizer, THOUGHT)]
    rows = decode(model, tokenizer, prompts, limit=100)
    for row, prompt in zip(rows, prompts, strict=True):
        plain = tokenizer.decode(generate(model, prompt), skip_special_tokens=False)
        state = GRAMMAR.read(GRAMMAR.start(IDENTIFIERS), plain.partition(CLOSE)[2])
        assert state is not None
        assert state.done
        assert row.writer.state.chosen == state.chosen
        assert row.reasoning is not None
        assert not row.reasoning.truncated
        text = tokenizer.decode(row.reasoning.tokens, skip_special_tokens=False)
        assert THOUGHT.strip() in text  # a token may reach from the tag into the answer


@pytest.mark.parametrize("merges", MERGES)
@pytest.mark.parametrize("limit", [1, 2, 5])
def test_reasoning_over_its_limit_is_closed_and_counted(merges: str, limit: int) -> None:
    tokenizer, model = MERGES[merges](), trained(merges, 150, THOUGHT)
    prompts = [prompt for prompt, _ in examples(tokenizer, THOUGHT)]
    close = tokenizer.encode(CLOSE, add_special_tokens=False).ids
    rows = decode(model, tokenizer, prompts, limit=limit)
    for row, prompt in zip(rows, prompts, strict=True):
        assert row.reasoning is not None
        assert row.reasoning.truncated
        assert row.reasoning.tokens[limit:] == close
        # As an answer behind a prompt that ends with that reasoning.
        (whole,) = decode(model, tokenizer, [[*prompt, *row.reasoning.tokens]])
        assert row.writer.tokens == whole.writer.tokens
        assert row.writer.state.chosen == whole.writer.state.chosen


def test_rows_that_reason_for_different_times_wait_for_each_other() -> None:
    tokenizer, model = MERGES["llama3"](), trained("llama3", 150, THOUGHT)
    prompts = [prompt for prompt, _ in examples(tokenizer, THOUGHT)]
    prompts += [[BOS, *ids] for ids in ([5, 6, 7], [400, 301, 22, 9])]  # never closed
    together = decode(model, tokenizer, prompts, limit=40)
    alone = [decode(model, tokenizer, [prompt], limit=40)[0] for prompt in prompts]
    assert {row.reasoning.truncated for row in together if row.reasoning} == {True, False}
    for row, single in zip(together, alone, strict=True):
        assert row.writer.tokens == single.writer.tokens
        assert row.reasoning is not None
        assert single.reasoning is not None
        assert row.reasoning.tokens == single.reasoning.tokens


def test_an_answer_without_reasoning_is_taken_as_it_stands() -> None:
    """Its digits were never reasoning; the model ended its text behind a whole permutation."""
    tokenizer, model = MERGES["llama3"](), trained("llama3", 150)
    prompts = [prompt for prompt, _ in examples(tokenizer)]
    direct = decode(model, tokenizer, prompts)
    for row, expected in zip(decode(model, tokenizer, prompts, limit=200), direct, strict=True):
        assert row.reasoning is not None
        assert not row.reasoning.truncated
        assert row.writer.state.chosen == expected.writer.state.chosen
        assert np.isnan(row.writer.logprobs).all()


def test_reasoning_that_begins_with_a_list_of_all_is_no_answer() -> None:
    thought = ANSWER.text(IDENTIFIERS) + " is the given order, but "
    tokenizer, model = MERGES["llama3"](), trained("llama3", 200, thought)
    prompts = [prompt for prompt, _ in examples(tokenizer, thought)]
    for limit in (90, 200):  # within the reasoning, and beyond the end of the text
        for row in decode(model, tokenizer, prompts, limit=limit):
            assert row.reasoning is not None
            assert row.reasoning.truncated
            assert not np.isnan(row.writer.logprobs).any()


def test_a_text_that_ends_in_its_reasoning_is_closed_and_counted() -> None:
    tokenizer, model = MERGES["llama3"](), trained("llama3", 150, "[3] > [1]")
    prompts = [prompt for prompt, _ in examples(tokenizer, "[3] > [1]")]
    for row in decode(model, tokenizer, prompts, limit=200):
        assert row.reasoning is not None
        assert row.reasoning.truncated
        assert sorted(row.writer.state.chosen, key=int) == IDENTIFIERS
