"""Parquet and Arrow: tables, read a few rows at a time through pyarrow.

A column of JSON texts (Arrow's `arrow.json` type, which `datasets` writes for objects of mixed form) is parsed, so
that a row is the same whichever way it was saved.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING, Any

from tune.data.sources.files import File
from tune.data.sources.rows import BadRow, Place, Row, printable
from tune.errors import DataError
from tune.secrets import redact

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS = 512
"""Rows made into Python objects at a time."""

_Parse = Callable[[Any], Any]


def read_parquet(file: File, index: int) -> Iterator[Row | BadRow]:
    """The rows of a Parquet file in its order, numbered from 0.

    Raises:
        DataError: the file is no Parquet, damaged, or has a column twice.
    """
    with file.seekable() as handle:
        yield from _rows(_parquet(handle), file, index, "Parquet")


def read_arrow(file: File, index: int) -> Iterator[Row | BadRow]:
    """The rows of an Arrow file, of the file form or the stream form, in its order, numbered from 0.

    Raises:
        DataError: the file is no Arrow, damaged, or has a column twice.
    """
    with file.seekable() as handle:
        yield from _rows(_arrow(handle), file, index, "Arrow")


def _parquet(handle: IO[bytes]) -> Iterator[pa.RecordBatch]:
    import pyarrow.parquet as pq

    # Pages are read as they are needed; else a row group is held, which may be the whole file.
    table = pq.ParquetFile(handle, buffer_size=1 << 20, pre_buffer=False)
    yield from table.iter_batches(batch_size=_ROWS, use_threads=False)


def _arrow(handle: IO[bytes]) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    is_file = handle.read(6) == b"ARROW1"
    handle.seek(0)
    if is_file:
        table = pa.ipc.open_file(handle)
        batches = (table.get_batch(number) for number in range(table.num_record_batches))
    else:
        batches = pa.ipc.open_stream(handle)
    for batch in batches:
        # Its bytes are taken as they lie in the file: unchecked, a damaged one reads other memory, or ends the process.
        batch.validate(full=True)
        yield batch


def _rows(batches: Iterator[pa.RecordBatch], file: File, index: int, kind: str) -> Iterator[Row | BadRow]:
    number = 0
    for batch, parsers in _whole(batches, file, kind):
        for start in range(0, batch.num_rows, _ROWS):
            for made in _values(batch.slice(start, _ROWS), parsers):
                place = Place(index, number)
                number += 1
                yield BadRow(made, place) if isinstance(made, str) else Row(made, place)


def _whole(
    batches: Iterator[pa.RecordBatch], file: File, kind: str
) -> Iterator[tuple[pa.RecordBatch, dict[str, _Parse]]]:
    """The batches, each with its parsers; what pyarrow cannot read ends in one message."""
    import pyarrow as pa

    try:
        for batch in batches:
            yield batch, _parsers(batch, file)
    # An OSError with a number is the disk's; pyarrow's own have none. It passes on what Python's codecs raise.
    except (pa.ArrowException, OSError, ValueError, MemoryError, EOFError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(f"{file.shown}: cannot be read as {kind} ({_said(error)}). Write or fetch it again.") from None


def _values(batch: pa.RecordBatch, parsers: dict[str, _Parse]) -> Iterator[dict[str, Any] | str]:
    """The rows of a batch as dicts, in place of one that cannot be made the reason."""
    try:
        rows = _made(batch, parsers)
    except (ValueError, ArithmeticError, RecursionError) as error:
        if batch.num_rows > 1:
            for start in range(batch.num_rows):
                yield from _values(batch.slice(start, 1), parsers)
        else:
            yield f"holds a value that cannot be read ({_said(error)})"
        return
    yield from rows


def _said(error: BaseException) -> str:
    """What a library said; it may quote the damaged file."""
    return printable(" ".join(redact(str(error)).split())[:160]) or type(error).__name__


def _made(batch: pa.RecordBatch, parsers: dict[str, _Parse]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = batch.to_pylist()
    for name, parse in parsers.items():
        for row in rows:
            row[name] = parse(row[name])
    return rows


def _parsers(batch: pa.RecordBatch, file: File) -> dict[str, _Parse]:
    """What makes Python objects of JSON texts, for each column that holds some."""
    names = batch.schema.names
    if len({*names}) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{file.shown}: names the column {twice!r} twice. Rename or remove one.")
    found = {field.name: _parser(field.type) for field in batch.schema}
    return {name: parse for name, parse in found.items() if parse is not None}


def _parser(type: pa.DataType) -> _Parse | None:
    """What parses the JSON texts within a value of this type; None where there can be none."""
    import pyarrow as pa

    if isinstance(type, pa.JsonType):
        return lambda value: None if value is None else json.loads(value)
    if pa.types.is_struct(type):
        found = {field.name: _parser(field.type) for field in type}
        parse = {name: inner for name, inner in found.items() if inner is not None}
        if parse:
            return lambda value: value and {k: parse[k](v) if k in parse else v for k, v in value.items()}
    elif pa.types.is_list(type) or pa.types.is_large_list(type) or pa.types.is_fixed_size_list(type):
        inner = _parser(type.value_type)
        if inner is not None:
            return lambda value: value and [inner(item) for item in value]
    return None
