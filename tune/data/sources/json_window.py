"""The part of a long text that is looked at: it slides forward over a JSON document of any size.

A value is parsed where the window stands. If it ends within the window, good; if it may go on beyond it, as much text
again is added and the value is parsed anew, so the work stays within twice that of one pass. What may go on is decided
by where the parser stopped: an error before the last few characters is an error in the document.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from tune.data.sources.json_values import TOO_DEEP, Values
from tune.data.sources.lines import LONGEST
from tune.errors import DataError

_SPACE = re.compile(r"[ \t\r\n]*")
# The longest token that may be cut off without being an open string: `-Infinity`, or two escapes `\\uD83D\\uDE00`.
_MARGIN = 16


class Window:
    """A text given in pieces, from where it is being read.

    `text[at:]` is what is there and not yet read.
    """

    def __init__(self, pieces: Iterator[str], shown: str) -> None:
        self.pieces, self.shown = pieces, shown
        self.text, self.at = "", 0
        self.ended = False
        # Lines are counted up to `_counted`; that line begins at `_line_start`, which may lie behind the window.
        self._line, self._counted, self._line_start = 1, 0, 0

    def more(self) -> None:
        """Let go of what was read and add as much text as is left, or what there is; places in `text` change."""
        self.line()
        kept = [self.text[self.at :]]
        left = size = len(kept[0])
        if size > LONGEST:
            raise self.wrong(f"a row is longer than {LONGEST} characters. Give one object a line, or a list of objects")
        self._counted -= self.at
        self._line_start -= self.at
        self.at = 0
        while size < 2 * left or size == left:
            piece = next(self.pieces, "")
            if not piece:
                self.ended = True
                break
            kept.append(piece)
            size += len(piece)
        self.text = "".join(kept)

    def line(self) -> int:
        """The line, from 1, on which the window stands."""
        if found := self.text.count("\n", self._counted, self.at):
            self._line += found
            self._line_start = self.text.rindex("\n", self._counted, self.at) + 1
        self._counted = self.at
        return self._line

    def peek(self) -> str:
        """The next character that is no space, where the window then stands, or "" at the end."""
        while True:
            match = _SPACE.match(self.text, self.at)
            assert match is not None
            self.at = match.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if self.ended:
                return ""
            self.more()

    def value(self, values: Values) -> tuple[Any, int]:
        """The value at the window's place, and where it ends in `text`.

        Raises:
            DataError: there is none, or it is nested too deeply.
        """
        while True:
            try:
                value, end = values.value(self.text, self.at)
            except json.JSONDecodeError as error:
                cut_off = error.pos >= len(self.text) - _MARGIN or error.msg.startswith("Unterminated string")
                if self.ended or not cut_off:
                    self.at = error.pos
                    raise self.invalid(error.msg) from None
            except RecursionError:
                raise self.wrong(TOO_DEEP) from None
            else:
                # A number may go on: `1` in `1e+`, which stands for `1e+5`.
                if self.text[end - 1] in '}]"' or end < len(self.text) - _MARGIN or self.ended:
                    return value, end
            self.more()

    def wrong(self, what: str) -> DataError:
        """The error that says `what` of the line on which the window stands."""
        return DataError(f"{self.shown}:{self.line()}: {what}.")

    def invalid(self, why: str) -> DataError:
        """The error for a document that is no JSON from where the window stands."""
        line = self.line()
        column = self.at - self._line_start + 1
        return DataError(f"{self.shown}:{line}: is not valid JSON ({why}, column {column}). Mend the file there.")
