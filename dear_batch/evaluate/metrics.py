"""Judgements and run files, and the measures of every topic.

Reads TREC and BEIR files and asks trec_eval's own code (through ir_measures) for the
measures. Knows nothing of averages over topics, of baselines or of output.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import ir_measures
from ir_measures import AP, RR, R, nDCG

from dear_batch.errors import InputError

ValueT = TypeVar("ValueT", int, float)

Qrels = dict[str, dict[str, int]]
Run = dict[str, dict[str, float]]

MEASURES = ("nDCG@1", "nDCG@5", "nDCG@10", "MAP", "MRR@10", "R@100")

_BEIR_HEADER = ["query-id", "corpus-id", "score"]
_MRR_CUTOFF = 10
_FLOAT32_MAX = 3.4028234663852886e38  # IEEE 754 binary32: (2 - 2^-23) * 2^127
_VALID_QRELS = (
    "lines of four columns: qid, ignored, docid, whole number (TREC); or the header line "
    "query-id, corpus-id, score and lines of these three, separated by tabs (BEIR)"
)
_VALID_RUN = "lines of six columns: qid, Q0, docid, rank, score, tag"


def read_qrels(path: Path) -> Qrels:
    """Judgements of a TREC qrels file or a BEIR TSV with its header; negative ones are kept.

    Raises:
        InputError: the file cannot be read, holds no judgement, a line is malformed, or a
            document is judged twice for one query, which trec_eval refuses too.
    """
    qrels: Qrels = {}
    beir = False
    for number, line in _lines(path):
        columns = line.split("\t") if beir else line.split()
        if columns == _BEIR_HEADER and not qrels:
            beir = True
            continue
        qid, docid, level = _judgement(columns, beir=beir, path=path, number=number)
        _add(qrels, qid, docid, level, path=path, number=number)
    if not qrels:
        raise InputError("There is no judgement.", where=str(path), valid=_VALID_QRELS)
    return qrels


def read_run(path: Path) -> Run:
    """Scores of a TREC run file; the rank column is ignored, as trec_eval does.

    Raises:
        InputError: the file cannot be read or is empty, a line is malformed, a document
            occurs twice in a query, or a score is not finite in trec_eval's float32.
    """
    run: Run = {}
    for number, line in _lines(path):
        columns = line.split()
        if len(columns) != len(("qid", "Q0", "docid", "rank", "score", "tag")):
            raise _malformed(f"{len(columns)} columns", path, number, _VALID_RUN)
        qid, _, docid, _, score, _ = columns
        _add(run, qid, docid, _score(score, path, number), path=path, number=number)
    if not run:
        raise InputError("The run is empty.", where=str(path), valid=_VALID_RUN)
    return run


def topic_values(
    qrels: Qrels, run: Run, *, relevance_level: int = 1
) -> dict[str, dict[str, float]]:
    """The `MEASURES` of every topic of the qrels, in their order; 0 where the run lacks it.

    Documents are ordered as trec_eval does: by score as float32, ties by docid descending.

    Args:
        qrels: topic → document → judgement.
        run: topic → document → score.
        relevance_level: the least judgement that counts as relevant in MAP, MRR@10 and R@100
            (1; TREC Deep Learning uses 2). nDCG takes the judgement itself as the gain.
    """
    measures = _measures(relevance_level)
    values = {qid: dict.fromkeys(MEASURES, 0.0) for qid in qrels}
    provider = ir_measures.pytrec_eval
    for metric in provider.iter_calc(list(measures), qrels, run):
        name = measures[metric.measure]
        # ir_measures leaves RR@10 to MS MARCO's script, which breaks ties by docid ascending.
        beyond = name == "MRR@10" and metric.value < 1 / _MRR_CUTOFF
        values[metric.query_id][name] = 0.0 if beyond else metric.value
    return values


def _measures(relevance_level: int) -> Mapping[Any, str]:
    objects = (
        nDCG @ 1,
        nDCG @ 5,
        nDCG @ 10,
        AP(rel=relevance_level),
        RR(rel=relevance_level),
        R(rel=relevance_level) @ 100,
    )
    return dict(zip(objects, MEASURES, strict=True))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, without their end, numbered from 1."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line.rstrip("\n")
    except OSError as error:
        raise InputError(f"Cannot read the file: {error.strerror}.", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise InputError("The file is not UTF-8 text.", where=str(path)) from error


_NO_GRADE = 2**31  # trec_eval keeps grades in 32 bits


def _judgement(columns: list[str], *, beir: bool, path: Path, number: int) -> tuple[str, str, int]:
    if len(columns) != len(_BEIR_HEADER if beir else ("qid", "0", "docid", "judgement")):
        raise _malformed(f"{len(columns)} columns", path, number, _VALID_QRELS)
    try:
        grade = int(columns[-1])
    except ValueError:
        grade = _NO_GRADE
    if abs(grade) >= _NO_GRADE:
        fault = f"{columns[-1][:20]!r} is no whole number of 32 bits"
        raise _malformed(fault, path, number, _VALID_QRELS)
    return columns[0], columns[-2], grade


def _score(text: str, path: Path, number: int) -> float:
    try:
        score = float(text)
    except ValueError:
        raise _malformed(f"{text!r} is no number", path, number, _VALID_RUN) from None
    if not abs(score) <= _FLOAT32_MAX:  # NaN compares false
        raise InputError(
            f"The score {text} is not finite as float32.",
            where=f"{path}, line {number}",
            valid="finite scores: evaluators order the others in ways of their own",
        )
    return score


def _add(
    table: dict[str, dict[str, ValueT]],
    qid: str,
    docid: str,
    value: ValueT,
    *,
    path: Path,
    number: int,
) -> None:
    documents = table.setdefault(qid, {})
    if docid in documents:
        raise InputError(
            f"The document {docid!r} occurs twice in query {qid!r}.",
            where=f"{path}, line {number}",
            valid="each document once a query",
        )
    documents[docid] = value


def _malformed(fault: str, path: Path, number: int, valid: str) -> InputError:
    return InputError(f"Malformed line: {fault}.", where=f"{path}, line {number}", valid=valid)
