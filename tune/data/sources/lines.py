"""A text's lines, from pieces of any length, with a bound on how long a line may be."""

from __future__ import annotations

from collections.abc import Iterator

from tune.errors import DataError

LONGEST = 1 << 26
"""Characters in the longest row that is read; more is no training example but a file without line ends."""


def split_lines(pieces: Iterator[str], shown: str, begin: int = 1, end: str = "\n") -> Iterator[tuple[int, list[str]]]:
    """The lines of a text without their ends, many at a time, each list with its first line's number.

    Args:
        pieces: the text, in pieces.
        shown: how messages name the file.
        begin: the number of the first line.
        end: what ends a line. Only that does: U+2028 and its like may stand inside a JSON string.

    Raises:
        DataError: a line is longer than LONGEST.
    """
    rest: list[str] = []
    size = 0
    for piece in pieces:
        rest.append(piece)
        size += len(piece)
        if end in piece:
            lines = "".join(rest).split(end)
            rest = [lines.pop()]
            size = len(rest[0])
            yield begin, lines
            begin += len(lines)
        elif size > LONGEST:
            raise DataError(f"{shown}:{begin}: is longer than {LONGEST} characters. Put each row on a line of its own.")
    if last := "".join(rest):
        yield begin, [last]
