from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq

from dear_batch.data import Refusal
from dear_batch.files.results import quarantine_writer

REFUSALS = [
    Refusal("bad_qid", "why", "in.parquet", 0, 0, None, None, 7),
    Refusal("null_text", "why", "in.parquet", 3, 2**40 - 1, "q", "d", 1),
]


def test_the_quarantine_has_every_field_of_a_refusal(tmp_path: Path) -> None:
    with quarantine_writer(tmp_path) as refuse:
        for refusal in REFUSALS:
            refuse(refusal)
    rows = pq.read_table(tmp_path / "quarantine.parquet").to_pylist()
    assert rows == [asdict(refusal) for refusal in REFUSALS]
    assert list(rows[0]) == [
        "reason", "detail", "path", "row_group", "row", "qid", "docid", "candidates"
    ]  # fmt: skip


def test_without_refusals_there_is_no_quarantine(tmp_path: Path) -> None:
    with quarantine_writer(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
