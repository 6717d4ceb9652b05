"""Parquet files, as pandas and the Hugging Face hub write them: rows, and the names of classes."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from files.disk import UserError, reading

PARQUET_START = b"PAR1\x15"  # of every file; prose has no control characters
BATCH_ROWS = 256  # rows that are Python objects at once
# Arrow would hold the compressed columns of all row groups: it is told to read them piece by piece.
READING = {"pre_buffer": False, "buffer_size": 2**16, "page_checksum_verification": True}


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: parquet files need pyarrow: pip install pyarrow") from None
    with reading(path), pyarrow.parquet.ParquetFile(path, **READING) as file:
        yield file


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Read {column: value} of each row, with lists as in JSON, and class numbers as their names.

    A class number without a name, such as the -1 of hidden labels, is None.
    """
    with _open(path) as file:
        names = _features(file)
        for batch in file.iter_batches(BATCH_ROWS):
            for row in batch.to_pylist():
                for column in names.keys() & row.keys():
                    row[column] = _to_name(row[column], names[column])
                yield row


def class_names(path: Path) -> dict[str, list[str]]:
    """The names of the classes, in their order, of each column that holds class numbers."""
    with _open(path) as file:
        return _features(file)


def _features(file: Any) -> dict[str, list[str]]:
    """What the hub's `datasets` write into the metadata of the schema."""
    metadata = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", "{}"))
    names = {}
    for column, feature in metadata.get("info", {}).get("features", {}).items():
        feature = feature[0] if isinstance(feature, list) else feature.get("feature", feature)
        if "names" in feature:  # of ClassLabel, or of a list of them
            names[column] = feature["names"]
    return names


def _to_name(value: Any, names: list[str]) -> Any:
    if isinstance(value, list):
        return [_to_name(element, names) for element in value]
    return names[value] if value in range(len(names)) else None
