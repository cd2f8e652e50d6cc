"""Turns out of order, as scraped conversations have them, brought into the order that templates write.

This is the one place where the order of turns is changed, and only conversations scraped from elsewhere come here:
ShareGPT's, and transcripts. Messages are taken as they are, since they are what a chat template is given.

- System messages in a row at the start become one.
- What the assistant says before the first user's turn is left out, as FastChat's training code does: such halves of
  conversations that were split begin with an answer to a question that is not there.
- Turns of one speaker in a row become one, as mistral-common does before it writes a prompt.

Joined turns have a blank line between them. Turns that call tools, and what tools return, stay as they are.
"""

from __future__ import annotations

from dataclasses import replace

from tune.data.conversation import Conversation, Message
from tune.data.formats.turns import JOINT

LEFT_OUT = "what the assistant says before the first question is left out"
JOINED = "turns in a row by the same speaker are joined"


def in_order(conversation: Conversation) -> Conversation:
    """The conversation with its turns in order; `mended` says what was changed, and is empty where nothing was."""
    previous = "system"
    for message in conversation.messages:
        if message.role == previous or (message.role == "assistant" and previous == "system"):
            break
        previous = message.role
    else:
        return conversation
    return _mended(conversation)


def _mended(conversation: Conversation) -> Conversation:
    messages, mended = list(conversation.messages), []
    first_user = next((i for i, m in enumerate(messages) if m.role == "user"), 0)
    opening = [m for m in messages[:first_user] if m.role != "assistant"]
    if len(opening) < first_user and any(m.role == "assistant" for m in messages[first_user:]):
        messages = [*opening, *messages[first_user:]]
        mended.append(LEFT_OUT)
    joined: list[Message] = []
    for message in messages:
        if joined and _belong_together(joined[-1], message):
            joined[-1] = replace(joined[-1], content=joined[-1].content + JOINT + message.content)
        else:
            joined.append(message)
    if len(joined) < len(messages):
        mended.append(JOINED)
    return replace(conversation, messages=tuple(joined), mended=tuple(mended))


def _belong_together(one: Message, other: Message) -> bool:
    plain = not one.extra and not other.extra and one.role != "tool"
    return plain and one.role == other.role and one.trained == other.trained
