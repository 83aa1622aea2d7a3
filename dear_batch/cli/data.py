"""Commands around a job's data: `convert` before it, `inspect` at any time, `evaluate` after it."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from dear_batch.errors import UsageError
from dear_batch.log import outcome

CONVERT_EXAMPLES = """
\b
Examples:
  dear-batch convert rankgpt bm25-top100.json -o candidates.parquet
  dear-batch convert tevatron bm25.jsonl -o candidates.parquet
  dear-batch convert beir scifact/ bm25.trec -o candidates.parquet
  dear-batch convert beir queries.jsonl corpus.parquet bm25.trec -o candidates.parquet
"""

EVALUATE_EXAMPLES = """
\b
Examples:
  dear-batch evaluate qrels.txt runs/tonight/run.trec
  dear-batch evaluate qrels/test.tsv a.trec b.trec --baseline bm25.trec --json scores.json
"""


@click.command(epilog=CONVERT_EXAMPLES)
@click.argument("form", metavar="FORMAT", type=click.Choice(["rankgpt", "tevatron", "beir"]))
@click.argument("inputs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="IN...")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Parquet file to write."
)
def convert(form: str, inputs: tuple[Path, ...], output: Path) -> None:
    """Turn candidate lists of another format into the Parquet that `run` reads.

    \b
    rankgpt   JSON: [{query, hits: [{content, qid, docid, rank, score}]}]
    tevatron  JSONL: query_id, query, docid, title, text (score), a line a candidate
    beir      FOLDER RUN, or QUERIES CORPUS RUN: texts joined to a TREC run file
    """  # noqa: D301 - click reads \b
    from dear_batch.files import convert as converters

    functions: dict[str, Callable[..., Any]] = {
        "rankgpt": converters.convert_rankgpt,
        "tevatron": converters.convert_tevatron,
        "beir": converters.convert_beir,
    }
    from dear_batch.show import status

    with status(f"converting {form}"):
        converted = functions[form](inputs, output)
    outcome({"status": "ok", **asdict(converted), "out": str(converted.out)})


@click.command(epilog=EVALUATE_EXAMPLES)
@click.argument("qrels", type=click.Path(path_type=Path))
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--baseline", type=click.Path(path_type=Path), help="Run to compare with.")
@click.option(
    "--average-over",
    type=click.Choice(["qrels", "run"]),
    default="qrels",
    show_default=True,
    help="Average over all topics of the qrels (trec_eval -c), or over those of the run.",
)
@click.option(
    "--relevance-level",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Least judgement that counts as relevant for MAP, MRR and recall.",
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write figures here.")
def evaluate(
    qrels: Path,
    runs: tuple[Path, ...],
    baseline: Path | None,
    json_path: Path | None,
    **options: Any,
) -> None:
    """Score run files against judgements: nDCG@1/5/10, MAP, MRR@10, R@100."""
    from dear_batch.evaluate.evaluation import evaluate as evaluate_runs
    from dear_batch.evaluate.report import table
    from dear_batch.files.durable import replacing
    from dear_batch.show import show

    evaluations = evaluate_runs(qrels, runs, baseline_path=baseline, **options)
    show(table(evaluations))
    figures = [evaluation.as_dict() for evaluation in evaluations]
    if json_path:
        with replacing(json_path) as temporary:
            temporary.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    means = {f["run"]: f["measures"] for f in figures}
    outcome({"status": "ok", "average_over": options["average_over"], "runs": means})


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
def inspect(path: Path) -> None:
    """Show what a bundle, a Parquet file or an output folder holds, on one screen.

    \b
    Examples:
      dear-batch inspect bundles/dear-3b-ce
      dear-batch inspect candidates.parquet
      dear-batch inspect runs/tonight
    """  # noqa: D301 - click reads \b
    from dear_batch.inspection import inspect_path
    from dear_batch.show import show

    if not path.exists():
        raise UsageError(
            f"{path} does not exist.", valid="a bundle, a Parquet file, an output folder"
        )
    show(inspect_path(path))
