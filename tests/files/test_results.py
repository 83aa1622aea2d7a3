"""What is published: runs, tables of all shards in even row groups, transcripts, quarantine."""

import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dear_batch.data import Permutation, Ranked, Ranking, Refusal, Reranked, Transcript, Window
from dear_batch.errors import InputError
from dear_batch.files import results
from dear_batch.files.parts import RERANKED_SCHEMA, part_writer
from dear_batch.files.results import (
    QUARANTINE_SCHEMA,
    REFUSAL_ROWS,
    RERANKED_RESULTS_SCHEMA,
    RESULTS_SCHEMA,
    TRANSCRIPTS_SCHEMA,
    merge_runs,
    merge_tables,
    published_names,
    transcript_writer,
    write_quarantine,
)

REFUSALS = [
    Refusal("bad_qid", "why", "in.parquet", 0, 0, None, None, 7),
    Refusal("null_text", "why", "in.parquet", 3, 2**40 - 1, "q", "d", 1),
]


def group_rows(path: Path) -> list[int]:
    metadata = pq.read_metadata(path)
    return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]


def ranking(qid: str, size: int) -> Ranking:
    return Ranking(
        qid,
        tuple(Ranked(f"d{k}", k + 1, 1 / 3 - k, 0.5, None, size - k) for k in range(size)),
    )


def parts_of(folder: Path, sizes: Iterable[int]) -> list[Path]:
    """A part for each size, with one list of so many candidates; none where it is 0."""
    paths = []
    for i, size in enumerate(sizes):
        paths.append(folder / f"{i}.parquet")
        with part_writer(paths[-1]) as write:
            if size:
                write(ranking(f"q{i}", size))
    return paths


# Names.


def test_the_files_of_the_only_run_have_bare_names() -> None:
    assert published_names("run") == {
        "run": "run.trec",
        "results": "results.parquet",
        "transcripts": "transcripts.parquet",
    }
    assert published_names("monday") == {
        "run": "monday.trec",
        "results": "monday.results.parquet",
        "transcripts": "monday.transcripts.parquet",
    }


# Runs.


def test_parts_become_one_run_and_its_results(tmp_path: Path) -> None:
    paths = parts_of(tmp_path, [2, 0, 1])
    trec, table = tmp_path / "run.trec", tmp_path / "results.parquet"
    assert sum(merge_runs(paths, trec, table, RESULTS_SCHEMA, "mine")) == 3
    assert trec.read_text() == (
        "q0 Q0 d0 1 0.333333343 mine\nq0 Q0 d1 2 -0.666666687 mine\nq2 Q0 d0 1 0.333333343 mine\n"
    )  # nine digits identify a float32
    assert pq.read_schema(table).equals(RESULTS_SCHEMA, check_metadata=True)
    assert [(r["qid"], r["docid"], r["rank"]) for r in pq.read_table(table).to_pylist()] == [
        ("q0", "d0", 1),
        ("q0", "d1", 2),
        ("q2", "d0", 1),
    ]


def test_results_have_the_columns_of_a_part_without_its_score() -> None:
    first = ["qid", "docid", "rank", "logit", "first_score", "first_rank"]
    second = ["pointwise_rank", "listwise_rank", "window_status", "choice_logprob"]
    assert RESULTS_SCHEMA.names == first
    assert RERANKED_RESULTS_SCHEMA.names == first + second
    assert RESULTS_SCHEMA.metadata == {b"schema_version": b"1"}


def test_reranked_results_keep_what_each_stage_said(tmp_path: Path) -> None:
    entry = Reranked("d", 1, 2.0, 1.0, None, 3, 2, 1, "ok", -0.5)
    with part_writer(tmp_path / "p.parquet", RERANKED_SCHEMA) as write:
        write(Ranking("q", (entry,)))
    trec, table = tmp_path / "run.trec", tmp_path / "results.parquet"
    list(merge_runs([tmp_path / "p.parquet"], trec, table, RERANKED_RESULTS_SCHEMA, "t"))
    (row,) = pq.read_table(table).to_pylist()
    expected = {"qid": "q", **asdict(entry)}
    del expected["score"]
    assert row == expected


@pytest.mark.parametrize("sizes", [[25], [3, 4, 5, 6, 7], [9, 1, 10, 5], [0, 25, 0]])
def test_row_groups_do_not_show_how_the_parts_were_cut(
    sizes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "RESULT_ROWS", 10)
    monkeypatch.setattr(results, "_FORMAT_ROWS", 4)
    trec, table = tmp_path / "run.trec", tmp_path / "results.parquet"
    assert sum(merge_runs(parts_of(tmp_path, sizes), trec, table, RESULTS_SCHEMA, "t")) == 25
    assert group_rows(table) == [10, 10, 5]
    assert len(trec.read_text().splitlines()) == 25


def test_without_parts_there_are_empty_files(tmp_path: Path) -> None:
    trec, table = tmp_path / "run.trec", tmp_path / "results.parquet"
    assert list(merge_runs([], trec, table, RESULTS_SCHEMA, "t")) == []
    assert trec.read_text() == ""
    assert pq.read_table(table).num_rows == 0
    assert pq.read_schema(table).equals(RESULTS_SCHEMA)


def test_a_damaged_part_is_one_clear_error(tmp_path: Path) -> None:
    (path,) = parts_of(tmp_path, [500])
    raw = bytearray(path.read_bytes())
    raw[200] ^= 1
    path.write_bytes(raw)
    merge = merge_runs([path], tmp_path / "r", tmp_path / "t", RESULTS_SCHEMA, "t")
    with pytest.raises(InputError):
        list(merge)


# Transcripts.


def test_a_transcript_has_every_field_of_its_window(tmp_path: Path) -> None:
    answer = Permutation(
        Window("q", 3, 5), (1, 0), "ok", (-0.5, 0.0), "[2] > [1]", "", "5" * 64, 9, 8, 7, 6, 5, 4, 3
    )
    nothing = Permutation(Window("q", 0, 1), (0,), "kept", (math.nan,))
    with transcript_writer(tmp_path / "t.parquet") as write:
        write(Transcript(0, answer, ("b", "a")))
        write(Transcript(1, nothing, ("c",)))
    table = pq.read_table(tmp_path / "t.parquet")
    assert table.schema.equals(TRANSCRIPTS_SCHEMA)
    whole, kept = table.to_pylist()
    assert whole == {
        "qid": "q", "window": 0, "start": 3, "end": 5, "status": "ok", "detail": "",
        "prompt_sha256": "5" * 64, "text": "[2] > [1]", "order": ["b", "a"],
        "logprobs": [-0.5, 0.0], "prompt_tokens": 9, "answer_tokens": 8, "forwards": 7,
        "overruled": 6, "cut_passages": 5, "shortened_passages": 4, "neutralised_texts": 3,
    }  # fmt: skip
    assert (kept["order"], kept["logprobs"], kept["status"]) == (["c"], [None], "kept")


# Quarantine.


def test_the_quarantine_has_every_field_of_a_refusal(tmp_path: Path) -> None:
    write_quarantine(tmp_path / "quarantine.parquet", REFUSALS)
    table = pq.read_table(tmp_path / "quarantine.parquet")
    assert table.schema.equals(QUARANTINE_SCHEMA, check_metadata=True)
    rows = table.to_pylist()
    assert rows == [asdict(refusal) for refusal in REFUSALS]
    assert list(rows[0]) == [
        "reason", "detail", "path", "row_group", "row", "qid", "docid", "candidates"
    ]  # fmt: skip


def test_the_quarantines_of_shards_become_one(tmp_path: Path) -> None:
    many = [Refusal("null_text", "why", "in", 0, i, "q", "d", 1) for i in range(REFUSAL_ROWS)]
    for name, refusals in (("1", REFUSALS), ("2", many), ("3", REFUSALS[:1])):
        write_quarantine(tmp_path / name, refusals)
    paths = [tmp_path / name for name in ("1", "2", "3")]
    out = tmp_path / "all"
    assert sum(merge_tables(paths, out, QUARANTINE_SCHEMA, REFUSAL_ROWS)) == REFUSAL_ROWS + 3
    assert group_rows(out) == [REFUSAL_ROWS, 3]
    expected = pa.concat_tables([pq.read_table(path) for path in paths])
    assert pq.read_table(out).equals(expected)
