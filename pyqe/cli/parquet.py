"""Rows of Parquet files (``pip install pyqe[parquet]``): columns of the input keep their types."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pyqe._files import atomic_path
from pyqe.cli.rows import Check, Row


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"Parquet needs pyarrow (pip install 'pyqe[parquet]'): {error}") from error
    return pyarrow


def count_rows(path: str) -> int:
    """Rows of a file.

    Raises:
        ValueError: it has no column "text", or is no Parquet.
    """
    metadata = _pyarrow().parquet.read_metadata(path)
    _check_columns(metadata.schema.to_arrow_schema().names, path)
    return metadata.num_rows


def _check_columns(names: Sequence[str], place: str) -> None:
    if "text" not in names:
        raise ValueError(f"{place}: expected a column 'text', got {', '.join(map(repr, names)) or 'no columns'}")


def read_table(path: str, start: int, count: int) -> Any:
    """Some rows of a file, of which no more row groups are read than hold them."""
    pa = _pyarrow()
    with pa.parquet.ParquetFile(path) as file:
        groups, before, end = [], 0, 0
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if end + size <= start:
                before = end + size
            elif end < start + count:
                groups.append(group)
            end += size
        found, at = [], before
        for batch in file.iter_batches(max(count, 1), row_groups=groups):
            found.append(batch.slice(max(start - at, 0), start + count - max(start, at)))
            at += len(batch)
            if at >= start + count:
                break
        return pa.Table.from_batches(found, schema=file.schema_arrow)


def rows_of_table(table: Any, first: int, check: Check) -> Iterator[Row]:
    """Rows of a table, the first of which has the number ``first``, with values that JSON knows.

    Raises:
        ValueError: there is no column "text".
    """
    _check_columns(table.column_names, "table")
    for number, values in enumerate(table.to_pylist(), first):
        fields = _plain(values)
        reason = next(filter(None, (_not_utf8(name, values.get(name)) for name in ("text", "prompt"))), check(fields))
        yield Row(number, fields) if reason is None else Row(number, fields, "failed", reason)


def _not_utf8(name: str, value: Any) -> str | None:
    """What is wrong with bytes, as which some programs write text."""
    try:
        if isinstance(value, bytes):
            value.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"{name}: invalid UTF-8 at byte {error.start + 1}"
    return None


def _plain(value: Any) -> Any:
    """A value as JSON has it: what it does not know becomes text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def table_of_rows(rows: Sequence[Row]) -> Any:
    """A table of what rows of lines hold. A text or prompt that is no string becomes JSON.

    Raises:
        ValueError: a field has several types.
    """
    pa = _pyarrow()
    names = dict.fromkeys(name for row in rows for name in row.fields)
    columns = {}
    for name in names:
        values = [row.fields.get(name) for row in rows]
        if name in ("text", "prompt"):
            values = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
        try:
            columns[name] = pa.array(values, pa.string() if name in ("text", "prompt") else None)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise ValueError(f"{name}: Parquet needs one type in all rows; JSON lines do not: {error}") from error
    return pa.table(columns) if columns else pa.table({"text": pa.nulls(len(rows), pa.string())})


def with_results(table: Any, results: Sequence[dict[str, Any]], places: Sequence[str] = ()) -> Any:
    """A table [N] with the results of its rows [N] as columns, which replace its own of the same names.

    All tables have the same columns of results; those of signals that were not asked for hold nulls.

    Args:
        table: what the rows hold.
        results: what came out.
        places: "file" and "line", if they are to be columns.
    """
    from pyqe.scored import SIGNALS

    pa = _pyarrow()
    types = {
        **{name: pa.string() if name == "file" else pa.int64() for name in places},
        "quality": pa.float64(),
        **dict.fromkeys(("status", "reason", "finish_reason"), pa.string()),
        "token_ids": pa.list_(pa.int64()),
        "tokens": pa.list_(pa.string()),
        "offsets": pa.list_(pa.list_(pa.int64())),
        **{f"token_{signal}": pa.list_(pa.float32()) for signal in SIGNALS},
    }
    table = table.drop_columns([name for name in table.column_names if name in types])
    for name, kind in types.items():
        table = table.append_column(name, pa.array([row.get(name) for row in results], kind))
    return table.replace_schema_metadata(None)  # what pandas and others note there is of other columns


def write_table(tables: Sequence[Any], path: Path) -> None:
    """A file of tables whose columns may differ."""
    pa = _pyarrow()
    pa.parquet.write_table(pa.concat_tables(tables, promote_options="permissive"), path)


def _common_schema(paths: Sequence[Path]) -> Any:
    pa = _pyarrow()
    try:
        return pa.unify_schemas([pa.parquet.read_schema(path) for path in paths], promote_options="permissive")
    except pa.ArrowTypeError as error:
        raise ValueError(f"Parquet needs one type in all rows; JSON lines do not: {error}") from error


def _read_as(schema: Any, path: Path) -> Any:
    """The table of a file, with the columns of a schema that its own can be made."""
    pa = _pyarrow()
    table = pa.concat_tables([schema.empty_table(), pa.parquet.read_table(path)], promote_options="permissive")
    return table.select(schema.names)


def join(paths: Sequence[Path], target: Path) -> None:
    """One file of several, whose columns may differ.

    Raises:
        ValueError: columns of the same name have types that cannot be made one.
    """
    schema = _common_schema(paths)
    with _pyarrow().parquet.ParquetWriter(target, schema) as writer:
        for path in paths:
            writer.write_table(_read_as(schema, path))


def make_alike(paths: Sequence[Path]) -> None:
    """Give all files the same columns, as readers of a folder take those of the first one.

    Raises:
        ValueError: columns of the same name have types that cannot be made one.
    """
    pa = _pyarrow()
    schema = _common_schema(paths)
    for path in paths:
        if not pa.parquet.read_schema(path).equals(schema):
            with atomic_path(path) as temporary:
                pa.parquet.write_table(_read_as(schema, path), temporary)
