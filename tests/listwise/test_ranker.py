import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the listwise stage needs PyTorch")

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from dear_batch.bundle import Bundle, open_bundle
from dear_batch.data import Window
from dear_batch.errors import ConfigurationError, TryAgainError, UsageError
from dear_batch.listwise.decoding import Row
from dear_batch.listwise.model import LanguageModel
from dear_batch.listwise.preflight import check_listwise
from dear_batch.listwise.prompts import BUILT_IN
from dear_batch.listwise.ranker import NO_MEMORY, ListwiseRanker
from dear_batch.listwise.windows import WindowRequest
from dear_batch.specs import ListwiseSpec

pytestmark = pytest.mark.model

SPEC = ListwiseSpec("unused", window=12, depth=12)


@pytest.fixture(scope="session")
def listwise(bundle: Callable[..., Path], checkpoint: Callable[..., Path]) -> Bundle:
    """A tiny random causal LM: its answers are nonsense, and permutations all the same."""
    model = checkpoint("llama31", causal=True, max_position_embeddings=1024)
    return open_bundle(bundle("llama31", model=str(model)))


@pytest.fixture(scope="session")
def ranker(listwise: Bundle) -> ListwiseRanker:
    return ListwiseRanker.open(listwise, SPEC, "cpu")


def request_of(
    texts: tuple[str, ...], n: int, query: str = "a river", at: int = 0
) -> WindowRequest:
    return WindowRequest(Window(f"q{n}", at, at + n), query, texts[at : at + n])


def test_every_window_gets_a_permutation_in_its_place(
    ranker: ListwiseRanker, texts: tuple[str, ...]
) -> None:
    short = tuple(text[:60] for text in texts)
    requests = [request_of(short, n) for n in (5, 12, 2, 7)]
    finished: list[int] = []
    permutations = ranker.rank(requests, finished.append)
    assert [p.window for p in permutations] == [r.window for r in requests]
    for permutation, asked in zip(permutations, requests, strict=True):
        assert sorted(permutation.order) == list(range(len(asked.passages)))
        assert len(permutation.logprobs) == len(asked.passages)
    assert [p.status for p in permutations] == ["ok"] * 4
    assert finished[-1] == len(requests)


def test_what_a_permutation_tells(ranker: ListwiseRanker, texts: tuple[str, ...]) -> None:
    short = tuple(text[:60] for text in texts)
    (found,) = ranker.rank([request_of(short, 5)])
    assert found.text.strip() == "[" + "] > [".join(map(str, found.order)) + "]"
    assert len(found.prompt_sha256) == 64
    assert found.prompt_tokens > 50
    assert found.answer_tokens >= found.forwards >= 4
    assert found.logprobs[-1] == 0
    assert all(p < 0 for p in found.logprobs[:-1])


def test_windows_do_not_depend_on_their_company(
    listwise: Bundle, ranker: ListwiseRanker, texts: tuple[str, ...]
) -> None:
    short = tuple(text[:60] for text in texts)
    requests = [request_of(short, 2 + i % 7, at=i) for i in range(20)]
    together = [p.order for p in ranker.rank(requests)]
    assert together == [ranker.rank([asked])[0].order for asked in requests]
    small = ListwiseRanker.open(listwise, replace(SPEC, batch_tokens=700), "cpu")
    before = small.forwards
    assert together == [p.order for p in small.rank(requests)]
    assert small.forwards - before > len(requests)  # so there were several batches


def test_passages_that_do_not_fit_are_shortened_and_counted(
    ranker: ListwiseRanker, texts: tuple[str, ...]
) -> None:
    # Tiny tokenizers make many tokens of 300 characters: 12 passages are over 1,024.
    (found,) = ranker.rank([request_of(texts, 12)])
    assert found.status == "ok"
    assert found.shortened_passages > 0
    assert found.cut_passages == sum(len(text) > 300 for text in texts[:12])
    assert found.prompt_tokens <= 1024


def test_a_query_that_leaves_no_room_fails_its_window_alone(
    ranker: ListwiseRanker, texts: tuple[str, ...]
) -> None:
    long, good = request_of(texts, 4, query="why " * 800), request_of(texts, 4)
    failed, ok = ranker.rank([long, good])
    assert (failed.status, ok.status) == ("failed", "ok")
    assert failed.order == (0, 1, 2, 3)
    assert "no room" in failed.detail


def test_nan_weights_fail_every_window(listwise: Bundle, texts: tuple[str, ...]) -> None:
    ranker = ListwiseRanker.open(listwise, SPEC, "cpu")
    ranker._decoder._head_VH.fill_(float("nan"))
    (found,) = ranker.rank([request_of(texts, 4)])
    assert (found.status, found.order) == ("failed", (0, 1, 2, 3))
    assert "NaN" in found.detail


def test_reasoning_is_limited_closed_and_kept(listwise: Bundle, texts: tuple[str, ...]) -> None:
    ranker = ListwiseRanker.open(listwise, replace(SPEC, reasoning_tokens=9), "cpu")
    for found in ranker.rank([request_of(texts, n) for n in (3, 6)]):
        assert found.status == "truncated"
        thought, _, answer = found.text.partition("</think>")
        assert thought
        assert answer.strip() == "[" + "] > [".join(map(str, found.order)) + "]"


def test_bf16(listwise: Bundle, texts: tuple[str, ...]) -> None:
    ranker = ListwiseRanker.open(listwise, replace(SPEC, precision="bf16"), "cpu")
    assert ranker.precision == "bf16"
    (found,) = ranker.rank([request_of(texts, 6)])
    assert found.status == "ok"
    assert sorted(found.order) == list(range(6))


def test_a_chat_prompt_needs_a_chat_template(listwise: Bundle) -> None:
    with pytest.raises(ConfigurationError, match="no chat template"):
        check_listwise(listwise, replace(SPEC, prompt="rankllm-chat"))


def test_a_window_that_cannot_fit_a_passage_each_is_refused(listwise: Bundle) -> None:
    with pytest.raises(ConfigurationError, match="window of 400 passages does not fit") as error:
        check_listwise(listwise, replace(SPEC, window=400, depth=400))
    assert "1024 tokens in all" in error.value.valid
    with pytest.raises(ConfigurationError, match="does not fit") as error:
        check_listwise(listwise, replace(SPEC, reasoning_tokens=1000))
    assert "1000 of reasoning" in error.value.where
    assert "--reasoning-tokens" in error.value.next_step
    check_listwise(listwise, replace(SPEC, window=400))  # of which a list has 12 at most


def test_identifiers_that_the_tokenizer_cannot_spell_are_refused(
    bundle: Callable[..., Path], checkpoint: Callable[..., Path]
) -> None:
    model = checkpoint("llama2", causal=True)
    found = open_bundle(bundle("llama2", model=str(model)))
    with pytest.raises(ConfigurationError, match="cannot write these characters"):
        check_listwise(found, SPEC)


def test_reasoning_needs_a_prompt_that_says_what_closes_it(
    listwise: Bundle, tmp_path: Path
) -> None:
    text = (BUILT_IN / "readme.toml").read_text(encoding="utf-8")
    mine = tmp_path / "mine.toml"
    mine.write_text(text.partition("[reasoning]")[0], encoding="utf-8")
    with pytest.raises(ConfigurationError, match="what closes the reasoning"):
        check_listwise(listwise, replace(SPEC, prompt=str(mine), reasoning_tokens=10))
    check_listwise(listwise, replace(SPEC, prompt=str(mine)))


def test_an_unknown_prompt_is_refused(listwise: Bundle) -> None:
    with pytest.raises(UsageError, match="Did you mean 'readme'"):
        check_listwise(listwise, replace(SPEC, prompt="redme"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(listwise: Bundle) -> None:
    with pytest.raises(ConfigurationError, match="finds no GPU"):
        ListwiseRanker.open(listwise, SPEC, "cuda")


def test_no_windows_are_no_work(ranker: ListwiseRanker) -> None:
    assert ranker.rank([]) == []


def test_a_mistral_within_its_sliding_window(
    bundle: Callable[..., Path],
    checkpoint: Callable[..., Path],
    texts: tuple[str, ...],
    tmp_path: Path,
) -> None:
    """RankZephyr's architecture: what a layer can see bounds the prompt."""
    model = tmp_path / "mistral"
    shutil.copytree(checkpoint("llama31", causal=True, max_position_embeddings=1024), model)
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    config |= {
        "sliding_window": 640,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    (model / "config.json").write_text(json.dumps(config))
    found = open_bundle(bundle("mistral", model=str(model)))
    encoder = check_listwise(found, SPEC)
    assert encoder.max_tokens < 640
    asked = request_of(texts, 6)
    (ranked,) = ListwiseRanker.open(found, SPEC, "cpu").rank([asked])
    assert ranked.status == "ok"
    assert 500 < ranked.prompt_tokens < 640
    causal = AutoModelForCausalLM.from_pretrained(found.folder)
    (prompt,) = encoder.encode([(asked.query, asked.passages)])
    assert prompt
    # The last forced character and the first identifier, by Hugging Face's own forward.
    tokenizer = Tokenizer.from_file(str(found.file("tokenizer.json")))
    opened = tokenizer.encode("x" + ranked.text.partition("[")[0] + "[").ids[1:]
    logits = causal(torch.tensor([[*prompt.ids.tolist(), *opened]])).logits[0, -1]
    digits = {tokenizer.encode(f"[{i}").ids[-1]: i for i in range(6)}
    assert digits[max(digits, key=lambda token: logits[token].item())] == ranked.order[0]


def starve(
    patch: pytest.MonkeyPatch, ranker: ListwiseRanker, name: str, full: Callable[..., bool]
) -> None:
    """Let memory run out in a step of the model where `full` says so."""
    model = ranker._decoder._model
    original = getattr(model, name)

    def limited(*arguments: Any) -> Any:
        if full(*arguments):
            raise MemoryError("no room for it")
        return original(*arguments)

    patch.setattr(model, name, limited)


@pytest.mark.parametrize("most", [1, 3, 7])
def test_smaller_batches_of_windows_give_the_same_orders(
    listwise: Bundle, texts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    short = tuple(text[:60] for text in texts)
    requests = [request_of(short, 2 + i % 7, at=i) for i in range(20)]
    ranker = ListwiseRanker.open(listwise, SPEC, "cpu")
    expected = ranker.rank(requests)
    steps = 0

    def full(ids_RT: torch.Tensor, *_: object) -> bool:
        nonlocal steps
        steps += 1
        # First in the midst of answers: what they hold by then is void.
        return steps > 1 and len(ids_RT) > most

    starve(monkeypatch, ranker, "step", full)
    finished: list[int] = []
    found = ranker.rank(requests, finished.append)
    assert ranker.memory_backoffs > 0
    assert [(p.window, p.order, p.status) for p in found] == [
        (p.window, p.order, p.status) for p in expected
    ]
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert finished[-1] == len(requests)
    assert finished == sorted(finished)


def test_a_window_without_memory_fails_alone(
    listwise: Bundle, texts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranker = ListwiseRanker.open(listwise, SPEC, "cpu")
    requests = [request_of(texts, n) for n in (3, 12, 2)]
    expected = ranker.rank(requests)
    again = ListwiseRanker.open(listwise, SPEC, "cpu")
    room = expected[1].prompt_tokens - 1
    starve(
        monkeypatch,
        again,
        "read_prompts",
        lambda _first, prompts, *_: max(map(len, prompts)) > room,
    )
    small, failed, other = again.rank(requests)
    assert (failed.status, failed.detail) == ("failed", NO_MEMORY)
    assert failed.order == tuple(range(12))
    assert [small.order, other.order] == [expected[0].order, expected[2].order]


def test_memory_that_was_there_before_is_worth_another_try(
    listwise: Bundle, texts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranker = ListwiseRanker.open(listwise, SPEC, "cpu")
    ranker.rank([request_of(texts, 12)])
    starve(monkeypatch, ranker, "read_prompts", lambda *_: True)
    with pytest.raises(TryAgainError, match="order a single window of"):
        ranker.rank([request_of(texts, 4)])


def test_a_model_without_memory_for_a_small_window_is_worth_another_try(
    listwise: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(*_: object) -> None:
        raise MemoryError("no room for it")

    monkeypatch.setattr(LanguageModel, "begin", begin)
    with pytest.raises(TryAgainError, match="not enough memory to load"):
        ListwiseRanker.open(listwise, SPEC, "cpu")


def test_another_error_of_the_model_is_raised_as_it_is(
    listwise: Bundle, texts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranker = ListwiseRanker.open(listwise, SPEC, "cpu")
    calls: list[None] = []

    def broken(*_: object) -> None:
        calls.append(None)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(ranker._decoder._model, "step", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        ranker.rank([request_of(texts, n) for n in (4, 5)])
    assert len(calls) == 1


def test_windows_do_not_depend_on_the_calls_before(
    listwise: Bundle, texts: tuple[str, ...]
) -> None:
    """What one call learned would change the guesses of the next, and with them low bits."""
    requests = [request_of(tuple(text[:60] for text in texts), n) for n in (5, 9, 7)]
    fresh, used = (ListwiseRanker.open(listwise, SPEC, "cpu") for _ in range(2))
    speller = used._speller
    for segment in list(speller._learned):  # as if the last answer had had odd spellings
        speller.learn(segment, speller.vocabulary.ids[:3])
    feeds: list[list[int]] = []
    for ranker in (fresh, used):
        decode = ranker._decoder.decode

        def noting(rows: Sequence[Row], decode: Callable[..., None] = decode) -> None:
            feeds.extend(list(row.turn.feed) for row in rows)
            decode(rows)

        ranker._decoder.decode = noting
    assert used.rank(requests) == fresh.rank(requests)
    assert feeds[:3] == feeds[3:]
