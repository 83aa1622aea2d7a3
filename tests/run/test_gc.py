"""What `gc` removes, and all that it must not."""

import fcntl
import itertools
import os
import time
from pathlib import Path

import pytest

from dear_batch.errors import UsageError
from dear_batch.run import ledger
from dear_batch.run.gc import Collected, age_s, collect
from dear_batch.run.verify import verify
from tests.run.folders import FINGERPRINT, KEYS, Folder, dump

DAY = 24 * 3600
OTHER = "f" * 32
ORPHANS = (
    f"parts/{KEYS[0]}-{FINGERPRINT[:12]}-{OTHER}.parquet",
    f"parts/{KEYS[0]}-{FINGERPRINT[:12]}-{OTHER}.transcripts.parquet",
    f"parts/00000-{FINGERPRINT[:12]}-{OTHER}.regrouped.parquet",
    f"quarantine/{KEYS[1]}-{OTHER}.parquet",
    f".run.trec.{OTHER}.tmp",
    f"parts/.{KEYS[0]}.parquet.{OTHER}.tmp",
    f"commits/pointwise/.{KEYS[0]}.json.{OTHER}.tmp",
    ".plan.ab3_x9yz.tmp/keys.duckdb",
)
FOREIGN = (
    "thesis.tex",
    "notes.parquet",
    ".hidden.tmp",
    "parts/mine.parquet",
    "parts/deeper/x.parquet",
    "quarantine/readme.txt",
    "commits/pointwise/notes.json",
    "other/y",
)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "out").write()


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def tree(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}


def age(folder: Path, days: int) -> None:
    then = time.time() - days * DAY
    os.utime(folder / "_SUCCESS", (then, then))


def only(*folders: Path, older_than_s: int | None = None, dry_run: bool = False) -> Collected:
    (found,) = collect(folders, older_than_s=older_than_s, dry_run=dry_run)
    return found


def test_orphans_go_and_nothing_else(folder: Folder) -> None:
    put(folder.path, *FOREIGN)
    before = tree(folder.path)
    put(folder.path, *ORPHANS)
    size = sum(len(name) for name in ORPHANS)
    dry = only(folder.path, dry_run=True)
    assert (dry.action, dry.files, dry.bytes) == ("orphans", len(ORPHANS), size)
    assert tree(folder.path) == before | set(ORPHANS)
    found = only(folder.path)
    assert found == dry
    assert tree(folder.path) == before
    assert not (folder.path / ".plan.ab3_x9yz.tmp").exists()
    (folder.path / "commits" / "pointwise" / "notes.json").unlink()  # verify takes it for a commit
    assert verify(folder.path).ok
    assert only(folder.path).files == 0


def test_of_an_unfinished_job_what_is_committed_stays(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "out")
    folder.path.mkdir()
    folder.plan()
    folder.commit(0)
    before = tree(folder.path)
    put(folder.path, *ORPHANS)
    found = only(folder.path, older_than_s=0)
    assert (found.action, found.files) == ("orphans", len(ORPHANS))
    assert tree(folder.path) == before | {"LOCK"}


def test_links_are_not_followed(folder: Folder, tmp_path: Path) -> None:
    put(tmp_path, "elsewhere/precious.parquet")
    link = folder.path / "parts" / f"{KEYS[0]}-{FINGERPRINT[:12]}-{OTHER}.parquet"
    link.symlink_to(tmp_path / "elsewhere" / "precious.parquet")
    (folder.path / f".plan.{OTHER}.tmp").symlink_to(tmp_path / "elsewhere")
    (folder.path / "quarantine").symlink_to(tmp_path / "elsewhere")
    inside = folder.path / ".run.abcd_123.tmp"
    inside.mkdir()
    (inside / "link").symlink_to(tmp_path / "elsewhere")
    age(folder.path, 40)
    for older_than_s in (None, 30 * DAY):
        only(folder.path, older_than_s=older_than_s)
        assert (tmp_path / "elsewhere" / "precious.parquet").exists()
    assert link.is_symlink()
    assert not inside.exists()


def test_a_linked_folder_is_left_alone(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "dt=2026-11-23").symlink_to(folder.path)
    assert list(collect([tmp_path / "runs"], older_than_s=0)) == []
    with pytest.raises(UsageError, match="is not a folder"):
        list(collect([tmp_path / "runs" / "dt=2026-11-23"]))
    with pytest.raises(UsageError, match="is not a folder"):
        list(collect([tmp_path / "gone"]))
    assert verify(folder.path).ok


def test_old_outputs_go_whole(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for day, days in (("21", 41), ("22", 40), ("23", 29)):
        folder = Folder(runs / f"dt=2026-11-{day}").write()
        put(folder.path, *ORPHANS)
        age(folder.path, days)
    put(runs, "other/thesis.tex", "notes.txt")
    dry = list(collect([runs], older_than_s=30 * DAY, dry_run=True))
    size = {
        day: sum(p.lstat().st_size for p in (runs / f"dt=2026-11-{day}").rglob("*") if p.is_file())
        for day in (21, 22)
    }
    found = list(collect([runs], older_than_s=30 * DAY))
    assert found == dry
    assert [item.action for item in found] == ["removed", "removed", "orphans"]
    assert {p.name for p in runs.iterdir()} == {"dt=2026-11-23", "other", "notes.txt"}
    assert verify(runs / "dt=2026-11-23").ok
    lock = len(Folder(tmp_path).lock().read_bytes())
    assert [item.bytes for item in found[:2]] == [size[21] - lock, size[22] - lock]
    assert not any(item.foreign for item in found)


def test_foreign_files_stay_and_are_told(folder: Folder) -> None:
    put(folder.path, *FOREIGN)
    age(folder.path, 2)
    dry = only(folder.path, older_than_s=DAY, dry_run=True)
    assert dry.foreign == sorted(FOREIGN)
    found = only(folder.path, older_than_s=DAY)
    assert (found.action, found.foreign) == ("removed", sorted(FOREIGN))
    assert tree(folder.path) == {*FOREIGN, "LOCK"}


def test_a_seal_that_does_not_fit_is_no_finished_output(folder: Folder) -> None:
    (folder.path / "_SUCCESS").write_text("0" * 64 + "\n")
    age(folder.path, 99)
    before = tree(folder.path)
    assert only(folder.path, older_than_s=DAY).action == "orphans"
    assert tree(folder.path) == before


def test_a_published_file_that_is_gone_already_is_no_fault(folder: Folder) -> None:
    (folder.path / "run.trec").unlink()
    age(folder.path, 2)
    assert only(folder.path, older_than_s=DAY).action == "removed"
    assert not folder.path.exists()


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_folder_at_work_is_left_alone(dry_run: bool, folder: Folder) -> None:
    put(folder.path, *ORPHANS)
    age(folder.path, 99)
    before = tree(folder.path)
    with (folder.path / "LOCK").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = only(folder.path, older_than_s=DAY, dry_run=dry_run)
    assert (found.action, found.files) == ("held", 0)
    assert "elsewhere" in found.why
    assert tree(folder.path) == before


def test_the_end_goes_first(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at any moment, what is left of a folder does not look finished."""
    age(folder.path, 2)
    seen = []

    def discard(path: Path) -> None:
        seen.append(path.name)
        assert not (folder.path / "_SUCCESS").exists()
        path.unlink()

    monkeypatch.setattr("dear_batch.run.gc.discard", discard)
    only(folder.path, older_than_s=DAY)
    assert seen[0] == "manifest.json"
    assert seen[-2] == "plan.json"
    assert seen[-1].startswith(".removing.")


class KilledError(Exception):
    pass


@pytest.mark.parametrize("before", range(12))
def test_a_removal_that_was_killed_is_finished(
    before: int, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the next gc, though the age of the folder is not known any more."""
    put(folder.path, *ORPHANS)
    age(folder.path, 2)
    steps = itertools.count()

    def discard(path: Path) -> None:
        if next(steps) == before:
            raise KilledError
        ledger.discard(path)

    with monkeypatch.context() as patch:
        patch.setattr("dear_batch.run.gc.discard", discard)
        with pytest.raises(KilledError):
            only(folder.path, older_than_s=DAY)
    assert folder.path.exists()
    dry = only(folder.path.parent, dry_run=True)
    assert dry.action == "removed"
    found = only(folder.path.parent)
    assert (found.action, found.files, found.bytes) == ("removed", dry.files, dry.bytes)
    assert not folder.path.exists()


def test_a_folder_half_removed_and_run_again_is_a_jobs(folder: Folder) -> None:
    """The run removes what marks the removal, as it does all temporary files."""
    mark = folder.path / f".removing.{OTHER}.tmp"
    (folder.path / "_SUCCESS").rename(mark)
    assert mark in ledger.temporaries(folder.path)
    mark.unlink()
    before = tree(folder.path)
    assert only(folder.path, older_than_s=0).action == "orphans"
    assert tree(folder.path) == before


@pytest.mark.parametrize("outputs", [None, 5, [{}], ["run"], [{"stem": "\0"}]])
def test_a_plan_of_another_form_fails_alone(outputs: object, folder: Folder) -> None:
    other = Folder(folder.path.parent / "zz").write()
    plan = {"schema_version": 2} if outputs is None else {"schema_version": 2, "outputs": outputs}
    dump(folder.path / "plan.json", plan)
    for path in (folder.path, other.path):
        os.utime(path / "_SUCCESS", (0, 0))
    before = tree(folder.path)
    first, second = collect([folder.path.parent], older_than_s=DAY)
    assert (first.action, first.exit_code, second.action) == ("failed", 78, "removed")
    assert tree(folder.path) == before


@pytest.mark.parametrize(
    ("text", "seconds"), [("30d", 30 * DAY), ("12h", DAY // 2), ("2w", 14 * DAY), ("0d", 0)]
)
def test_ages(text: str, seconds: int) -> None:
    assert age_s(text) == seconds


@pytest.mark.parametrize("text", ["30", "d", "-1d", "1.5d", "30 d", "1y", ""])
def test_no_ages(text: str) -> None:
    with pytest.raises(UsageError, match="is no age"):
        age_s(text)
