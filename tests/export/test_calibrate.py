"""The length of rows, chosen from lists like those to come."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dear_batch.bundle import open_bundle
from dear_batch.data import Candidate, CandidateList
from dear_batch.errors import InputError
from dear_batch.export import calibrate as calibrate_module
from dear_batch.export.calibrate import calibrate
from dear_batch.export.engines import add_engines
from dear_batch.files.parquet import write_lists
from dear_batch.specs import EngineSpec

pytestmark = pytest.mark.model
Make = Callable[..., Path]


def write(path: Path, n_lists: int, n_documents: int, words: int, query: str = "who?") -> Path:
    lists = (
        CandidateList(
            f"q{q}",
            f"{query} {q}",
            tuple(
                Candidate(f"d{d}", "", " ".join(["the"] * (words + d % 7) + [str(d)]), None)
                for d in range(n_documents)
            ),
            q,
        )
        for q in range(n_lists)
    )
    write_lists(lists, path)
    return path


def test_the_choice_is_that_of_least_cost(bundle: Make, tmp_path: Path) -> None:
    opened = open_bundle(bundle("llama31"))
    found = calibrate(opened, write(tmp_path / "c.parquet", 30, 40, 20))
    assert set(found.costs) == {256, 512, 1024, 2048}
    assert found.costs[found.row_tokens] == min(found.costs.values())
    assert found.pairs == 30 * 40
    assert 15 < found.document_tokens < 60


def test_attention_decides_where_nothing_is_shared(bundle: Make, tmp_path: Path) -> None:
    """Pairs as long as a short row: longer ones only add attention between strangers."""
    opened = open_bundle(bundle("llama31"))
    found = calibrate(opened, write(tmp_path / "c.parquet", 40, 1, 600), 2048)
    assert found.row_tokens == 256
    assert found.costs[2048] > found.costs[256]


def test_a_shared_query_pays_for_longer_rows(
    bundle: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a model as wide as 8B, where attention is little; in a tiny one it is most."""
    opened = open_bundle(bundle("llama31"))
    assert calibrate_module._attention_share(opened) == pytest.approx(128 / 30_720)
    monkeypatch.setattr(calibrate_module, "_attention_share", lambda _bundle: 2 * 4096 / 218e6)
    long_query = " ".join(["where is the long river of the north"] * 4)
    found = calibrate(opened, write(tmp_path / "c.parquet", 10, 100, 5, long_query))
    assert found.costs[512] < found.costs[256] < 1
    assert found.row_tokens > 256


def test_engines_are_built_for_the_chosen_rows(bundle: Make, tmp_path: Path) -> None:
    import shutil

    own = Path(shutil.copytree(bundle("llama31"), tmp_path / "bundle"))
    candidates = write(tmp_path / "c.parquet", 40, 1, 600)
    spec = EngineSpec(
        targets=("sm_89",),
        precision="fp32",
        calibrate=str(candidates),
        batch_tokens=2048,
    )
    told: list[str] = []
    (engine,) = add_engines(own, spec, told.append, lambda *_: None)
    assert (engine.row_tokens, engine.batch_tokens) == (256, 2048)
    assert any("rows of 256 tokens, by 40 pairs" in line for line in told)


def test_a_file_without_texts_is_refused(bundle: Make, tmp_path: Path) -> None:
    opened = open_bundle(bundle("llama31"))
    empty = CandidateList("q", "who?", (Candidate("d", "", None, None),), 0)
    write_lists([empty], tmp_path / "c.parquet")
    with pytest.raises(InputError, match="holds no candidates"):
        calibrate(opened, tmp_path / "c.parquet")
    with pytest.raises(InputError):
        calibrate(opened, tmp_path / "missing.parquet")
