"""Measures against arithmetic done by hand, and files that are refused with their line."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dear_batch.errors import InputError
from dear_batch.evaluate.metrics import MEASURES, read_qrels, read_run, topic_values

DATA = Path(os.environ.get("DEAR_BATCH_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_by_hand() -> None:
    qrels = {"q": {"a": 3, "b": 0, "c": 1, "d": 2}}
    run = {"q": {"b": 4.0, "a": 3.0, "x": 2.0, "c": 1.0}}  # d is not retrieved
    values = topic_values(qrels, run)["q"]
    # gains in run order 0 3 0 1; discounts 1/log2(rank + 1)
    dcg = 3 / math.log2(3) + 1 / math.log2(5)
    ideal = 3 + 2 / math.log2(3) + 1 / math.log2(4)
    assert values["nDCG@1"] == 0
    assert values["nDCG@5"] == pytest.approx(dcg / ideal)
    assert values["nDCG@10"] == pytest.approx(dcg / ideal)
    # relevant at ranks 2 and 4 of three relevant: (1/2 + 2/4) / 3
    assert values["MAP"] == pytest.approx(1 / 3)
    assert values["MRR@10"] == pytest.approx(1 / 2)
    assert values["R@100"] == pytest.approx(2 / 3)


def test_relevance_level_leaves_ndcg_alone() -> None:
    qrels = {"q": {"a": 3, "b": 0, "c": 1, "d": 2}}
    run = {"q": {"c": 4.0, "a": 3.0, "b": 2.0}}
    one, two = (topic_values(qrels, run, relevance_level=level)["q"] for level in (1, 2))
    assert {name for name in MEASURES if one[name] == two[name]} == {"nDCG@1", "nDCG@5", "nDCG@10"}
    # level 2: a and d are relevant, a is found at rank 2: (1/2) / 2, 1/2, 1/2
    assert (two["MAP"], two["MRR@10"], two["R@100"]) == (0.25, 0.5, 0.5)
    # level 1: c, a, d are relevant, c and a found at 1 and 2: (1/1 + 2/2) / 3, 1, 2/3
    assert one["MAP"] == pytest.approx(2 / 3)
    assert one["MRR@10"] == 1


def test_ties_go_by_docid_descending() -> None:
    """trec_eval's order, for every measure: ir_measures' own RR@10 has it ascending."""
    qrels = {"q": {"d1": 1}}
    tied = topic_values(qrels, {"q": {"d1": 1.0, "d2": 1.0}})["q"]
    assert (tied["nDCG@1"], tied["MAP"], tied["MRR@10"]) == (0, 0.5, 0.5)
    # 0.9 + 1e-9 is 0.9 in float32, in which trec_eval holds scores
    assert topic_values(qrels, {"q": {"d1": 0.9 + 1e-9, "d2": 0.9}})["q"]["MRR@10"] == 0.5


@pytest.mark.parametrize(("rank", "expected"), [(1, 1.0), (9, 1 / 9), (10, 0.1), (11, 0.0)])
def test_reciprocal_rank_ends_at_ten(rank: int, expected: float) -> None:
    run = {"q": {f"d{place:02}": float(-place) for place in range(1, 20)}}
    assert topic_values({"q": {f"d{rank:02}": 1}}, run)["q"]["MRR@10"] == expected


def test_negative_judgements_are_not_relevant() -> None:
    qrels = {"q": {"spam": -2, "a": 1}}
    values = topic_values(qrels, {"q": {"spam": 2.0, "a": 1.0}})["q"]
    assert values["nDCG@10"] == pytest.approx(1 / math.log2(3))
    assert values["MAP"] == 0.5


def test_topics_are_those_of_the_qrels() -> None:
    qrels = {"a": {"d": 1}, "nothing": {"d": 0}, "missing": {"d": 1}}
    values = topic_values(qrels, {"a": {"d": 1.0}, "nothing": {"d": 1.0}, "other": {"d": 1.0}})
    assert list(values) == ["a", "nothing", "missing"]
    assert set(values["a"].values()) == {1.0}
    assert set(values["nothing"].values()) == set(values["missing"].values()) == {0.0}


def independent(judged: dict[str, int], scored: dict[str, float]) -> dict[str, float]:
    """The definitions (trec_eval 9, m_ndcg_cut.c, m_map.c, m_recip_rank.c), written again."""
    order = sorted(scored, reverse=True)
    order.sort(key=lambda docid: scored[docid], reverse=True)
    gains = [max(0, judged.get(docid, 0)) for docid in order]
    best = sorted((level for level in judged.values() if level > 0), reverse=True)

    def dcg(levels: list[int]) -> float:
        return math.fsum(level / math.log2(rank + 1) for rank, level in enumerate(levels, 1))

    hits = [rank for rank, gain in enumerate(gains, 1) if gain > 0]
    found = enumerate(hits, 1)
    relevant = max(1, len(best))
    return {
        **{f"nDCG@{k}": dcg(gains[:k]) / (dcg(best[:k]) or 1) for k in (1, 5, 10)},
        "MAP": math.fsum(count / rank for count, rank in found) / relevant,
        "MRR@10": 1 / hits[0] if hits and hits[0] <= 10 else 0.0,
        "R@100": len([rank for rank in hits if rank <= 100]) / relevant,
    }


DOCIDS = st.integers(0, 120).map(str)


@settings(max_examples=60, deadline=None)
@given(
    judged=st.dictionaries(DOCIDS, st.integers(-1, 3), min_size=1, max_size=40),
    scored=st.dictionaries(DOCIDS, st.integers(-4, 4).map(float), min_size=1, max_size=120),
)
def test_against_the_definitions(judged: dict[str, int], scored: dict[str, float]) -> None:
    """Few distinct scores, so that most of a list is tied."""
    values = topic_values({"q": judged}, {"q": scored})["q"]
    assert values == pytest.approx(independent(judged, scored))


# ir_measures on the first-stage order, four decimals: the table that comes with the data.
@pytest.mark.parametrize(
    ("folder", "file", "expected"),
    [
        ("dl19", "bm25-top100.rankgpt.json", (0.5426, 0.5278, 0.5058)),
        ("noveleval", "google-top20.rankgpt.json", (0.6429, 0.5824, 0.6503)),
    ],
)
def test_first_stage_figures(folder: str, file: str, expected: tuple[float, ...]) -> None:
    if not DATA.is_dir():
        pytest.skip(f"no test collections at {DATA}: set DEAR_BATCH_TEST_DATA")
    lists = json.loads((DATA / folder / file).read_text(encoding="utf-8"))
    run = {
        str(hits[0]["qid"]): {hit["docid"]: float(-rank) for rank, hit in enumerate(hits)}
        for hits in (entry["hits"] for entry in lists)
    }
    values = topic_values(read_qrels(DATA / folder / "qrels.txt"), run)
    for name, figure in zip(("nDCG@1", "nDCG@5", "nDCG@10"), expected, strict=True):
        mean = math.fsum(topic[name] for topic in values.values()) / len(values)
        assert round(mean, 4) == figure


def test_read_trec_qrels(tmp_path: Path) -> None:
    path = write(tmp_path / "qrels", "1 0 a 2\n\n1 Q0\tb -1\r\n2 0 a 0")
    assert read_qrels(path) == {"1": {"a": 2, "b": -1}, "2": {"a": 0}}


def test_read_beir_qrels(tmp_path: Path) -> None:
    path = write(tmp_path / "test.tsv", "query-id\tcorpus-id\tscore\nq 1\td1\t1\nq 1\td2\t0\n")
    assert read_qrels(path) == {"q 1": {"d1": 1, "d2": 0}}


def test_read_run_ignores_the_rank(tmp_path: Path) -> None:
    path = write(tmp_path / "run", "1 Q0 a 7 0.5 t\n1 Q0 b x 1e1 t\n2 Q0 a 1 -3 t\n")
    assert read_run(path) == {"1": {"a": 0.5, "b": 10.0}, "2": {"a": -3.0}}


@pytest.mark.parametrize(
    ("read", "text", "line", "what"),
    [
        (read_qrels, "1 0 a 1\n1 0 b\n", 2, "3 columns"),
        (read_qrels, "1 0 a yes\n", 1, "'yes' is no whole number"),
        (read_qrels, "1 0 a 1\n1 0 a 1\n", 2, "'a' occurs twice in query '1'"),
        (read_qrels, "query-id\tcorpus-id\tscore\n1 0 a 1\n", 2, "1 columns"),
        (read_qrels, "1 0 a 1\nquery-id\tcorpus-id\tscore\n", 2, "3 columns"),
        (read_qrels, "q\td\t1\n", 1, "3 columns"),
        (read_run, "1 Q0 a 1 1.0 t\n1 Q0 b 2 1.0\n", 2, "5 columns"),
        (read_run, "1 Q0 a b 1 1.0 t\n", 1, "7 columns"),
        (read_run, "1 Q0 a 1 high t\n", 1, "'high' is no number"),
        (read_run, "1 Q0 a 1 nan t\n", 1, "nan is not finite"),
        (read_run, "\n1 Q0 a 1 -inf t\n", 2, "-inf is not finite"),
        (read_run, "1 Q0 a 1 1e39 t\n", 1, "1e39 is not finite as float32"),
        (read_run, "1 Q0 a 1 2 t\n2 Q0 a 1 2 t\n1 Q0 a 2 1 t\n", 3, "'a' occurs twice"),
    ],
)
def test_bad_line(
    tmp_path: Path, read: Callable[[Path], object], text: str, line: int, what: str
) -> None:
    path = write(tmp_path / "file", text)
    with pytest.raises(InputError) as caught:
        read(path)
    assert caught.value.exit_code == 65
    assert what in caught.value.what
    assert caught.value.where == f"{path}, line {line}"
    assert caught.value.valid


@pytest.mark.parametrize("read", [read_qrels, read_run])
def test_bad_file(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(InputError, match="No such file"):
        read(tmp_path / "absent")
    with pytest.raises(InputError, match=r"no judgement|empty"):
        read(write(tmp_path / "empty", "\n"))
    (tmp_path / "latin").write_bytes(b"1 0 \xe9 1\n")
    with pytest.raises(InputError, match="not UTF-8"):
        read(tmp_path / "latin")
