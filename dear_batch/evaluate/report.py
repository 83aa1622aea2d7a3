"""Evaluations as a table for people. Builds it; printing is for the caller.

Knows nothing of files or of how a measure is computed.
"""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from dear_batch.evaluate.evaluation import Evaluation
from dear_batch.evaluate.metrics import MEASURES
from dear_batch.evaluate.significance import Comparison

SIGNIFICANT = 0.05


def table(evaluations: Sequence[Evaluation]) -> Table:
    """Runs as rows, measures as columns, differences to the baseline under the means.

    Args:
        evaluations: what `evaluate` returned: same qrels, same averaging, baseline first.
    """
    # Without vertical lines, so that a terminal of 80 columns leaves some for the run.
    result = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    result.caption, result.caption_justify = _caption(evaluations), "left"
    # Run paths may hold brackets, which rich would take for markup: everything is a Text.
    result.add_column("run", overflow="fold")
    result.add_column("topics", justify="right", no_wrap=True)
    for name in MEASURES:
        result.add_column(name, justify="right", no_wrap=True)
    for evaluation in evaluations:
        cells = [_cell(evaluation, name) for name in MEASURES]
        result.add_row(Text(evaluation.run), str(len(evaluation.per_topic)), *cells)
    return result


def _cell(evaluation: Evaluation, name: str) -> Text:
    mean = f"{evaluation.measures[name]:.4f}"
    if evaluation.comparison is None:
        return Text(mean)
    comparison = evaluation.comparison[name]
    return Text(f"{mean}\n{comparison.difference:+.4f}{_marker(comparison)}")


def _marker(comparison: Comparison) -> str:
    """A star for significance, else a space, so that the figures stay aligned."""
    significant = comparison.p_value is not None and comparison.p_value < SIGNIFICANT
    return "*" if significant else " "


def _caption(evaluations: Sequence[Evaluation]) -> Text:
    first = evaluations[0]
    level = f"MAP, MRR@10 and R@100 count judgements from {first.relevance_level} as relevant"
    lines = [f"qrels: {first.qrels}; {level}", _averaging(first)]
    lines += [
        f"{evaluation.run} lacks {len(evaluation.missing_topics)} of the judged topics"
        for evaluation in evaluations
        if evaluation.missing_topics
    ]
    lines += _test_lines(evaluations)
    return Text("\n".join(lines))


def _averaging(evaluation: Evaluation) -> str:
    if evaluation.average_over == "qrels":
        topics = len(evaluation.per_topic)
        return (
            f"means over all {topics} topics of the qrels, 0 where a run lacks one (trec_eval -c)"
        )
    return "means over the topics that are in both the qrels and the run"


def _test_lines(evaluations: Sequence[Evaluation]) -> list[str]:
    """What the second figure of a cell and its star mean, and why a test is missing."""
    baselines = {evaluation.baseline for evaluation in evaluations if evaluation.baseline}
    lines = [
        f"second figure: difference to {baseline} on the topics of both; "
        f"* p < {SIGNIFICANT}, paired t-test, a test for each measure"
        for baseline in baselines
    ]
    lines += [
        f"{evaluation.run}, {name}: {comparison.note}"
        for evaluation in evaluations
        for name, comparison in (evaluation.comparison or {}).items()
        if comparison.note
    ]
    return lines
