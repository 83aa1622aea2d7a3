"""One TREC run file beside its results: valid for every evaluator, and the same line by line.

Read side by side in batches, compared as columns; only the docids of the query in hand and the
qids, which DuckDB keeps on disk where they are many, outlive a batch. Knows nothing of jobs.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dear_batch.files.durable import scratch_folder
from dear_batch.files.regroup import MEMORY_LIMIT, connect, execute, load

BLOCK_BYTES = 1 << 20
SHOWN = 3  # faults of one kind that are told
_COLUMNS: dict[str, Any] = {
    "qid": pa.string(),
    "q0": pa.string(),
    "docid": pa.string(),
    "rank": pa.int32(),
    "score": pa.float32(),
    "tag": pa.string(),
}
_COMPARED = ("qid", "docid", "rank")
_QIDS = pa.schema({"qid": pa.string()})
# What would end a field for some reader: of all white space the file has its six single spaces.
_UNSAFE = r"^$|[\pZ\p{Cc}]"
Mask = NDArray[np.bool_]


class _Broken(Exception):  # noqa: N818 - told as a fault
    """The file cannot be read any further."""


@dataclass(slots=True)
class RunCheck:
    """A check of one run; `lines` and `queries` are what it has read so far."""

    run: Path
    results: Path
    tag: str
    lines: int = 0
    queries: int = 0
    _faults: list[str] = field(default_factory=list)
    _last: tuple[str, int, float] = ("", 0, 0.0)  # qid, rank, score
    _docids: set[str] = field(default_factory=set)  # of the last query so far

    def faults(self) -> list[str]:
        """What is wrong with the run, first things first."""
        place = Path(tempfile.gettempdir()) / "dear-batch-verify"
        with scratch_folder(place) as scratch, connect(scratch, MEMORY_LIMIT) as connection:
            try:
                load(connection, "query", _QIDS, self._compared())
            except _Broken as fault:
                self._faults.append(str(fault))
                return self._faults
            query = f"SELECT qid FROM query GROUP BY qid HAVING count(*) > 1 LIMIT {SHOWN}"
            for (qid,) in execute(connection, query):
                self._faults.append(f"{self.run.name}: the lines of qid {qid} are not together")
        return self._faults

    def _compared(self) -> Iterator[pa.RecordBatch]:
        """Check all; yields the qids with which runs of lines begin."""
        results = _Rows(self.results)
        for batch in self._run_batches():
            if len(self._faults) < SHOWN:
                self._compare(batch, results.take(batch.num_rows))
            yield self._check(batch)
            self.lines += batch.num_rows
        rest = results.left()
        if results.taken < self.lines or rest:
            found = results.taken + rest
            self._faults.append(f"{self.results.name}: {found:,} rows for {self.lines:,} lines")

    def _run_batches(self) -> Iterator[pa.RecordBatch]:
        if self.run.stat().st_size == 0:  # every query was set aside
            return
        try:
            with pacsv.open_csv(
                self.run,
                # Without threads its faults name the line.
                pacsv.ReadOptions(
                    column_names=list(_COLUMNS), block_size=BLOCK_BYTES, use_threads=False
                ),
                pacsv.ParseOptions(
                    delimiter=" ", quote_char=False, escape_char=False, ignore_empty_lines=False
                ),
                pacsv.ConvertOptions(column_types=_COLUMNS, null_values=[]),
            ) as reader:
                yield from (batch for batch in reader if batch.num_rows)
        except pa.ArrowException as error:
            raise _Broken(f"{self.run.name}: not a TREC run: {error}") from error

    def _compare(self, batch: pa.RecordBatch, rows: pa.Table) -> None:
        """The same as the results, so far as these go."""
        for name in _COMPARED:
            ours = cast("Any", batch.column(name).slice(0, rows.num_rows))
            theirs = rows.column(name).combine_chunks()
            same = pc.equal(ours, theirs.cast(ours.type)).to_numpy(zero_copy_only=False)
            self._tell(~np.asarray(same, bool), batch, f"its {name} is not that of the results")

    def _check(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        columns: Any = batch
        for name, wanted in (("q0", "Q0"), ("tag", self.tag)):
            differs = pc.not_equal(columns.column(name), pa.scalar(wanted))
            self._tell(_mask(differs), batch, f"its {name} is not {wanted}")
        for name in ("qid", "docid"):
            unsafe = pc.match_substring_regex(columns.column(name), _UNSAFE)
            self._tell(_mask(unsafe), batch, f"its {name} would break the line")
        qids = columns.column("qid")
        last_qid, last_rank, last_score = self._last
        before = pa.concat_arrays([pa.array([last_qid]), qids.slice(0, len(qids) - 1)])
        first_N = _mask(pc.not_equal(qids, before))
        if self.lines == 0:
            first_N[0] = True
        rank_N = columns.column("rank").to_numpy()
        score_N = columns.column("score").to_numpy()
        wanted_N = np.where(first_N, 1, np.append(last_rank, rank_N[:-1]) + 1)
        self._tell(rank_N != wanted_N, batch, "its rank does not follow")
        self._tell(~np.isfinite(score_N), batch, "its score is not finite")
        above_N = np.append(np.float32(last_score), score_N[:-1])
        falls_N = first_N | (score_N < above_N)
        self._tell(~falls_N, batch, "its score is not below that of the line above")
        starts = np.flatnonzero(first_N)
        self._check_docids(columns.column("docid").to_pylist(), starts.tolist(), batch)
        self.queries += len(starts)
        self._last = (qids[-1].as_py(), int(rank_N[-1]), float(score_N[-1]))
        return pa.record_batch([qids.take(pa.array(starts))], schema=_QIDS)

    def _check_docids(self, docids: list[str], starts: list[int], batch: pa.RecordBatch) -> None:
        """No docid twice in a query, which may have begun in an earlier batch."""
        for start, end in pairwise([*sorted({0, *starts}), len(docids)]):
            if start > 0 or starts[:1] == [0]:
                self._docids = set()
            part = docids[start:end]
            before = len(self._docids)
            self._docids.update(part)
            if len(self._docids) != before + len(part):
                repeats = np.zeros(len(docids), bool)
                repeats[start] = True
                self._tell(repeats, batch, "a docid is repeated in the query that goes on here")

    def _tell(self, wrong_N: Mask, batch: pa.RecordBatch, what: str) -> None:
        """Note the first line of a batch for which something is wrong."""
        if wrong_N.any() and len(self._faults) < SHOWN:
            at = int(np.argmax(wrong_N))
            qid, docid = batch.column("qid")[at].as_py(), batch.column("docid")[at].as_py()
            line = self.lines + at + 1
            self._faults.append(f"{self.run.name}, line {line:,}, qid {qid}, docid {docid}: {what}")


def _mask(values: Any) -> Mask:
    return np.array(values.to_numpy(zero_copy_only=False), bool)


class _Rows:
    """The compared columns of the results, taken as many at a time as are wanted."""

    def __init__(self, path: Path) -> None:
        self._batches = self._read(path)
        self._pending: pa.RecordBatch | None = None
        self.taken = 0

    @staticmethod
    def _read(path: Path) -> Iterator[pa.RecordBatch]:
        try:
            with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
                yield from file.iter_batches(batch_size=1 << 16, columns=list(_COMPARED))
        except (pa.ArrowException, OSError) as error:
            raise _Broken(f"{path.name}: it cannot be read: {error}") from error

    def take(self, n_rows: int) -> pa.Table:
        """The next rows; fewer at the end."""
        held, wanted = list[pa.RecordBatch](), n_rows
        while wanted and (batch := self._pending or next(self._batches, None)) is not None:
            held.append(batch.slice(0, wanted))
            rest = batch.slice(held[-1].num_rows)
            self._pending = rest if rest.num_rows else None
            wanted -= held[-1].num_rows
        self.taken += n_rows - wanted
        schema = pa.schema({name: _COLUMNS[name] for name in _COMPARED})
        return pa.Table.from_batches(held) if held else schema.empty_table()

    def left(self) -> int:
        """Rows that nobody took."""
        pending = self._pending.num_rows if self._pending else 0
        return pending + sum(batch.num_rows for batch in self._batches)
