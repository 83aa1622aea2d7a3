"""Peak memory of a job beside that of the same job on one query."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import collection_texts, save_checkpoint

pytestmark = [
    pytest.mark.model,
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads VmHWM of Linux"),
]
LIMIT_MB = 400
ROW_GROUP_BYTES = 300_000_000
LIST = 100
# The peak of the process that works, which is a child of the command line's. That of getrusage
# would begin with the parent's.
MEASURED = """
import pathlib, sys
from dear_batch.run.local import run_job
from dear_batch.specs import InputSpec, JobSpec, OutputSpec, PointwiseSpec
path, output, bundle, depth = sys.argv[1:]
stage = PointwiseSpec(bundle, depth=int(depth))
try:
    run_job(JobSpec(InputSpec((path,)), stage, OutputSpec(output)))
finally:
    status = pathlib.Path("/proc/self/status").read_text().splitlines()
    print(next(line for line in status if line.startswith("VmHWM")).split()[1], file=sys.stderr)
"""


def passages() -> "pa.StringArray":
    """50,000 different snippets of about 60 characters out of real text."""
    words = " ".join(collection_texts()).split()
    rng = np.random.default_rng(5)
    starts = rng.integers(0, len(words) - 10, 50_000)
    return pa.array(" ".join(words[s : s + 10])[:60] for s in starts)


def write_lists(path: Path, n_lists: int) -> None:
    """Lists of `LIST` passages in one row group, stored as they are."""
    n = n_lists * LIST
    pool = passages()
    text = pool.take(pa.array(np.random.default_rng(6).integers(0, len(pool), n)))
    docid = pa.array(np.arange(n)).cast(pa.string())
    candidates = pa.ListArray.from_arrays(
        pa.array(np.arange(0, n + 1, LIST), pa.int32()),
        pa.StructArray.from_arrays([docid, text], names=["docid", "text"]),
    )
    qid = pa.array(np.arange(n_lists)).cast(pa.string())
    table = pa.table({"qid": qid, "query": pool.take(pa.array(range(n_lists))), "c": candidates})
    pq.write_table(
        table.rename_columns(["qid", "query", "candidates"]),
        path,
        row_group_size=n_lists,
        use_dictionary=False,
        compression="none",
    )


@pytest.fixture(scope="module")
def one_layer(bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = save_checkpoint(
        tmp_path_factory.mktemp("one-layer"),
        "llama31",
        num_hidden_layers=1,
        hidden_size=32,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return bundle("llama31", model=str(checkpoint))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("large") / "large.parquet"
    write_lists(path, 45_000)
    metadata = pq.read_metadata(path)
    assert metadata.num_row_groups == 1
    assert metadata.row_group(0).total_byte_size >= ROW_GROUP_BYTES
    yield path
    path.unlink()  # pytest keeps the folders of its last sessions


def peak_mb(*arguments: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments],
        check=True,
        capture_output=True,
        text=True,
    )
    return int(done.stderr.splitlines()[-1]) * 1024 / 1e6


# Scoring every pair takes an hour and more, and holds less: a block is counted in scored pairs,
# so the smaller the depth, the more unscored candidates it holds. At depth 1 that is a shard;
# depth 10 calls the model ten times as often.
@pytest.mark.parametrize("depth", [1, 10])
def test_one_large_row_group_is_streamed(
    depth: int, one_layer: Path, large: Path, tmp_path: Path
) -> None:
    write_lists(tmp_path / "one.parquet", 1)
    peaks = {
        path.stem: peak_mb(str(path), str(tmp_path / path.stem), str(one_layer), str(depth))
        for path in (tmp_path / "one.parquet", large)
    }
    shutil.rmtree(tmp_path / "large")  # 4.5 million lines
    above = peaks["large"] - peaks["one"]
    print(  # noqa: T201 - the figures are wanted, not only the verdict
        f"depth {depth}: one query {peaks['one']:.0f} MB, "
        f"{ROW_GROUP_BYTES / 1e6:.0f} MB row group {peaks['large']:.0f} MB, {above:.0f} above"
    )
    assert above <= LIMIT_MB
