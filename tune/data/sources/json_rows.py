"""JSON: a list of objects, or one object a line. The first character that is no space decides which, not the name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain

from tune.data.sources.files import BLOCK, File
from tune.data.sources.json_values import TOO_DEEP, Values
from tune.data.sources.json_window import Window
from tune.data.sources.lines import split_lines
from tune.data.sources.rows import BadRow, Place, Row
from tune.errors import DataError

_SPACE = " \t\r"


def read_json(file: File, index: int, size: int = BLOCK) -> Iterator[Row | BadRow]:
    """The rows of a JSON file in its order.

    Args:
        file: what to read.
        index: the file's place among its source's.
        size: characters read at a time.

    Raises:
        DataError: the file is no list of rows as a whole: not UTF-8, a list that is broken, one object.
    """
    window = Window(file.text(size), file.shown)
    first = window.peek()
    if first == "[":
        return _elements(window, index)
    return _lines(file, window, index) if first else iter(())


def _elements(window: Window, index: int) -> Iterator[Row | BadRow]:
    """The elements of a list one at a time, each with the line on which it starts."""
    values = Values()
    window.at += 1
    if window.peek() == "]":
        window.at += 1
    else:
        while True:
            if window.peek() == "":
                raise window.invalid("the list does not end")
            # Parsing may slide the window, so the line is asked for before, and the place after.
            line = window.line()
            value, end = window.value(values)
            yield values.row(value, window.text, window.at, end, Place(index, line))
            window.at = end
            following = window.peek()
            if following not in (",", "]"):
                raise window.invalid("expecting ',' or ']'" if following else "the list does not end")
            window.at += 1
            if following == "]":
                break
    if window.peek():
        raise window.invalid("expecting the end after ']'")


def _lines(file: File, window: Window, index: int) -> Iterator[Row | BadRow]:
    """JSON Lines; only a newline ends a line, since U+2028 and its like may stand inside JSON strings."""
    values = Values()
    scan, seen = values.scan, False
    pieces = chain((window.text[window.at :],), window.pieces)
    for begin, lines in split_lines(pieces, file.shown, window.line()):
        for number, line in enumerate(lines, start=begin):
            try:
                value, end = scan(line, 0)
                if end != len(line) and line[end:].strip(_SPACE):
                    raise json.JSONDecodeError("Extra data", line, end)
            except (StopIteration, ValueError, RecursionError):
                # Something is before the value, or wrong with it: the slow way finds out.
                values.wrong = ""
                if text := line.strip(_SPACE):
                    place = Place(index, number)
                    found = _one(values, text, place)
                    if isinstance(found, BadRow) and not seen:
                        _refuse_spread_objects(file)
                    seen = True
                    yield found
                continue
            seen = True
            if values.wrong or type(value) is not dict or "\\u" in line:
                yield values.row(value, line, 0, end, Place(index, number))
            else:
                yield Row(value, Place(index, number))


def _one(values: Values, text: str, place: Place) -> Row | BadRow:
    """A line without the spaces around it as a row."""
    try:
        value, end = values.value(text, 0)
        if rest := text[end:].lstrip(_SPACE):
            raise json.JSONDecodeError("Extra data", text, len(text) - len(rest))
    except json.JSONDecodeError as error:
        values.wrong = ""
        return BadRow(f"is not valid JSON ({error.msg}, column {error.colno})", place)
    except RecursionError:
        values.wrong = ""
        return BadRow(TOO_DEEP, place)
    return values.row(value, text, 0, end, place)


def _refuse_spread_objects(file: File) -> None:
    """A file whose first line is no object, while its first lines are: say so, not that each line is broken."""
    window, values = Window(file.text(), file.shown), Values()
    window.peek()
    begins = window.line()
    try:
        value, window.at = window.value(values)
    except DataError:  # no object at all: the lines are judged one by one
        return
    if not isinstance(value, dict) or window.line() == begins:
        return
    if window.peek():
        raise DataError(
            f"{file.shown}: its objects stand over several lines. Put each on one line, or all into a list."
        )
    lists = {key: inner for key, inner in value.items() if isinstance(inner, list)}
    if len(lists) > 1 and not any(isinstance(item, dict) for inner in lists.values() for item in inner):
        hint = "It holds columns, it seems: write one object for each row."
    else:
        hint = f"Its key {min(lists)!r} holds a list: save that list by itself." if lists else "Put it into a list."
    raise DataError(f"{file.shown}: holds one object, not a list of rows. {hint}")
