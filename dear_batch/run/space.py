"""Whether the disk of an output folder has room for what a job will write.

Estimated from the footers of the inputs, without reading them: bytes a candidate as measured on
runs with ids of about 20 characters, and the text that a second stage needs.
"""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dear_batch.errors import OutputError
from dear_batch.files.pages import chunk_sizes, open_parquet
from dear_batch.files.parquet import InputFile
from dear_batch.run.plan import Plan
from dear_batch.specs import JobSpec

# Bytes a candidate. In parts and results scores do not compress, and ids by about half.
PART_BYTES = 48
RESULT_BYTES = 40
RUN_BYTES = 64
TEXT_SHARE = 0.6  # of a text that zstd leaves
TRANSCRIPT_BYTES = 40  # a candidate that windows see, its identifier written once a window
TOKEN_BYTES = 4  # of reasoning
GB = 1e9


@dataclass(frozen=True, slots=True)
class Space:
    """Bytes: what the job will write, what of it is there, and what is free."""

    needed: int
    there: int
    free: int

    @property
    def suffices(self) -> bool:
        """Whether the rest fits."""
        return self.needed - self.there <= self.free


def check_space(spec: JobSpec, plan: Plan) -> Space:
    """Estimate what a job writes, and see that there is room for it.

    Raises:
        OutputError: there is not.
    """
    folder = Path(spec.output.folder).absolute()
    space = Space(_needed(spec, plan), _there(folder), shutil.disk_usage(_existing(folder)).free)
    if not space.suffices:
        raise OutputError(
            f"The disk of {folder} has not enough space for the job.",
            where=f"{space.free / GB:.2f} GB are free",
            valid=f"about {(space.needed - space.there) / GB:.2f} GB for parts and outputs",
            next_step="free space (dear-batch gc), or choose an --output on another disk",
        )
    return space


def candidates_of(files: Iterable[InputFile]) -> int:
    """How many candidates the files have, by their footers."""
    total = 0
    for file in files:
        if file.layout == "flat":
            total += file.n_rows
            continue
        docids = [name for name in file.columns if name.rpartition(".")[2] == "docid"]
        with open_parquet(file.path) as source:
            total += sum(values for values, _ in chunk_sizes(source.metadata, docids))
    return total


def _needed(spec: JobSpec, plan: Plan) -> int:
    candidates = candidates_of(plan.inputs)
    once = PART_BYTES + RESULT_BYTES + RUN_BYTES + len(spec.output.tag)
    if spec.listwise is None:
        return candidates * once
    lists = sum(output.n_queries for output in plan.outputs)
    shown = min(candidates, lists * spec.listwise.depth)
    text = sum(file.row_bytes * file.n_rows for file in plan.inputs)
    windows = shown / spec.listwise.stride + lists
    return int(
        candidates * (once + PART_BYTES)
        + text * TEXT_SHARE * shown / max(1, candidates)
        # Parts of transcripts, and the published ones.
        + 2 * windows * (spec.listwise.window * TRANSCRIPT_BYTES)
        + 2 * windows * spec.listwise.reasoning_tokens * TOKEN_BYTES
    )


def _there(folder: Path) -> int:
    """Parts of an earlier attempt are not written again."""
    if not (folder / "parts").is_dir():
        return 0
    return sum(path.lstat().st_size for path in (folder / "parts").iterdir())


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.is_dir())
