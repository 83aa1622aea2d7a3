"""The evaluation of run files: values per topic, means, and a comparison with a baseline.

Says which topics it averages over and which are missing. Knows nothing of tables or the
command line.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

from dear_batch.errors import InputError
from dear_batch.evaluate.metrics import MEASURES, Qrels, read_qrels, read_run, topic_values
from dear_batch.evaluate.significance import Comparison, compare

AverageOver = Literal["qrels", "run"]
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One run against one set of judgements.

    `measures` are means over the topics of `per_topic` (topic → measure → value): with
    `average_over` "qrels" every topic of the qrels, those the run lacks at 0 (trec_eval -c);
    with "run" the topics of both. `missing_topics` are judged but not in the run,
    `unjudged_topics` are in the run but not judged, and count nowhere. `comparison`
    (measure → difference to the run `baseline`) is None without a baseline.
    """

    run: str
    qrels: str
    average_over: AverageOver
    relevance_level: int
    measures: Mapping[str, float]
    per_topic: Mapping[str, Mapping[str, float]]
    missing_topics: tuple[str, ...]
    unjudged_topics: tuple[str, ...]
    baseline: str | None = None
    comparison: Mapping[str, Comparison] | None = None

    def as_dict(self) -> dict[str, object]:
        """Everything as JSON knows it, with a `schema_version` and the number of topics."""
        head = {"schema_version": SCHEMA_VERSION, "topics": len(self.per_topic)}
        return {**head, **dataclasses.asdict(self)}


def evaluate(
    qrels_path: Path,
    run_paths: Sequence[Path],
    *,
    baseline_path: Path | None = None,
    average_over: AverageOver = "qrels",
    relevance_level: int = 1,
) -> list[Evaluation]:
    """Evaluate runs; with a baseline it comes first, and the others are compared with it.

    Args:
        qrels_path: TREC qrels or BEIR TSV.
        run_paths: TREC run files; the baseline may be among them.
        baseline_path: the run to compare with.
        average_over: see `Evaluation`.
        relevance_level: the least judgement that MAP, MRR@10 and R@100 count as relevant.

    Raises:
        InputError: a file is malformed, or a run and the qrels share no topic.
    """
    qrels = read_qrels(qrels_path)

    def alone(path: Path) -> Evaluation:
        return _evaluate_run(
            path, qrels, qrels_path, average_over=average_over, relevance_level=relevance_level
        )

    if baseline_path is None:
        return [alone(path) for path in run_paths]
    baseline = alone(baseline_path)
    others = [alone(path) for path in run_paths if path != baseline_path]
    return [baseline, *(_compared(other, baseline) for other in others)]


def _evaluate_run(
    path: Path,
    qrels: Qrels,
    qrels_path: Path,
    *,
    average_over: AverageOver,
    relevance_level: int,
) -> Evaluation:
    run = read_run(path)
    if qrels.keys().isdisjoint(run):
        raise InputError(
            "The run and the qrels share no topic.",
            where=f"{path} and {qrels_path}",
            valid=f"topics such as {next(iter(qrels))!r}; the run has {next(iter(run))!r}",
        )
    values = topic_values(qrels, run, relevance_level=relevance_level)
    per_topic = {qid: values[qid] for qid in qrels if average_over == "qrels" or qid in run}
    return Evaluation(
        run=str(path),
        qrels=str(qrels_path),
        average_over=average_over,
        relevance_level=relevance_level,
        measures={name: fmean(topic[name] for topic in per_topic.values()) for name in MEASURES},
        per_topic=per_topic,
        missing_topics=tuple(qid for qid in qrels if qid not in run),
        unjudged_topics=tuple(qid for qid in run if qid not in qrels),
    )


def _compared(evaluation: Evaluation, baseline: Evaluation) -> Evaluation:
    """The evaluation with its differences to the baseline, over the topics of both."""
    shared = [qid for qid in evaluation.per_topic if qid in baseline.per_topic]
    if not shared:
        raise InputError(
            "The run and the baseline share no judged topic.",
            where=f"{evaluation.run} and {baseline.run}",
        )

    def column(source: Evaluation, name: str) -> list[float]:
        return [source.per_topic[qid][name] for qid in shared]

    comparison = {
        name: compare(column(evaluation, name), column(baseline, name)) for name in MEASURES
    }
    return dataclasses.replace(evaluation, baseline=baseline.run, comparison=comparison)
