"""What every format is read into and every template is written from: a conversation of messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from tune.errors import DataError

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = get_args(Role)


class BadRowError(DataError):
    """One row cannot be used, for the reason given. `data.on_bad` decides whether that ends the run."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `input` is Alpaca's separate input; `trained=False` keeps an answer out of the loss.

    `extra` is what a chat template may read besides: `tool_calls`, `tool_call_id`, `name`, `reasoning_content`.
    """

    role: Role
    content: str
    input: str | None = None
    trained: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The content, with the input after a blank line, for templates that have no slot for an input."""
        return f"{self.content}\n\n{self.input}" if self.input else self.content


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in the order in which they were said, and the tools that they may call, as JSON schemas.

    `text` is a whole text to learn, in place of messages: there are none then, no template writes it, and every
    token of it is trained on. `mended` says what a format changed in the order of the turns, in words.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    text: str | None = None
    mended: tuple[str, ...] = ()

    @classmethod
    def of(cls, *turns: tuple[Role, str]) -> Conversation:
        """A conversation of (role, content) pairs."""
        return cls(tuple(Message(role, content) for role, content in turns))

    @property
    def texts(self) -> tuple[str, ...]:
        """What is said in it, without tools and calls."""
        return (self.text,) if self.text is not None else tuple(message.text for message in self.messages)

    @property
    def has_system(self) -> bool:
        """Whether it opens with a system message."""
        return bool(self.messages) and self.messages[0].role == "system"

    def with_system(self, content: str) -> Conversation:
        """This conversation behind a system message, unless it has one or is a text."""
        return (
            self
            if self.has_system or self.text is not None
            else replace(self, messages=(Message("system", content), *self.messages))
        )

    def last_response_only(self) -> Conversation:
        """This conversation with every answer but the last kept out of the loss."""
        last = max((i for i, m in enumerate(self.messages) if m.role == "assistant"), default=-1)
        kept = (
            replace(m, trained=False) if m.role == "assistant" and i != last else m for i, m in enumerate(self.messages)
        )
        return replace(self, messages=tuple(kept))


def checked(messages: Sequence[Message], tools: tuple[Mapping[str, Any], ...] = ()) -> Conversation:
    """The conversation of a row's messages; a blank system message counts as none.

    Only an answer that calls tools, and what a tool returned, may be empty.

    Raises:
        BadRowError: no messages, no assistant turn, an empty turn, or text that is not valid Unicode.
    """
    kept = []
    answered = False
    for number, message in enumerate(messages, start=1):
        role, content = message.role, message.content
        if not content or content.isspace():
            if role == "system":
                continue
            if role != "tool" and "tool_calls" not in message.extra:
                raise BadRowError(_empty_turn(messages, number))
        elif not content.isascii():
            check_unicode(content)
        if message.input:
            check_unicode(message.input)
        answered = answered or role == "assistant"
        kept.append(message)
    if not kept:
        raise BadRowError("the conversation is empty")
    if not answered:
        raise BadRowError("the conversation has no assistant turn, so there is nothing to learn")
    return Conversation(tuple(kept), tools)


def _empty_turn(messages: Sequence[Message], number: int) -> str:
    role = messages[number - 1].role
    what = "answer" if role == "assistant" else f"{role} turn"
    few = sum(message.role != "system" for message in messages) < 3
    return f"the {what} is empty" if few else f"turn {number}, the {what}, is empty"


def check_unicode(text: str) -> None:
    """Raise BadRowError when a text cannot be written as UTF-8."""
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        broken = text[error.start]
        raise BadRowError(
            f"the text holds half a surrogate pair (U+{ord(broken):04X}), which is no character"
        ) from None
