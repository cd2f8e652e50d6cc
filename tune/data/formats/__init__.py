"""How rows are read into conversations: one small file a format, and one line here.

`auto` looks at the first rows of a source and takes the format that fits most of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from tune.data.conversation import Conversation
from tune.data.formats.alpaca import Alpaca
from tune.data.formats.messages import Messages
from tune.data.formats.sharegpt import ShareGPT
from tune.errors import DataError, did_you_mean


class Format(Protocol):
    """One way of writing a conversation as a row."""

    @property
    def name(self) -> str:
        """The name that a recipe gives it."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it knows, which `columns` of a source may rename."""

    @property
    def needs(self) -> str:
        """The columns without which it reads nothing, in words."""

    def matches(self, row: dict[str, Any]) -> bool:
        """Whether a row has this format's columns; what they hold is for `parse` to judge."""

    def parse(self, row: dict[str, Any]) -> Conversation:
        """The conversation in a row. Raises BadRowError with the reason."""


# The order breaks ties: a format that is more particular about its columns comes first.
FORMATS: dict[str, Format] = {
    "messages": Messages(),
    "sharegpt": ShareGPT(),
    "alpaca": Alpaca(),
}

_LOOKED_AT = 50


def find_format(name: str) -> Format:
    """The format of this name. Raises DataError with the nearest name when there is none."""
    if name not in FORMATS:
        near = did_you_mean(name, [*FORMATS, "auto"])
        raise DataError(f"format {name!r} is not known. Use auto or one of {', '.join(FORMATS)}.{near}")
    return FORMATS[name]


def detect_format(rows: Sequence[dict[str, Any]]) -> Format | None:
    """The format that fits most of the first rows, or None when none fits any of them."""
    looked_at = rows[:_LOOKED_AT]
    fits = {name: sum(fmt.matches(row) for row in looked_at) for name, fmt in FORMATS.items()}
    best = max(fits, key=lambda name: fits[name])
    return FORMATS[best] if fits[best] else None


def columns_seen(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The columns of the first rows, in the order of their appearance."""
    return list(dict.fromkeys(str(column) for row in rows[:_LOOKED_AT] for column in row))
