"""CSV and TSV: the first line names the columns, and every value is text, an empty one the empty text.

Python's `csv` splits the lines, in its strict mode: a quote that is out of place is said and not read over. A `.csv`
whose first line has no comma is separated by semicolons or tabs if that line has some, as spreadsheets write where the
comma is a decimal sign.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from itertools import chain

from tune.data.formats import FORMATS
from tune.data.formats.pair import ANSWERS, QUESTIONS
from tune.data.sources.files import BLOCK, File
from tune.data.sources.lines import LONGEST, split_lines
from tune.data.sources.rows import BadRow, Place, Row, printable
from tune.errors import DataError
from tune.secrets import redact

_BLANK = 5_000_000
"""Blank lines that are read over; there is no sense in more, and a file may be packed from nothing else."""
# A number, a sentence, several lines or very many characters.
_NO_NAME = re.compile(r"[-\d.,\s]+|.*\s.*[.?!]|.*\n.*|.{65,}", re.DOTALL)


def read_csv(file: File, index: int, size: int = BLOCK) -> Iterator[Row | BadRow]:
    """The rows of a CSV or TSV file in its order, each with the line on which it starts.

    Args:
        file: what to read.
        index: the file's place among its source's.
        size: characters read at a time.

    Raises:
        DataError: the first line names no columns, a quote never closes, or the file is not UTF-8.
    """
    # The module's limit is one for the whole process, and 128 Ki characters are few for a document. There has to be
    # one: a quote that never closes takes in the rest of the file.
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST))
    lines = _Lines(file, size)
    rows = csv.reader(lines, delimiter=lines.separator, strict=True)
    names: list[str] = []
    unnamed = False
    blank = 0
    number = 1
    while True:
        try:
            for fields in rows:
                if not fields:
                    blank += 1
                    if blank > _BLANK:
                        raise DataError(
                            f"{file.shown}:{number}: holds more than {_BLANK:,} blank lines. Take them out."
                        )
                elif not names:
                    if any(field.strip() for field in fields):
                        names = _names(fields, file, number)
                        unnamed = "" in names
                elif len(fields) == len(names):
                    value = dict(zip(names, fields, strict=True))
                    if unnamed:
                        del value[""]
                    yield Row(value, Place(index, number))
                # A line of nothing but spaces is blank, and no row of one value.
                elif any(field.strip() for field in fields):
                    columns = "1 column" if len(names) == 1 else f"{len(names)} columns"
                    values = "1 value" if len(fields) == 1 else f"{len(fields)} values"
                    yield BadRow(f"has {values}, and the first line names {columns}", Place(index, number))
                number = rows.line_num + 1
            return
        except csv.Error as error:
            said = printable(str(error))
            if lines.ended or "field larger" in said:
                raise DataError(
                    f"{file.shown}:{number}: a quote opens in this row and does not close. "
                    'Close it; a quote within a quoted value is written twice ("").'
                ) from None
            if not names:
                raise DataError(f"{file.shown}:{number}: the first line is not valid CSV ({said}). Mend it.") from None
            yield BadRow(f"is not valid CSV ({said})", Place(index, number))
            number = rows.line_num + 1


class _Lines:
    """A text's lines with their ends, and what separates its columns.

    Attributes:
        separator: between two values.
        ended: whether every line has been given out.
    """

    def __init__(self, file: File, size: int) -> None:
        self.ended = False
        self._shown, self._pieces = file.shown, file.text(size)
        self._begun = ""
        while "\n" not in self._begun.lstrip() and len(self._begun) < BLOCK and (piece := next(self._pieces, "")):
            self._begun += piece
        # Spreadsheets of old Macs end lines with a carriage return alone.
        self._end = "\r" if "\r" in self._begun and "\n" not in self._begun else "\n"
        header = self._begun.lstrip().partition(self._end)[0]
        found = next((mark for mark in ",;\t" if mark in header), ",")
        self.separator = "\t" if file.ending == ".tsv" else found

    def __iter__(self) -> Iterator[str]:
        for _, lines in split_lines(chain((self._begun,), self._pieces), self._shown, end=self._end):
            for line in lines:
                yield line + "\n"
        self.ended = True


def _names(fields: list[str], file: File, line: int) -> list[str]:
    """The columns that the first line names; a column without a name is left out of every row.

    Raises:
        DataError: two have one name, or the line is most likely a row.
    """
    names = [field.strip() for field in fields]
    named = [name for name in names if name]
    if twice := next((name for name in named if named.count(name) > 1), None):
        raise DataError(f"{file.shown}:{line}: names the column {twice!r} twice. Rename or remove one.")
    known = {*QUESTIONS, *ANSWERS, *(column for fmt in FORMATS.values() for column in fmt.columns), *file.named}
    row = next((name for name in named if _NO_NAME.fullmatch(name)), None)
    if row is not None and known.isdisjoint(named):
        row = redact(row)
        shown = repr(row) if len(row) <= 40 else f"{row[:37]!r}..."
        raise DataError(
            f"{file.shown}:{line}: the first line names the columns, and this one looks like a row ({shown}). "
            "Put a line such as instruction,output above it, or rename them with columns:."
        )
    return names
