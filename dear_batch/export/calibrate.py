"""Chooses the row length of an engine from candidates like those that it will score.

Longer rows share a prefix among more documents and leave less padding; attention, which reads
every pair of tokens of a row, costs more. What that comes to depends on the lengths of the
texts and on the model: both are looked at, nothing is timed. Knows nothing of TensorRT.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dear_batch.bundle import Bundle
from dear_batch.errors import InputError
from dear_batch.files.parquet import open_input
from dear_batch.files.sample import sample
from dear_batch.pointwise.calibration import ROW_TOKENS
from dear_batch.pointwise.profiles import BATCH_TOKENS, Profile, fit, lay_out, layout
from dear_batch.pointwise.recipe import EncodedPair, PairEncoder
from dear_batch.pointwise.rows import batches


@dataclass(frozen=True, slots=True)
class Calibration:
    """What the candidates showed.

    Attributes:
        row_tokens: the row length of least cost.
        document_tokens: tokens of a row for each of its documents, prefixes included.
        pairs: how many were looked at.
        costs: of each row length, in computed operations a real token, relative to a pair
            alone without padding and attention.
    """

    row_tokens: int
    document_tokens: float
    pairs: int
    costs: dict[int, float]


def calibrate(bundle: Bundle, path: Path, batch_tokens: int = BATCH_TOKENS) -> Calibration:
    """Choose for a sample of the lists in a file of candidates.

    Raises:
        InputError: the file cannot be read, or holds no pairs.
    """
    encoder = PairEncoder.from_file(bundle.file("tokenizer.json"), bundle.recipe)
    lists = list(sample(open_input(path)))
    pairs = [pair for encoded in encoder.encode(lists) for pair in encoded]
    if not pairs:
        raise InputError(f"{path} holds no candidates to calibrate with.", valid="lists with text")
    lengths = [n for n in ROW_TOKENS if n >= bundle.recipe.max_length]
    lengths = lengths or [bundle.recipe.max_length]
    attention = _attention_share(bundle)
    found = {n: _cost(pairs, lay_out(n, max(n, batch_tokens)), attention) for n in lengths}
    best = min(found, key=lambda n: (found[n][0], n))
    costs = {n: round(cost, 4) for n, (cost, _) in found.items()}
    return Calibration(best, found[best][1], len(pairs), costs)


def _cost(
    pairs: Sequence[EncodedPair], profiles: tuple[Profile, ...], attention: float
) -> tuple[float, float]:
    """Cost a real token, and tokens a document."""
    computed, tokens = 0.0, 0
    for batch in batches(pairs, layout(profiles)):
        _, (R, T, _) = fit(profiles, len(batch.rows), batch.length, max(batch.counts))
        computed += R * T * (1 + T * attention)
        tokens += batch.tokens
    return computed / sum(map(len, pairs)), tokens / len(pairs)


def _attention_share(bundle: Bundle) -> float:
    """Operations of a token's attention to one other, relative to its matrix products.

    Two products of `heads * head_dim`; masked places are computed too.
    """
    config: dict[str, Any] = json.loads(bundle.file("config.json").read_bytes())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    key_value = config.get("num_key_value_heads") or heads
    products = hidden * size * 2 * (heads + key_value) + 3 * hidden * config["intermediate_size"]
    return float(2 * heads * size / products)
