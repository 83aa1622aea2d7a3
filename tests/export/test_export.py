"""Tiny random checkpoints of each style, exported for real."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from dear_batch import parity
from dear_batch.bundle import open_bundle
from dear_batch.errors import (
    ConfigurationError,
    DearBatchError,
    OutputError,
    TrustError,
)
from dear_batch.export.bundle_from_checkpoint import Plan, bundle_from_checkpoint
from dear_batch.pointwise.onnx_scorer import PackedOnnxScorer, PaddedOnnxScorer
from dear_batch.pointwise.recipe import PairEncoder
from dear_batch.pointwise.scorer import open_scorer, score_pairs
from dear_batch.pointwise.selection import Choice
from dear_batch.pointwise.torch_scorer import TorchScorer
from dear_batch.specs import ExportSpec
from tests.conftest import save_checkpoint

pytestmark = pytest.mark.model
Make = Callable[..., Path]


def export(tmp_path: Path, **settings: str) -> Path:
    output = tmp_path / "bundle"
    plan = Plan(ExportSpec(output=str(output), **settings))
    return bundle_from_checkpoint(plan, lambda _step: None).folder


def readme_logits(folder: Path, query: str, documents: list[str]) -> np.ndarray:
    """Hugging Face's own model, tokenizer call and pooling, as the DeAR README has it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    tokenizer.padding_side = "right"
    inputs = tokenizer(
        [f"query: {query}"] * len(documents),
        [f"document:  {document}" for document in documents],
        truncation=True,
        max_length=228,
        padding=True,
        return_tensors="pt",
    )
    inputs.pop("token_type_ids", None)
    with torch.inference_mode():
        return model(**inputs).logits[:, 0].numpy()


@pytest.mark.parametrize("style", ["llama31", "llama32", "llama2"])
def test_all_engines_score_as_the_readme_does(
    style: str, bundle: Make, checkpoint: Make, texts: tuple[str, ...], queries: tuple[str, ...]
) -> None:
    folder = bundle(style)
    opened = open_bundle(folder)
    encoder = PairEncoder.from_file(folder / "tokenizer.json", opened.recipe)
    documents = [*texts[:20], " ".join(texts[20:26]), "short"]
    (pairs,) = encoder.encode([(queries[0], [("", text) for text in documents])])
    expected = readme_logits(checkpoint(style), queries[0], documents)
    assert expected.std() > 0.1
    scorers = [
        PackedOnnxScorer(folder / "onnx/packed.onnx", opened.recipe, "cpu"),
        PaddedOnnxScorer(folder / "onnx/model.onnx", opened.recipe, "cpu"),
        TorchScorer.from_bundle(opened, "cpu"),
    ]
    for scorer in scorers:
        np.testing.assert_allclose(score_pairs(scorer, pairs), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("style", ["llama31", "llama32", "llama2"])
def test_the_manifest_describes_the_bundle(style: str, bundle: Make) -> None:
    folder = bundle(style)
    fields = json.loads((folder / "bundle.json").read_text())
    assert fields["schema_version"] == 3
    assert fields["task"] == "pointwise"
    assert fields["architecture"]["hidden_size"] == 64
    assert fields["architecture"]["num_layers"] == 2
    assert fields["parity"]["data"] == "dear-batch"
    for figures in fields["parity"]["graphs"].values():
        assert figures["pairs"] == 64
        assert figures["max_abs_difference"] <= 1e-4
    assert fields["graphs"]["onnx/model.onnx"] == {
        "inputs": {
            "input_ids": ["int64", "batch", "length"],
            "attention_mask": ["int64", "batch", "length"],
        },
        "outputs": {"logits": ["float", "batch", 1]},
    }
    packed = fields["graphs"]["onnx/packed.onnx"]
    assert {name: kind[0] for name, kind in packed["inputs"].items()} == dict.fromkeys(
        ("tokens", "positions", "groups", "segments", "pooled"), "int32"
    )
    on_disk = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert set(fields["files"]) == on_disk - {"bundle.json"}


def test_both_graphs_name_one_weights_file(bundle: Make) -> None:
    folder = bundle("llama31") / "onnx"
    stored = (folder / "weights.safetensors").stat().st_size
    for name in ("model.onnx", "packed.onnx"):
        graph = onnx.load(folder / name, load_external_data=False).graph
        external = [i for i in graph.initializer if i.external_data]
        assert {e.value for i in external for e in i.external_data if e.key == "location"} == {
            "weights.safetensors"
        }
        lengths = [int(e.value) for i in external for e in i.external_data if e.key == "length"]
        assert sum(lengths) > 0.97 * stored  # all but the header's page
        assert (folder / name).stat().st_size < 300_000
        onnx.checker.check_model(folder / name)


def test_graphs_hold_no_trace_of_the_machine(bundle: Make) -> None:
    folder = bundle("llama31")
    for name in ("onnx/model.onnx", "onnx/packed.onnx", "bundle.json", "config.json"):
        assert b"site-packages" not in (folder / name).read_bytes()


def test_a_4x_config_keeps_its_rope_scaling(
    tmp_path: Path, bundle: Make, checkpoint: Make, texts: tuple[str, ...]
) -> None:
    """transformers 4 wrote rope_theta and rope_scaling; 5 writes rope_parameters (trap 7)."""
    old = tmp_path / "old"
    shutil.copytree(checkpoint("llama31"), old)
    config = json.loads((old / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    config["torch_dtype"] = config.pop("dtype")
    (old / "config.json").write_text(json.dumps(config))
    exported = open_bundle(export(tmp_path, model=str(old)))
    new = open_bundle(bundle("llama31"))
    encoder = PairEncoder.from_file(new.folder / "tokenizer.json", new.recipe)
    (pairs,) = encoder.encode([("q", [("", " ".join(texts[i : i + 4])) for i in range(6)])])
    expected = score_pairs(open_scorer(new, Choice("onnxruntime", "cpu")), pairs)
    np.testing.assert_array_equal(
        score_pairs(open_scorer(exported, Choice("onnxruntime", "cpu")), pairs), expected
    )
    # And the scaling matters: without it these scores differ.
    config["rope_scaling"] = None
    (old / "config.json").write_text(json.dumps(config))
    plain = AutoModelForSequenceClassification.from_pretrained(old)
    scores = score_pairs(TorchScorer(plain, new.recipe), pairs)
    assert np.abs(scores - expected).max() > 1e-2


@pytest.mark.parametrize("layers", [1, 5])
def test_any_depth_is_exported_from_two_traced_layers(
    layers: int, tmp_path: Path, texts: tuple[str, ...]
) -> None:
    """Every layer keeps its own weights, also where the first two hold equal ones."""
    model = save_checkpoint(tmp_path / "deep", "llama31", num_hidden_layers=layers)
    tensors = load_file(model / "model.safetensors")
    for name in tensors:
        if "norm" in name and (".layers.0." in name or ".layers.1." in name):
            tensors[name] = torch.ones_like(tensors[name])
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    bundle = open_bundle(export(tmp_path, model=str(model)))
    encoder = PairEncoder.from_file(bundle.folder / "tokenizer.json", bundle.recipe)
    (pairs,) = encoder.encode([("q", [("", text) for text in texts[:8]])])
    expected = readme_logits(model, "q", list(texts[:8]))
    np.testing.assert_allclose(
        score_pairs(open_scorer(bundle, Choice("onnxruntime", "cpu")), pairs),
        expected,
        atol=1e-4,
        rtol=0,
    )


def test_final_position_pooling_is_served_unpacked_at_full_length(
    bundle: Make, checkpoint: Make, texts: tuple[str, ...]
) -> None:
    """run_pointwise.sh: padded to 228 with eos, pooled at the final position (dear.md)."""
    folder = bundle("llama31", recipe="paper-script", pooling="final-position")
    opened = open_bundle(folder)
    assert set(opened.manifest.graphs) == {"onnx/model.onnx"}
    encoder = PairEncoder.from_file(folder / "tokenizer.json", opened.recipe)
    (pairs,) = encoder.encode([("who?", [("", text) for text in texts[:9]])])
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint("llama31")).eval()
    model.config.pad_token_id = 0  # as the authors' loader leaves it
    ids = torch.full((9, 228), 2)
    mask = torch.zeros(9, 228, dtype=torch.long)
    for n, pair in enumerate(pairs):
        ids[n, : len(pair)] = torch.from_numpy(pair.input_ids())
        mask[n, : len(pair)] = 1
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask).logits[:, 0].numpy()
        last = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
        at_last_token = model.score(last[torch.arange(9), mask.sum(-1) - 1])[:, 0].numpy()
    assert np.abs(expected - at_last_token).max() > 1e-2
    for scorer in (
        open_scorer(opened, Choice("onnxruntime", "cpu")),
        open_scorer(opened, Choice("onnxruntime", "cpu"), batch_tokens=4 * 228),
        open_scorer(opened, Choice("torch", "cpu")),
    ):
        assert scorer.layout.fixed_length == 228
        np.testing.assert_allclose(score_pairs(scorer, pairs), expected, atol=1e-4, rtol=0)


def test_pad_like_tokens_inside_a_pair_do_not_move_the_pooling(
    bundle: Make, checkpoint: Make
) -> None:
    """A real trailing eos, and id 0 ("!"), are tokens like any other (trap 1)."""
    opened = open_bundle(bundle("llama31"))
    encoder = PairEncoder.from_file(opened.folder / "tokenizer.json", opened.recipe)
    texts = ["wow!", "end <|end_of_text|>", "a longer text, so that both are padded"]
    (pairs,) = encoder.encode([("q", [("", text) for text in texts])])
    assert pairs[0].document_ids[-1] == 0
    assert pairs[1].document_ids[-1] == opened.recipe.pad_id
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint("llama31")).eval()
    with torch.inference_mode():
        hidden = [
            model.model(input_ids=torch.from_numpy(p.input_ids()).long()[None]).last_hidden_state
            for p in pairs
        ]
        expected = [float(model.score(h[0, -1])) for h in hidden]
    standard = PaddedOnnxScorer(opened.folder / "onnx/model.onnx", opened.recipe, "cpu")
    for scorer in (
        open_scorer(opened, Choice("onnxruntime", "cpu")),
        standard,
        open_scorer(opened, Choice("torch", "cpu")),
    ):
        np.testing.assert_allclose(score_pairs(scorer, pairs), expected, atol=1e-4, rtol=0)


def test_an_adapter_is_merged_with_its_own_head(
    tmp_path: Path, checkpoint: Make, adapter: Make
) -> None:
    base, lora = checkpoint("llama32", causal=True), adapter("llama32")
    bundle = open_bundle(export(tmp_path, model=str(base), adapter=str(lora)))
    assert bundle.manifest.source.base_checked_by == "shapes"
    with safe_open(lora / "adapter_model.safetensors", "pt") as file:
        head = file.get_tensor("base_model.model.score.weight")
        up = file.get_tensor("base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight")
        down = file.get_tensor("base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight")
    stored = load_file(bundle.folder / "onnx/weights.safetensors")
    assert torch.equal(stored["score.weight"].T, head)
    name = "model.layers.1.self_attn.q_proj.weight"
    weight = load_file(base / "model.safetensors")[name]
    merged = weight + 2.0 * up @ down  # alpha / r = 8 / 4
    torch.testing.assert_close(stored[name].T, merged, atol=1e-6, rtol=0)
    assert (merged - weight).abs().max() > 1e-3


@pytest.mark.parametrize("style", ["llama31", "llama32"])
def test_a_listwise_adapter_becomes_merged_safetensors(
    style: str, tmp_path: Path, checkpoint: Make, adapter: Make
) -> None:
    from transformers import AutoModelForCausalLM

    base, lora = checkpoint(style, causal=True), adapter(style, causal=True)
    bundle = open_bundle(export(tmp_path, model=str(base), adapter=str(lora)))
    assert bundle.manifest.task == "listwise"
    assert not bundle.manifest.graphs
    assert not (bundle.folder / "onnx").exists()
    from peft import PeftModel

    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora)
    loaded = AutoModelForCausalLM.from_pretrained(bundle.folder)
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(loaded(ids).logits, expected(ids).logits, atol=1e-4, rtol=0)
    assert AutoTokenizer.from_pretrained(bundle.folder).encode("a b")
    with pytest.raises(ConfigurationError, match="no scores"):
        open_scorer(bundle, Choice("onnxruntime", "cpu"))


def test_listwise_weights_are_cast_once_to_the_checkpoints_dtype(
    tmp_path: Path, checkpoint: Make
) -> None:
    half = tmp_path / "half"
    shutil.copytree(checkpoint("llama31", causal=True), half)
    tensors = load_file(half / "model.safetensors")
    save_file(
        {name: tensor.bfloat16() for name, tensor in tensors.items()},
        half / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    bundle = open_bundle(export(tmp_path, model=str(half)))
    assert bundle.manifest.precision == "bf16"
    stored = load_file(bundle.folder / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


# Bad input: one clear error each, with its exit code, and nothing left behind.


def refused(tmp_path: Path, kind: type[DearBatchError], match: str, **settings: str) -> None:
    before = set(tmp_path.iterdir())
    with pytest.raises(kind, match=match):
        export(tmp_path, **settings)
    assert set(tmp_path.iterdir()) == before


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def test_pickled_weights_are_refused(tmp_path: Path, checkpoint: Make) -> None:
    model = copied(checkpoint("llama31"), tmp_path / "model")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    refused(tmp_path, TrustError, "pickled", model=str(model))


def test_a_pickled_adapter_is_refused(tmp_path: Path, checkpoint: Make, adapter: Make) -> None:
    lora = copied(adapter("llama31"), tmp_path / "lora")
    (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin")
    base = checkpoint("llama31", causal=True)
    refused(tmp_path, TrustError, "pickled", model=str(base), adapter=str(lora))


def test_remote_code_is_refused(tmp_path: Path, checkpoint: Make) -> None:
    model = copied(checkpoint("llama31"), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.Model"}
    (model / "config.json").write_text(json.dumps(config))
    refused(tmp_path, TrustError, "auto_map", model=str(model))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "modeling.py"])
@pytest.mark.parametrize("of", ["model", "adapter"])
def test_pickles_and_code_beside_good_weights_are_refused(
    name: str, of: str, tmp_path: Path, checkpoint: Make, adapter: Make
) -> None:
    folders = {"model": checkpoint("llama31", causal=True), "adapter": adapter("llama31")}
    folders[of] = copied(folders[of], tmp_path / of)
    (folders[of] / name).write_bytes(b"")
    match = f"{name}: it is (pickled|code)"
    refused(tmp_path, TrustError, match, **{k: str(v) for k, v in folders.items()})


@pytest.mark.parametrize(
    ("of", "name"),
    [
        ("model", "generation_config.json"),
        ("adapter", "adapter_config.json"),
        ("adapter", "tokenizer_config.json"),
    ],
)
def test_remote_code_in_any_config_is_refused(
    of: str, name: str, tmp_path: Path, checkpoint: Make, adapter: Make
) -> None:
    folders = {"model": checkpoint("llama31", causal=True), "adapter": adapter("llama31")}
    folders[of] = copied(folders[of], tmp_path / of)
    path = folders[of] / name
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}}))
    refused(tmp_path, TrustError, f"{name}.*auto_map", **{k: str(v) for k, v in folders.items()})


@pytest.mark.parametrize(
    ("of", "name"), [("model", "model.safetensors"), ("adapter", "adapter_model.safetensors")]
)
def test_an_oversized_header_is_refused(
    of: str, name: str, tmp_path: Path, checkpoint: Make, adapter: Make
) -> None:
    folders = {"model": checkpoint("llama31", causal=True), "adapter": adapter("llama31")}
    folders[of] = copied(folders[of], tmp_path / of)
    with (folders[of] / name).open("r+b") as file:
        file.write((2**62).to_bytes(8, "little"))
    refused(
        tmp_path,
        TrustError,
        "header of 4611686018427387904 bytes",
        **{k: str(v) for k, v in folders.items()},
    )


def test_shards_in_other_folders_are_refused(tmp_path: Path, checkpoint: Make) -> None:
    model = copied(checkpoint("llama31"), tmp_path / "model")
    (model / "model.safetensors").rename(tmp_path / "x.safetensors")
    index = {"metadata": {}, "weight_map": {"score.weight": "../x.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path, TrustError, r"names '\.\./x\.safetensors'", model=str(model))


def test_an_adapter_without_head_is_refused(
    tmp_path: Path, checkpoint: Make, adapter: Make
) -> None:
    lora = adapter("llama31", causal=True)
    base = str(checkpoint("llama31", causal=True))
    refused(
        tmp_path,
        ConfigurationError,
        "no score head",
        model=base,
        adapter=str(lora),
        task="pointwise",
    )


def test_a_causal_model_has_no_head(tmp_path: Path, checkpoint: Make) -> None:
    model = str(checkpoint("llama31", causal=True))
    refused(tmp_path, ConfigurationError, "no score head", model=model, task="pointwise")


def test_a_head_of_two_labels_is_refused(tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "two", "llama31", num_labels=2)
    refused(tmp_path, ConfigurationError, "2 labels", model=str(model))


def test_an_adapter_for_a_base_of_other_shapes_is_refused(
    tmp_path: Path, checkpoint: Make, adapter: Make
) -> None:
    lora, base = str(adapter("llama31")), str(checkpoint("llama32", causal=True))
    refused(tmp_path, ConfigurationError, "was not trained on", model=base, adapter=lora)


def test_an_adapter_for_a_deeper_base_is_refused(tmp_path: Path, adapter: Make) -> None:
    shallow = save_checkpoint(tmp_path / "one", "llama31", causal=True, num_hidden_layers=1)
    lora = str(adapter("llama31"))
    refused(tmp_path, ConfigurationError, "absent here", model=str(shallow), adapter=lora)


def test_an_adapter_for_another_named_base_is_refused(
    tmp_path: Path, checkpoint: Make, adapter: Make
) -> None:
    lora = copied(adapter("llama31"), tmp_path / "lora")
    config = json.loads((lora / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "meta-llama/Llama-3.1-8B"
    (lora / "adapter_config.json").write_text(json.dumps(config))
    base = copied(checkpoint("llama31", causal=True), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["_name_or_path"] = "meta-llama/Llama-3.2-3B"
    (base / "config.json").write_text(json.dumps(config))
    match = "not trained on(.|\n)*Llama-3.2-3B(.|\n)*Llama-3.1-8B"
    refused(tmp_path, ConfigurationError, match, model=str(base), adapter=str(lora))


def test_a_base_given_as_adapter_is_refused(tmp_path: Path, checkpoint: Make) -> None:
    base = str(checkpoint("llama31", causal=True))
    refused(tmp_path, ConfigurationError, "is a full model", model=base, adapter=base)


def test_an_adapter_given_as_model_is_refused(tmp_path: Path, adapter: Make) -> None:
    refused(tmp_path, ConfigurationError, "is a LoRA adapter", model=str(adapter("llama31")))


def test_another_architecture_is_refused(tmp_path: Path, checkpoint: Make) -> None:
    model = copied(checkpoint("llama31"), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    refused(tmp_path, ConfigurationError, "'bert' model", model=str(model))


def test_an_unknown_checkpoint_names_both_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(tmp_path, ConfigurationError, "neither a local folder nor", model="nobody/nothing")


def test_an_output_that_exists_is_refused(tmp_path: Path, checkpoint: Make) -> None:
    (tmp_path / "bundle").mkdir()
    refused(tmp_path, OutputError, "exists already", model=str(checkpoint("llama31")))


def test_a_failed_gate_leaves_nothing(
    tmp_path: Path, checkpoint: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(parity.GATES, "fp32", parity.Gate(absolute=1e-12))
    match = "does not score as PyTorch does"
    refused(tmp_path, ConfigurationError, match, model=str(checkpoint("llama31")))


def test_parity_data_of_the_user_is_measured_and_not_kept(tmp_path: Path, checkpoint: Make) -> None:
    data = tmp_path / "pairs.jsonl"
    documents = [{"title": "", "text": f"secret {i}"} for i in range(3)]
    data.write_text(json.dumps({"query": "classified", "documents": documents}))
    folder = export(tmp_path, model=str(checkpoint("llama31")), parity_data=str(data))
    text = (folder / "bundle.json").read_text()
    assert json.loads(text)["parity"]["graphs"]["packed.onnx"]["pairs"] == 64 + 3
    assert json.loads(text)["parity"]["data"] == "dear-batch and user"
    assert len(json.loads(text)["own_scores"]) == 64
    assert "secret" not in text
    assert "classified" not in text


def test_needs_are_computed_from_the_config_alone(tmp_path: Path, checkpoint: Make) -> None:
    folder = checkpoint("llama31")
    plan = Plan(ExportSpec(output=str(tmp_path / "bundle"), model=str(folder)))
    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder))
    parameters = sum(p.numel() for p in model.parameters())
    assert plan.needs.parameters == parameters
    assert plan.needs.memory_bytes > 4 * parameters
    assert list(tmp_path.iterdir()) == []


def without(folder: Path, target: Path, part: str, name: str = "model.safetensors") -> Path:
    """A copy of a checkpoint that lacks the tensors whose names hold `part`."""
    shutil.copytree(folder, target)
    tensors = {k: v for k, v in load_file(folder / name).items() if part not in k}
    save_file(tensors, target / name, metadata={"format": "pt"})
    return target


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path, checkpoint: Make) -> None:
    """transformers would start them at random, and the gate compare two equal randoms."""
    model = without(checkpoint("llama31"), tmp_path / "model", "layers.1.mlp")
    refused(tmp_path, ConfigurationError, r"3 tensors(.|\n)*layers\.1\.mlp", model=str(model))


def test_an_adapter_that_lacks_tensors_is_refused(
    tmp_path: Path, checkpoint: Make, adapter: Make
) -> None:
    lora = without(adapter("llama31"), tmp_path / "lora", "layers.1.", "adapter_model.safetensors")
    base = str(checkpoint("llama31", causal=True))
    refused(tmp_path, ConfigurationError, "not complete", model=base, adapter=str(lora))


def test_a_decoy_beside_a_pickled_adapter_changes_nothing(
    tmp_path: Path, checkpoint: Make, adapter: Make
) -> None:
    lora = copied(adapter("llama31"), tmp_path / "lora")
    (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin")
    save_file({"a": torch.zeros(1)}, lora / "decoy.safetensors")
    base = str(checkpoint("llama31", causal=True))
    refused(tmp_path, TrustError, "pickled", model=base, adapter=str(lora))


def test_a_tokenizer_with_remote_code_is_refused(tmp_path: Path, checkpoint: Make) -> None:
    model = copied(checkpoint("llama31"), tmp_path / "model")
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", None]}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    refused(tmp_path, TrustError, "tokenizer_config.*auto_map", model=str(model))


def test_cut_weights_are_refused(tmp_path: Path, checkpoint: Make) -> None:
    model = copied(checkpoint("llama31"), tmp_path / "model")
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path, TrustError, "ends outside the file", model=str(model))


def test_weights_that_do_not_fit_their_config_are_refused(tmp_path: Path, checkpoint: Make) -> None:
    model = copied(checkpoint("llama31"), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "intermediate_size": 112}))
    refused(tmp_path, DearBatchError, "cannot be loaded|not complete", model=str(model))


def test_a_scorer_is_no_listwise_model(tmp_path: Path, checkpoint: Make, adapter: Make) -> None:
    match = "is a pointwise scorer"
    model = str(checkpoint("llama31"))
    refused(tmp_path, ConfigurationError, match, model=model, task="listwise")
    base, lora = str(checkpoint("llama31", causal=True)), str(adapter("llama31"))
    refused(tmp_path, ConfigurationError, match, model=base, adapter=lora, task="listwise")


def test_a_bf16_base_is_merged_in_fp32(tmp_path: Path, checkpoint: Make, adapter: Make) -> None:
    """In bf16 the adapter's small deltas would round away (trap 3)."""
    base = copied(checkpoint("llama31", causal=True), tmp_path / "base")
    halves = {k: v.bfloat16() for k, v in load_file(base / "model.safetensors").items()}
    save_file(halves, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    lora = adapter("llama31")
    bundle = open_bundle(export(tmp_path, model=str(base), adapter=str(lora)))
    tensors = load_file(lora / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    delta = 2.0 * tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
    name = "model.layers.0.self_attn.q_proj.weight"
    stored = load_file(bundle.folder / "onnx/weights.safetensors")[name].T
    torch.testing.assert_close(stored, halves[name].float() + delta, atol=1e-6, rtol=0)
    assert (stored - stored.bfloat16().float()).abs().max() > 1e-4
