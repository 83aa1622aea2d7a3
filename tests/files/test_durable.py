"""Files that are complete or absent, and the errors of folders that cannot be written."""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dear_batch.errors import OutputError
from dear_batch.files.durable import (
    linking,
    make_folder,
    remove,
    replacing,
    scratch_folder,
    staging,
)


@contextmanager
def file_size_limit(n_bytes: int) -> Iterator[None]:
    """Files of this process end here: the kernel's EFBIG stands in for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_file_appears_complete(tmp_path: Path) -> None:
    out = tmp_path / "out.txt"
    with replacing(out) as temporary:
        temporary.write_text("whole")
        assert temporary.parent == tmp_path
        assert not out.exists()
    assert out.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [out]


def test_file_has_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    with replacing(tmp_path / "out"):
        pass
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_failure_leaves_the_old_file(tmp_path: Path, failure: type[BaseException]) -> None:
    out = tmp_path / "out.txt"
    out.write_text("old")

    def write() -> None:
        with replacing(out) as temporary:
            temporary.write_text("half")
            raise failure

    with pytest.raises(failure):
        write()
    assert out.read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


def test_full_disk_is_an_output_error(tmp_path: Path) -> None:
    def write() -> None:
        table = pa.table({"text": [f"{i:099}" for i in range(10_000)]})
        with replacing(tmp_path / "out.parquet") as temporary:
            pq.write_table(table, temporary, compression="none", use_dictionary=False)

    with file_size_limit(100_000), pytest.raises(OutputError, match=r"out\.parquet") as caught:
        write()
    assert caught.value.exit_code == 73
    assert "File too large" in caught.value.what
    assert caught.value.next_step
    assert list(tmp_path.iterdir()) == []


def test_full_disk_at_the_last_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def no_space(descriptor: int) -> None:
        calls.append(descriptor)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)

    def write() -> None:
        with replacing(tmp_path / "out") as temporary:
            temporary.write_text("whole")

    with pytest.raises(OutputError, match="No space left"):
        write()
    assert len(calls) == 1, "fsync is never tried again"
    assert list(tmp_path.iterdir()) == []


def test_missing_folder(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="folder does not exist") as caught,
        replacing(tmp_path / "none" / "out"),
    ):
        pass
    assert caught.value.next_step == f"mkdir -p {tmp_path / 'none'}"


def test_folder_in_the_way(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="a folder has that name"), replacing(tmp_path):
        pass


def test_unrelated_os_error_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(ConnectionResetError), replacing(tmp_path / "out"):
        raise ConnectionResetError(errno.ECONNRESET, "reset")


def test_scratch_folder_is_beside_and_removed(tmp_path: Path) -> None:
    with scratch_folder(tmp_path / "out.parquet") as scratch:
        (scratch / "file").write_text("x")
        assert scratch.parent == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_scratch_folder_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputError), scratch_folder(tmp_path / "none" / "out.parquet"):
        pass


# Files that never replace another.


def test_a_link_makes_a_complete_file(tmp_path: Path) -> None:
    with linking(tmp_path / "commit") as temporary:
        temporary.write_text("whole")
        assert not (tmp_path / "commit").exists()
    assert (tmp_path / "commit").read_text() == "whole"
    assert list(tmp_path.iterdir()) == [tmp_path / "commit"]


@pytest.mark.parametrize("kind", ["file", "link", "broken link"])
def test_a_link_never_replaces_what_is_there(kind: str, tmp_path: Path) -> None:
    theirs = tmp_path / "commit"
    if kind == "file":
        theirs.write_text("theirs")
    else:
        theirs.symlink_to(tmp_path / "elsewhere")
        if kind == "link":
            (tmp_path / "elsewhere").write_text("theirs")
    before = set(tmp_path.iterdir())
    with pytest.raises(FileExistsError), linking(theirs) as temporary:
        temporary.write_text("mine")
    assert set(tmp_path.iterdir()) == before
    assert theirs.is_symlink() == (kind != "file")
    assert kind == "broken link" or theirs.read_text() == "theirs"


# Files that wait for others.


def test_a_staged_file_waits_for_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    real = os.fsync
    monkeypatch.setattr("os.fsync", lambda fd: flushed.append(os.fstat(fd).st_ino) or real(fd))
    with staging(tmp_path / "run.trec") as temporary:
        temporary.write_text("whole")
    assert [*tmp_path.iterdir()] == [temporary]
    assert temporary.name.startswith(".run.trec.")
    assert temporary.read_text() == "whole"
    assert flushed == [temporary.stat().st_ino]


def test_a_staged_file_goes_when_its_block_raises(tmp_path: Path) -> None:
    def stage() -> None:
        with staging(tmp_path / "run.trec") as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        stage()
    assert list(tmp_path.iterdir()) == []


def test_a_staged_file_goes_where_it_cannot_be_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with (
        pytest.raises(OutputError, match="No space left"),
        staging(tmp_path / "run.trec") as temporary,
    ):
        temporary.write_text("whole")
    assert list(tmp_path.iterdir()) == []


# Folders, and files that go.


def test_a_folder_is_made_once(tmp_path: Path) -> None:
    for _ in range(2):
        make_folder(tmp_path / "parts")
    assert (tmp_path / "parts").is_dir()
    with pytest.raises(OutputError, match="folder does not exist"):
        make_folder(tmp_path / "none" / "parts")


def test_a_file_is_removed_for_good(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link", "never there", "no/folder/either"):
        remove(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", [replacing, linking, staging])
def test_a_temporary_name_is_never_a_link_of_someone_else(
    write: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link that lies where the temporary file would be is not followed."""
    monkeypatch.setattr("uuid.uuid4", lambda: type("Known", (), {"hex": "known"}))
    (tmp_path / "mine").write_text("precious")
    (tmp_path / ".out.known.tmp").symlink_to(tmp_path / "mine")
    assert callable(write)
    with pytest.raises(FileExistsError), write(tmp_path / "out"):
        pass
    assert (tmp_path / "mine").read_text() == "precious"
