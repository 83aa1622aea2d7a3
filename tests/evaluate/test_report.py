"""What a person reads: figures, stars, and a caption that says how they came about."""

import io
from dataclasses import replace

from rich.console import Console

from dear_batch.evaluate.evaluation import Evaluation
from dear_batch.evaluate.metrics import MEASURES
from dear_batch.evaluate.report import table
from dear_batch.evaluate.significance import Comparison

BASELINE = Evaluation(
    run="out/[bm25]/run.trec",
    qrels="qrels.txt",
    average_over="qrels",
    relevance_level=2,
    measures=dict.fromkeys(MEASURES, 0.50581),
    per_topic={"1": {}, "2": {}},
    missing_topics=(),
    unjudged_topics=(),
)


def compared(comparison: Comparison) -> Evaluation:
    return replace(
        BASELINE,
        run="out/dear/run.trec",
        missing_topics=("2",),
        baseline=BASELINE.run,
        comparison=dict.fromkeys(MEASURES, comparison),
    )


def rendered(*evaluations: Evaluation) -> str:
    out = io.StringIO()
    Console(width=160, file=out).print(table(evaluations))
    return out.getvalue()


def test_eighty_columns_cut_no_figure() -> None:
    out = io.StringIO()
    evaluation = compared(Comparison(2, -0.0252, 0.01, (-0.1, -0.01)))
    Console(width=80, file=out).print(table([BASELINE, evaluation]))
    assert out.getvalue().count("0.5058") == 2 * len(MEASURES)
    assert out.getvalue().count("-0.0252*") == len(MEASURES)


def test_one_run() -> None:
    text = rendered(BASELINE)
    assert text.count("0.5058") == len(MEASURES)
    assert "out/[bm25]/run.trec" in text
    assert "qrels: qrels.txt; MAP, MRR@10 and R@100 count judgements from 2 as relevant" in text
    assert "means over all 2 topics of the qrels" in text
    assert "t-test" not in text


def test_significant_difference() -> None:
    text = rendered(BASELINE, compared(Comparison(2, 0.0252, 0.01, (0.01, 0.04))))
    assert text.count("+0.0252*") == len(MEASURES)
    assert "difference to out/[bm25]/run.trec" in text
    assert "paired t-test" in text
    assert "out/dear/run.trec lacks 1 of the judged topics" in text


def test_difference_by_chance() -> None:
    text = rendered(BASELINE, compared(Comparison(2, -0.0252, 0.05, (-0.1, 0.05))))
    assert text.count("-0.0252") == len(MEASURES)
    assert "-0.0252*" not in text


def test_a_test_that_was_not_made_says_why() -> None:
    text = rendered(BASELINE, compared(Comparison(1, 0.1, None, None, "not computed: one topic")))
    assert "+0.1000*" not in text
    assert "out/dear/run.trec, nDCG@10: not computed: one topic" in text


def test_averaging_over_run_topics() -> None:
    assert "in both the qrels and the run" in rendered(replace(BASELINE, average_over="run"))
