"""Our calls of TensorRT and CUDA, checked against the types that the libraries bring themselves.

TensorRT's are generated from the compiled module, cuda.core's lie within its package where no
type checker looks. A misspelt name or a wrong number of arguments in a path that needs a GPU is
found without one.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.process

CHECKED = ("pointwise/tensorrt_plan.py", "pointwise/tensorrt_scorer.py", "export/tensorrt.py")
SETTINGS = """
[mypy]
strict = True
disallow_subclassing_any = False
ignore_missing_imports = True
follow_imports = silent
# How the generated files are written is not our concern.
[mypy-cuda.*,tensorrt_rtx_bindings.*]
ignore_errors = True
[mypy-torch.*,transformers.*,onnx.*,onnxruntime.*,scipy.*]
follow_imports = skip
"""
# What the generator writes down as C++ says it, and is no Python.
REPAIRS = ((r"\bin: ", "in_: "), (r"(def add_scale_nd\(.*), (channel_axis: [\w.]+)", r"\1, *, \2"))


@pytest.fixture(scope="module")
def types(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the libraries' types, as mypy looks for them."""
    for module in ("pybind11_stubgen", "tensorrt_rtx_bindings", "cuda.core"):
        pytest.importorskip(module, reason="its types are tested against")
    import cuda.core

    folder = tmp_path_factory.mktemp("types")
    command = [sys.executable, "-m", "pybind11_stubgen", "tensorrt_rtx_bindings", "-o", folder]
    subprocess.run([*command, "--ignore-all-errors"], check=True, capture_output=True)
    generated = folder / "tensorrt_rtx_bindings" / "tensorrt_rtx.pyi"
    text = generated.read_text(encoding="utf-8")
    for wrong, right in REPAIRS:
        text = re.sub(wrong, right, text)
    generated.write_text(text, encoding="utf-8")
    (folder / "tensorrt_rtx.pyi").write_text("from tensorrt_rtx_bindings import *\n")
    versioned = Path(cuda.core.__path__[0])  # it has a copy of itself for each CUDA
    assert (versioned / "_device.pyi").exists()
    shutil.copytree(versioned, folder / "cuda" / "core", ignore=shutil.ignore_patterns("*.so"))
    (folder / "cuda" / "__init__.pyi").touch()
    shutil.copy(versioned.parent / "__init__.py", folder / "cuda" / "core")
    # Its public names are put together in a way that mypy does not follow.
    for package in (folder / "cuda").rglob("__init__.py"):
        stars = re.findall(
            r"^from .* import \*$", package.read_text(encoding="utf-8"), re.MULTILINE
        )
        package.rename(package.with_suffix(".pyi")).write_text("\n".join(stars), encoding="utf-8")
    return folder


def mypy(types: Path, root: Path) -> str:
    """What mypy finds wrong in the modules of a source folder."""
    (types / "mypy.ini").write_text(SETTINGS)
    files = [path for name in CHECKED if (path := root / "dear_batch" / name).exists()]
    command = [sys.executable, "-m", "mypy", "--config-file", types / "mypy.ini"]
    options = ["--cache-dir", types / "cache", "--namespace-packages", "--explicit-package-bases"]
    done = subprocess.run(
        [*command, *options, *files],
        env={"MYPYPATH": f"{types}:{root}", "PATH": ""},
        cwd=root,
        check=False,
        capture_output=True,
        text=True,
    )
    assert not done.stderr
    return "" if done.returncode == 0 else done.stdout


def test_our_calls_fit_the_libraries(types: Path) -> None:
    assert mypy(types, ROOT) == ""


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("context.set_tensor_address(name, inputs + offset)", "context.set_address(name, 0)"),
        ("context.set_input_shape(name, sizes)", "context.set_input_shape(name)"),
        ("runtime.deserialize_cuda_engine(data)", "runtime.deserialize_engine(data)"),
        ("builder.begin_building()", "builder.begin()"),
        ("slot.done.sync()", "slot.done.sync(0)"),
        ("trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE", "trt.CudaGraphStrategy.WHOLE"),
        ("self._compute.wait(slot.copied)", "self._compute.wait_for(slot.copied)"),
    ],
)
def test_a_call_that_does_not_is_found(right: str, wrong: str, types: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "dear_batch", tmp_path / "dear_batch")
    changed = 0
    for name in CHECKED[:2]:
        path = tmp_path / "dear_batch" / name
        text = path.read_text(encoding="utf-8")
        changed += text.count(right)
        path.write_text(text.replace(right, wrong), encoding="utf-8")
    assert changed
    assert "error" in mypy(types, tmp_path)
