"""Whether a published folder holds exactly what was read, read by parsers that are not ours."""

from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytrec_eval

from dear_batch.evaluate.metrics import read_run
from dear_batch.run.verify import verify
from tests.fuzz.candidates import Table

Lists = dict[str, list[tuple[str, np.float32]]]  # qid → (docid, score) in the order of the lines
UNITS = ("queries", "candidates")


def strict_run(path: Path, tag: str) -> Lists:
    """A run file by the letter of the format, each query's lines together."""
    lists: Lists = {}
    last = None
    for line in path.read_bytes().splitlines(keepends=True):
        assert line.endswith(b"\n")
        qid, q0, docid, rank, score, name = line[:-1].decode().split(" ")
        assert (q0, name) == ("Q0", tag)
        assert qid == last or qid not in lists
        last = qid
        entries = lists.setdefault(qid, [])
        assert rank == str(len(entries) + 1)
        entries.append((docid, np.float32(score)))
    for entries in lists.values():
        scores = [score for _, score in entries]
        assert np.isfinite(scores).all()
        assert all(above > below for above, below in pairwise(scores))
        assert len({docid for docid, _ in entries}) == len(entries)
    return lists


def check_by_evaluators(path: Path, lists: Lists) -> None:
    """trec_eval's code recovers our order: it alone gives the best nDCG."""
    with path.open(encoding="utf-8") as file:
        run = pytrec_eval.parse_run(file)
    assert {q: set(docs) for q, docs in run.items()} == {
        q: {d for d, _ in entries} for q, entries in lists.items()
    }
    if lists:
        assert {q: {d: float(s) for d, s in entries} for q, entries in lists.items()} == {
            q: {d: float(np.float32(s)) for d, s in docs.items()}
            for q, docs in read_run(path).items()
        }
    gains = {
        qid: {docid: len(entries) - i for i, (docid, _) in enumerate(entries)}
        for qid, entries in lists.items()
    }
    found = pytrec_eval.RelevanceEvaluator(gains, {"ndcg"}).evaluate(run)
    assert all(abs(found[qid]["ndcg"] - 1) < 1e-9 for qid in lists)


def check_folder(folder: Path, files: dict[str, Table], report: dict[str, Any], tag: str) -> None:
    """All of a published folder against what was read."""
    verdict = verify(folder)
    assert verdict.ok, verdict.faults
    lists, rows = [], []
    for name in report["outputs"]:
        lists.append(strict_run(folder / name, tag))
        check_by_evaluators(folder / name, lists[-1])
        results = "results.parquet" if name == "run.trec" else f"{name[:-5]}.results.parquet"
        rows.append(pq.read_table(folder / results).to_pylist())
        _check_order(lists[-1], rows[-1])
    for unit in UNITS:
        count = report[unit]
        assert count["read"] == count["written"] + count["quarantined"] + count["skipped"]
    quarantine = folder / "quarantine.parquet"
    refused = pq.read_table(quarantine).to_pylist() if quarantine.exists() else []
    assert Counter(row["reason"] for row in refused) == report["quarantine_reasons"]
    assert sum(row["candidates"] for row in refused) == report["candidates"]["quarantined"]
    assert sum(row["docid"] is None for row in refused) == report["queries"]["quarantined"]
    assert sum(map(len, rows)) == report["candidates"]["written"]
    assert sum(map(len, lists)) == report["queries"]["written"]
    _check_accounts(files, rows, refused, report)


def _check_order(lists: Lists, rows: list[dict[str, Any]]) -> None:
    by_query = defaultdict(list)
    for row in rows:
        by_query[row["qid"]].append(row)
    assert {q: [d for d, _ in entries] for q, entries in lists.items()} == {
        q: [row["docid"] for row in found] for q, found in by_query.items()
    }
    for found in by_query.values():
        assert [row["rank"] for row in found] == list(range(1, len(found) + 1))
        scored = [(-row["logit"], row["first_rank"]) for row in found if row["logit"] is not None]
        assert scored == sorted(scored)
        unscored = [row["first_rank"] for row in found[len(scored) :]]
        assert unscored == sorted(unscored)
        assert all(row["logit"] is None for row in found[len(scored) :])


def _check_accounts(
    files: dict[str, Table],
    rows: list[list[dict[str, Any]]],
    refused: list[dict[str, Any]],
    report: dict[str, Any],
) -> None:
    """Every candidate that was read is written or set aside at its own place, once."""
    left = defaultdict[tuple[str, int], list[tuple[str | None, str]]](list)
    total = 0
    for path, table in files.items():
        for record in table.records():
            qid = table.identifier("qid", record.qid)
            for doc in record.docs:
                docid = table.identifier("docid", (doc or (None,))[0]) or ""
                left[path, record.row].append((qid, docid))
                total += 1
    assert total == report["candidates"]["read"]
    for row in refused:
        place = row["path"], row["row"]
        if row["docid"] is not None:
            left[place].remove((row["qid"], row["docid"]))
    whole = [row for row in refused if row["docid"] is None and row["candidates"]]
    for row in whole:
        _take_list(left, row, is_flat=files[row["path"]].layout == "flat")
    remaining = Counter(pair for pairs in left.values() for pair in pairs)
    assert remaining == Counter((row["qid"], row["docid"]) for some in rows for row in some)


def _take_list(left: Any, row: dict[str, Any], *, is_flat: bool) -> None:
    """A refused list leaves with all that is left of it, in a flat job from several rows."""
    if not is_flat:
        assert len(left[row["path"], row["row"]]) == row["candidates"]
        left[row["path"], row["row"]] = []
        return
    mine = [place for place in sorted(left) if left[place] and left[place][0][0] == row["qid"]]
    start = mine.index((row["path"], row["row"]))
    for place in mine[start : start + row["candidates"]]:
        left[place] = []
