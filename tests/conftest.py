"""Tiny real checkpoints, tokenizers and bundles, made once a session and only when asked for.

Random weights with a wide spread, so that scores differ; text from the example collection.
"""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
COLLECTION = ROOT / "examples" / "collection"


# Background jobs of a shell ignore Ctrl-C, and those under nohup the end of a terminal; so would
# the processes that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tests, and the processes they start, leave nothing in the user's cache folder."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real test collections; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("DEAR_BATCH_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"the test collections are not at {folder} (set DEAR_BATCH_TEST_DATA)")
    return folder


@cache
def collection_texts() -> tuple[str, ...]:
    lines = (COLLECTION / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(json.loads(line)["text"] for line in lines)


@cache
def collection_queries() -> tuple[str, ...]:
    lines = (COLLECTION / "queries.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(json.loads(line)["text"] for line in lines)


@pytest.fixture(scope="session")
def texts() -> tuple[str, ...]:
    return collection_texts()


@pytest.fixture(scope="session")
def queries() -> tuple[str, ...]:
    return collection_queries()


def tokenizer_of(style: str) -> Any:
    """A tiny tokenizer of that style, out of tests/data."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(ROOT / "tests" / "data" / f"{style}-tokenizer.json"))


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Short, so that the scaling of low frequencies acts within a tiny model's positions.
    "original_max_position_embeddings": 64,
}
STYLES: dict[str, dict[str, Any]] = {
    "llama31": {
        "num_key_value_heads": 2,
        "rope_parameters": {**LLAMA3_ROPE, "factor": 8.0},
        "tie_word_embeddings": False,
    },
    "llama32": {  # head_dim x heads differs from the hidden size
        "num_key_value_heads": 1,
        "head_dim": 24,
        "rope_parameters": {**LLAMA3_ROPE, "factor": 32.0},
        "tie_word_embeddings": True,
    },
    "llama2": {"num_key_value_heads": 4, "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
}


def save_checkpoint(
    folder: Path, style: str, *, causal: bool = False, seed: int = 0, **settings: Any
) -> Path:
    """A tiny random Llama checkpoint with its tokenizer."""
    import torch
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": 600,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "initializer_range": 0.15,
            "num_labels": 1,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **STYLES[style],
            **settings,
        }
    )
    model = (LlamaForCausalLM if causal else LlamaForSequenceClassification)(config)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    bos, eos = ("<s>", "</s>") if style == "llama2" else ("<|begin_of_text|>", "<|end_of_text|>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_of(style), bos_token=bos, eos_token=eos
    )
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path, *, causal: bool = False) -> Path:
    """A LoRA adapter of a tiny base, its deltas and its head far from zero."""
    import torch
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    torch.manual_seed(7)
    auto = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    settings = {} if causal else {"num_labels": 1}
    model = auto.from_pretrained(base, **settings)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM if causal else TaskType.SEQ_CLS,
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "down_proj"],
    )
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
        if "score" in name and parameter.requires_grad:
            parameter.data = torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoint("llama31", causal=True)`: the folder of such a checkpoint, made once."""

    @cache
    def make(style: str, **settings: Any) -> Path:
        return save_checkpoint(tmp_path_factory.mktemp(style), style, **settings)

    return make


@pytest.fixture(scope="session")
def adapter(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[..., Path]
) -> Callable[..., Path]:
    """`adapter("llama32")`: a LoRA adapter of that style's causal base."""

    @cache
    def make(style: str, **settings: Any) -> Path:
        base = checkpoint(style, causal=True)
        return save_adapter(tmp_path_factory.mktemp(f"{style}-lora"), base, **settings)

    return make


@pytest.fixture(scope="session")
def traced_once() -> Iterator[None]:
    """Graphs of the same layers are traced once a process: seconds of every export.

    A trace depends on the config and the kinds of layers alone, since its weights are random.
    """
    from dear_batch.export import graphs

    known, real = dict[tuple[object, ...], Any](), graphs._traced

    def traced(module: Any, dtype: Any, shapes: Any, output: str) -> Any:
        kinds = tuple(type(part).__name__ for part in module.modules())
        config = module.scorer.config.to_json_string(use_diff=False)
        key = (kinds, config, module.dtype, dtype, str(shapes), output)
        if key not in known:
            known[key] = real(module, dtype, shapes, output)
        return known[key].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "_traced", traced)
        yield


@pytest.fixture(scope="session")
def bundle(
    tmp_path_factory: pytest.TempPathFactory,
    checkpoint: Callable[..., Path],
    cache_home: Path,
    traced_once: None,  # noqa: ARG001 - in use
) -> Callable[..., Path]:
    """`bundle("llama31", recipe="paper-script")`: an exported bundle, made once."""

    @cache
    def make(style: str, **settings: Any) -> Path:
        from dear_batch.export.bundle_from_checkpoint import Plan, bundle_from_checkpoint
        from dear_batch.run.loading import load_pointwise
        from dear_batch.specs import ExportSpec

        output = tmp_path_factory.mktemp("bundles") / style
        model = settings.pop("model", None) or str(checkpoint(style))
        spec = ExportSpec(output=str(output), model=model, **settings)
        made = bundle_from_checkpoint(Plan(spec), lambda _step: None)
        if made.manifest.task == "pointwise":
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("XDG_CACHE_HOME", str(cache_home))
                load_pointwise(made.folder)  # its first run: tests disturb what comes after it
        return made.folder

    return make


@pytest.fixture(scope="session")
def generator(
    bundle: Callable[..., Path],
    checkpoint: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A tiny random causal LM with Llama 3's chat template and the three tokens that it needs."""
    model = tmp_path_factory.mktemp("models") / "chat"
    from tests.listwise.test_encoding import huggingface_tokenizer

    sizes = {"max_position_embeddings": 2048, "vocab_size": 603}
    shutil.copytree(checkpoint("llama31", causal=True, **sizes), model)
    huggingface_tokenizer("llama31").save_pretrained(model)
    return bundle("llama31", model=str(model))
