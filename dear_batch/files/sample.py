"""A sample of the candidate lists of a file, bounded, from places all over it.

The same every time. Knows nothing of models or jobs.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import accumulate

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
    starts = [0, *accumulate(file.row_group_rows)]
    ranges = list(_joined((starts[g], min(starts[g] + rows, starts[g + 1])) for g in groups))
    taken = sum(end - first for first, end in ranges)
    most = max(1, SAMPLE_PAIRS // taken) if file.layout == "nested" else taken
    with RowReader(file) as reader:
        for first, end in ranges:
            for item in reader.read(first, end - first):
                yield replace(item, candidates=item.candidates[:most])


def _joined(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Ranges in order, those that touch as one: the rows of a flat list may lie in both."""
    first, end = 0, 0
    for start, stop in ranges:
        if start > end:
            yield first, end
            first = start
        end = stop
    yield first, end
