"""Random qrels and run files: figures that pytrec_eval agrees with, or a clear refusal."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytrec_eval
from hypothesis import strategies as st

from dear_batch.errors import DearBatchError, InputError
from dear_batch.evaluate.evaluation import evaluate
from dear_batch.evaluate.report import table
from dear_batch.show import show
from tests.fuzz.effort import Effort
from tests.fuzz.strategies import NASTY, Damage, damages, ids, raw

SCORES = (
    "1",
    "0.5",
    "-0",
    "1e-46",
    "16777216",
    "16777217",
    "nan",
    "inf",
    "1e39",
    "1_0",
    "x",
    "\u0661",
)
GRADES = ("0", "1", "2", "-1", "3", "2147483648", "-99", "+1", "1.0", "1_0", "\u0661", "", "x")
ENDS = ("\n", "\r\n", "\r", "\n\n", "\x0b", "\x85", "\u2028", " \n")


@dataclass(frozen=True)
class Texts:
    """A file of qrels and one or two of runs."""

    qrels: bytes
    runs: tuple[bytes, ...]
    average_over: str = "qrels"
    level: int = 1


def _lines(draw: st.DrawFn, fields: list[st.SearchStrategy[str]], gap: str) -> bytes:
    rows = draw(st.lists(st.tuples(*fields), max_size=12))
    end = draw(st.sampled_from([*["\n"] * 12, *ENDS]))
    content = raw("".join(gap.join(row) + end for row in rows))
    if draw(st.integers(0, 9)) == 9:
        damage: Damage = draw(damages("flip", "cut", "insert", "empty"))
        content = damage(content)
    return content


@st.composite
def _texts(draw: st.DrawFn) -> Texts:
    good = st.sampled_from([f"d{i}" for i in range(5)])
    docid = st.one_of(*[good] * 30, ids(), st.sampled_from(NASTY))
    qid = st.one_of(*[st.sampled_from(["q1", "q2", "3"])] * 30, ids())
    score = st.one_of(*[st.floats(-5, 5).map(str)] * 9, st.sampled_from(SCORES))
    grade = st.one_of(*[st.sampled_from(GRADES[:4])] * 9, st.sampled_from(GRADES))
    gap = draw(st.sampled_from([" ", " ", "\t", "  ", "\u00a0"]))
    if draw(st.booleans()):
        qrels = _lines(draw, [qid, st.just("0"), docid, grade], gap)
    else:
        header = draw(
            st.sampled_from(
                [b"query-id\tcorpus-id\tscore\n", b"\xef\xbb\xbfquery-id\tcorpus-id\tscore\n"]
            )
        )
        qrels = header + _lines(draw, [qid, docid, grade], "\t")
    run = [qid, st.just("Q0"), docid, st.just("1"), score, st.just("t")]
    runs = [_lines(draw, run, gap) for _ in range(draw(st.integers(1, 2)))]
    return Texts(
        qrels, tuple(runs), draw(st.sampled_from(["qrels", "run"])), draw(st.integers(1, 3))
    )


KNOWN: tuple[Texts, ...] = ()


def test_figures_are_those_of_trec_eval_or_refused(effort: Effort, tmp_path: Path) -> None:
    qrels = tmp_path / "qrels"
    paths = [tmp_path / f"run{i}" for i in range(2)]

    def check(texts: Texts) -> None:
        qrels.write_bytes(texts.qrels)
        for path, content in zip(paths, texts.runs, strict=False):
            path.write_bytes(content)
        given = paths[: len(texts.runs)]
        options: Any = {"average_over": texts.average_over, "relevance_level": texts.level}
        try:
            found = evaluate(qrels, given, baseline_path=given[0], **options)
        except InputError:
            return
        show(table(found))
        for evaluation, path in zip(found, given, strict=True):
            assert all(math.isfinite(value) for value in evaluation.measures.values())
            _check_against_trec_eval(evaluation, qrels, path, texts.level)

    effort.run(check, _texts(), known=KNOWN, few=60, share=0.06)


def _check_against_trec_eval(evaluation: Any, qrels: Path, run: Path, level: int) -> None:
    """The same files, read by pytrec_eval's own readers where they can."""
    try:
        with qrels.open(encoding="utf-8") as judged, run.open(encoding="utf-8") as ranked:
            judgements, scores = pytrec_eval.parse_qrel(judged), pytrec_eval.parse_run(ranked)
    except (ValueError, DearBatchError):  # BEIR, and white space that trec_eval does not know
        return
    names = {"ndcg_cut_10": "nDCG@10", "map": "MAP", "recall_100": "R@100"}
    evaluator = pytrec_eval.RelevanceEvaluator(judgements, {"ndcg_cut", "map", "recall"}, level)
    for qid, values in evaluator.evaluate(scores).items():
        for theirs, ours in names.items():
            assert abs(values[theirs] - evaluation.per_topic[qid][ours]) < 1e-9
