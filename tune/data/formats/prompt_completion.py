"""Prompts with completions: `prompt` and `completion`, each a text or a list of messages.

Only the completion is trained on, whatever answers the prompt holds. Texts become a user's turn and an answer, written
with the recipe's template; lists of `{role, content}` are put end to end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from tune.data.conversation import BadRowError, Conversation, Message, Role
from tune.data.formats.fields import required_text, required_turns
from tune.data.formats.pair import Columns, Pair
from tune.data.formats.turns import MESSAGE, read_conversation, read_messages


@dataclass(frozen=True)
class PromptCompletion(Pair):
    """Rows of a prompt and what completes it."""

    name: ClassVar[str] = "prompt_completion"
    needs: ClassVar[str] = "prompt and completion, each text or a list of {role, content}"
    own: ClassVar[Columns] = Columns("prompt", "completion", None)
    read: Columns = own

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it knows."""
        return (*super().columns, "tools")

    def parse(self, row: dict[str, Any]) -> list[Conversation]:
        """The prompt's turns and the completion's.

        Raises:
            BadRowError: a column is missing, of the wrong type, or empty, or the completion holds no answer.
        """
        read = self.read
        if not isinstance(row.get(read.question), list) and not isinstance(row.get(read.answer), list):
            return super().parse(row)
        prompt = [
            replace(message, trained=False) if message.role == "assistant" else message
            for message in _turns(row, read.question, "user")
        ]
        completion = _turns(row, read.answer, "assistant")
        if not prompt:
            raise BadRowError(f"{read.question!r} is empty")
        if not any(message.role == "assistant" for message in completion):
            raise BadRowError(f"{read.answer!r} holds no assistant turn, so there is nothing to learn")
        return [read_conversation(row, [*prompt, *completion])]


def _turns(row: dict[str, Any], column: str, role: Role) -> list[Message]:
    if isinstance(row.get(column), list):
        try:
            return read_messages(required_turns(row, column), MESSAGE)
        except BadRowError as error:
            raise BadRowError(f"{column!r}: {error}") from None
    return [Message(role, required_text(row, column))]
