"""Rows of Parquet files in bounded memory, whatever the file unfolds to.

A value that a column's dictionary holds is held once, not once a row; other values are unpacked a
few rows at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megallm.base import optional
from megallm.base.errors import DataError

_ROWS = 32  # at most, unpacked together
_BOMB_BYTES, _BOMB_RATIO = 64 << 20, 1000  # unpacked, and times the packed size


def row_batches(
    name: str, keys: Sequence[str], batch_bytes: int, limit: int
) -> Iterator[list[tuple[Any, ...]]]:
    """Yields the rows of the columns `keys`, about `batch_bytes` of text at once; [] for a row with
    a value over `limit`.

    `limit` in bytes. A text that is not UTF-8 comes as bytes. Errors: `DataError` for a damaged
    file, a missing column, and a file that unfolds to more than 1000 times its size.
    """
    pyarrow = optional.need_for_file("pyarrow", name)
    parquet = optional.need_for_file("pyarrow.parquet", name)
    try:
        schema = parquet.read_schema(name)
        _check_columns(name, schema.names, keys)
        text = [
            key
            for key in keys
            if schema.field(key).type in (pyarrow.string(), pyarrow.large_string())
        ]
        with parquet.ParquetFile(name, read_dictionary=text, buffer_size=batch_bytes) as file:
            rows = max(1, min(_ROWS, int(4 * batch_bytes / _longest_rows(name, file, keys))))
            for batch in file.iter_batches(rows, columns=list(keys)):
                yield from _parts(pyarrow, [batch.column(key) for key in keys], batch_bytes, limit)
    except pyarrow.ArrowException as error:
        raise DataError(f"{name} is not a Parquet file that can be read: {error}.") from error
    except (ValueError, OverflowError) as error:  # a time that Python cannot hold
        raise DataError(f"{name} has a value that cannot be read: {error}.") from error


def _check_columns(name: str, columns: Sequence[str], keys: Sequence[str]) -> None:
    for key in keys:
        found = columns.count(key)
        if found != 1:
            has = ", ".join(f"'{column}'" for column in columns)
            raise DataError(
                f"{name} has {f'{found} columns' if found else 'no column'} '{key}', only {has}."
            )


def _longest_rows(name: str, file: Any, keys: Sequence[str]) -> float:
    """Bytes of a row, unpacked, in the group with the longest ones. Errors: `DataError` for a
    bomb.
    """
    longest = 1.0
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        columns = [group.column(k) for k in range(group.num_columns)]
        wanted = [column for column in columns if column.path_in_schema.split(".")[0] in keys]
        size = sum(column.total_uncompressed_size for column in wanted)
        packed = sum(column.total_compressed_size for column in wanted)
        if size > max(_BOMB_BYTES, _BOMB_RATIO * packed):
            raise DataError(
                f"{name} unfolds {packed} bytes to {size}: such a file is a bomb, and is not read."
            )
        longest = max(longest, size / max(group.num_rows, 1))
    return longest


def _parts(
    pyarrow: Any, columns: list[Any], batch_bytes: int, limit: int
) -> Iterator[list[tuple[Any, ...]]]:
    """Yields the rows of one batch, divided by size before any Python object is made of them."""
    rows: list[tuple[Any, ...]] = []
    held = 0
    for number in range(len(columns[0])):
        cells = [_flat(pyarrow, column[number]) for column in columns]
        sizes = [
            cell.as_buffer().size if isinstance(cell, pyarrow.BinaryScalar) and cell.is_valid else 0
            for cell in cells
        ]
        if rows and (held + sum(sizes) > batch_bytes or max(sizes) > limit):
            yield rows
            rows, held = [], 0
        if max(sizes) > limit:
            yield []
        else:
            rows.append(tuple(map(_value, cells)))
            held += sum(sizes)
    if rows:
        yield rows


def _flat(pyarrow: Any, cell: Any) -> Any:
    """Returns the value behind a dictionary's index."""
    return cell.value if isinstance(cell, pyarrow.DictionaryScalar) and cell.is_valid else cell


def _value(cell: Any) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        return cell.as_buffer().to_pybytes()
