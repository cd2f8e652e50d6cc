"""One source of the recipe, from its rows to conversations: which format reads it, and which rows it cannot read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from tune.data.conversation import BadRowError, Conversation
from tune.data.facts import Facts
from tune.data.formats import LOOKED_AT, Format, detect_format, find_format
from tune.data.sources import BadRow, Opened, Place, Row
from tune.data.unread import advice, no_format_fits
from tune.errors import DataError, did_you_mean
from tune.recipe.schema import Data as DataSection
from tune.recipe.schema import Source
from tune.secrets import shaped_like_secret

CHUNK = 2048
"""Rows that are read, encoded and written together; bounds the memory."""


class Said(NamedTuple):
    """A conversation, and the place of the row that it was read from."""

    place: Place
    conversation: Conversation


class Reader:
    """Reads a source once. `facts` grows as it does.

    Raises:
        DataError: on creation, when the source cannot be read or no format reads its first rows.
    """

    def __init__(self, opened: Opened, source: Source, wanted: DataSection) -> None:
        self._opened, self._source, self._wanted = opened, source, wanted
        self._rows = iter(opened)
        self.facts = Facts(format="")
        # The first rows that can be read decide on the format; they are kept and not read again.
        self._first = list(self._next(LOOKED_AT))
        if not self._first:
            bad = self.facts.bad
            raise DataError(
                f"{source.path}: none of its rows ({bad.count}) can be read. The first: {_ended(self._first_bad())}"
            )
        self._format = _format(source, [row.value for row in self._first])
        self.facts.format = self._format.label

    def chunks(self) -> Iterator[list[Said]]:
        """The conversations of all rows, those of a few thousand rows at a time.

        Raises:
            DataError: at the end, when no row could be read.
        """
        found = False
        rows = self._first
        while rows:
            chunk = list(self._parsed(rows))
            self._note_secrets(chunk)
            if chunk:
                found = True
                yield chunk
            rows = list(self._next(CHUNK))
        if not found:
            self._refuse_format()

    def _next(self, count: int) -> Iterator[Row]:
        """The next rows, so many if there are, with the bad ones among them taken down."""
        while count:
            row = next(self._rows, None)
            if row is None:
                return
            self.facts.rows += 1
            if isinstance(row, BadRow):
                self.facts.bad.add(row.place, row.reason)
            else:
                yield row
                count -= 1

    def _parsed(self, rows: list[Row]) -> Iterator[Said]:
        system = self._wanted.system
        last_only = self._wanted.train_on == "last_response"
        for row in rows:
            try:
                parsed = self._format.parse(row.value)
            except BadRowError as error:
                self.facts.bad.add(row.place, str(error))
                continue
            for conversation in parsed:
                for words in conversation.mended:
                    self.facts.mended[words] = self.facts.mended.get(words, 0) + 1
                if system:
                    conversation = conversation.with_system(system)
                if last_only:
                    conversation = conversation.last_response_only()
                yield Said(row.place, conversation)

    def _note_secrets(self, chunk: list[Said]) -> None:
        # One look at all of it costs next to nothing; hardly ever is a second one needed.
        if shaped_like_secret("\n".join(text for said in chunk for text in said.conversation.texts)):
            found = (said.place for said in chunk if shaped_like_secret("\n".join(said.conversation.texts)))
            for place in dict.fromkeys(found):
                self.facts.secrets.add(place)

    def _first_bad(self) -> str:
        place, reason = self.facts.bad.first[0]
        return f"{self._opened.where(place)}: {reason}"

    def _refuse_format(self) -> None:
        """No row at all could be read: most likely the format is another one."""
        path, fmt = self._source.path, self._format
        values = [row.value for row in self._first]
        better = detect_format(values, self._source.columns)
        if better is not None and better.name != fmt.name:
            said = self._first_bad().rstrip(".")
            raise DataError(f"{path}: its rows are not {fmt.name} ({said}). They fit format: {better.name}.")
        found = f"{path}: none of its rows ({self.facts.rows}) can be read as {fmt.name}"
        raise DataError(
            f"{found}, which needs {fmt.needs}. The first: {_ended(self._first_bad())} "
            f"{advice(values, self._source.columns, self._source.format)}"
        )


def _format(source: Source, values: list[dict[str, Any]]) -> Format:
    if source.format != "auto":
        fmt = find_format(source.format, values)
    elif (detected := detect_format(values, source.columns)) is None:
        raise DataError(no_format_fits(source.path, values, source.columns))
    else:
        fmt = detected
    if unknown := [name for name in source.columns if name not in fmt.columns]:
        raise DataError(
            f"{source.path}: columns: names {unknown[0]!r}, which format {fmt.name} does not have "
            f"({', '.join(fmt.columns)}). Ours is on the left, the data's on the right."
            f"{did_you_mean(unknown[0], fmt.columns)}"
        )
    return fmt


def _ended(sentence: str) -> str:
    return sentence if sentence.endswith((".", "?", "!")) else f"{sentence}."
