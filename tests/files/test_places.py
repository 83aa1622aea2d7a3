from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dear_batch.files.parquet import open_input
from dear_batch.files.places import FILE_ROWS, Places


def test_positions_over_row_groups_of_which_one_is_empty(tmp_path: Path) -> None:
    schema = pa.schema([(name, pa.string()) for name in ("qid", "query", "docid", "text")])
    path = tmp_path / "f.parquet"
    with pq.ParquetWriter(path, schema) as writer:
        for rows in (2, 0, 3):
            columns = {name: pa.array(["x"] * rows, pa.string()) for name in schema.names}
            writer.write_table(pa.table(columns, schema))
    file = open_input(path)
    assert file.row_group_rows == (2, 0, 3)
    places = Places([file, file])
    expected = [(str(path), 0, 0), (str(path), 0, 1)] + [(str(path), 2, row) for row in (2, 3, 4)]
    for start in (0, FILE_ROWS):
        assert [places.position(start + row) for row in range(5)] == expected
