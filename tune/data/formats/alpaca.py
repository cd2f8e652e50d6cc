"""Alpaca: `instruction`, `output`, and optionally `input` and `system`, one question and one answer a row."""

from __future__ import annotations

from typing import Any

from tune.data.conversation import Conversation, Message, checked
from tune.data.formats.fields import optional_text, required_text


class Alpaca:
    """Rows of Stanford Alpaca and its many descendants."""

    name = "alpaca"
    columns = ("instruction", "input", "output", "system")
    needs = "instruction and output, both text"

    def matches(self, row: dict[str, Any]) -> bool:
        """Whether a row has this format's columns."""
        return isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str)

    def parse(self, row: dict[str, Any]) -> Conversation:
        """One user turn, with its input kept apart for the template, and one assistant turn.

        Raises:
            BadRowError: a column is missing, of the wrong type, or empty.
        """
        system = optional_text(row, "system")
        user = Message("user", required_text(row, "instruction"), input=optional_text(row, "input") or None)
        answer = Message("assistant", required_text(row, "output"))
        return checked([Message("system", system), user, answer])
