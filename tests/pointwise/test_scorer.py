"""Memory that runs out: batches shrink, scores stay; any other error is not tried again."""

import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

pytest.importorskip("torch", reason="the other engine")

import torch
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from dear_batch.bundle import Engine, open_bundle
from dear_batch.errors import ConfigurationError, TryAgainError
from dear_batch.pointwise.profiles import lay_out
from dear_batch.pointwise.recipe import EncodedPair, PairEncoder
from dear_batch.pointwise.rows import Batch, Layout, packed_arrays, scores_of_documents
from dear_batch.pointwise.scorer import Finish, OneAtATime, Scorer, open_scorer, score_pairs
from dear_batch.pointwise.selection import Choice
from tests.conftest import collection_queries, collection_texts

pytestmark = pytest.mark.model

Make = Callable[..., Path]
ENGINES = ("onnxruntime", "torch")
CHOICE = Choice("onnxruntime", "cpu")


class Limited(OneAtATime):
    """A real scorer with memory for so many tokens at once, padding included."""

    def __init__(self, scorer: Scorer, tokens: int, error: Exception | None = None) -> None:
        self.layout, self.engine, self.device = scorer.layout, scorer.engine, scorer.device
        self.precision = scorer.precision
        self._scorer, self._tokens = scorer, tokens
        self._error = error
        self.asked: list[int] = []

    def score(self, batch: Batch) -> NDArray[np.float32]:
        self.asked.append(len(batch.rows) * batch.length)
        if self.asked[-1] > self._tokens:
            raise self._error or MemoryError("no room for it")
        return self._scorer.start(batch)()


def pairs_of(folder: Path, queries: int = 3) -> list[EncodedPair]:
    bundle = open_bundle(folder)
    encoder = PairEncoder.from_file(bundle.file("tokenizer.json"), bundle.recipe)
    documents = [("", text) for text in collection_texts()[:16]]
    encoded = encoder.encode((query, documents) for query in collection_queries()[:queries])
    return [pair for pairs in encoded for pair in pairs]


def order(scores_N: NDArray[np.float32]) -> list[int]:
    return np.argsort(-scores_N, kind="stable").tolist()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("tokens", [1500, 600, 300])
def test_smaller_batches_give_the_same_scores(bundle: Make, engine: str, tokens: int) -> None:
    pairs = pairs_of(bundle("llama31"))
    scorer = open_scorer(open_bundle(bundle("llama31")), Choice(engine, "cpu"), batch_tokens=4096)
    expected_N = score_pairs(scorer, pairs)
    limited, seen, limits = Limited(scorer, tokens), list[Batch](), list[int]()
    found_N = score_pairs(limited, pairs, seen.append, limits.append)
    np.testing.assert_allclose(found_N, expected_N, atol=1e-4, rtol=0)
    assert order(found_N) == order(expected_N)
    assert sorted(d for batch in seen for d in batch.documents) == list(range(len(pairs)))
    # Every failure halves, and nothing as large is asked for again in this call.
    failed = [at for at, asked in enumerate(limited.asked) if asked > tokens]
    assert limits == [limited.asked[at] // 2 for at in failed]
    assert limits == sorted(limits, reverse=True)
    for at, limit in zip(failed, limits, strict=True):
        assert max(limited.asked[at + 1 :]) <= max(limit, *(len(pair) for pair in pairs))


@settings(max_examples=15, deadline=None)
@given(data=st.data(), row_tokens=st.integers(228, 1500), rows=st.integers(1, 5))
def test_scores_do_not_depend_on_the_plan(
    bundle: Make, data: st.DataObject, row_tokens: int, rows: int
) -> None:
    """Any rows, any batches, any company: the score of a pair is that of the pair alone."""
    pairs = pairs_of(bundle("llama31"))
    scorer = scorer_alone(bundle("llama31"))
    scorer.layout = Layout(True, 228, 1)
    alone_N = score_pairs(scorer, pairs)
    chosen = data.draw(st.lists(st.integers(0, len(pairs) - 1), min_size=1, max_size=80))
    scorer.layout = Layout(True, row_tokens, rows * row_tokens)
    found_N = score_pairs(scorer, [pairs[n] for n in chosen])
    np.testing.assert_allclose(found_N, alone_N[chosen], atol=1e-4, rtol=0)


@cache
def scorer_alone(folder: Path) -> Scorer:
    return open_scorer(open_bundle(folder), CHOICE)


def test_rows_of_many_documents_are_split_down_to_one(bundle: Make) -> None:
    pairs = pairs_of(bundle("llama31"), queries=2)
    longest = max(len(pair) for pair in pairs)
    scorer = open_scorer(open_bundle(bundle("llama31")), CHOICE, row_tokens=2048, batch_tokens=2048)
    expected_N = score_pairs(scorer, pairs)
    limited = Limited(scorer, longest)  # a pair of the longest, and not a token more
    np.testing.assert_allclose(score_pairs(limited, pairs), expected_N, atol=1e-4, rtol=0)
    assert limited.asked[0] > longest


def test_the_next_call_starts_at_full_size_again(bundle: Make) -> None:
    pairs = pairs_of(bundle("llama31"))
    scorer = open_scorer(open_bundle(bundle("llama31")), CHOICE, batch_tokens=4096)
    limited = Limited(scorer, 600)
    score_pairs(limited, pairs)
    first = limited.asked.copy()
    score_pairs(limited, pairs)
    assert limited.asked == first * 2


def test_below_a_single_pair_the_job_may_try_again(bundle: Make) -> None:
    pairs = pairs_of(bundle("llama31"))
    longest = max(len(pair) for pair in pairs)
    limited = Limited(open_scorer(open_bundle(bundle("llama31")), CHOICE), longest - 1)
    with pytest.raises(TryAgainError, match=f"a single pair of {longest} tokens") as caught:
        score_pairs(limited, pairs)
    assert caught.value.exit_code == 75
    assert caught.value.where == "onnxruntime on cpu: no room for it"
    assert "batch_tokens" in caught.value.next_step


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: an illegal memory access"), ValueError("out of memory")]
)
def test_any_other_error_is_raised_as_it_is(bundle: Make, error: Exception) -> None:
    limited = Limited(open_scorer(open_bundle(bundle("llama31")), CHOICE), 0, error)
    with pytest.raises(type(error)) as caught:
        score_pairs(limited, pairs_of(bundle("llama31")))
    assert caught.value is error
    assert len(limited.asked) == 1


def test_a_failed_attempt_holds_nothing_when_the_next_begins(bundle: Make) -> None:
    scorer = open_scorer(open_bundle(bundle("llama31")), CHOICE, batch_tokens=4096)

    class Holding(Limited):
        held: "weakref.ref[NDArray[np.float32]] | None" = None

        def score(self, batch: Batch) -> NDArray[np.float32]:
            assert self.held is None or self.held() is None
            activations = np.zeros(1000, np.float32)
            self.held = weakref.ref(activations)
            return super().score(batch) + activations[: len(batch.documents)]

    limits: list[int] = []
    holding = Holding(scorer, 600)
    score_pairs(holding, pairs_of(bundle("llama31")), backed_off=limits.append)
    assert limits


class TwoAtOnce(Limited):
    """A scorer with memory for so many tokens in all batches under way together.

    It says at `late` documents, or fewer, only when it is waited for that there was none.
    """

    in_flight = 2

    def __init__(self, scorer: Scorer, tokens: int, late: int = 0) -> None:
        super().__init__(scorer, tokens)
        self._late, self.under_way, self.finished = late, list[Batch](), list[Batch]()

    def start(self, batch: Batch) -> Finish:
        assert len(self.under_way) < self.in_flight
        taken = sum(len(b.rows) * b.length for b in [*self.under_way, batch])
        self.asked.append(taken)
        if taken > self._tokens and len(batch.documents) > self._late:
            raise MemoryError("no room for it")
        self.under_way.append(batch)

        def finish() -> NDArray[np.float32]:
            assert self.under_way.pop(0) is batch
            self.finished.append(batch)
            if taken > self._tokens:
                raise MemoryError("no room for it, seen late")
            return self._scorer.start(batch)()

        return finish


@pytest.mark.parametrize("late", [0, 1000])
@pytest.mark.parametrize("tokens", [10**6, 1400, 600, 300])
def test_scores_do_not_depend_on_how_many_batches_go_at_once(
    bundle: Make, tokens: int, late: int
) -> None:
    pairs = pairs_of(bundle("llama31"), queries=6)
    scorer = open_scorer(open_bundle(bundle("llama31")), CHOICE, batch_tokens=1024)
    alone, seen_alone, limits_alone = Limited(scorer, tokens), list[Batch](), list[int]()
    expected_N = score_pairs(alone, pairs, seen_alone.append, limits_alone.append)
    together, seen, limits = TwoAtOnce(scorer, tokens, late), list[Batch](), list[int]()
    found_N = score_pairs(together, pairs, seen.append, limits.append)
    np.testing.assert_array_equal(found_N, expected_N)
    assert [batch.documents for batch in seen] == [batch.documents for batch in seen_alone]
    assert limits == limits_alone
    assert not together.under_way
    assert len(limits) >= (tokens < 1000)
    if tokens == 10**6:
        assert max(together.asked) > max(alone.asked)  # two were under way


class Sums(OneAtATime):
    """Scores without a model."""

    layout, engine, device, precision = Layout(True, 256, 512), "sums", "cpu", "fp32"

    def score(self, batch: Batch) -> NDArray[np.float32]:
        arrays = packed_arrays(batch, 0)
        found_RP = np.take_along_axis(arrays.tokens_RT, arrays.pooled_RP, 1)
        return scores_of_documents(found_RP.astype(np.float32), batch)


@pytest.mark.parametrize("in_flight", [2, 3, 5])
@pytest.mark.parametrize("late", [0, 4, 8, 1000])
@pytest.mark.parametrize("tokens", [600, 1100, 1600, 2100])
def test_only_what_fails_alone_is_halved(in_flight: int, late: int, tokens: int) -> None:
    rng = np.random.default_rng(0)
    pairs = [
        EncodedPair(np.full(5, 1, np.int32), rng.integers(0, 999, n, dtype=np.int32), False)
        for n in rng.integers(10, 200, 200)
    ]
    scorer: Any = Sums()
    expected_N = score_pairs(scorer, pairs)
    together, limits = TwoAtOnce(scorer, tokens, late), list[int]()
    together.in_flight = in_flight
    np.testing.assert_array_equal(
        score_pairs(together, pairs, backed_off=limits.append), expected_N
    )
    assert max(together.asked) > tokens or in_flight * 512 <= tokens
    assert limits == []  # there is memory for each of them alone
    assert not together.under_way


def test_below_a_single_pair_the_others_are_waited_for(bundle: Make) -> None:
    pairs = pairs_of(bundle("llama31"))
    longest = max(len(pair) for pair in pairs)
    scorer = open_scorer(open_bundle(bundle("llama31")), CHOICE)
    together = TwoAtOnce(scorer, longest - 1)
    with pytest.raises(TryAgainError, match=f"a single pair of {longest} tokens"):
        score_pairs(together, pairs)
    assert not together.under_way


def plan_of(row_tokens: int, batch_tokens: int) -> Engine:
    return Engine(
        path="engines/tensorrt-sm_80/x.plan",
        bytes=1,
        sha256="0" * 64,
        flavour="tensorrt",
        version="10.13",
        sm="sm_80",
        platform="linux-x86_64",
        precision="fp16",
        row_tokens=row_tokens,
        batch_tokens=batch_tokens,
        profiles=lay_out(row_tokens, batch_tokens),
        build_seconds=1.0,
    )


@pytest.mark.parametrize(
    "asked",
    [{"row_tokens": 513}, {"batch_tokens": 4097}, {"row_tokens": 512, "batch_tokens": 5000}],
)
def test_budgets_beyond_what_an_engine_was_built_for(bundle: Make, asked: dict[str, int]) -> None:
    choice = Choice("tensorrt", "cuda:0", plan_of(512, 4096))
    with pytest.raises(ConfigurationError, match="was built for"):
        open_scorer(open_bundle(bundle("llama31")), choice, **asked)


# Memory that really runs out: the address space of a process of its own is limited.
STARVED = """
import json, resource, sys
from pathlib import Path
from tests.pointwise.test_scorer import pairs_of
from dear_batch.bundle import open_bundle
from dear_batch.pointwise.scorer import open_scorer, score_pairs
from dear_batch.pointwise.selection import Choice

folder, engine, more_mb = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
pairs = pairs_of(folder, queries=12)
scorer = open_scorer(open_bundle(folder), Choice(engine, "cpu"), batch_tokens=1 << 20)
score_pairs(scorer, pairs[:2])  # threads and libraries are there
used = next(int(line.split()[1]) << 10 for line in open("/proc/self/status")
            if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (used + (more_mb << 20),) * 2)
limits = []
scores = score_pairs(scorer, pairs, backed_off=limits.append)
print(json.dumps([limits, scores.tolist()]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads VmSize, limits the address space")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_real_shortage(bundle: Make, engine: str) -> None:
    folder = bundle("llama31")
    command = [sys.executable, "-c", STARVED, str(folder), engine, "60"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    limits, scores = json.loads(done.stdout)
    assert limits
    assert done.stderr == ""
    pairs = pairs_of(folder, queries=12)
    expected_N = score_pairs(open_scorer(open_bundle(folder), Choice(engine, "cpu")), pairs)
    np.testing.assert_allclose(scores, expected_N, atol=1e-4, rtol=0)


def full_onnx(*_: object, **_settings: object) -> None:
    raise Fail("1 : FAIL : Failed to allocate memory for requested buffer of size 8")


def full_torch(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 bytes.")


@pytest.mark.parametrize(
    ("engine", "place", "full"),
    [
        ("onnxruntime", "dear_batch.pointwise.onnx_scorer.ort.InferenceSession", full_onnx),
        ("torch", "dear_batch.pointwise.torch_scorer.model_from_bundle", full_torch),
    ],
)
def test_a_model_that_finds_no_memory_is_worth_another_try(
    bundle: Make,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    place: str,
    full: Callable[..., None],
) -> None:
    monkeypatch.setattr(place, full)
    with pytest.raises(TryAgainError, match="not enough memory to load") as caught:
        open_scorer(open_bundle(bundle("llama31")), Choice(engine, "cpu"))
    assert "allocate" in caught.value.where
