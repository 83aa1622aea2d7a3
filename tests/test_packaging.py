"""What an installation gets: the wheel's file list.

`export/` and `jobs/` lie at the root beside the package; installed as modules, names so generic
would break other people's imports.
"""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

from tests.conftest import ROOT

FOLDERS = ("benchmarks", "dear_batch", "examples", "export", "jobs", "tests")
FILES = ("LICENSE", "README.md", "pyproject.toml")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Path → text of the metadata, of the wheel built from a copy of the tree."""
    source = tmp_path_factory.mktemp("source")
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, source)
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    offline = ["--no-index", "--disable-pip-version-check"]
    done = subprocess.run(
        [*build, *offline, "--wheel-dir", str(out), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return {
            name: archive.read(name).decode() if ".dist-info/" in name else ""
            for name in archive.namelist()
        }


def metadata(wheel: dict[str, str], name: str) -> str:
    return next(text for path, text in wheel.items() if path.endswith(f".dist-info/{name}"))


def test_the_wheel_holds_the_package_and_its_metadata_alone(wheel: dict[str, str]) -> None:
    assert {re.sub(r"-.*\.dist-info$", "", path.split("/")[0]) for path in wheel} == {"dear_batch"}
    assert metadata(wheel, "top_level.txt").split() == ["dear_batch"]


def test_every_source_and_data_file_is_in_the_wheel(wheel: dict[str, str]) -> None:
    package = ROOT / "dear_batch"
    files = {
        path.relative_to(ROOT).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {path for path in wheel if path.startswith("dear_batch/")} == files
    data = {"py.typed", "pointwise/parity_pairs.jsonl", "listwise/prompts/readme.toml"}
    assert {f"dear_batch/{name}" for name in data} <= files


def test_the_wheel_names_its_command_extras_and_licence(wheel: dict[str, str]) -> None:
    assert "dear-batch = dear_batch.cli:main" in metadata(wheel, "entry_points.txt")
    fields = metadata(wheel, "METADATA")
    assert "Provides-Extra: export" in fields
    for extra in ("listwise", "tensorrt", "tensorrt-rtx"):
        assert f"Provides-Extra: {extra}\n" in fields
    assert "License-Expression: Apache-2.0" in fields
    assert "Apache License" in metadata(wheel, "licenses/LICENSE")
    required = re.findall(r"^Requires-Dist: (onnxruntime\S*?)[>=;].*?; (.+)$", fields, re.MULTILINE)
    assert len(required) == 2  # one of them on any platform, never both


def test_every_folder_of_the_package_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent for path in (ROOT / "dear_batch").rglob("*.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(listed) == names | {"dear_batch.listwise.prompts"}  # which holds data alone
    assert all((folder / "__init__.py").is_file() for folder in folders)
