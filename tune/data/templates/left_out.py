"""Whether a chat template writes the tools, calls and results that it is given.

Jinja says nothing of what a template does not look at: an answer that is a call would be written, and trained, as an
empty one. So a conversation with tools is made up once for a template, and rendered with one thing changed at a time.
What is the same afterwards was not written. A template may refuse the made-up conversation, or write a thing in some
conversations only; then the row itself is rendered again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, Literal

from tune.data.conversation import BadRowError

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]] | None
Write = Callable[[Messages, Tools], str]
"""Renders messages and tools; raises BadRowError where the template refuses them."""
Part = Literal["tools", "tool calls", "tool results"]

_CHANGED = "\uf8df"
_TOOL = {"name": "tide", "description": "High water.", "parameters": {"type": "object", "properties": {}}}
# Mistral's own templates refuse an id that is not of nine letters and digits.
_PROBE: Messages = [
    {"role": "user", "content": "When?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call00001", "type": "function", "function": {"name": "tide", "arguments": {"day": 1}}}],
    },
    {"role": "tool", "content": '{"hour": 12}', "name": "tide", "tool_call_id": "call00001"},
    {"role": "assistant", "content": "At noon."},
]


def parts_written(write: Write) -> frozenset[Part]:
    """The parts that a template writes of the made-up conversation; none where it refuses that."""
    probe: Tools = [{"type": "function", "function": _TOOL}]
    try:
        text = write(_PROBE, probe)
    except BadRowError:
        return frozenset()
    return frozenset(part for part in parts_of(_PROBE, probe) if _depends(write, text, part, _PROBE, probe))


def parts_of(messages: Messages, tools: Tools) -> list[Part]:
    """The parts that a conversation has."""
    found: list[Part] = ["tools"] if tools else []
    if any(message.get("tool_calls") for message in messages):
        found.append("tool calls")
    if any(message["role"] == "tool" for message in messages):
        found.append("tool results")
    return found


def check_nothing_left_out(
    name: str, write: Write, text: str, given: tuple[Messages, Tools], written: Collection[Part]
) -> None:
    """Raise BadRowError where template `name` does not write a part of what it is `given`.

    `text` is what it wrote; `written` are the parts that it is known to write. Those are looked at again only
    where a function's name is seldomer in the text than it must be.
    """
    messages, tools = given
    doubted = [part for part in parts_of(messages, tools) if part not in written or _too_seldom(part, text, *given)]
    if not doubted:
        return
    plain = write(messages, tools)
    lost = [part for part in doubted if not _depends(write, plain, part, messages, tools)]
    if not lost and "tool calls" in doubted:
        lost = _lost_calls(write, messages, tools)
    if lost:
        raise BadRowError(
            f"template {name} leaves out the {' and the '.join(lost)} of the conversation. Set data.template to one "
            "that was made for tools (mistral-v2, mistral-v3, or the chat template of a base that was tuned for them), "
            "or train on rows without"
        )


def _depends(write: Write, text: str, part: Part, messages: Messages, tools: Tools) -> bool:
    """Whether the text changes with a part."""
    if part == "tools":
        tools = None
    elif part == "tool calls":
        messages = [_renamed(message, range(len(message.get("tool_calls") or []))) for message in messages]
    else:
        messages = [{**m, "content": m["content"] + _CHANGED} if m["role"] == "tool" else m for m in messages]
    return _differs(write, text, messages, tools)


def _differs(write: Write, text: str, messages: Messages, tools: Tools) -> bool:
    try:
        return write(messages, tools) != text
    except BadRowError:  # it can only refuse what it looks at
        return True


def _renamed(message: dict[str, Any], which: Collection[int]) -> dict[str, Any]:
    """A message whose calls at the places `which` are of functions with other names."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    return {**message, "tool_calls": [_other(call) if i in which else call for i, call in enumerate(calls)]}


def _other(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "name": function["name"] + _CHANGED}}


def _too_seldom(part: Part, text: str, messages: Messages, tools: Tools) -> bool:
    """Whether the names in a part are not as often in the text as they are if all that is given is written."""
    if part == "tools":
        return any(tool["function"]["name"] not in text for tool in tools or [])
    if part == "tool results":
        return False
    calls = [call["function"] for i in _told(messages) for call in messages[i].get("tool_calls") or []]
    # What is said and offered may hold the name of a function as well, and would hide that the call is missing.
    offered = [tool["function"] for tool in tools or []]
    given = "\0".join(_strings([[message["content"] for message in messages], calls, offered]))
    return any(text.count(name) < given.count(name) for name in {call["name"] for call in calls})


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings([*value, *value.values()])
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _lost_calls(write: Write, messages: Messages, tools: Tools) -> list[Part]:
    """Name the calls when a single one of them is not written, though others are."""
    text = write(messages, tools)
    for i in _told(messages):
        for place in range(len(messages[i].get("tool_calls") or [])):
            changed = [*messages[:i], _renamed(messages[i], [place]), *messages[i + 1 :]]
            if not _differs(write, text, changed, tools):
                return ["tool calls"]
    return []


def _told(messages: Messages) -> range:
    """The turns after the last question: templates may leave out what was called for earlier ones, as mistral-v2."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=0)
    return range(last, len(messages))
