"""What every format is read into and every template is written from: a conversation of messages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from tune.errors import DataError, did_you_mean

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = get_args(Role)


class BadRowError(DataError):
    """One row cannot be used, for the reason given. `data.on_bad` decides whether that ends the run."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `input` is Alpaca's separate input; `trained=False` keeps an answer out of the loss."""

    role: Role
    content: str
    input: str | None = None
    trained: bool = True

    @property
    def text(self) -> str:
        """The content, with the input after a blank line, for templates that have no slot for an input."""
        return f"{self.content}\n\n{self.input}" if self.input else self.content


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in the order in which they were said."""

    messages: tuple[Message, ...]

    @classmethod
    def of(cls, *turns: tuple[Role, str]) -> Conversation:
        """A conversation of (role, content) pairs."""
        return cls(tuple(Message(role, content) for role, content in turns))

    @property
    def has_system(self) -> bool:
        """Whether it opens with a system message."""
        return bool(self.messages) and self.messages[0].role == "system"

    def with_system(self, content: str) -> Conversation:
        """This conversation behind a system message, unless it has one."""
        return self if self.has_system else Conversation((Message("system", content), *self.messages))

    def last_response_only(self) -> Conversation:
        """This conversation with every answer but the last kept out of the loss."""
        last = max((i for i, m in enumerate(self.messages) if m.role == "assistant"), default=-1)
        return Conversation(
            tuple(
                replace(m, trained=False) if m.role == "assistant" and i != last else m
                for i, m in enumerate(self.messages)
            )
        )


def checked(messages: list[Message]) -> Conversation:
    """The conversation of a row's messages; a blank system message counts as none.

    Raises:
        BadRowError: no messages, no assistant turn, an empty turn, or text that is not valid Unicode.
    """
    kept = [m for m in messages if m.role != "system" or m.content.strip()]
    if not kept:
        raise BadRowError("the conversation is empty")
    if not any(m.role == "assistant" for m in kept):
        raise BadRowError("the conversation has no assistant turn, so there is nothing to learn")
    for number, message in enumerate(kept, start=1):
        if not message.content.strip():
            what = "answer" if message.role == "assistant" else f"{message.role} turn"
            raise BadRowError(f"the {what} is empty" if len(kept) < 3 else f"turn {number}, the {what}, is empty")
        _check_unicode(message.content)
        if message.input:
            _check_unicode(message.input)
    return Conversation(tuple(kept))


def _check_unicode(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        broken = text[error.start]
        raise BadRowError(
            f"the text holds half a surrogate pair (U+{ord(broken):04X}), which is no character"
        ) from None


def checked_role(name: object, aliases: dict[str, Role]) -> Role:
    """The role that `name` stands for in a format with these names for roles.

    Raises:
        BadRowError: an unknown role, or one that is not a string.
    """
    if isinstance(name, str) and name in aliases:
        return aliases[name]
    known = ", ".join(aliases)
    near = did_you_mean(name, aliases) if isinstance(name, str) else ""
    raise BadRowError(f"unknown role {name!r}; roles here are {known}.{near}")
