"""ShareGPT: `conversations`, a list of `{from, value}` with the speakers `human` and `gpt`."""

from __future__ import annotations

from typing import Any

from tune.data.conversation import Conversation, Role, checked
from tune.data.formats.fields import message, required_turns

_ROLES: dict[str, Role] = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "tool": "tool",
    "user": "user",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "observation": "tool",
}


class ShareGPT:
    """Rows exported from ShareGPT, and Vicuna's own training form."""

    name = "sharegpt"
    columns = ("conversations",)
    needs = "conversations, a list of {from, value}"

    def matches(self, row: dict[str, Any]) -> bool:
        """Whether a row has this format's columns."""
        turns = row.get("conversations")
        return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "from" in turns[0]

    def parse(self, row: dict[str, Any]) -> Conversation:
        """The turns in their order.

        Raises:
            BadRowError: a turn lacks `from` or `value`, or its speaker is unknown.
        """
        turns = required_turns(row, "conversations")
        return checked([message(turn, i, "from", "value", _ROLES) for i, turn in enumerate(turns, start=1)])
