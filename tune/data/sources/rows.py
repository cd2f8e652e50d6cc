"""What a source yields: rows, rows that cannot be used, and the place of each."""

from __future__ import annotations

from typing import Any, NamedTuple


class Place(NamedTuple):
    """Where a row stands within its source.

    `file` counts from 0 among the source's files. `number` is the line on which the row starts, from 1, where the
    file has lines, and else the row, from 0.
    """

    file: int
    number: int


class Row(NamedTuple):
    """One object of a source, by column, and its place."""

    value: dict[str, Any]
    place: Place


class BadRow(NamedTuple):
    """A row that cannot be used: why, as the end of a sentence that begins with its place, and that place."""

    reason: str
    place: Place


def printable(text: str) -> str:
    """A text as a part of a message of one line: what cannot be printed is written as an escape."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
