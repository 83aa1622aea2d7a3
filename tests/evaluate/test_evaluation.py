"""Averaging, comparison with a baseline, and the JSON form, on files of a few lines."""

import json
from pathlib import Path

import pytest

from dear_batch.errors import InputError
from dear_batch.evaluate.evaluation import evaluate
from dear_batch.evaluate.metrics import MEASURES

# Three topics, one relevant document each. The better run misses topic 3, both know topic 9.
QRELS = "1 0 a 1\n2 0 a 1\n3 0 a 1\n"
BASELINE = "1 Q0 b 1 2 t\n1 Q0 a 2 1 t\n2 Q0 a 1 1 t\n3 Q0 a 1 1 t\n9 Q0 a 1 1 t\n"
BETTER = "1 Q0 a 1 2 t\n1 Q0 b 2 1 t\n2 Q0 a 1 1 t\n9 Q0 a 1 1 t\n"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    texts = {"qrels": QRELS, "baseline": BASELINE, "better": BETTER}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return {name: tmp_path / name for name in texts}


def test_average_over_qrels(files: dict[str, Path]) -> None:
    (evaluation,) = evaluate(files["qrels"], [files["better"]])
    assert evaluation.average_over == "qrels"
    assert evaluation.measures["nDCG@1"] == pytest.approx(2 / 3)  # 1, 1, and 0 for topic 3
    assert list(evaluation.per_topic) == ["1", "2", "3"]
    assert evaluation.missing_topics == ("3",)
    assert evaluation.unjudged_topics == ("9",)
    assert evaluation.comparison is None


def test_average_over_run(files: dict[str, Path]) -> None:
    (evaluation,) = evaluate(files["qrels"], [files["better"]], average_over="run")
    assert evaluation.measures["nDCG@1"] == 1
    assert list(evaluation.per_topic) == ["1", "2"]
    assert evaluation.missing_topics == ("3",)


def test_comparison_over_qrels(files: dict[str, Path]) -> None:
    runs = [files["better"], files["baseline"]]  # the baseline may be among the runs
    first, second = evaluate(files["qrels"], runs, baseline_path=files["baseline"])
    assert (first.run, first.baseline) == (str(files["baseline"]), None)
    assert (second.run, second.baseline) == (str(files["better"]), str(files["baseline"]))
    assert second.comparison is not None
    assert set(second.comparison) == set(MEASURES)
    # MRR@10: 1, 1, 0 against 1/2, 1, 1
    assert second.comparison["MRR@10"].topics == 3
    assert second.comparison["MRR@10"].difference == pytest.approx(-0.5 / 3)


def test_comparison_over_run_takes_the_topics_of_both(files: dict[str, Path]) -> None:
    _, second = evaluate(
        files["qrels"], [files["better"]], baseline_path=files["baseline"], average_over="run"
    )
    assert second.comparison is not None
    # topics 1 and 2: 1, 1 against 1/2, 1; the means are over two and three topics
    assert second.comparison["MRR@10"].topics == 2
    assert second.comparison["MRR@10"].difference == pytest.approx(0.25)


def test_relevance_level_is_passed_on(files: dict[str, Path]) -> None:
    (evaluation,) = evaluate(files["qrels"], [files["better"]], relevance_level=2)
    assert evaluation.relevance_level == 2
    assert evaluation.measures["MAP"] == 0
    assert evaluation.measures["nDCG@1"] > 0


def test_json(files: dict[str, Path]) -> None:
    evaluations = evaluate(files["qrels"], [files["better"]], baseline_path=files["baseline"])
    alone, compared = json.loads(json.dumps([item.as_dict() for item in evaluations]))
    assert alone["schema_version"] == 1
    assert alone["comparison"] is None
    assert compared["qrels"] == str(files["qrels"])
    assert compared["average_over"] == "qrels"
    assert compared["topics"] == 3
    assert compared["missing_topics"] == ["3"]
    assert compared["per_topic"]["1"]["nDCG@10"] == 1
    assert set(compared["measures"]) == set(MEASURES)
    assert set(compared["comparison"]["MAP"]) == {
        "topics",
        "difference",
        "p_value",
        "interval",
        "note",
    }


def test_no_shared_topic(files: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("q1 Q0 a 1 1 t\n", encoding="utf-8")
    with pytest.raises(InputError, match="share no topic") as caught:
        evaluate(files["qrels"], [other])
    assert "'1'; the run has 'q1'" in caught.value.valid


def test_baseline_without_a_shared_topic(files: dict[str, Path], tmp_path: Path) -> None:
    third = tmp_path / "third"
    third.write_text("3 Q0 a 1 1 t\n", encoding="utf-8")
    with pytest.raises(InputError, match="share no judged topic"):
        evaluate(files["qrels"], [files["better"]], baseline_path=third, average_over="run")
