"""Messages: a list of `{role, content}`, the form of chat completion APIs and of chat templates."""

from __future__ import annotations

from typing import Any

from tune.data.conversation import ROLES, Conversation, Role, checked
from tune.data.formats.fields import message, required_turns

_ROLES: dict[str, Role] = {role: role for role in ROLES}


class Messages:
    """Rows of chat messages; a message's `weight: 0` keeps it out of the loss."""

    name = "messages"
    columns = ("messages",)
    needs = "messages, a list of {role, content}"

    def matches(self, row: dict[str, Any]) -> bool:
        """Whether a row has this format's columns."""
        turns = row.get("messages")
        return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "role" in turns[0]

    def parse(self, row: dict[str, Any]) -> Conversation:
        """The messages in their order.

        Raises:
            BadRowError: a message lacks `role` or `content`, or its role is unknown.
        """
        turns = required_turns(row, "messages")
        return checked([message(turn, i, "role", "content", _ROLES) for i, turn in enumerate(turns, start=1)])
