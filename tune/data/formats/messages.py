"""Messages: a list of `{role, content}`, the form of chat completion APIs and of chat templates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from tune.data.conversation import Conversation
from tune.data.formats.fields import label, required_turns
from tune.data.formats.turns import MESSAGE, is_turns, read_conversation, read_messages

COLUMNS = ("messages", "conversations", "conversation")
"""The names under which lists of turns are found without being named."""


@dataclass(frozen=True)
class Messages:
    """Rows of chat messages, taken in their order; a message's `weight: 0` keeps it out of the loss.

    `column` is what the data calls the list.
    """

    name: ClassVar[str] = "messages"
    columns: ClassVar[tuple[str, ...]] = ("messages", "tools", "system")
    needs: ClassVar[str] = "messages, a list of {role, content}"
    column: str = "messages"

    @property
    def label(self) -> str:
        """The format's name, with the data's name of the column where it differs."""
        return label(self.name, {} if self.column == "messages" else {"messages": self.column})

    def fitted(self, rows: Sequence[dict[str, Any]]) -> Messages:
        """This format with the name that these rows have for the list."""
        found = [name for name in COLUMNS if any(is_turns(row.get(name), MESSAGE) for row in rows)]
        if "messages" in found or len(found) != 1:
            return self
        return replace(self, column=found[0])

    def matches(self, row: dict[str, Any]) -> bool:
        """Whether a row has this format's columns."""
        return is_turns(row.get(self.column), MESSAGE)

    def parse(self, row: dict[str, Any]) -> list[Conversation]:
        """The messages in their order, with the tools that they may call.

        Raises:
            BadRowError: a message lacks `role` or `content`, its role is unknown, or tools or calls are malformed.
        """
        return [read_conversation(row, read_messages(required_turns(row, self.column), MESSAGE))]
