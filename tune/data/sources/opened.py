"""A source of the recipe, found and named: its rows, streamed, as often as they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any, Protocol

from tune.data.formats import columns_seen
from tune.data.sources.rows import BadRow, Place, Row
from tune.errors import DataError, did_you_mean

_SHOWN = 50
"""Rows whose columns a message lists."""


class Part(Protocol):
    """A file, or a split of a data set on the Hub."""

    @property
    def shown(self) -> str:
        """How messages name it."""

    @property
    def by_line(self) -> bool:
        """Whether a row is known by its line, from 1, or else by its number, from 0."""

    def rows(self, index: int) -> Iterator[Row | BadRow]:
        """Its rows in order, each with `index` as its place's file."""

    def feed(self, hasher: Any) -> None:
        """Update a hash with all that its rows depend on."""


class Opened:
    """A source, found and named. It may be iterated over again; memory is bounded whatever its size.

    Args:
        path: as the recipe gives it.
        parts: what is read, in order.
        columns: the format's names for columns, each with the name that the rows have.
        limit: how many rows are read over all parts, those that cannot be used counted; None for all.
    """

    def __init__(self, path: str, parts: Sequence[Part], columns: dict[str, str], limit: int | None) -> None:
        self._path, self._parts, self._columns, self._limit = path, tuple(parts), dict(columns), limit
        self._not_kept = {*columns, *columns.values()}
        self._columns_checked = not columns

    @property
    def files(self) -> tuple[str, ...]:
        """What is read, as messages name it: `data/a.jsonl`, or `owner/name[train]`."""
        return tuple(part.shown for part in self._parts)

    def __iter__(self) -> Iterator[Row | BadRow]:
        """The rows in order, their columns renamed.

        Raises:
            DataError: a file cannot be read, or is none of its kind as a whole; there are no rows; a column that is
                renamed is in no row. It may come with any row.
        """
        if not self._columns_checked:
            self._check_columns()
            self._columns_checked = True
        rows = self._as_written()
        first = next(rows, None)
        if first is None:
            raise DataError(f"{self._path}: is empty: it holds no rows. Give data with at least one.")
        rows = chain((first,), rows)
        return map(self._renamed, rows) if self._columns else rows

    def where(self, place: Place) -> str:
        """A place in words: `data/a.jsonl:12`, `data/a.parquet[11]` or `owner/name[train][11]`."""
        part = self._parts[place.file]
        return f"{part.shown}:{place.number}" if part.by_line else f"{part.shown}[{place.number}]"

    def digest(self) -> str:
        """The sha256, in hex, of what the rows are read from: whole files, or what tells a data set's versions apart.

        Names, `columns` and `limit` are not in it: a copied file has the same digest.

        Raises:
            DataError: a file cannot be read.
        """
        hasher = hashlib.sha256()
        for part in self._parts:
            part.feed(hasher)
        return hasher.hexdigest()

    def _as_written(self) -> Iterator[Row | BadRow]:
        rows = chain.from_iterable(part.rows(index) for index, part in enumerate(self._parts))
        return islice(rows, self._limit)

    def _check_columns(self) -> None:
        """Refuse a renamed column that no row has: it would be missed later, under a name that the data does not use.

        Rows are read until every column was seen, which is one row as a rule.
        """
        missing = {theirs: ours for ours, theirs in self._columns.items()}
        first: list[dict[str, Any]] = []
        for row in self._as_written():
            if isinstance(row, BadRow):
                continue
            for name in missing.keys() & row.value.keys():
                del missing[name]
            if not missing:
                return
            if len(first) < _SHOWN:
                first.append(row.value)
        if first:
            theirs, ours = next(iter(missing.items()))
            seen = columns_seen(first)
            turned = f" Ours is on the left, the data's on the right: {{{theirs}: {ours}}}." if ours in seen else ""
            raise DataError(
                f"{self._path}: columns.{ours}: there is no column {theirs!r}. "
                f"It has: {', '.join(seen) or 'none'}.{turned or did_you_mean(theirs, seen)}"
            )

    def _renamed(self, row: Row | BadRow) -> Row | BadRow:
        if isinstance(row, BadRow):
            return row
        value, not_kept = row.value, self._not_kept
        renamed = {name: inner for name, inner in value.items() if name not in not_kept}
        for ours, theirs in self._columns.items():
            if theirs in value:
                renamed[ours] = value[theirs]
        return Row(renamed, row.place)
