"""Where rows come from: files of several kinds, folders and patterns of them, and data sets on the Hugging Face Hub.

Files are read here rather than through `datasets`, since each row must know its place: an error in the data is only
useful when it says where. A row that cannot be read is not raised but given out among the good ones, so that
`data.on_bad` is decided in one place; what is wrong with a whole file is raised. Everything is streamed: a file may be
larger than the memory.

    rows.py      what is given out: Row, BadRow, Place
    opened.py    a source as a whole: renaming, the limit, the digest
    kinds.py     KINDS, one line for each kind of file, and one file for each reader beside it
    find.py      which files a path means
    files.py     one file: its bytes, unpacked, its text, and what can be wrong with it
    hub_rows.py  the Hub
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tune.data.sources.files import File
from tune.data.sources.find import find_files
from tune.data.sources.hub_rows import HubSplit, is_hub_id
from tune.data.sources.kinds import FILE_ENDINGS, KINDS
from tune.data.sources.opened import Opened, Part
from tune.data.sources.rows import BadRow, Place, Row
from tune.errors import DataError

if TYPE_CHECKING:
    from tune.recipe.schema import Data, Source

__all__ = ["EXTENSIONS", "KINDS", "BadRow", "Opened", "Place", "Row", "check_places", "is_hub_id", "open_source"]

EXTENSIONS = FILE_ENDINGS


class _FilePart:
    """A file with the kind that its ending says."""

    def __init__(self, file: File) -> None:
        self._file, self._kind = file, KINDS[file.ending]
        self.shown, self.by_line = file.shown, self._kind.by_line

    def rows(self, index: int) -> Iterator[Row | BadRow]:
        return self._kind.read(self._file, index)

    def feed(self, hasher: Any) -> None:
        # Equal bytes are other rows where the ending has them read otherwise.
        hasher.update(f"{self._file.ending}{self._file.packing}".encode())
        self._file.feed(hasher)


def check_places(data: Data) -> None:
    """Find the local files of all sources, and read none: a misspelt path is told before anything slow begins.

    Raises:
        DataError: what `open_source` raises of files, folders and patterns.
    """
    for source in (*data.train, *(data.eval if isinstance(data.eval, tuple) else ())):
        if _is_local(source):
            open_source(source)


def _is_local(source: Source) -> bool:
    return not is_hub_id(source.path) or os.path.lexists(source.path)


def open_source(source: Source) -> Opened:
    """Find what a source of the recipe names; of files nothing is read yet, a data set of the Hub is fetched.

    A local path wins over a hub id of the same name.

    Raises:
        DataError: the file, folder or data set is missing, not permitted, or of a kind that is not read; a pattern
            matches nothing.
    """
    parts: list[Part]
    if not _is_local(source):
        parts = [HubSplit(source)]
    else:
        if given := [key for key in ("split", "config", "revision") if getattr(source, key) is not None]:
            raise DataError(f"{source.path}: is a local path, and {given[0]}: is for data sets on the Hub. Remove it.")
        files = find_files(source.path, KINDS, frozenset(source.columns.values()))
        parts = [_FilePart(file) for file in files]
    return Opened(source.path, parts, source.columns, source.limit)
