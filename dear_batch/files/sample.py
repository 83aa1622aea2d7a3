"""A sample of the candidate lists of a file, bounded, from places all over it.

The same every time. Knows nothing of models or jobs.
"""

from collections.abc import Iterator
from dataclasses import replace

from dear_batch.data import CandidateList
from dear_batch.files.parquet import InputFile, RowReader

SAMPLE_PLACES = 64  # of the file, evenly spread over its row groups
SAMPLE_LISTS = 256
SAMPLE_PAIRS = 20_000  # rows of a flat file, too


def sample_lists(file: InputFile) -> Iterator[CandidateList]:
    """Lists in the order of the file; where they are long, their first candidates.

    Raises:
        InputError: the data cannot be decoded.
    """
    n_groups = len(file.row_group_rows)
    groups = sorted({n_groups * i // SAMPLE_PLACES for i in range(SAMPLE_PLACES)})
    rows = -(-(SAMPLE_LISTS if file.layout == "nested" else SAMPLE_PAIRS) // len(groups))
    taken = {group: min(rows, file.row_group_rows[group]) for group in groups}
    most = SAMPLE_PAIRS // sum(taken.values()) if file.layout == "nested" else rows
    with RowReader(file) as reader:
        for group, count in taken.items():
            for item in reader.read(sum(file.row_group_rows[:group]), count):
                yield replace(item, candidates=item.candidates[:most])
