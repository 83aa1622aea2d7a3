"""`benchmarks/peers.py`: what its processes say, who is ranked, and what the README makes of it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import peer_results
import plots
from peer_process import NotRunError, Peer, Side
from peer_results import LOOP, OPTIMUM, Task, Timed
from peer_sides import ReadmeLoop, pairs_of

CEILING = {"gflops": 100.0, "flop_per_token": 2e8, "flop_per_packed_token": 1.9e8}


def task(**settings: object) -> Task:
    reference = [np.float32([3, 1, 2]), np.float32([5, 4])]
    return Task(["q", "r"], [["a", "b", "c"], ["d", "e"]], reference, 1000, **settings)


def test_the_readme_says_what_the_committed_result_says() -> None:
    result = json.loads(plots.RESULT.read_text(encoding="utf-8"))
    text = plots.README.read_text(encoding="utf-8")
    assert plots.between_markers(text, plots.readme(result)) == text
    assert plots.PLOT.read_text(encoding="utf-8") == plots.plot(result)
    assert all(side["name"] in text for side in result["sides"])


def test_who_computes_something_else_is_last_and_counts_for_no_goal() -> None:
    scores = [3.0, 1.0, 2.0, 5.0, 4.0]
    sides = [
        Timed(LOOP, "fp32", 64, False, seconds=[60.0, 80.0, 61.0], scores=scores),
        Timed(OPTIMUM, "fp32", 8, False, seconds=[1.0], scores=[*scores[:4], 4.1]),
        Timed("dear-batch", "fp32", None, True, seconds=[10.0], scores=scores, computed_tokens=900),
        Timed("dear-batch", "int8", None, True, seconds=[5.0], scores=[x * 1.1 for x in scores]),
    ]
    entries = peer_results.compared([peer_results.entry(side, task()) for side in sides], CEILING)
    assert [e["name"] for e in entries] == ["dear-batch", "dear-batch", LOOP, OPTIMUM]
    assert "0.1" in entries[-1]["not_ranked"]
    assert entries[2]["seconds"] == [60.0, 80.0, 61.0]
    assert [e["times_loop"] for e in entries[:3]] == [12.2, 6.1, 1.0]
    assert entries[1]["share_of_fp32_ceiling"] == 0.171  # 1.9e8 * 900 / 10 s of 100 GFLOP/s
    found = peer_results.goals(entries)
    assert found == {
        f"fp32, times {LOOP}": {"wanted": 5.0, "found": 6.1},
        "int8, times our fp32": {"wanted": 1.7, "found": 2.0},
    }


def test_ndcg_is_that_of_the_scores(tmp_path: Path) -> None:
    qrels = tmp_path / "qrels"
    qrels.write_text("q 0 b 1\nr 0 d 1\nother 0 d 1\n")
    worst = peer_results.entry(
        Timed("x", "fp32", 1, False, seconds=[1.0], scores=[3, 1, 2, 5, 4]), task(qrels=qrels)
    )
    assert worst["ndcg@10"] == pytest.approx((1 / np.log2(4) + 1) / 2)


def test_the_plot_holds_every_ranked_side_in_proportion() -> None:
    sides = [
        {"name": n, "precision": "fp32", "batch": 8, "ours": False, "not_ranked": why}
        | {"median_seconds": s}
        for n, s, why in (("<a>", 10.0, None), ("b", 100.0, None), ("c", 5.0, "it differs"))
    ]
    svg = plots.plot({"pairs": 7, "sides": sides})
    assert "&lt;a&gt;, fp32, batch 8" in svg
    assert ">c, " not in svg
    first, second = (
        float(line.split('width="')[1].split('"')[0])
        for line in svg.splitlines()
        if f'height="{plots.BAR}"' in line
    )
    per_decade = (plots.WIDTH - plots.LEFT - plots.RIGHT) / np.log10(100 / 5)
    assert second - first == pytest.approx(per_decade, abs=0.2)


def test_a_side_without_its_environment_says_so(tmp_path: Path) -> None:
    python = tmp_path / ".venv-peers" / "bin" / "python"
    with pytest.raises(NotRunError, match=r"\.venv-peers is not there"):
        Peer(Side("x", "rerankers", python, tmp_path, "fp32", (16,)), [])


@pytest.mark.model
@pytest.mark.process
def test_sides_score_alike_each_in_a_process_of_its_own(
    checkpoint: Callable[..., Path],
    adapter: Callable[..., Path],
    bundle: Callable[..., Path],
    texts: tuple[str, ...],
    tmp_path: Path,
) -> None:
    from merged_checkpoint import merge

    base, lora = checkpoint("llama2", causal=True), adapter("llama2")
    merged = tmp_path / "merged"
    merge(str(base), str(lora), str(merged))
    ours = bundle("llama2", model=str(base), adapter=str(lora))
    lists = [("how are rivers made?", texts[:5]), ("who wrote it?", [texts[7]])]
    here = Path(sys.executable)
    found = {}
    for kind, model in (("sorted", merged), ("ours", ours)):
        peer = Peer(Side("x", kind, here, model, "fp32", (2,)), lists)
        answer = peer.score(2)
        found[kind] = peer.ids(), answer["scores"]
        assert answer["seconds"] > 0
        peer.end()
    ids, scores = found["sorted"]
    assert len(scores) == len(ids) == 6
    assert len({len(one) for one in ids}) > 1  # so that batches are padded
    loop = ReadmeLoop(str(merged))
    found["loop"] = loop.ids(pairs_of(lists)), loop.score(lists, 2)
    for other_ids, others in found.values():
        assert other_ids == ids
        np.testing.assert_allclose(others, scores, atol=1e-4, rtol=0)
    with pytest.raises(NotRunError, match="absent"):
        Peer(Side("x", "ours", here, tmp_path / "absent", "fp32", (2,)), lists)
