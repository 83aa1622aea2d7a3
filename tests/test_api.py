"""A few documents from a notebook."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import dear_batch
from dear_batch import Reranker
from dear_batch.bundle import open_bundle
from dear_batch.errors import ConfigurationError, TrustError
from dear_batch.pointwise.recipe import PairEncoder
from dear_batch.pointwise.rows import Batch
from dear_batch.pointwise.scorer import OneAtATime, open_scorer, score_pairs
from dear_batch.pointwise.selection import Choice

pytestmark = pytest.mark.model
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def reranker(bundle: Make) -> Reranker:
    return Reranker.load(bundle("llama31"))


def test_scores_are_the_logits_of_the_documents_in_their_order(
    reranker: Reranker, bundle: Make, texts: tuple[str, ...]
) -> None:
    documents = [texts[0], ("A title", texts[1]), texts[2]]
    opened = open_bundle(bundle("llama31"))
    encoder = PairEncoder.from_file(opened.folder / "tokenizer.json", opened.recipe)
    split = [("", texts[0]), ("A title", texts[1]), ("", texts[2])]
    (pairs,) = encoder.encode([("who?", split)])
    expected = score_pairs(open_scorer(opened, Choice("torch", "cpu")), pairs)
    scores = reranker.score("who?", documents)
    assert all(type(score) is float for score in scores)
    np.testing.assert_allclose(scores, expected, atol=1e-4, rtol=0)
    assert np.std(scores) > 0.01


def test_a_single_document_scores_as_it_does_in_a_list(
    reranker: Reranker, texts: tuple[str, ...]
) -> None:
    together = reranker.score("who?", texts[:9])
    alone = [reranker.score("who?", [text])[0] for text in texts[:9]]
    np.testing.assert_allclose(alone, together, atol=1e-4, rtol=0)


def test_a_title_counts(reranker: Reranker, texts: tuple[str, ...]) -> None:
    with_title, without = reranker.score("who?", [("A title", texts[0][:80]), texts[0][:80]])
    assert abs(with_title - without) > 1e-3


def test_reranked_documents_come_best_first_with_their_old_places(
    reranker: Reranker, texts: tuple[str, ...]
) -> None:
    documents = list(texts[:12])
    scores = reranker.score("who?", documents)
    ranked = reranker.rerank("who?", documents)
    assert [item.score for item in ranked] == sorted(scores, reverse=True)
    assert sorted(item.index for item in ranked) == list(range(12))
    assert [item.index for item in ranked] != list(range(12))
    for item in ranked:
        assert (item.document, item.score) == (documents[item.index], scores[item.index])
    assert reranker.rerank("who?", documents, top_k=3) == ranked[:3]


def test_an_empty_list_is_no_error(reranker: Reranker) -> None:
    assert reranker.score("who?", []) == []
    assert reranker.rerank("who?", []) == []


class Constant(OneAtATime):
    """A scorer to which all documents are equal."""

    engine, device, precision = "constant", "cpu", "fp32"

    def __init__(self, reranker: Reranker) -> None:
        self.layout = reranker._scorer.layout

    def score(self, batch: Batch) -> NDArray[np.float32]:
        return np.zeros(len(batch.documents), np.float32)


def test_ties_keep_their_order(reranker: Reranker, texts: tuple[str, ...]) -> None:
    tied = Reranker(Constant(reranker), reranker._encoder)
    assert [item.index for item in tied.rerank("who?", texts[:9])] == list(range(9))


def test_a_changed_bundle_is_not_loaded(bundle: Make, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    (folder / "onnx").mkdir(parents=True)
    for path in bundle("llama31").rglob("*"):
        if path.is_file():
            target = folder / path.relative_to(bundle("llama31"))
            target.write_bytes(path.read_bytes())
    Reranker.load(folder)
    with (folder / "tokenizer.json").open("a") as file:
        file.write(" ")
    with pytest.raises(TrustError, match="not what its manifest says"):
        Reranker.load(folder)


def test_a_listwise_bundle_has_no_scores(bundle: Make, checkpoint: Make) -> None:
    folder = bundle("llama31", model=str(checkpoint("llama31", causal=True)))
    with pytest.raises(ConfigurationError, match="listwise model, given as the pointwise one"):
        Reranker.load(folder)


def test_the_package_offers_the_reranker_and_nothing_unknown() -> None:
    assert dear_batch.Reranker is Reranker
    with pytest.raises(AttributeError, match="Rerankr"):
        _ = dear_batch.Rerankr
