"""Inputs are what they were when they were planned, to the last byte, or the job ends."""

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dear_batch.errors import InputError
from dear_batch.files.parquet import open_input
from dear_batch.run import inputs
from dear_batch.run.inputs import (
    Hashes,
    Pin,
    changed,
    check_pins,
    hash_blocks,
    joined,
    recorded,
    recorded_of_source,
)
from dear_batch.run.ledger import Ledger
from tests.run.test_plan import nested


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    (tmp_path / "out").mkdir()
    return Ledger(tmp_path / "out")


def pin(path: Path, *qids: str) -> Pin:
    return Pin.of(open_input(nested(path, [*qids] or ["a"])))


def sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def hashing() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("dear-batch-hash")]


# Pins.


def test_a_pin_says_what_an_input_is(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    found = pin(path, "a", "b")
    assert (found.path, found.rows, found.layout) == (str(path), 2, "nested")
    assert found.bytes == path.stat().st_size
    assert found.mtime_ns == path.stat().st_mtime_ns
    raw = path.read_bytes()
    length = int.from_bytes(raw[-8:-4], "little")
    assert found.footer_sha256 == hashlib.sha256(raw[-8 - length :]).hexdigest()


def test_the_footer_tells_files_of_one_size_and_time_apart(tmp_path: Path) -> None:
    """Its statistics do, for one: a footer is no copy of the other's."""
    one, other = pin(tmp_path / "1.parquet", "aaaa"), pin(tmp_path / "2.parquet", "zzzz")
    assert one.bytes == other.bytes
    assert one.footer_sha256 != other.footer_sha256


def test_an_input_that_went_away_is_one_clear_error(tmp_path: Path) -> None:
    file = open_input(nested(tmp_path / "in.parquet", ["a"]))
    (tmp_path / "in.parquet").unlink()
    with pytest.raises(InputError, match="cannot be read") as caught:
        Pin.of(file)
    assert caught.value.exit_code == 65


def test_pins_are_checked_at_a_glance(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    found = pin(path)
    check_pins([found])
    os.utime(path, ns=(0, found.mtime_ns + 1))
    with pytest.raises(InputError, match="changed while"):
        check_pins([found])
    os.utime(path, ns=(0, found.mtime_ns))
    check_pins([found])
    path.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        check_pins([found])


# Hashes.


def test_every_byte_is_hashed_and_recorded(tmp_path: Path, ledger: Ledger) -> None:
    pins = [pin(tmp_path / "1.parquet", "a"), pin(tmp_path / "2.parquet", "b", "c")]
    with Hashes(pins, ledger) as hashes:
        assert [hashes.sha256(i) for i in (1, 0)] == [sha256(pins[i].path) for i in (1, 0)]
        assert hashes.of_source((0,)) == sha256(pins[0].path)
        assert hashes.of_source((0, 1)) == joined([sha256(p.path) for p in pins])
        hashes.check()
    assert hashing() == []
    assert [recorded(ledger, i) for i in (0, 1, 2)] == [*(sha256(p.path) for p in pins), None]
    assert recorded_of_source(ledger, (0, 1)) == joined([sha256(p.path) for p in pins])
    assert recorded_of_source(ledger, (1, 2)) is None
    commit = ledger.found("input", "00001")
    assert commit
    assert commit.fingerprint == pins[1].footer_sha256
    assert commit.counts == {"path": pins[1].path, "sha256": sha256(pins[1].path)}


def test_several_hashes_make_another_one() -> None:
    assert joined(["a"]) == "a"
    assert joined(["a", "b"]) == hashlib.sha256(b"ab").hexdigest()
    assert joined(["b", "a"]) != joined(["a", "b"])


def test_a_second_attempt_finds_the_same_bytes(tmp_path: Path, ledger: Ledger) -> None:
    pins = [pin(tmp_path / "in.parquet")]
    for _ in range(2):
        with Hashes(pins, ledger) as hashes:
            hashes.check()
    first = ledger.found("input", "00000")
    assert first
    assert first.attempt == ledger.attempt


def test_a_second_attempt_that_finds_other_bytes_ends(tmp_path: Path, ledger: Ledger) -> None:
    """Of the same size, at the same time, with the same footer: a bit flipped on the disk."""
    path = tmp_path / "in.parquet"
    pins = [pin(path)]
    with Hashes(pins, ledger) as hashes:
        hashes.check()
    before = recorded(ledger, 0)
    flip(path, pins[0].mtime_ns)
    assert Pin.of(open_input(path)) == pins[0]
    with Hashes(pins, ledger) as hashes, pytest.raises(InputError, match="changed") as caught:
        hashes.check()
    assert "earlier attempt" in caught.value.where
    assert recorded(ledger, 0) == before


def flip(path: Path, mtime_ns: int) -> None:
    """Change a byte of the data, and let the file look as it did."""
    raw = bytearray(path.read_bytes())
    raw[20] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(mtime_ns, mtime_ns))


def swap(path: Path, mtime_ns: int) -> None:
    """Put another file with as many bytes in its place."""
    other = path.with_name("other")
    nested(other, ["z"])
    assert other.stat().st_size == path.stat().st_size
    os.utime(other, ns=(mtime_ns, mtime_ns))
    other.replace(path)


def touch(path: Path, mtime_ns: int) -> None:
    os.utime(path, ns=(mtime_ns, mtime_ns + 1))


def append(path: Path, mtime_ns: int) -> None:
    with path.open("ab") as file:
        file.write(b"more")
    os.utime(path, ns=(mtime_ns, mtime_ns))


def remove(path: Path, _mtime_ns: int) -> None:
    path.unlink()


CHANGES = [flip, swap, touch, append, remove]


@pytest.mark.parametrize("change", CHANGES)
def test_an_input_that_changes_after_it_was_hashed_ends_the_job(
    change: Callable[[Path, int], None], tmp_path: Path, ledger: Ledger
) -> None:
    path = tmp_path / "in.parquet"
    found = pin(path)
    with Hashes([found], ledger) as hashes:
        hashes.check()
        change(path, found.mtime_ns)
        with pytest.raises(InputError) as caught:
            hashes.sha256(0)
    assert caught.value.exit_code == 65
    assert str(path) in caught.value.where
    assert hashing() == []


@pytest.mark.parametrize("change", CHANGES)
def test_an_input_that_changes_while_it_is_hashed_ends_the_job(
    change: Callable[[Path, int], None],
    tmp_path: Path,
    ledger: Ledger,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first block is the old file's, whatever lies there by the time of the second."""
    monkeypatch.setattr(inputs, "_BLOCK", 64)
    path = tmp_path / "in.parquet"
    found = pin(path)
    real, calls = Hashes._go_on, list[int]()

    def check(self: Hashes) -> None:
        calls.append(1)
        if len(calls) == 1:
            change(path, found.mtime_ns)
        real(self)

    monkeypatch.setattr(Hashes, "_go_on", check)
    with Hashes([found], ledger) as hashes, pytest.raises(InputError):
        hashes.sha256(0)
    assert len(calls) > 1


@pytest.mark.parametrize("change", ["permissions", "link", "copy"])
def test_a_change_of_everything_but_bytes_size_and_time_passes(
    change: str, tmp_path: Path, ledger: Ledger
) -> None:
    """A hard link or new permissions move the ctime; a copy with its times is another inode."""
    path = tmp_path / "in.parquet"
    found, before = pin(path), path.stat()
    with Hashes([found], ledger) as hashes:
        first = hashes.sha256(0)
        match change:
            case "permissions":
                path.chmod(0o600)
            case "link":
                (tmp_path / "linked").hardlink_to(path)
            case "copy":
                (tmp_path / "copy").write_bytes(path.read_bytes())
                os.utime(tmp_path / "copy", ns=(0, found.mtime_ns))
                (tmp_path / "copy").replace(path)
        after = path.stat()
        assert (after.st_ctime_ns, after.st_ino) != (before.st_ctime_ns, before.st_ino)
        assert hashes.sha256(0) == first
        hashes.check()


def test_an_input_that_changed_before_it_was_hashed_is_not_recorded(
    tmp_path: Path, ledger: Ledger
) -> None:
    path = tmp_path / "in.parquet"
    found = pin(path)
    touch(path, found.mtime_ns)
    with Hashes([found], ledger) as hashes, pytest.raises(InputError, match="changed"):
        hashes.sha256(0)
    assert recorded(ledger, 0) is None


def test_leaving_ends_the_thread_in_the_middle_of_a_file(
    tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "_BLOCK", 1)  # hashing would take seconds
    path = tmp_path / "in.parquet"
    text = pa.array([f"{i:09}" for i in range(300_000)])
    candidates = pa.ListArray.from_arrays(
        pa.array([0, len(text)], pa.int32()),
        pa.StructArray.from_arrays([text, text], names=["docid", "text"]),
    )
    table = pa.table({"qid": ["q"], "query": ["q"], "candidates": candidates})
    pq.write_table(table, path, compression="none", use_dictionary=False)
    found = Pin.of(open_input(path))
    with Hashes([found, found], ledger):
        assert hashing()
    assert hashing() == []
    assert recorded(ledger, 0) is None


def test_blocks_make_the_hash_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "_BLOCK", 7)
    (tmp_path / "file").write_bytes(bytes(range(100)))
    calls: list[int] = []
    assert hash_blocks(str(tmp_path / "file"), lambda: calls.append(1)) == sha256(tmp_path / "file")
    assert len(calls) == 15
    with pytest.raises(InputError, match="cannot be read"):
        hash_blocks(str(tmp_path / "none"), lambda: None)


def test_the_error_says_what_to_do(tmp_path: Path) -> None:
    error = changed(str(tmp_path / "in.parquet"), "its size differs")
    assert error.where == f"{tmp_path / 'in.parquet'}: its size differs"
    assert "--restart" in error.next_step
