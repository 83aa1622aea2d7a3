"""What is remembered of files that were hashed, and when it is not believed."""

import hashlib
import json
import os
import stat
import time
from pathlib import Path

import pytest

from dear_batch import verified
from dear_batch.verified import FileState, Hashes, opened_file, opened_folder

CONTENTS = b"weights"
SHA256 = hashlib.sha256(CONTENTS).hexdigest()
WRONG = hashlib.sha256(b"others").hexdigest()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dear-batch" / "verified.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of one file that has settled."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "weights").write_bytes(CONTENTS)
    return folder


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """All files were written long enough ago: the tests' own wait would be two seconds each."""
    now = time.time_ns
    monkeypatch.setattr(verified.time, "time_ns", lambda: now() + 3 * 10**9)


def matches(folder: Path, sha256: str = SHA256, *, paranoid: bool = False) -> tuple[bool, bool]:
    """Whether the file has the hash, and whether it was read for that."""
    hashes = Hashes.load(paranoid=paranoid)
    with opened_folder(folder) as top, opened_file(top, "weights") as file:
        found = hashes.matches(file, FileState.of(os.fstat(file.fileno())), sha256)
        was_read = file.tell() > 0
    hashes.save()
    return found, was_read


@pytest.mark.usefixtures("settled", "cache")
def test_what_matched_is_not_read_again(folder: Path) -> None:
    assert matches(folder) == (True, True)
    assert matches(folder) == (True, False)
    assert matches(folder, paranoid=True) == (True, True)


@pytest.mark.usefixtures("settled", "cache")
def test_what_did_not_match_is_not_remembered(folder: Path) -> None:
    assert matches(folder, WRONG) == (False, True)
    assert matches(folder, WRONG) == (False, True)
    assert matches(folder) == (True, True)
    assert matches(folder, WRONG) == (False, True)


def test_a_file_of_this_second_is_not_remembered(folder: Path, cache: Path) -> None:
    os.utime(folder / "weights", (0, 0))  # which moves ctime, not back
    assert matches(folder) == (True, True)
    assert not cache.exists()
    assert matches(folder) == (True, True)


@pytest.mark.usefixtures("settled", "cache")
def test_another_file_of_the_same_size_and_times(folder: Path) -> None:
    assert matches(folder) == (True, True)
    before = (folder / "weights").stat()
    (folder / "new").write_bytes(b"others!")
    os.utime(folder / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
    (folder / "new").replace(folder / "weights")
    assert matches(folder) == (False, True)


@pytest.mark.usefixtures("settled")
def test_the_cache_is_for_this_user_alone(folder: Path, cache: Path) -> None:
    matches(folder)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o600
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]
    cache.chmod(0o620)
    assert matches(folder) == (True, True)  # others could have written it
    assert stat.S_IMODE(cache.stat().st_mode) == 0o600
    assert matches(folder) == (True, False)


@pytest.mark.usefixtures("settled")
def test_a_cache_of_another_user(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matches(folder)
    owner = cache.stat().st_uid
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: owner + 1)
        assert matches(folder) == (True, True)
    assert matches(folder) == (True, False)


@pytest.mark.usefixtures("settled")
def test_a_cache_that_is_a_link(folder: Path, cache: Path) -> None:
    matches(folder)
    cache.rename(folder / "elsewhere")
    cache.symlink_to(folder / "elsewhere")
    assert matches(folder) == (True, True)
    assert not cache.is_symlink()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 100_000,
        "[]",
        "\xff",
        '{"schema_version": 2, "files": {}}',
        '{"schema_version": 1, "files": []}',
        '{"schema_version": 1, "files": {"1:2": 3}}',
        '{"schema_version": 1, "files": {"1:2": [1, 2, 3]}}',
        '{"schema_version": 1, "files": {"1:2": [1, 2, 3, 4]}}',
    ],
)
@pytest.mark.usefixtures("settled")
def test_a_broken_cache_is_written_anew(text: str, folder: Path, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_bytes(text.encode("latin-1"))
    assert matches(folder) == (True, True)
    assert len(json.loads(cache.read_text())["files"]) == 1
    assert matches(folder) == (True, False)


@pytest.mark.usefixtures("settled")
def test_a_cache_folder_that_cannot_be_written(folder: Path, cache: Path) -> None:
    cache.parent.parent.write_text("a file in place of the folder")
    assert matches(folder) == (True, True)
    assert matches(folder) == (True, True)


@pytest.mark.usefixtures("settled")
def test_the_oldest_are_forgotten(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verified, "MAX_REMEMBERED", 2)
    for _ in range(4):
        (folder / "new").write_bytes(CONTENTS)
        (folder / "new").rename(folder / "weights")
        matches(folder)
    assert len(json.loads(cache.read_text())["files"]) == 2
    assert matches(folder) == (True, False)


def test_a_relative_cache_home_is_ignored(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verified, "SETTLED_NS", -(10**18))
    matches(folder)
    assert (tmp_path / "home" / ".cache" / "dear-batch" / "verified.json").is_file()
    assert not (tmp_path / "cache").exists()


def test_no_part_of_a_name_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "real" / "deep" / "file").write_bytes(CONTENTS)
    (tmp_path / "link").symlink_to("real")
    with opened_folder(tmp_path) as top:
        with opened_file(top, "real/deep/file") as file:
            assert file.read() == CONTENTS
        with (
            pytest.raises(OSError, match=r"Not a directory|symbolic"),
            opened_file(top, "link/deep/file"),
        ):
            pass


def test_descriptors_are_closed(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with opened_folder(tmp_path) as top:
        for name in ("a", "a/b", "a/missing", "missing/b"):
            with pytest.raises(OSError, match="directory"), opened_file(top, name):
                pass
    assert len(list(Path("/proc/self/fd").iterdir())) == before
