"""Bundles of which a file was damaged: refused, or opened as what they were."""

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import strategies as st

from dear_batch.bundle import BLANK, MANIFEST, OWN, open_bundle
from dear_batch.errors import ConfigurationError, TrustError
from dear_batch.inspection import inspect_path
from dear_batch.show import show
from tests.fuzz.effort import Effort
from tests.fuzz.strategies import Damage, damages

pytestmark = pytest.mark.model
SEALS = ("as it was", "none", "of the new contents")


@dataclass(frozen=True)
class Change:
    """Damage to one file, given by its place among all; the manifest's own hash follows or not."""

    damage: Damage
    file: int = 0
    seal: str = SEALS[0]

    def __call__(self, folder: Path, names: list[str]) -> None:
        name = names[self.file % len(names)]
        path = folder / name
        damage = self.damage
        if damage.kind.startswith("json") and path.suffix != ".json":
            damage = replace(damage, kind="flip", value=1)
        content = damage(path.read_bytes())
        path.write_bytes(_sealed(content, self.seal) if name == MANIFEST else content)


def _sealed(content: bytes, seal: str) -> bytes:
    """A manifest whose maker wanted it to look whole."""
    try:
        fields: Any = json.loads(content)
    except (ValueError, RecursionError):
        return content
    if seal == SEALS[0] or not isinstance(fields, dict):
        return content
    fields.pop(OWN, None)
    if seal == "of the new contents":
        blank = json.dumps({OWN: BLANK, **fields}, indent=2) + "\n"
        return blank.replace(BLANK, hashlib.sha256(blank.encode()).hexdigest(), 1).encode()
    return json.dumps(fields).encode()


def _changes() -> st.SearchStrategy[Change]:
    manifest = st.builds(Change, damages(), st.just(0), st.sampled_from(SEALS))
    return manifest | st.builds(Change, damages(), st.integers(0, 20))


KNOWN: tuple[Change, ...] = ()


def test_a_damaged_bundle_is_refused_or_what_it_was(
    effort: Effort, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    whole = bundle("llama31")
    original = open_bundle(whole, "pointwise")
    names = [MANIFEST, *sorted(original.manifest.files)]

    def check(change: Change) -> None:
        with TemporaryDirectory(dir=tmp_path) as name:
            folder = Path(name) / "bundle"
            shutil.copytree(whole, folder)
            change(folder, names)
            try:
                found = open_bundle(folder, "pointwise")
            except (TrustError, ConfigurationError):
                pass
            else:
                if change.seal == SEALS[0]:
                    assert replace(found.manifest, files={}) == replace(original.manifest, files={})
                assert all(
                    (folder / name).read_bytes() == (whole / name).read_bytes()
                    for name in found.manifest.files
                )
            with suppress(TrustError, ConfigurationError):
                show(inspect_path(folder))

    effort.run(check, _changes(), known=KNOWN, few=40, share=0.08)
