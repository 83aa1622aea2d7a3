"""Where a row stands in the files of the user, whatever file the job reads it from.

A place is one integer, a file's index and a row of it, so that it can be a column: rows that
are regrouped into a file of ours take their places along.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from dear_batch.files.parquet import InputFile

# A row alone is a place in the first file.
FILE_ROWS = 1 << 40


class Places:
    """Turns places into positions that a user can look up.

    Args:
        files: the user's own, in the order of the places' indices: those that were regrouped
            together, or the one that is read as it is.
    """

    def __init__(self, files: Sequence[InputFile]) -> None:
        self._paths = [file.path for file in files]
        self._starts = [[0, *accumulate(file.row_group_rows)] for file in files]

    def position(self, place: int) -> tuple[str, int, int]:
        """Path, row group, and row from the start of the file."""
        index, row = divmod(place, FILE_ROWS)
        return self._paths[index], bisect_right(self._starts[index], row) - 1, row
