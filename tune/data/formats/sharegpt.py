"""ShareGPT: `conversations`, a list of `{from, value}` with the speakers `human` and `gpt`.

What tools there are and how they are called is written in two ways: with a column `tools` and turns by
`function_call` and `observation`, which are passed on as tools and calls; or all of it as text, in a system message
with `<tools>` and answers with `<tool_call>`, which stays the text that it is. A column `tools` beside such a system
message repeats it, and is not given to the template a second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from tune.data.conversation import Conversation
from tune.data.formats.fields import label, required_turns
from tune.data.formats.messages import COLUMNS
from tune.data.formats.order import in_order
from tune.data.formats.tools import with_links
from tune.data.formats.turns import SHAREGPT, is_turns, read_conversation, read_messages


@dataclass(frozen=True)
class ShareGPT:
    """Rows exported from ShareGPT, and Vicuna's own training form. `column` is what the data calls the list."""

    name: ClassVar[str] = "sharegpt"
    columns: ClassVar[tuple[str, ...]] = ("conversations", "tools", "system")
    needs: ClassVar[str] = "conversations, a list of {from, value}"
    column: str = "conversations"

    @property
    def label(self) -> str:
        """The format's name, with the data's name of the column where it differs."""
        return label(self.name, {} if self.column == "conversations" else {"conversations": self.column})

    def fitted(self, rows: Sequence[dict[str, Any]]) -> ShareGPT:
        """This format with the name that these rows have for the list."""
        found = [name for name in COLUMNS if any(is_turns(row.get(name), SHAREGPT) for row in rows)]
        if "conversations" in found or len(found) != 1:
            return self
        return replace(self, column=found[0])

    def matches(self, row: dict[str, Any]) -> bool:
        """Whether a row has this format's columns."""
        return is_turns(row.get(self.column), SHAREGPT)

    def parse(self, row: dict[str, Any]) -> list[Conversation]:
        """The turns, brought into order (see `order.py`), with the tools that they may call (see `with_links`).

        Raises:
            BadRowError: a turn lacks `from` or `value`, its speaker is unknown, or tools or calls are malformed.
        """
        conversation = read_conversation(row, read_messages(required_turns(row, self.column), SHAREGPT))
        if conversation.tools and conversation.has_system and "<tools>" in conversation.messages[0].content:
            conversation = replace(conversation, tools=())
        return [with_links(in_order(conversation))]
