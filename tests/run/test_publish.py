"""The end of a job: all published files or none; parts and commits are made by hand."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from dear_batch.data import Ranked, Ranking, Refusal, Reranked
from dear_batch.errors import InputError, OutputError
from dear_batch.files import durable
from dear_batch.files.parts import RERANKED_SCHEMA, part_writer
from dear_batch.files.results import transcript_writer, write_quarantine
from dear_batch.run import publish as publish_module
from dear_batch.run.folder import finished, write_json
from dear_batch.run.ledger import Commit, Ledger
from dear_batch.run.publish import Finished, publish, published

REPORT = {"status": "ok"}
MANIFEST = {"job": {}, "counts": {}}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    folder = tmp_path / "out"
    folder.mkdir()
    write_json(folder / "plan.json", {"schema_version": 2})
    return Ledger(folder)


def counts(queries: int, candidates: int) -> dict[str, Any]:
    return {"queries": {"written": queries}, "candidates": {"written": candidates}}


def first_stage(ledger: Ledger, shard: str, *qids: str, refused: int = 0) -> Commit:
    """A shard with lists of two candidates."""
    files = {"part": ledger.new_file("parts", shard)}
    with part_writer(files["part"]) as write:
        for qid in qids:
            write(Ranking(qid, tuple(Ranked(f"d{k}", k + 1, -k, -k, None, 1) for k in range(2))))
    if refused:
        files["quarantine"] = ledger.new_file("quarantine", shard)
        bad = Refusal("null_text", "why", "in", 0, 0, shard, "d", 1)
        write_quarantine(files["quarantine"], [bad] * refused)
    return ledger.commit(
        "pointwise",
        shard,
        fingerprint="",
        input_sha256="",
        files=files,
        counts=counts(len(qids), 2 * len(qids)),
    )


def second_stage(ledger: Ledger, shard: str, *qids: str) -> Commit:
    files = {
        "part": ledger.new_file("parts", shard),
        "transcripts": ledger.new_file("parts", shard, "", ".transcripts"),
    }
    with part_writer(files["part"], RERANKED_SCHEMA) as write:
        for qid in qids:
            entries = (
                Reranked(f"d{1 - k}", k + 1, -k, 0.0, None, 1, 2 - k, k + 1, "ok", 0.0)
                for k in range(2)
            )
            write(Ranking(qid, tuple(entries)))
    with transcript_writer(files["transcripts"]):
        pass
    return ledger.commit("listwise", shard, fingerprint="", input_sha256="", files=files, counts={})


def go(
    ledger: Ledger, *outputs: Finished, beat: Callable[[], None] = lambda: None, tag: str = "t"
) -> None:
    publish(ledger, outputs, tag, report=REPORT, manifest=MANIFEST, beat=beat)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


WORK = {"plan.json", "parts", "commits"}
END = {"report.json", "manifest.json", "_SUCCESS"}


# What is published.


def test_shards_become_one_run_in_their_order(ledger: Ledger) -> None:
    shards = [first_stage(ledger, "0", "q1", "q2"), first_stage(ledger, "1"),
              first_stage(ledger, "2", "q0")]  # fmt: skip
    go(ledger, Finished("run", shards, None), tag="mine")
    folder = ledger.folder
    assert names(folder) == WORK | END | {"run.trec", "results.parquet"}
    lines = (folder / "run.trec").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["q1", "q1", "q2", "q2", "q0", "q0"]
    assert lines[0] == "q1 Q0 d0 1 0 mine"
    assert pq.read_table(folder / "results.parquet").num_rows == 6


def test_the_manifest_names_every_file_and_success_names_the_manifest(ledger: Ledger) -> None:
    go(ledger, Finished("run", [first_stage(ledger, "0", "q", refused=1)], None))
    folder = ledger.folder
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {
        "report.json", "run.trec", "results.parquet", "quarantine.parquet"
    }  # fmt: skip
    for name, record in manifest["files"].items():
        raw = (folder / name).read_bytes()
        assert record == {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    assert manifest["schema_version"] == 1
    assert manifest["tool"].startswith("dear-batch ")
    assert manifest["job"] == {}
    sha256 = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    assert (folder / "_SUCCESS").read_text() == sha256 + "\n"
    assert finished(folder) == manifest
    assert json.loads((folder / "report.json").read_text()) == REPORT


def test_the_second_stage_makes_the_run_where_there_is_one(ledger: Ledger) -> None:
    shards = [first_stage(ledger, "0", "q1"), first_stage(ledger, "1", "q2", refused=2)]
    go(ledger, Finished("run", shards, [second_stage(ledger, "0", "q1", "q2")]))
    folder = ledger.folder
    assert "transcripts.parquet" in names(folder)
    results = pq.read_table(folder / "results.parquet").to_pylist()
    assert [(r["qid"], r["docid"], r["pointwise_rank"]) for r in results] == [
        ("q1", "d1", 2), ("q1", "d0", 1), ("q2", "d1", 2), ("q2", "d0", 1)
    ]  # fmt: skip
    assert pq.read_table(folder / "quarantine.parquet").num_rows == 2  # of the first stage


def test_a_run_an_input_and_one_quarantine_for_all(ledger: Ledger) -> None:
    outputs = [
        Finished("monday", [first_stage(ledger, "0", "q", refused=1)], None),
        Finished("tuesday", [first_stage(ledger, "1", "q", refused=2)], None),
    ]
    go(ledger, *outputs)
    assert published(outputs) == ["monday.trec", "tuesday.trec"]
    runs = {f"{d}.{kind}" for d in ("monday", "tuesday") for kind in ("trec", "results.parquet")}
    assert names(ledger.folder) == WORK | END | runs | {"quarantine", "quarantine.parquet"}
    rows = pq.read_table(ledger.folder / "quarantine.parquet").to_pylist()
    assert [row["qid"] for row in rows] == ["0", "1", "1"]


def test_counts_are_those_of_the_first_stage(ledger: Ledger) -> None:
    shards = [first_stage(ledger, "0", "q1"), first_stage(ledger, "1", "q2", "q3")]
    found = Finished("run", shards, [second_stage(ledger, "0", "q1", "q2", "q3")])
    assert found.counts() == {"queries": 3, "candidates": 6}


# All or none.


@pytest.fixture
def old(ledger: Ledger) -> Iterator[dict[str, bytes]]:
    """What an earlier run of other settings published, with a quarantine and another input."""
    outputs = [
        Finished("run", [first_stage(ledger, "0", "old", refused=1)], None),
        Finished("more", [first_stage(ledger, "1", "old")], None),
    ]
    go(ledger, *outputs)
    return contents(ledger.folder)


def new(ledger: Ledger) -> Finished:
    return Finished("run", [first_stage(ledger, "9", "new")], None)


@pytest.mark.parametrize("beats", range(4))
def test_a_job_that_is_stopped_publishes_nothing(
    beats: int, ledger: Ledger, old: dict[str, bytes]
) -> None:
    """The last beat comes when all is staged; until then the old run stands."""
    left = beats
    output = Finished("run", [first_stage(ledger, f"9{i}", "new") for i in range(3)], None)

    def beat() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        go(ledger, output, beat=beat)
    assert contents(ledger.folder) == old
    go(ledger, output)
    assert (ledger.folder / "run.trec").read_text().count("new") == 6


def test_nothing_has_its_name_until_all_is_staged(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[str]] = []

    def beat() -> None:
        seen.append(names(ledger.folder))

    real, flushed = durable.sync, list[str]()

    def sync(path: Path) -> None:
        flushed.append(path.name)
        assert names(ledger.folder) & {"run.trec", "results.parquet", "more.trec"} == set()
        real(path)

    outputs = [new(ledger), Finished("more", [first_stage(ledger, "8", "new")], None)]
    with monkeypatch.context() as patch:
        patch.setattr(durable, "sync", sync)
        patch.setattr(publish_module, "_retract", lambda *_: patch.undo())
        go(ledger, *outputs, beat=beat)
    assert seen
    staged = {name for name in flushed if name.endswith(".tmp")}
    assert len(staged) == 4  # each flushed before the first has its name
    assert seen[-1] == WORK | staged
    assert finished(ledger.folder)


def test_the_end_comes_in_order(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    real = Path.replace

    def replaced(path: Path, target: Path) -> Path:
        order.append(target.name)
        return real(path, target)

    output = new(ledger)
    monkeypatch.setattr(Path, "replace", replaced)
    go(ledger, output)
    assert order[-3:] == ["report.json", "manifest.json", "_SUCCESS"]
    assert set(order[:-3]) == {"run.trec", "results.parquet"}


def test_the_old_end_goes_first_and_stale_files_with_it(
    ledger: Ledger, old: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that `_SUCCESS` never stands beside files of two runs."""
    gone: list[str] = []
    real = Path.unlink

    def unlink(path: Path, **options: Any) -> None:
        gone.append(path.name)
        real(path, **options)

    output = new(ledger)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        go(ledger, output)
    ours = [name for name in gone if not name.endswith(".tmp")]
    assert (ours[0], ours[-1]) == ("_SUCCESS", "manifest.json")
    stale = {"more.trec", "more.results.parquet", "quarantine.parquet", "report.json"}
    assert set(ours[1:-1]) == stale
    assert set(contents(ledger.folder)) == old.keys() - stale | {"report.json"}
    assert "new" in (ledger.folder / "run.trec").read_text()


@pytest.mark.parametrize("at", range(5))
def test_killed_at_any_rename_there_is_no_end_or_a_whole_one(
    at: int, ledger: Ledger, old: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, left = new(ledger), at
    real = Path.replace

    def replaced(path: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replaced)
        with pytest.raises(KeyboardInterrupt):
            go(ledger, output)
    assert finished(ledger.folder) is None
    assert "_SUCCESS" not in names(ledger.folder)
    assert not [name for name in names(ledger.folder) if name.endswith(".tmp")]
    go(ledger, output)
    manifest = finished(ledger.folder)
    assert manifest
    assert set(manifest["files"]) == {"run.trec", "results.parquet", "report.json"}
    assert "more.trec" not in names(ledger.folder)
    assert old


def test_a_part_that_cannot_be_read_leaves_the_old_run(
    ledger: Ledger, old: dict[str, bytes]
) -> None:
    output = new(ledger)
    part = ledger.path_of(output.pointwise[0].files["part"])
    raw = bytearray(part.read_bytes())
    raw[60] ^= 1
    part.write_bytes(raw)
    with pytest.raises((InputError, OSError)):
        go(ledger, output)
    assert contents(ledger.folder) == old


def test_a_full_disk_leaves_the_old_run(
    ledger: Ledger, old: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = new(ledger)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(durable, "sync", full)
        with pytest.raises(OutputError, match="No space left"):
            go(ledger, output)
    assert contents(ledger.folder) == old


def test_parts_that_hold_other_than_was_counted_publish_nothing(
    ledger: Ledger, old: dict[str, bytes]
) -> None:
    shard = first_stage(ledger, "9", "new")
    other = first_stage(ledger, "8", "new", "more")
    mixed = [Finished("run", [shard], [second_stage(ledger, "9", "new", "more")])]
    assert other.counts["candidates"]["written"] == 4
    with pytest.raises(AssertionError, match="4 candidates are in the parts"):
        go(ledger, *mixed)
    assert contents(ledger.folder) == old


@pytest.mark.parametrize("name", ["../precious", "parts/kept.parquet"])
def test_an_old_manifest_cannot_name_files_elsewhere(name: str, ledger: Ledger) -> None:
    for path in (ledger.folder.parent / "precious", ledger.folder / "parts" / "kept.parquet"):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    write_json(ledger.folder / "manifest.json", {"files": {name: {}}})
    go(ledger, new(ledger))
    assert (ledger.folder / name).exists()
