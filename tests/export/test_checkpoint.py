"""How a checkpoint is found. The hub is not within reach of tests: its two calls are replaced."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dear_batch.errors import ConfigurationError, InputError, TrustError
from dear_batch.export import checkpoint
from dear_batch.export.checkpoint import check_model, resolve

pytestmark = pytest.mark.model  # imports the hub's client
COMMIT = "a" * 40


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A hub that has one model, and records what is asked of it."""
    asked: dict[str, Any] = {}

    class Api:
        def model_info(self, name: str, revision: str) -> SimpleNamespace:
            asked["resolved"] = (name, revision)
            return SimpleNamespace(sha=COMMIT)

    def snapshot_download(name: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked["downloaded"] = (name, revision, allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(checkpoint, "HfApi", Api)
    monkeypatch.setattr(checkpoint, "snapshot_download", snapshot_download)
    return asked


def test_a_branch_is_pinned_to_its_commit_before_anything_is_fetched(hub: dict[str, Any]) -> None:
    found = resolve("abdoelsayed/dear-3b-reranker-ce-v1", "main")
    assert found.revision == COMMIT
    assert hub["resolved"] == ("abdoelsayed/dear-3b-reranker-ce-v1", "main")
    name, revision, patterns = hub["downloaded"]
    assert (name, revision) == ("abdoelsayed/dear-3b-reranker-ce-v1", COMMIT)
    assert "*.safetensors" in patterns
    assert not any(pattern.endswith((".bin", ".pt", ".pth", ".py")) for pattern in patterns)


@pytest.mark.parametrize("answer", [None, "main", "a" * 39, "A" * 40])
def test_a_hub_that_names_no_commit(
    answer: str | None, hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Api:
        def model_info(self, name: str, revision: str) -> SimpleNamespace:  # noqa: ARG002
            return SimpleNamespace(sha=answer)

    monkeypatch.setattr(checkpoint, "HfApi", Api)
    with pytest.raises(TrustError, match="no commit"):
        resolve("some/model", "main")
    assert "downloaded" not in hub


def test_a_snapshot_that_holds_code_all_the_same(hub: dict[str, Any], tmp_path: Path) -> None:
    """The folder of the hub's cache may hold what others have downloaded there."""
    (tmp_path / "modeling.py").touch()
    with pytest.raises(TrustError, match=r"modeling\.py: it is code"):
        resolve("some/model", "main")
    assert "downloaded" in hub


def test_a_snapshot_of_links_into_the_hubs_store(hub: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abc").write_text('{"auto_map": {"AutoModel": "evil.Model"}}')
    (tmp_path / "config.json").symlink_to("blobs/abc")
    with pytest.raises(TrustError, match="auto_map"):
        resolve("some/model", "main")
    (tmp_path / "blobs" / "abc").write_text('{"model_type": "llama"}')
    assert check_model(resolve("some/model", "main")) == {"model_type": "llama"}
    assert hub["downloaded"][0] == "some/model"


def test_a_dry_run_fetches_no_weights(hub: dict[str, Any]) -> None:
    resolve("some/model", "main", weights=False)
    assert "*.safetensors" not in hub["downloaded"][2]


def test_a_local_folder_asks_no_hub(hub: dict[str, Any], tmp_path: Path) -> None:
    assert resolve(str(tmp_path), "main").revision is None
    assert hub == {}


def test_a_config_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is not valid JSON"):
        check_model(resolve(str(tmp_path), "main"))


def test_an_empty_folder_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="not a model"):
        check_model(resolve(str(tmp_path), "main"))


def test_the_needs_of_an_8b_checkpoint(tmp_path: Path) -> None:
    """meta-llama/Llama-3.1-8B's published dimensions: 32 GB as a language model in fp32."""
    from dear_batch.export.needs import needs_from_config

    config = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    listwise = needs_from_config(config, "listwise", tmp_path)
    assert listwise.parameters == 8_030_261_248
    assert 32e9 < listwise.memory_bytes < 34e9
    assert 16e9 < listwise.disk_bytes < 16.2e9  # stored in bf16
    pointwise = needs_from_config(config, "pointwise", tmp_path)
    assert pointwise.parameters == 8_030_261_248 - 128256 * 4096 + 4096  # a head of one row
    assert 30e9 < pointwise.disk_bytes < 30.2e9
    assert json.dumps(pointwise.to_json())
