"""Random Parquet inputs: a job refuses them with a clear error, or loses and invents nothing."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import reject
from hypothesis import strategies as st

from dear_batch.errors import InputError, UsageError
from dear_batch.run.local import run_job
from dear_batch.specs import InputSpec, JobSpec, OutputSpec, PointwiseSpec
from tests.fuzz.candidates import Row, Table, tables
from tests.fuzz.effort import Effort
from tests.fuzz.published import check_folder
from tests.fuzz.strategies import Damage, damages

pytestmark = pytest.mark.model
TAGS = ("dear-batch", "\u00e9#'")


@dataclass(frozen=True)
class Job:
    """Inputs of one job and what is asked of it."""

    tables: tuple[Table, ...]
    depth: int | None = None
    run_per_input: bool = False
    tag: str = TAGS[0]
    damage: Damage | None = None

    def write(self, folder: Path) -> dict[str, Table]:
        files = {}
        for number, table in enumerate(self.tables):
            path = folder / f"in {number}.parquet"
            try:
                table.write(path)
            except (pa.ArrowNotImplementedError, OSError):  # Arrow cannot write such a file
                reject()
            files[str(path)] = table
        if self.damage:
            path.write_bytes(self.damage(path.read_bytes()))
        return files

    @property
    def is_sound(self) -> bool:
        layouts = {table.layout for table in self.tables}
        return len(layouts) == 1 and all(t.is_sound for t in self.tables) and not self.damage


ROW = Row(b"q", b"query", ((b"d", None, b"text", 1.0), (b"e", None, b"text", 1.0)))
SMALL_PAGES = {"data_page_size": 1, "row_group_size": 1, "use_dictionary": True}
KNOWN = (
    Job((Table("nested", (ROW,), extras=(("candidates.text", "string"),)),)),
    Job((Table("nested", (ROW, ROW), options=SMALL_PAGES),)),
)


@st.composite
def jobs(draw: st.DrawFn, *, damaged: bool = False) -> Job:
    layout = draw(st.sampled_from(["nested", "flat"] * 5 + [None]))
    found = draw(st.lists(tables(layout), min_size=1, max_size=3))
    return Job(
        tuple(found),
        depth=draw(st.sampled_from([None, None, 1, 3])),
        run_per_input=draw(st.booleans()),
        tag=draw(st.sampled_from(TAGS)),
        damage=draw(st.none() | damages("flip", "cut", "insert", "empty")) if damaged else None,
    )


def test_a_job_refuses_its_inputs_or_accounts_for_all(
    effort: Effort, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    model = str(bundle("llama31"))

    def check(job: Job) -> None:
        with TemporaryDirectory(dir=tmp_path) as name:
            folder = Path(name)
            files = job.write(folder)
            spec = JobSpec(
                InputSpec(tuple(files)),
                PointwiseSpec(model, depth=job.depth),
                OutputSpec(str(folder / "out"), job.tag, run_per_input=job.run_per_input),
            )
            try:
                report = run_job(spec)
            except (InputError, UsageError):
                if job.is_sound:
                    raise
                assert not (folder / "out" / "_SUCCESS").exists()
                return
            bad = max(report[unit]["quarantined"] for unit in ("queries", "candidates"))
            assert report["exit_code"] == (3 if bad else 0)
            check_folder(folder / "out", files, report, job.tag)

    effort.run(check, jobs(), known=KNOWN, few=25, share=0.4)


def test_the_command_shows_no_traceback(
    effort: Effort, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    model = str(bundle("llama31"))

    def check(job: Job) -> None:
        with TemporaryDirectory(dir=tmp_path) as name:
            folder = Path(name)
            files = job.write(folder)
            command = [sys.executable, "-m", "dear_batch", "run"]
            command += [part for path in files for part in ("--input", path)]
            command += ["--bundle", model, "--output", str(folder / "out"), "--tag", job.tag]
            command += ["--depth", str(job.depth)] if job.depth else []
            command += ["--run-per-input"] if job.run_per_input else []
            done = subprocess.run(command, capture_output=True, check=False, timeout=120)
            check_outcome(done, folder, files, job)

    effort.run(check, jobs(damaged=True), few=3, share=0.2)


def check_outcome(
    done: "subprocess.CompletedProcess[bytes]", folder: Path, files: dict[str, Table], job: Job
) -> None:
    stderr = done.stderr.decode()
    last: dict[str, Any] = json.loads(done.stdout.decode().splitlines()[-1])
    assert last["exit_code"] == done.returncode
    assert "Traceback" not in stderr
    events = [json.loads(line) for line in stderr.splitlines()]
    if done.returncode in {0, 3}:
        if job.damage is None:
            check_folder(folder / "out", files, last, job.tag)
        return
    # A page that native code dies of twice ends with 75: nobody can say which row it was.
    assert done.returncode in ({2, 65} if job.damage is None else {2, 65, 75}), stderr
    assert [event for event in events if event["event"] == "error"][-1]["what"]
    assert not job.is_sound
