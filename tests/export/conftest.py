"""Packed graphs of tiny models in each precision, made once."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from dear_batch.bundle import Precision, open_bundle

Make = Callable[..., Path]


@pytest.fixture(scope="session")
def packed(bundle: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`packed("llama31", "fp16")`: the path of a bundle's packed graph in that precision."""

    @cache
    def make(style: str, precision: Precision = "fp16") -> Path:
        from dear_batch.export.graphs import packed_graph

        return packed_graph(
            open_bundle(bundle(style)), precision, tmp_path_factory.mktemp(f"{style}-{precision}")
        )

    return make
