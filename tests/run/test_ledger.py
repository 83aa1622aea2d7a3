"""Commits: what counts as done, whoever was first, and what nobody names."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from dear_batch.bundle import hash_file
from dear_batch.errors import OutputError
from dear_batch.files import durable
from dear_batch.run import ledger as ledger_module
from dear_batch.run.folder import unsealed
from dear_batch.run.ledger import Commit, Ledger, Part, discard, temporaries

KEY, FINGERPRINT, INPUT = "00000-000000000000", "f" * 64, "1" * 64
COUNTS = {"queries": {"read": 2, "written": 2, "quarantined": 0, "skipped": 0}}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    (tmp_path / "out").mkdir()
    return Ledger(tmp_path / "out")


def write(ledger: Ledger, content: bytes = b"part", place: str = "parts") -> Path:
    path = ledger.new_file(place, KEY, FINGERPRINT)
    path.write_bytes(content)
    return path


def commit(ledger: Ledger, **files: Path) -> Commit:
    return ledger.commit(
        "pointwise",
        KEY,
        fingerprint=FINGERPRINT,
        input_sha256=INPUT,
        files=files,
        counts=COUNTS,
    )


def kept(ledger: Ledger) -> Commit | None:
    return ledger.kept("pointwise", KEY, FINGERPRINT, INPUT)


def path_of(ledger: Ledger) -> Path:
    return ledger.folder / "commits" / "pointwise" / f"{KEY}.json"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# A commit.


def test_a_commit_names_its_files_with_size_and_hash(ledger: Ledger) -> None:
    part, quarantine = write(ledger), write(ledger, b"refused", "quarantine")
    made = commit(ledger, part=part, quarantine=quarantine)
    fields = json.loads(path_of(ledger).read_text())
    assert unsealed(fields) == asdict(made)
    assert set(fields) == {
        "schema_version", "stage", "shard", "fingerprint", "input_sha256", "files", "counts",
        "attempt", "created", "sha256",
    }  # fmt: skip
    assert fields["files"] == {
        "part": {"name": f"parts/{part.name}", **asdict(hash_file(part))},
        "quarantine": {"name": f"quarantine/{quarantine.name}", **asdict(hash_file(quarantine))},
    }
    assert fields["attempt"] == ledger.attempt
    assert names(path_of(ledger).parent) == {f"{KEY}.json"}
    assert kept(ledger) == made
    assert ledger.found("pointwise", KEY) == made
    assert ledger.path_of(made.files["part"]) == part


def test_files_have_unique_names_that_say_what_they_are_of(ledger: Ledger) -> None:
    one, two = (ledger.new_file("parts", KEY, FINGERPRINT, ".transcripts") for _ in range(2))
    assert one != two
    assert one.name.startswith(f"{KEY}-{FINGERPRINT[:12]}-")
    assert one.name.endswith(".transcripts.parquet")
    assert one.parent == ledger.folder / "parts"
    assert not one.exists()
    plain = ledger.new_file("quarantine", KEY)
    assert plain.name.startswith(f"{KEY}-")
    assert FINGERPRINT[:12] not in plain.name


def test_a_commit_is_on_disk_before_it_has_its_name(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file, then the link, then the folder; a power cut leaves it whole or absent."""
    part, order = write(ledger), list[str]()
    real_sync, real_link = durable.sync, os.link

    def sync(path: Path) -> None:
        order.append("commit file" if path.suffix == ".tmp" else path.name)
        real_sync(path)

    def link(*arguments: Any, **options: Any) -> None:
        order.append("link")
        real_link(*arguments, **options)

    monkeypatch.setattr(durable, "sync", sync)
    monkeypatch.setattr(os, "link", link)
    commit(ledger, part=part)
    assert order == ["out", "commits", "commit file", "link", "pointwise"]


# Someone was first.


def test_another_attempt_that_was_first_wins(ledger: Ledger) -> None:
    theirs = commit(Ledger(ledger.folder), part=write(ledger))
    mine = write(ledger)
    assert commit(ledger, part=mine) == theirs
    assert theirs.attempt != ledger.attempt
    assert not mine.exists()
    assert ledger.path_of(theirs.files["part"]).exists()
    assert kept(ledger) == theirs


@pytest.mark.parametrize("fault", ["fingerprint", "input", "part", "no part", "garbage"])
def test_a_commit_that_does_not_hold_makes_way(fault: str, ledger: Ledger) -> None:
    other = Ledger(ledger.folder)
    old = commit(other, part=write(ledger, b"old"))
    match fault:
        case "fingerprint":
            rewrite(ledger, fingerprint="0" * 64)
        case "input":
            rewrite(ledger, input_sha256="0" * 64)
        case "part":
            ledger.path_of(old.files["part"]).write_bytes(b"0ld")
        case "no part":
            ledger.path_of(old.files["part"]).unlink()
        case "garbage":
            path_of(ledger).write_text("{")
    new = write(ledger, b"new")
    made = commit(ledger, part=new)
    assert made.attempt == ledger.attempt
    assert new.exists()
    assert kept(ledger) == made


def test_one_that_keeps_coming_back_is_another_run(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where locks do not work: another job commits between our two looks."""
    commit(ledger, part=write(ledger))
    rewrite(ledger, fingerprint="0" * 64)
    foreign = path_of(ledger).read_bytes()
    real = ledger_module.remove

    def remove(path: Path) -> None:
        real(path)
        if path == path_of(ledger):
            path.write_bytes(foreign)

    monkeypatch.setattr(ledger_module, "remove", remove)
    mine = write(ledger)
    with pytest.raises(OutputError, match="Another run commits") as caught:
        commit(ledger, part=mine)
    assert caught.value.exit_code == 73
    assert caught.value.where == str(path_of(ledger))
    assert not mine.exists()
    assert path_of(ledger).read_bytes() == foreign


def rewrite(ledger: Ledger, **changes: object) -> None:
    fields = json.loads(path_of(ledger).read_text())
    path_of(ledger).write_text(json.dumps({**fields, **changes}))


# What is kept.


def test_nothing_is_kept_where_nothing_was_committed(ledger: Ledger) -> None:
    """A run that died before its first shard was done goes on, too."""
    assert kept(ledger) is None
    assert ledger.found("pointwise", KEY) is None
    assert names(ledger.folder) == set()


@pytest.mark.parametrize("at", [0, 5, -1])
@pytest.mark.parametrize("kind", ["part", "quarantine"])
def test_a_flipped_bit_in_a_file_undoes_its_shard(kind: str, at: int, ledger: Ledger) -> None:
    files = {"part": write(ledger, b"0123456789"), "quarantine": write(ledger, b"abcdefghij")}
    commit(ledger, **files)
    raw = bytearray(files[kind].read_bytes())
    raw[at] ^= 1
    files[kind].write_bytes(raw)
    assert kept(ledger) is None
    assert not path_of(ledger).exists()


@pytest.mark.parametrize("what", ["cut", "longer", "gone", "link", "folder"])
def test_a_file_that_is_not_the_committed_one_undoes_its_shard(what: str, ledger: Ledger) -> None:
    part = write(ledger)
    commit(ledger, part=part)
    match what:
        case "cut":
            part.write_bytes(b"par")
        case "longer":
            part.write_bytes(b"parts")
        case _:
            content = part.read_bytes()
            part.unlink()
            if what == "link":
                (ledger.folder / "elsewhere").write_bytes(content)
                part.symlink_to(ledger.folder / "elsewhere")
            elif what == "folder":
                part.mkdir()
    assert kept(ledger) is None
    assert not path_of(ledger).exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"schema_version": 2},
        {"stage": "listwise"},
        {"shard": "00000-000000000001"},
        {"fingerprint": "0" * 64},
        {"input_sha256": "0" * 64},
        {"more": 1},
        {"files": {"part": {"name": "parts/x", "bytes": 4}}},
        {"files": []},
    ],
    ids=str,
)
def test_a_commit_of_something_else_is_removed(changes: dict[str, Any], ledger: Ledger) -> None:
    commit(ledger, part=write(ledger))
    rewrite(ledger, **changes)
    assert kept(ledger) is None
    assert not path_of(ledger).exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"files": 3}'])
def test_a_commit_that_cannot_be_read_is_none(text: str, ledger: Ledger) -> None:
    commit(ledger, part=write(ledger))
    path_of(ledger).write_text(text)
    assert ledger.found("pointwise", KEY) is None
    assert kept(ledger) is None


@pytest.mark.parametrize(
    "name",
    [
        "../precious",
        "parts/../../precious",
        "/etc/passwd",
        "run.trec",
        "parts/",
        "parts",
        "commits/x.json",
        "parts/deep/er",
        "",
    ],
)
def test_no_commit_names_a_file_outside_our_folders(name: str, ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="^" + name.replace(".", r"\.") + "$"):
        Part(name, 4, "0" * 64)
    part = write(ledger)
    commit(ledger, part=part)
    precious = ledger.folder.parent / "precious"
    precious.write_bytes(b"part")
    rewrite(ledger, files={"part": {"name": name, **asdict(hash_file(part))}})
    assert kept(ledger) is None
    assert precious.read_bytes() == b"part"


def test_parts_with_dots_do_not_climb(ledger: Ledger) -> None:
    """A name of two dots has no slash, and is a folder, which is no file of a commit."""
    commit(ledger, part=write(ledger))
    rewrite(ledger, files={"part": {"name": "parts/..", "bytes": 4096, "sha256": "0" * 64}})
    assert kept(ledger) is None
    assert ledger.folder.is_dir()


# What nobody names.


def test_orphans_are_what_no_commit_names(ledger: Ledger) -> None:
    named, orphan = write(ledger), write(ledger)
    refused = write(ledger, place="quarantine")
    commit(ledger, part=named)
    temporary = ledger.folder / f".run.trec.{'1' * 32}.tmp"
    temporary.touch()
    assert set(ledger.orphans()) == {orphan, refused, temporary}
    for path in ledger.orphans():
        discard(path)
    assert set(ledger.orphans()) == set()
    assert kept(ledger) is not None


def test_temporary_files_are_found_in_every_folder_of_ours(ledger: Ledger) -> None:
    commit(ledger, part=write(ledger))
    places = ["", "parts/", "commits/", "commits/pointwise/"]
    made = {ledger.folder / f"{place}.x.{str(i) * 32}.tmp" for i, place in enumerate(places)}
    folder = ledger.folder / f".x.{'0' * 32}.tmp"
    for path in made:
        path.mkdir() if path == folder else path.touch()
    (folder / "file").touch()
    (ledger.folder / ".precious.tmp").mkdir()  # no name that only we give
    assert set(temporaries(ledger.folder)) == made
    for path in made:
        discard(path)
    assert list(temporaries(ledger.folder)) == []


def test_what_cannot_be_removed_costs_space_only(tmp_path: Path) -> None:
    discard(tmp_path / "never there")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    discard(tmp_path / "link")
    assert names(tmp_path) == {"folder"}


def test_dropping_a_stage_leaves_the_others(ledger: Ledger) -> None:
    made = commit(ledger, part=write(ledger))
    other = ledger.commit(
        "listwise", KEY, fingerprint=FINGERPRINT, input_sha256=INPUT, files={}, counts={}
    )
    assert ledger.found("listwise", KEY) == other
    ledger.drop("listwise")
    assert ledger.found("listwise", KEY) is None
    assert kept(ledger) == made
