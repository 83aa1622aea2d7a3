"""Runs the DeAR README's five-document example on a checkpoint or a bundle.

For users with hub access: proof that their checkpoint scores as its authors printed.
"""

from pathlib import Path

from tokenizers import Tokenizer

from dear_batch.api import Reranker
from dear_batch.bundle import MANIFEST, open_bundle
from dear_batch.errors import UsageError, missing_extra
from dear_batch.pointwise.recipe import PairEncoder, recipe_from_tokenizer
from dear_batch.pointwise.reference import (
    DOCUMENTS,
    QUERY,
    SCORES,
    ReferenceName,
    Verdict,
    judge,
    name_from_id,
)


def verify(
    checkpoint: str,
    scores: ReferenceName | None,
    *,
    adapter: str | None,
    revision: str,
    adapter_revision: str,
) -> Verdict:
    """Score the example and judge it.

    Raises:
        UsageError: the printed scores cannot be told from the checkpoint's name.
        ConfigurationError, TrustError: the checkpoint or bundle cannot be loaded.
    """
    if (Path(checkpoint) / MANIFEST).is_file():
        source = open_bundle(checkpoint, verify=False).manifest.source
        name = scores or _name(source.adapter or source.model, checkpoint)
        reranker = Reranker.load(checkpoint)
    else:
        name = scores or _name(adapter or checkpoint, checkpoint)
        reranker = _from_checkpoint(checkpoint, revision, adapter, adapter_revision)
    return judge(name, reranker.score(QUERY, DOCUMENTS))


def _name(trained_as: str, checkpoint: str) -> ReferenceName:
    name = name_from_id(trained_as)
    if name is None:
        raise UsageError(
            f"The name {trained_as!r} does not tell which printed scores it should match.",
            valid=", ".join(SCORES),
            next_step=f"dear-batch verify-reference {checkpoint} --scores 8b-ce",
        )
    return name


def _from_checkpoint(
    checkpoint: str, revision: str, adapter: str | None, adapter_revision: str
) -> Reranker:
    """The checkpoint in PyTorch bf16, as the README runs it."""
    try:
        import torch

        from dear_batch.export.checkpoint import check_adapter, check_base, check_model, resolve
        from dear_batch.export.merge import model_from_checkpoint, tokenizer_from_checkpoint
        from dear_batch.pointwise.torch_scorer import TorchScorer
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "torch", "export", "Verifying a checkpoint") from error
    model, lora = resolve(checkpoint, revision), None
    check_model(model)
    if adapter is not None:
        lora = resolve(adapter, adapter_revision)
        check_base(lora, check_adapter(lora), model)
    merged = model_from_checkpoint(model, lora, "pointwise").to(torch.bfloat16)
    tokenizer = tokenizer_from_checkpoint(model, lora)
    fast = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    recipe = recipe_from_tokenizer(
        fast, "readme", "last-token", bos_id=tokenizer.bos_token_id, pad_id=tokenizer.pad_token_id
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Reranker(TorchScorer(merged, recipe, device), PairEncoder(fast, recipe))
