"""Alpaca: `instruction`, `output`, and optionally `input` and `system`, one question and one answer a row.

The seed tasks of self-instruct, from which Alpaca's rows were made, hold several answers to one instruction as a list
of `instances`, each `{input, output}`; each of them is a conversation of its own. LLaMA-Factory's rows may have earlier
turns in a column `history`, a list of `[question, answer]`, whose answers are trained on like the last one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tune.data.conversation import BadRowError, Conversation, Message
from tune.data.formats.fields import kind
from tune.data.formats.pair import Columns, Pair


@dataclass(frozen=True)
class Alpaca(Pair):
    """Rows of Stanford Alpaca and its many descendants."""

    name: ClassVar[str] = "alpaca"
    needs: ClassVar[str] = "instruction and output, both text"
    own: ClassVar[Columns] = Columns("instruction", "output", "input")
    read: Columns = own

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it knows."""
        return (*super().columns, "instances", "history")

    def matches(self, row: dict[str, Any]) -> bool:
        """Whether a row has this format's columns."""
        return super().matches(row) or (row.get(self.read.question) is not None and self._is_nested(row))

    def parse(self, row: dict[str, Any]) -> list[Conversation]:
        """One conversation, or one for each of a row's `instances`.

        Raises:
            BadRowError: a column is missing, of the wrong type, or empty.
        """
        if row.get(self.read.answer) is None and self._is_nested(row):
            return self._parse_nested(row)
        return super().parse(row)

    def _earlier(self, row: dict[str, Any]) -> list[Message]:
        history = row.get("history")
        if history is None or history == "":  # as CSV has it where a row has none
            return []
        if not isinstance(history, list):
            raise BadRowError(f"'history' is {kind(history)}, not a list of [question, answer]")
        messages: list[Message] = []
        for number, turns in enumerate(history, start=1):
            if not isinstance(turns, list) or len(turns) != 2 or not all(isinstance(turn, str) for turn in turns):
                raise BadRowError(f"item {number} of 'history' is not [question, answer], both text")
            question, answer = turns
            messages += (Message("user", question), Message("assistant", answer))
        return messages

    def _is_nested(self, row: dict[str, Any]) -> bool:
        instances = row.get("instances")
        return isinstance(instances, list) and bool(instances)

    def _parse_nested(self, row: dict[str, Any]) -> list[Conversation]:
        parsed = []
        for number, instance in enumerate(row["instances"], start=1):
            try:
                if not isinstance(instance, dict):
                    raise BadRowError(f"is {kind(instance)}, not an object")
                parsed += super().parse({**row, **instance})
            except BadRowError as error:
                raise BadRowError(f"instance {number}: {error}") from None
        return parsed
