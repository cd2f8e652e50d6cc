"""One JSON value at a time: what Python's parser takes and JSON or a tokenizer does not is said here.

`NaN` and `Infinity` are no JSON. A key that stands twice in an object hides its first value. Half a surrogate pair is
no character, and no tokenizer takes it. An integer of thousands of digits is refused by Python itself. Each of them is
a row that cannot be used, never one that is quietly changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from tune.data.sources.rows import BadRow, Place, Row, printable
from tune.secrets import redact

TOO_DEEP = "is nested too deeply to be a row of training data"

# An escaped surrogate that is not beside its other half, as far as the text shows it.
_LONE = re.compile(r"\\u[dD](?:[89abAB]..(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..\\u[dD])[c-fC-F])")
# A backslash of the value's own before a `u`: what follows may then look like an escape and be none.
_ESCAPED = "\\\\u"


class Values:
    """A parser of JSON values.

    `scan(text, start)` returns a value and where it ends, as `json.JSONDecoder.scan_once` does, and leaves in `wrong`
    what is wrong with the value although it was parsed; the caller empties it.
    """

    def __init__(self) -> None:
        self.wrong = ""
        self._decoder = self._made(None)
        self._patient = self._made(self._integer)
        # Below `raw_decode`, which says less and costs a call; typeshed does not know it.
        self.scan: Callable[[str, int], tuple[Any, int]] = self._decoder.scan_once  # type: ignore[attr-defined]

    def value(self, text: str, start: int) -> tuple[Any, int]:
        """The value at `start`, and where it ends.

        Raises:
            json.JSONDecodeError: there is none.
            RecursionError: it is nested too deeply.
        """
        self.wrong = ""
        try:
            return self._decoder.raw_decode(text, start)
        except json.JSONDecodeError:
            raise
        except ValueError:  # an integer of more digits than Python converts
            self.wrong = ""
            return self._patient.raw_decode(text, start)

    def row(self, value: object, text: str, start: int, end: int, place: Place) -> Row | BadRow:
        """A value that was parsed from `text[start:end]` as a row, if it is an object with nothing wrong in it."""
        wrong, self.wrong = self.wrong, ""
        if wrong:
            return BadRow(wrong, place)
        if not isinstance(value, dict):
            return BadRow(f"is no object but {_shown(value)}", place)
        may_be_half = _LONE.search(text, start, end) or text.find(_ESCAPED, start, end) >= 0
        if may_be_half and (half := _half_pair(value)):
            return BadRow(f"holds half a surrogate pair ({half}), which is no character", place)
        return Row(value, place)

    def _made(self, integer: Callable[[str], Any] | None) -> json.JSONDecoder:
        return json.JSONDecoder(parse_int=integer, parse_constant=self._constant, object_pairs_hook=self._object)

    def _constant(self, name: str) -> None:
        self.wrong = f"is not valid JSON (it holds {name}; where nothing is known, write null)"

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            self.wrong = f"has the key {_shown(twice)} twice in one object"
        return made

    def _integer(self, digits: str) -> int:
        try:
            return int(digits)
        except ValueError:
            self.wrong = f"holds a number of {len(digits)} digits"
            return 0


def _half_pair(value: object) -> str:
    """`U+D800` or the like if a text in `value` holds one, else nothing."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        return f"U+{ord(error.object[error.start]):04X}"
    return ""


def _shown(value: object) -> str:
    text = printable(redact(json.dumps(value, ensure_ascii=False)))
    return text if len(text) <= 40 else f"{text[:37]}..."
