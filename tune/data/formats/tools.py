"""Tools that a model may call, and its calls, as chat templates read them.

Both are brought into one form, OpenAI's: `{"type": "function", "function": {"name", "parameters"}}` for a tool and
`{"type": "function", "function": {"name", "arguments"}}` for a call. Data sets write them as objects, as lists, or as
JSON text of either, and a bare `{name, …}` without the frame. Arguments given as JSON text become an object, as
servers do before they render a template: a template that writes JSON would otherwise write a string in a string.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import count
from typing import Any

from tune.data.conversation import BadRowError, Conversation, Message, check_unicode
from tune.data.formats.fields import kind

_PLAIN = (bool, int, float)


def read_tools(row: dict[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The tools under `tools`, or under `functions` as older data has it; none where both are missing or empty.

    Raises:
        BadRowError: they are no list of objects, or JSON text of something else.
    """
    for column in ("tools", "functions"):
        if row.get(column):
            found = _objects(row[column], column)
            return tuple(_framed(tool, column) for tool in found)
    return ()


def read_calls(value: object, key: str) -> list[dict[str, Any]]:
    """The calls of one answer, under `key` of its turn: a list, one object, or JSON text of either.

    Raises:
        BadRowError: they are something else, or a call lacks its function's name.
    """
    calls = [_framed(call, key) for call in _objects(value, key)]
    if not calls:
        raise BadRowError(f"its {key!r} is empty")
    for call in calls:
        arguments = call["function"].get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parsed_arguments(arguments)
        call["function"]["arguments"] = arguments
    return calls


def with_links(conversation: Conversation) -> Conversation:
    """The conversation with the ids of calls and results, and the names of results, where they are missing.

    The results that follow an answer are those of its calls, in their order, where there are as many and no id or name
    says otherwise. New ids come from the call's place: nine letters and digits, as Mistral's models write them.
    """
    if not any("tool_calls" in message.extra for message in conversation.messages):
        return conversation
    messages = list(conversation.messages)
    known = {message.extra.get("tool_call_id") for message in messages}
    known |= {call.get("id") for message in messages for call in message.extra.get("tool_calls", ())}
    fresh = (id for id in (f"call{number:05}" for number in count(1)) if id not in known)
    for start, message in enumerate(messages):
        if "tool_calls" not in message.extra:
            continue
        end = start + 1
        while end < len(messages) and messages[end].role == "tool":
            end += 1
        messages[start:end] = _linked(message, messages[start + 1 : end], fresh)
    return replace(conversation, messages=tuple(messages))


def _linked(answer: Message, results: list[Message], fresh: Iterator[str]) -> list[Message]:
    """An answer with calls and what the tools returned, linked; as they are where it is not clear what belongs."""
    calls = answer.extra["tool_calls"]
    found = [result.extra for result in results] or [{}] * len(calls)
    if len(found) != len(calls) or any(map(_contradict, calls, found)):
        return [answer, *results]
    ids = [call.get("id") or extra.get("tool_call_id") or next(fresh) for call, extra in zip(calls, found, strict=True)]
    linked = [{**call, "id": id} for call, id in zip(calls, ids, strict=True)]
    named = [
        replace(result, extra={"tool_call_id": id, "name": call["function"]["name"], **result.extra})
        for result, call, id in zip(results, calls, ids, strict=False)
    ]
    return [replace(answer, extra={**answer.extra, "tool_calls": linked}), *named]


def _contradict(call: Mapping[str, Any], result: Mapping[str, Any]) -> bool:
    pairs = (call.get("id"), result.get("tool_call_id")), (call["function"]["name"], result.get("name"))
    return any(one and other and one != other for one, other in pairs)


def passed_on(value: object, key: str) -> Any:
    """`value` as a template may read it: without the keys that are null.

    Raises:
        BadRowError: it holds text that is not valid Unicode, a value that JSON has no form for, or too many levels.
    """
    try:
        return _without_nulls(value, key)
    except RecursionError:
        raise BadRowError(f"its {key!r} is nested too deeply") from None


def _without_nulls(value: object, key: str) -> Any:
    if isinstance(value, str):
        check_unicode(value)
    elif isinstance(value, dict):
        for name in value:
            if not isinstance(name, str):
                raise BadRowError(f"its {key!r} has a key that is {kind(name)}, not text")
            check_unicode(name)
        return {name: _without_nulls(item, key) for name, item in value.items() if item is not None}
    elif isinstance(value, list):
        return [_without_nulls(item, key) for item in value]
    elif value is not None and not isinstance(value, _PLAIN):
        raise BadRowError(f"its {key!r} holds a value that is {kind(value)}")
    return value


def _objects(value: object, key: str) -> list[dict[str, Any]]:
    """The objects under `key`, whichever way they are written."""
    found = _from_json(value, key) if isinstance(value, str) else value
    if isinstance(found, dict):
        found = [found]
    if found is None:
        return []
    if not isinstance(found, list):
        raise BadRowError(f"its {key!r} is {kind(found)}, not a list of objects")
    objects = [_from_json(item, key) if isinstance(item, str) else item for item in found]
    for item in objects:
        if not isinstance(item, dict):
            raise BadRowError(f"its {key!r} holds {kind(item)}, not an object")
    return [passed_on(item, key) for item in objects]


def _from_json(text: str, key: str) -> object:
    try:
        return json.loads(text) if text.strip() else None
    except (ValueError, RecursionError) as error:
        said = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise BadRowError(f"its {key!r} is text that is not JSON ({said})") from None


def _framed(item: dict[str, Any], key: str) -> dict[str, Any]:
    """A tool or a call inside its `function` frame."""
    framed = {"type": "function", **item} if "function" in item else {"type": "function", "function": item}
    function = framed["function"]
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRowError(f"an entry of its {key!r} names no function")
    return framed


def _parsed_arguments(text: str) -> object:
    """Arguments as an object where they are JSON text of one, else as they are."""
    try:
        parsed = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        return text
    return parsed if isinstance(parsed, dict) else text
