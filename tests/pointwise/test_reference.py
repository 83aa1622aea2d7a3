"""The README example's printed scores, and how a machine's own are judged by them."""

import pytest

from dear_batch.pointwise.reference import DOCUMENTS, SCORES, TOLERANCE, judge, name_from_id

# As the README of github.com/DataScienceUIBK/DeAR-Reranking ranks them (document: score, bf16).
PRINTED = {
    "8b-ce": "4: -2.015625, 1: -5.6875, 2: -6.375, 0: -6.5, 3: -6.78125",
    "8b-ranknet": "4: -2.984375, 1: -6.375, 3: -7.4375, 0: -7.75, 2: -8.125",
    "3b-ce": "4: -6.0625, 1: -10.1875, 0: -11.125, 3: -11.625, 2: -12.0625",
    "3b-ranknet": "4: -1.3046875, 1: -5.125, 3: -6.3125, 0: -6.4375, 2: -6.96875",
}


@pytest.mark.parametrize("name", PRINTED)
def test_scores_are_those_printed(name: str) -> None:
    printed = dict(entry.split(": ") for entry in PRINTED[name].split(", "))
    assert SCORES[name] == tuple(float(printed[str(i)]) for i in range(len(DOCUMENTS)))
    assert SCORES.keys() == PRINTED.keys()


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [
        ("abdoelsayed/dear-8b-reranker-ce-v1", "8b-ce"),
        ("abdoelsayed/dear-8b-reranker-ce-lora-v1", "8b-ce"),
        ("abdoelsayed/dear-8b-reranker-ranknet-v1", "8b-ranknet"),
        ("abdoelsayed/dear-8b-reranker-ranknet-lora-v1", "8b-ranknet"),
        ("abdoelsayed/dear-3b-reranker-ce-v1", "3b-ce"),
        ("abdoelsayed/dear-3b-reranker-ranknet-lora-v1", "3b-ranknet"),
        ("bundles/dear-3b-ce", "3b-ce"),
        ("models/DeAR-8B-Reranker-CE-v1", "8b-ce"),
        ("abdoelsayed/dear-8b-reranker-listwise-v1", None),
        ("abdoelsayed/llama2-13b-rankllama-teacher", None),
        ("abdoelsayed/dear-1b-reranker-ce-v1", None),
        ("my-cerebral-8b-model", None),
        ("", None),
    ],
)
def test_the_name_tells_which_scores(checkpoint: str, name: str | None) -> None:
    assert name_from_id(checkpoint) == name


@pytest.mark.parametrize("name", SCORES)
def test_the_printed_scores_pass(name: str) -> None:
    verdict = judge(name, SCORES[name])
    assert verdict.ok
    assert verdict.same_best
    assert verdict.max_abs_difference == 0
    assert verdict.expected == SCORES[name]


def test_scores_within_the_tolerance_pass() -> None:
    scores = [s + TOLERANCE * (1 if i % 2 else -1) for i, s in enumerate(SCORES["8b-ce"])]
    verdict = judge("8b-ce", scores)
    assert verdict.ok
    assert verdict.max_abs_difference == TOLERANCE


def test_one_score_beyond_the_tolerance_fails() -> None:
    scores = list(SCORES["3b-ce"])
    scores[2] += 2 * TOLERANCE
    verdict = judge("3b-ce", scores)
    assert not verdict.ok
    assert verdict.same_best
    assert verdict.max_abs_difference == 2 * TOLERANCE


def test_another_best_document_fails() -> None:
    verdict = judge("8b-ce", SCORES["8b-ce"][::-1])
    assert not verdict.ok
    assert not verdict.same_best


def test_another_checkpoints_scores_fail() -> None:
    for name in SCORES:
        for other in SCORES.keys() - {name}:
            assert not judge(name, SCORES[other]).ok


def test_a_score_that_is_no_number_fails() -> None:
    scores = [*SCORES["8b-ce"][:3], float("nan"), SCORES["8b-ce"][4]]
    assert not judge("8b-ce", scores).ok
