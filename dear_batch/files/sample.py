"""A sample of the lists of a file: enough to know how long its texts are, and little to read."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import accumulate

from dear_batch.data import CandidateList
from dear_batch.files.parquet import InputFile, RowReader

PLACES = 64  # of the file, evenly spread over its row groups
LISTS = 256
PAIRS = 20_000  # rows of a flat file, too


def sample_lists(
    file: InputFile, *, places: int = PLACES, lists: int = LISTS, pairs: int = PAIRS
) -> Iterator[CandidateList]:
    """Lists in the order of the file; where they are long, their first candidates.

    The same for the same file.

    Raises:
        InputError: the data cannot be decoded.
    """
    n_groups = len(file.row_group_rows)
    groups = sorted({n_groups * i // places for i in range(places)})
    rows = -(-(lists if file.layout == "nested" else pairs) // len(groups))
    starts = [0, *accumulate(file.row_group_rows)]
    ranges = list(_joined((starts[g], min(starts[g] + rows, starts[g + 1])) for g in groups))
    taken = sum(end - first for first, end in ranges)
    most = max(1, pairs // taken) if file.layout == "nested" else taken
    with RowReader(file) as reader:
        for first, end in ranges:
            for item in reader.read(first, end - first):
                yield replace(item, candidates=item.candidates[:most])


def sample(
    file: InputFile, *, places: int = PLACES, lists: int = LISTS, pairs: int = PAIRS
) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """The same lists as `(query, [(title, text), …])`.

    Those without a query, and texts that are null or empty, are left out.
    """
    for item in sample_lists(file, places=places, lists=lists, pairs=pairs):
        if item.query:
            yield item.query, [(c.title or "", c.text) for c in item.candidates if c.text]


def _joined(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Ranges in order, those that touch as one: the rows of a flat list may lie in both."""
    first, end = 0, 0
    for start, stop in ranges:
        if start > end:
            yield first, end
            first = start
        end = stop
    yield first, end
