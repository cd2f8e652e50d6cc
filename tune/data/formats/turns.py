"""One turn of a conversation, as chat messages and ShareGPT's exports write it: who speaks, and what.

Both forms share everything but the names of their two keys, so a data set that mixes the habits of both is read all
the same. What a chat template may read besides is passed on to it; keys that none reads are left out.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from tune.data.conversation import ROLES, BadRowError, Conversation, Message, Role, checked
from tune.data.formats.fields import kind, missing, optional_text
from tune.data.formats.tools import passed_on, read_calls, read_tools
from tune.errors import did_you_mean

SPEAKERS: dict[str, Role] = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "developer": "system",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "ipython": "tool",
}
"""What data sets call who speaks, and whose turn it is."""
_CALLERS = ("function_call", "tool_call")
"""Speakers whose text is a call of a tool, as JSON."""
_SWITCHES = ("train", "training")
"""What axolotl's users have in place of a weight: true or false."""
_PASSED_ON = ("tool_call_id", "name", "reasoning_content", "reasoning", "thinking")

# mistral-common joins the parts of a message, and messages in a row, in the same way.
JOINT = "\n\n"


class Keys(NamedTuple):
    """The two keys of a turn."""

    role: str
    content: str


MESSAGE = Keys("role", "content")
SHAREGPT = Keys("from", "value")


def is_turns(value: object, keys: Keys) -> bool:
    """Whether a value is a list of turns with these keys; what they hold is judged when they are read."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and keys.role in value[0]


def read_messages(turns: list[dict[str, Any]], keys: Keys) -> list[Message]:
    """The turns as messages. Raises BadRowError with the number of the turn (from 1) and what is wrong with it."""
    messages = []
    for number, turn in enumerate(turns, start=1):
        try:
            messages.append(_message(turn, keys))
        except BadRowError as error:
            raise BadRowError(f"turn {number}: {error}") from None
    return messages


def read_conversation(row: dict[str, Any], messages: list[Message]) -> Conversation:
    """A row's messages with what stands beside them: a system prompt and tools in columns of their own.

    Raises:
        BadRowError: the system prompt stands in both places and differs, or a message is not usable.
    """
    if "system" in row and (system := optional_text(row, "system")):
        if messages and messages[0].role == "system":
            if messages[0].content.strip() not in ("", system.strip()):
                raise BadRowError("has a column 'system' and a system message that says something else")
            messages = messages[1:]
        messages = [Message("system", system), *messages]
    return checked(messages, read_tools(row))


def _message(turn: dict[str, Any], keys: Keys) -> Message:
    speaker, content = turn.get(keys.role), turn.get(keys.content)
    role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if len(turn) == 2 and role is not None and isinstance(content, str):
        return Message(role, content)  # nearly every turn there is
    if speaker is None:
        raise missing(turn, keys.role)
    calls: list[dict[str, Any]] | None = None
    if speaker in _CALLERS:
        role, calls = "assistant", read_calls(content, keys.content)
        turn = {**turn, keys.content: None}
    elif role is None:
        raise BadRowError(_unknown(speaker, keys))
    elif key := next((key for key in ("tool_calls", "function_call") if turn.get(key)), None):
        calls = read_calls(turn[key], key)
    extra = {key: passed_on(turn[key], key) for key in _PASSED_ON if turn.get(key) is not None}
    if calls is not None:
        if role != "assistant":
            raise BadRowError(f"has calls of tools, and is {role}'s; only the assistant calls")
        extra["tool_calls"] = calls
    return Message(role, _content(turn, keys, calls is not None), trained=_trained(turn), extra=extra)


def _trained(turn: dict[str, Any]) -> bool:
    """Whether a turn may be trained on: its `weight`, or what other programs have for it."""
    weight = turn.get("weight")
    if weight not in (None, 0, 1):
        raise BadRowError(f"its weight is {weight!r}; 0 (not trained) and 1 (trained) are what is understood")
    said = {} if weight is None else {"weight": bool(weight)}
    for key in _SWITCHES:
        if (value := turn.get(key)) is None:
            continue
        if not isinstance(value, bool):
            raise BadRowError(f"its {key!r} is {kind(value)}; false (not trained) and true are what is understood")
        said[key] = value
    if len({*said.values()}) > 1:
        told = ", ".join(f"{key}: {json.dumps(turn[key])}" for key in said)
        raise BadRowError(f"it says both that it is trained on and that it is not ({told})")
    return all(said.values())


def _content(turn: dict[str, Any], keys: Keys, may_be_absent: bool) -> str:
    value = turn.get(keys.content)
    if isinstance(value, list):
        return JOINT.join(_part(part, number, keys.content) for number, part in enumerate(value, start=1))
    if isinstance(value, str):
        return value
    if value is None and may_be_absent:
        return ""
    if keys.content not in turn:
        raise missing(turn, keys.content)
    raise BadRowError(f"{keys.content!r} is {kind(value)}, not text")


def _part(part: object, number: int, key: str) -> str:
    """The text of one part of a content that is a list: `{"type": "text", "text": …}`."""
    if not isinstance(part, dict):
        raise BadRowError(f"part {number} of its {key!r} is {kind(part)}, not an object")
    if part.get("type") not in (None, "text"):
        raise BadRowError(f"part {number} of its {key!r} is of type {part['type']!r}; only text is learnt")
    if not isinstance(part.get("text"), str):
        raise BadRowError(f"part {number} of its {key!r} has no 'text'")
    return str(part["text"])


def _unknown(speaker: object, keys: Keys) -> str:
    known = ROLES if keys is MESSAGE else ("system", "human", "gpt", "tool")
    near = did_you_mean(speaker, SPEAKERS) if isinstance(speaker, str) else ""
    return f"unknown role {speaker!r}; roles here are {', '.join(known)}.{near}"
