"""Which folders lie in an interval, and what each becomes."""

from pathlib import Path

import pytest

from dear_batch.errors import InputError, UsageError
from dear_batch.run.partitions import Partition, Time, partitions, spec_of
from dear_batch.specs import InputSpec, JobSpec, OutputSpec, PointwiseSpec


def touch(folder: Path, *names: str) -> list[str]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return [str(folder / name) for name in names]


def test_the_interval_is_half_open_and_sorted_by_time(tmp_path: Path) -> None:
    days = [f"dt=2026-11-{day}/{name}.parquet" for day in (24, 22, 23, 21) for name in "ba"]
    touch(tmp_path, *days)
    found = partitions([f"{tmp_path}/dt=*/*.parquet"], "2026-11-22", "2026-11-24")
    assert found == [
        Partition(
            f"dt=2026-11-{day}", tuple(f"{tmp_path}/dt=2026-11-{day}/{n}.parquet" for n in "ab")
        )
        for day in (22, 23)
    ]
    assert partitions([f"{tmp_path}/dt=*/*.parquet"], "2026-12-01", "2026-12-02") == []


def test_hours_and_deeper_folders(tmp_path: Path) -> None:
    hours = ("2026-11-23T05", "2026-11-23T04", "2026-11-22T23")
    paths = touch(tmp_path, *(f"hour={h}/region=eu/x.parquet" for h in hours))
    found = partitions(paths, "2026-11-23", "2026-11-23T05")
    assert [p.key for p in found] == ["hour=2026-11-23T04"]
    found = partitions(paths, "2026-11-22T23:00", "2026-11-24")
    assert [p.key for p in found] == [f"hour={h}" for h in sorted(hours)]
    assert found[0].paths == (paths[2],)


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("2026-11-23", "2026-11-23"),
        ("2026-11-23T05", "2026-11-23T05"),
        ("2026-11-23T05:30", "2026-11-23T0530"),
        ("2026-11-23T053045", "2026-11-23T053045"),
        ("0099-01-01", "0099-01-01"),
    ],
)
def test_times_are_written_anew(text: str, written: str) -> None:
    found = Time.parse(text)
    assert found
    assert found.text == written
    assert Time.parse(written) == found


NO_TIMES = (
    "",
    "latest",
    "2026-11-31",
    "2026-13-01",
    "0000-01-01",
    "2026-11-23T24",
    "2026-11-23T05Z",
    "2026-11-23T05+01:00",
    "2026-11-23 05",
    "20261123",
    "2026-W47-1",
    "2026-11-2",
    "2026-11-23/..",
    "٢٠٢٦-11-23",
    "2026-11-23\n",
)


@pytest.mark.parametrize("text", NO_TIMES)
def test_what_is_no_time(text: str, tmp_path: Path) -> None:
    assert Time.parse(text) is None
    with pytest.raises(UsageError, match="is no date") as caught:
        partitions(["x"], text, "2026-11-24")
    assert caught.value.where == "--since"
    with pytest.raises(UsageError, match="is no date") as caught:
        partitions(["x"], "2026-11-23", text)
    assert caught.value.where == "--until"
    with pytest.raises(UsageError, match="in no partition by time"):
        partitions([f"{tmp_path}/dt={text}/x.parquet"], "2026-11-23", "2026-11-24")


@pytest.mark.parametrize(
    ("since", "until"), [("2026-11-24", "2026-11-24"), ("2026-11-24", "2026-11-23T23")]
)
def test_an_empty_interval_is_refused(since: str, until: str) -> None:
    with pytest.raises(UsageError, match="is empty"):
        partitions(["dt=2026-11-24/x"], since, until)


@pytest.mark.parametrize(
    ("paths", "match"),
    [
        (("x.parquet",), "in no partition"),
        (("dt=2026-11-23.parquet",), "in no partition"),
        (("a=1/x.parquet",), "in no partition"),
        (("=2026-11-23/x.parquet",), "in no partition"),
        (("d t=2026-11-23/x.parquet",), "in no partition"),
        (("dt=2026-11-23/up=2026-11-24/x.parquet",), "in several partitions"),
        (("dt=2026-11-23/x", "day=2026-11-23/x"), "by several names: day, dt"),
        (("dt=2026-11-23/x", "day=2020-01-01/x"), "by several names: day, dt"),
        (("dt=2026-11-23/x", "x"), "in no partition"),
    ],
)
def test_inputs_that_are_not_partitioned_are_refused(paths: tuple[str, ...], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        partitions(paths, "2026-11-23", "2026-11-24")


def test_a_glob_that_matches_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No file matches"):
        partitions([f"{tmp_path}/dt=*/x.parquet"], "2026-11-23", "2026-11-24")


def test_each_partition_has_a_folder_of_its_own() -> None:
    spec = JobSpec(InputSpec(("a/*/b",), "1%"), PointwiseSpec("bundle", 5), OutputSpec("runs", "t"))
    found = spec_of(spec, Partition("dt=2026-11-23", ("a", "b")))
    assert found == JobSpec(
        InputSpec(("a", "b"), "1%"),
        PointwiseSpec("bundle", 5),
        OutputSpec("runs/dt=2026-11-23", "t"),
    )
