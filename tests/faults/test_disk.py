"""What a disk can do to a job: refuse a flush, be full before or meanwhile, be read-only."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.model
Settings = dict[str, Any]
Result = tuple[dict[str, Any], int]
PUBLISHED = ("run.trec", "results.parquet")

ONE_RUN = """
import json, sys
from pathlib import Path
from tests.faults.job import run
report = run(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
print(json.dumps(report))
sys.exit(report["exit_code"])
"""


def once(settings_file: Path, folder: Path, *before: str) -> Result:
    """The report and the exit code of a run in a process of its own, behind a command."""
    command = [*before, sys.executable, "-c", ONE_RUN, str(settings_file), str(folder)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "Traceback" not in found.stderr, found.stderr
    return json.loads(found.stdout.splitlines()[-1]), found.returncode


@pytest.fixture
def whole(settings_file: Path, tmp_path: Path) -> dict[str, bytes]:
    """The published bytes of an undisturbed run."""
    report, code = once(settings_file, tmp_path / "whole")
    assert code == 0, report
    return {name: (tmp_path / "whole" / name).read_bytes() for name in PUBLISHED}


@pytest.fixture
def inject(tmp_path: Path) -> Callable[[str], list[str]]:
    """A command prefix by which a system call fails."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    probe = ["strace", "-o", os.devnull, "true"]
    if subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        pytest.skip("strace may not trace here")
    trace = str(tmp_path / "trace")
    return lambda what: ["strace", "-f", "-qq", "-o", trace, "-e", f"inject={what}"]


@pytest.mark.parametrize("fault", ["EIO:when=9", "ENOSPC:when=17"])
def test_a_flush_that_fails_ends_with_73(
    inject: Callable[[str], list[str]],
    settings_file: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    fault: str,
) -> None:
    folder = tmp_path / "out"
    failing = inject(f"fsync:error={fault}")
    report, code = once(settings_file, folder, *failing)
    assert code == 73, report
    assert not (folder / "_SUCCESS").exists()
    report, code = once(settings_file, folder)
    assert code == 0, report
    assert {name: (folder / name).read_bytes() for name in PUBLISHED} == whole


@pytest.mark.parametrize("call", ["link,linkat", "rename,renameat,renameat2"])
def test_a_name_that_cannot_be_given_ends_with_73(
    inject: Callable[[str], list[str]],
    settings_file: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    call: str,
) -> None:
    folder = tmp_path / "out"
    report, code = once(settings_file, folder, *inject(f"{call}:error=EROFS:when=2"))
    assert code == 73, report
    assert once(settings_file, folder)[1] == 0
    assert {name: (folder / name).read_bytes() for name in PUBLISHED} == whole


@pytest.fixture
def small_disk(tmp_path: Path) -> Callable[[int], list[str]]:
    """A command prefix that mounts a small disk at `disk`, in a namespace of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    own = ["unshare", "--mount", "--map-root-user"]
    check = [*own, "mount", "-t", "tmpfs", "none", str(disk)]
    if not shutil.which("unshare") or subprocess.run(check, capture_output=True).returncode:  # noqa: PLW1510 - its code decides
        pytest.skip("no disk can be mounted in a namespace of its own here")

    def prefix(size: int) -> list[str]:
        mount = f'mount -t tmpfs -o size={size} none {disk} && exec "$@"'
        return [*own, "sh", "-c", mount, "sh"]

    return prefix


@pytest.mark.parametrize("size", [4096, 32 << 10, 64 << 10])
def test_a_full_disk_ends_with_73(
    small_disk: Callable[[int], list[str]], settings_file: Path, tmp_path: Path, size: int
) -> None:
    report, code = once(settings_file, tmp_path / "disk" / "out", *small_disk(size))
    assert code == 73, report


def test_a_read_only_output_ends_with_73(settings_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir()
    own = ["unshare", "--mount", "--map-root-user"]
    mount = f'mount --bind -o ro {folder} {folder} && exec "$@"'
    probe = [*own, "sh", "-c", mount, "sh", "true"]
    if not shutil.which("unshare") or subprocess.run(probe, capture_output=True).returncode:  # noqa: PLW1510 - its code decides
        pytest.skip("no folder can be made read-only in a namespace of its own here")
    report, code = once(settings_file, folder / "out", *own, "sh", "-c", mount, "sh")
    assert code == 73, report
    report, code = once(settings_file, folder, *own, "sh", "-c", mount, "sh")
    assert code == 73, report
