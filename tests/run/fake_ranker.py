"""A listwise model that is none: it sorts passages by their text, or fails, as it is told.

Installed in place of `dear_batch.listwise.ranker`, so that a job finds it as it finds the real
one; the bundle that it is given is a real one without weights.
"""

import hashlib
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dear_batch.bundle import Bundle, Manifest, Source, hash_folder, write_manifest
from dear_batch.data import Permutation
from dear_batch.listwise.windows import WindowRequest
from dear_batch.specs import ListwiseSpec


def value(text: str) -> str:
    """What a passage is worth, the least first: nothing to do with any score."""
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class FakeRanker:
    """Sorts by `value`; windows that `fails` names fail, after `dies` calls the process does."""

    device: str = "cpu"
    precision: str = "fp32"
    wave_queries: int = 3
    memory_backoffs: int = 0
    fails: Callable[[WindowRequest], bool] = lambda _request: False
    dies: float = math.inf
    requests: list[list[WindowRequest]] = field(default_factory=list)

    def rank(
        self, requests: Sequence[WindowRequest], done: Callable[[int], None] = lambda _n: None
    ) -> list[Permutation]:
        self.requests.append(list(requests))
        if len(self.requests) > self.dies:
            raise RuntimeError("the listwise device is gone")
        for count in range(1, len(requests) + 1):
            done(count)
        return [self._permutation(request) for request in requests]

    def _permutation(self, request: WindowRequest) -> Permutation:
        n = len(request.passages)
        prompt = hashlib.sha256("\n".join([request.query, *request.passages]).encode())
        asked = {"prompt_sha256": prompt.hexdigest(), "prompt_tokens": 10 * n, "forwards": 1}
        if self.fails(request):
            nothing = (math.nan,) * n
            detail = "the prompt does not fit"
            return Permutation(
                request.window, tuple(range(n)), "failed", nothing, detail=detail, **asked
            )
        order = sorted(range(n), key=lambda i: value(request.passages[i]))
        return Permutation(
            window=request.window,
            order=tuple(order),
            status="ok",
            logprobs=tuple(-0.25 * k for k in reversed(range(n))),
            text=" > ".join(f"[{i}]" for i in order),
            answer_tokens=4 * n,
            overruled=1,
            cut_passages=2,
            shortened_passages=3,
            **asked,
        )


@dataclass
class Fake:
    """The fake module: what `ListwiseRanker.open` gives, and what it and the check were asked."""

    ranker: FakeRanker
    opened: list[tuple[Bundle, ListwiseSpec, str]] = field(default_factory=list)
    checked: list[tuple[Bundle, ListwiseSpec]] = field(default_factory=list)
    on_open: Callable[[], None] = lambda: None


def install(patch: pytest.MonkeyPatch, **settings: Any) -> Fake:
    """Put a fake in place of the real module until the patch is undone."""
    fake = Fake(FakeRanker(**settings))

    class ListwiseRanker:
        @classmethod
        def open(cls, bundle: Bundle, spec: ListwiseSpec, device: str) -> FakeRanker:
            fake.opened.append((bundle, spec, device))
            fake.on_open()
            return fake.ranker

    module: Any = ModuleType("dear_batch.listwise.ranker")
    module.ListwiseRanker = ListwiseRanker
    patch.setitem(sys.modules, module.__name__, module)

    def check(bundle: Bundle, spec: ListwiseSpec) -> None:
        fake.checked.append((bundle, spec))

    patch.setattr("dear_batch.run.listwise.check_listwise", check)
    return fake


def listwise_bundle(folder: Path) -> Path:
    """A listwise bundle of one small file."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    manifest = Manifest(
        task="listwise",
        source=Source("some/model", "0" * 40),
        precision="bf16",
        recipe=None,
        architecture={"hidden_size": 8},
        graphs={},
        parity=None,
        versions={},
        created="2026-01-01T00:00:00+00:00",
        files=hash_folder(folder),
    )
    write_manifest(folder, manifest)
    return folder


def slid(values: Iterable[str], depth: int, window: int, step: int) -> list[int]:
    """Places of a list after the fake's windows slid over its top, best first: the plain loop."""
    found = list(values)
    order = list(range(len(found)))
    end = min(depth, len(found))
    while True:
        start = max(0, end - window)
        order[start:end] = sorted(order[start:end], key=lambda place: value(found[place]))
        if start == 0:
            return order
        end -= step
