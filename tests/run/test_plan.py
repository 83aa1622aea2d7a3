"""What is read and where it is cut; no model loads."""

import itertools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dear_batch.data import Shard
from dear_batch.errors import InputError, UsageError
from dear_batch.files.parquet import RowReader, open_input
from dear_batch.run.plan import (
    LEAST_SHARD_BYTES,
    SHARD_BYTES,
    SHARDS,
    cut,
    expand,
    plan_job,
    shard_bytes,
)
from dear_batch.run.plan_json import outputs_from_json, outputs_to_json
from dear_batch.specs import InputSpec, JobSpec, OutputSpec, PointwiseSpec

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=40)


def flat(
    path: Path,
    qids: list[str | None],
    *,
    rows_a_group: int | None = None,
    with_score: bool = True,
) -> str:
    """A flat file with a row for each qid; docids number the rows."""
    columns: dict[str, Any] = {
        "qid": pa.array(qids, pa.string()),
        "query": [f"query {qid}" for qid in qids],
        "docid": [f"d{i}" for i in range(len(qids))],
        "text": ["some text"] * len(qids),
    }
    if with_score:
        columns["score"] = [float(-i) for i in range(len(qids))]
    pq.write_table(pa.table(columns), path, row_group_size=rows_a_group)
    return str(path)


def nested(
    path: Path, qids: list[str], *, rows_a_group: int | None = None, with_score: bool = True
) -> str:
    """A nested file of lists of one candidate."""
    candidate = {"docid": "d", "text": "some text"} | ({"score": 1.0} if with_score else {})
    columns = {"qid": qids, "query": ["query"] * len(qids), "candidates": [[candidate]] * len(qids)}
    pq.write_table(pa.table(columns), path, row_group_size=rows_a_group)
    return str(path)


def job(
    *paths: str, folder: str = "out", interpolate: float = 1.0, run_per_input: bool = False
) -> JobSpec:
    return JobSpec(
        InputSpec(paths),
        PointwiseSpec("bundle", interpolate=interpolate),
        OutputSpec(folder, run_per_input=run_per_input),
    )


# Paths and globs.


def test_a_glob_gives_its_files_sorted_and_each_once(tmp_path: Path) -> None:
    for name in ("b.parquet", "a.parquet", "c.txt"):
        (tmp_path / name).touch()
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "d.parquet").touch()
    a, b, d = (str(tmp_path / name) for name in ("a.parquet", "b.parquet", "deep/d.parquet"))
    assert expand([str(tmp_path / "*.parquet")]) == [a, b]
    assert expand([b, str(tmp_path / "*.parquet")]) == [b, a]
    assert sorted(expand([str(tmp_path / "**" / "*.parquet")])) == [a, b, d]


def test_a_file_whose_name_looks_like_a_glob_is_itself(tmp_path: Path) -> None:
    (tmp_path / "a[1].parquet").touch()
    (tmp_path / "a1.parquet").touch()
    assert expand([str(tmp_path / "a[1].parquet")]) == [str(tmp_path / "a[1].parquet")]


def test_a_glob_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    pattern = str(tmp_path / "*.parquet")
    with pytest.raises(InputError, match=r"No file matches .*\*\.parquet") as caught:
        expand([pattern])
    assert caught.value.where
    assert expand([pattern, str(tmp_path / "gone.parquet")], may_be_gone=True) == []


# Shards.


def shards_of(path: str, size: int) -> list[Shard]:
    return list(cut(open_input(path), 0, size))


def check_shards(path: str, starts: list[int], n_rows: int, size: int) -> None:
    """Shards follow each other over the whole file, and every one begins at a query."""
    shards = shards_of(path, size)
    assert [s.first_row for s in shards] == [
        0,
        *itertools.accumulate(s.n_rows for s in shards[:-1]),
    ]
    assert sum(s.n_rows for s in shards) == n_rows
    for shard in shards:
        inside = [s for s in starts if shard.first_row <= s < shard.first_row + shard.n_rows]
        assert inside[0] == shard.first_row
        assert shard.n_queries == len(inside)
    assert [s.key for s in shards] == [f"00000-{s.first_row:012d}" for s in shards]
    target = max(1, size // open_input(path).row_bytes)
    assert all(s.n_rows >= target for s in shards[:-1])
    # A shard goes over the target by less than its last query.
    longest = max(b - a for a, b in itertools.pairwise([*starts, n_rows]))
    assert all(s.n_rows < target + longest for s in shards)


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(1, 400), st.integers(1, 50))
def test_flat_shards_are_cut_at_query_boundaries(
    sizes: list[int], size: int, rows_a_group: int
) -> None:
    qids: list[str | None] = [f"q{i}" for i, n in enumerate(sizes) for _ in range(n)]
    with tempfile.TemporaryDirectory() as folder:
        path = flat(Path(folder) / "in.parquet", qids, rows_a_group=rows_a_group)
        starts = [0, *itertools.accumulate(sizes[:-1])]
        check_shards(path, starts, len(qids), size)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60), st.integers(1, 1000), st.integers(1, 50))
def test_nested_shards_hold_whole_rows(rows: int, size: int, rows_a_group: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        qids = [f"q{i}" for i in range(rows)]
        path = nested(Path(folder) / "in.parquet", qids, rows_a_group=rows_a_group)
        check_shards(path, list(range(rows)), rows, size)


def test_a_small_file_is_one_shard(tmp_path: Path) -> None:
    (shard,) = cut(open_input(flat(tmp_path / "in.parquet", ["a", "a", "b"])), 7, SHARD_BYTES)
    assert (shard.first_row, shard.n_rows, shard.n_queries) == (0, 3, 2)
    assert shard.key == "00007-000000000000"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (1, LEAST_SHARD_BYTES),
        (SHARDS * LEAST_SHARD_BYTES // 1000, LEAST_SHARD_BYTES),
        (SHARDS * 1_000_000 // 1000, 1_000_000),
        (SHARDS * SHARD_BYTES, SHARD_BYTES),
    ],
)
def test_small_jobs_get_small_shards_and_large_ones_not_too_many(
    rows: int, expected: int, tmp_path: Path
) -> None:
    file = open_input(nested(tmp_path / "in.parquet", ["a"]))
    assert shard_bytes([replace(file, n_rows=rows // 2, row_bytes=1000)] * 2) == pytest.approx(
        expected, abs=1000
    )


def test_shard_keys_are_unique_in_a_job(tmp_path: Path) -> None:
    """Two inputs of one name in two folders; parts and commits are named after the key."""
    for day in ("monday", "tuesday"):
        (tmp_path / day).mkdir()
    paths = [nested(tmp_path / day / "in.parquet", [day]) for day in ("monday", "tuesday")]
    planned = plan_job(job(*paths), tmp_path)
    assert [shard.key for _, shard in planned.shards] == [
        "00000-000000000000",
        "00001-000000000000",
    ]
    apart = plan_job(
        job(*paths[:1], nested(tmp_path / "b.parquet", ["b"]), run_per_input=True), tmp_path
    )
    assert [shard.key for _, shard in apart.shards] == [shard.key for _, shard in planned.shards]


# Sources: streamed, or regrouped first.


def lists_of(path: str) -> dict[str | None, list[str]]:
    file = open_input(path)
    with RowReader(file) as reader:
        return {i.qid: [c.docid for c in i.candidates] for i in reader.read(0, file.n_rows)}


def test_contiguous_flat_files_are_streamed_as_they_are(tmp_path: Path) -> None:
    first = flat(tmp_path / "1.parquet", ["a", "a", "b"], rows_a_group=1)
    second = flat(tmp_path / "2.parquet", ["c", None, "d", None, "d2"])
    (output,) = plan_job(job(first, second), tmp_path).outputs
    assert [source.file.path for source in output.sources] == [first, second]
    assert [source.inputs for source in output.sources] == [(0,), (1,)]
    assert not any(source.regrouped for source in output.sources)
    assert output.n_queries == 2 + 5  # rows without a qid are runs as well


def test_scattered_flat_rows_are_regrouped(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    path = flat(tmp_path / "in.parquet", ["a", "b", "a", "c", "b"])
    (output,) = plan_job(job(path), scratch).outputs
    (source,) = output.sources
    assert source.regrouped
    assert source.inputs == (0,)
    assert Path(source.file.path).parent == scratch
    assert lists_of(source.file.path) == {"a": ["d0", "d2"], "b": ["d1", "d4"], "c": ["d3"]}
    assert output.n_queries == 3


def test_a_query_that_goes_on_in_the_next_file_is_regrouped(tmp_path: Path) -> None:
    paths = [flat(tmp_path / "1.parquet", ["a", "b"]), flat(tmp_path / "2.parquet", ["b", "c"])]
    (output,) = plan_job(job(*paths), tmp_path).outputs
    assert [source.regrouped for source in output.sources] == [True]
    assert output.sources[0].inputs == (0, 1)
    assert lists_of(output.sources[0].file.path) == {"a": ["d0"], "b": ["d1", "d0"], "c": ["d1"]}


def test_of_a_qid_in_several_nested_rows_the_first_is_kept(tmp_path: Path) -> None:
    first = nested(tmp_path / "1.parquet", ["a", "b", "a"])
    second = nested(tmp_path / "2.parquet", ["c", "b", "d", "d"])
    (output,) = plan_job(job(first, second), tmp_path).outputs
    assert [source.kept_rows for source in output.sources] == [
        {"a": 0, "b": 1, "d": None},
        {"a": None, "b": None, "d": 2},
    ]


def test_planning_leaves_nothing_but_regrouped_files(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    path = nested(tmp_path / "in.parquet", ["a"])
    plan_job(job(path), scratch)
    assert list(scratch.iterdir()) == []
    assert {p.name for p in tmp_path.iterdir()} == {"in.parquet", "scratch"}


def test_rows_of_a_regrouped_file_are_found_in_the_users_files(tmp_path: Path) -> None:
    paths = [
        flat(tmp_path / "1.parquet", ["a", "b"], rows_a_group=1),
        flat(tmp_path / "2.parquet", ["b", "a", "c"], rows_a_group=2),
    ]
    planned = plan_job(job(*paths), tmp_path)
    (source,) = planned.outputs[0].sources
    places = planned.places(source)
    with RowReader(source.file) as reader:
        found = [
            (item.qid, *places.position(item.place(rank)))
            for item in reader.read(0, source.file.n_rows)
            for rank in range(1, len(item.candidates) + 1)
        ]
    assert found == [
        ("a", paths[0], 0, 0),
        ("a", paths[1], 0, 1),
        ("b", paths[0], 1, 1),
        ("b", paths[1], 0, 0),
        ("c", paths[1], 1, 2),
    ]


def test_planning_can_be_left_at_any_time(tmp_path: Path) -> None:
    """The beat that a caller gives comes often, and what it raises ends the plan."""
    path = flat(tmp_path / "in.parquet", ["a", "b", "a"])
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    beats: list[int] = []
    plan_job(job(path), scratch, beat=lambda: beats.append(1))
    assert beats

    def stop() -> None:
        raise InterruptedError

    (scratch / "00000.parquet").unlink()
    with pytest.raises(InterruptedError):
        plan_job(job(path), scratch, beat=stop)
    assert list(scratch.iterdir()) == []


# A plan that was written down.


@pytest.mark.parametrize("layout", ["nested", "contiguous", "scattered"])
@pytest.mark.parametrize("run_per_input", [False, True])
def test_a_plan_comes_back_from_json(layout: str, run_per_input: bool, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    match layout:
        case "nested":
            paths = [
                nested(tmp_path / "1.parquet", ["a", "b", "a"]),
                nested(tmp_path / "2.parquet", ["c", "b"]),
            ]
        case "contiguous":
            paths = [
                flat(tmp_path / "1.parquet", ["a", "a"]),
                flat(tmp_path / "2.parquet", ["b"]),
            ]
        case _:
            paths = [
                flat(tmp_path / "1.parquet", ["a", "b", "a"]),
                flat(tmp_path / "2.parquet", ["b", "c"]),
            ]
    planned = plan_job(job(*paths, run_per_input=run_per_input), scratch)
    written = json.loads(json.dumps(outputs_to_json(planned)))
    asked: list[tuple[int, tuple[str, ...]]] = []

    def regrouped(number: int, files: Sequence[str]) -> Path:
        asked.append((number, tuple(files)))
        return scratch / f"{number:05d}.parquet"

    assert outputs_from_json(written, planned.inputs, regrouped) == planned
    scattered = layout == "scattered"
    assert asked == (
        [] if not scattered else [(0, (paths[0],))] if run_per_input else [(0, tuple(paths))]
    )


# One run, or one an input.


def test_one_run_for_all_inputs(tmp_path: Path) -> None:
    paths = [nested(tmp_path / "1.parquet", ["a"]), nested(tmp_path / "2.parquet", ["b"])]
    (output,) = plan_job(job(*paths), tmp_path).outputs
    assert (output.stem, output.n_queries, len(output.sources)) == ("run", 2, 2)


def test_one_run_an_input_knows_no_repeats_of_other_inputs(tmp_path: Path) -> None:
    paths = [nested(tmp_path / "1.parquet", ["a", "b"]), nested(tmp_path / "2.parquet", ["a"])]
    outputs = plan_job(job(*paths, run_per_input=True), tmp_path).outputs
    assert [output.stem for output in outputs] == ["1", "2"]
    assert [output.n_queries for output in outputs] == [2, 1]
    assert [source.kept_rows for output in outputs for source in output.sources] == [{}, {}]


def test_one_run_an_input_needs_different_names(tmp_path: Path) -> None:
    for day in ("monday", "tuesday"):
        (tmp_path / day).mkdir()
    paths = [nested(tmp_path / day / "in.parquet", [day]) for day in ("monday", "tuesday")]
    with pytest.raises(UsageError, match="same file name") as caught:
        plan_job(job(*paths, run_per_input=True), tmp_path)
    assert caught.value.where == "in"
    assert len(plan_job(job(*paths), tmp_path).outputs) == 1


# Inputs that do not go together.


def test_mixed_layouts_are_refused(tmp_path: Path) -> None:
    paths = [nested(tmp_path / "n.parquet", ["a"]), flat(tmp_path / "f.parquet", ["b"])]
    with pytest.raises(InputError, match="layout") as caught:
        plan_job(job(*paths), tmp_path)
    assert paths[0] in caught.value.where
    assert paths[1] in caught.value.where


@pytest.mark.parametrize("write", [flat, nested])
def test_interpolation_needs_a_score_column(write: Any, tmp_path: Path) -> None:
    good = write(tmp_path / "good.parquet", ["a"])
    bad = write(tmp_path / "bad.parquet", ["b"], with_score=False)
    with pytest.raises(InputError, match="Interpolation") as caught:
        plan_job(job(good, bad, interpolate=0.5), tmp_path)
    assert "bad.parquet" in caught.value.where
    assert "good.parquet" not in caught.value.where
    assert plan_job(job(good, bad), tmp_path).outputs


def test_every_input_is_opened_before_anything_is_scored(tmp_path: Path) -> None:
    good = nested(tmp_path / "a.parquet", ["a"])
    bad = tmp_path / "b.parquet"
    bad.write_bytes(Path(good).read_bytes()[:-20])
    with pytest.raises(InputError, match="is cut"):
        plan_job(job(good, str(bad)), tmp_path)
