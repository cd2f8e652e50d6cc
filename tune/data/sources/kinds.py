"""The kinds of files that are read: one small file a kind, and one line here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from tune.data.sources.arrow_rows import read_arrow, read_parquet
from tune.data.sources.csv_rows import read_csv
from tune.data.sources.files import PACKED, File
from tune.data.sources.find import NOT_READ
from tune.data.sources.json_rows import read_json
from tune.data.sources.rows import BadRow, Row


class Reader(Protocol):
    """Reads a file's rows, lazily, in its order."""

    def __call__(self, file: File, index: int) -> Iterator[Row | BadRow]:
        """The rows, each with `Place(index, number)`. Raises DataError for a mistake of the whole file."""


class Kind(NamedTuple):
    """How a kind of file is read, and whether its rows are known by the line on which they start."""

    read: Reader
    by_line: bool


KINDS: dict[str, Kind] = {
    ".jsonl": Kind(read_json, by_line=True),
    ".json": Kind(read_json, by_line=True),
    ".ndjson": Kind(read_json, by_line=True),
    ".csv": Kind(read_csv, by_line=True),
    ".tsv": Kind(read_csv, by_line=True),
    ".parquet": Kind(read_parquet, by_line=False),
    ".arrow": Kind(read_arrow, by_line=False),
}
"""By a file's ending; each may also be packed."""

FILE_ENDINGS = frozenset({*KINDS, *PACKED, *NOT_READ})
"""Last endings that say "a file" even where there is none, so that a typing error is not looked up on the Hub."""
