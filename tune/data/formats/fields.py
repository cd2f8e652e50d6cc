"""How formats take a value out of a row: with one wording for what is missing or of the wrong type."""

from __future__ import annotations

from typing import Any, cast

from tune.data.conversation import BadRowError, Message, Role, checked_role


def required_text(row: dict[str, Any], column: str) -> str:
    """The text under `column`. Raises BadRowError when it is missing or no text."""
    if column not in row:
        raise BadRowError(f"has no {column!r} (it has: {', '.join(map(str, row)) or 'nothing'})")
    return _text(row[column], column)


def optional_text(row: dict[str, Any], column: str) -> str:
    """The text under `column`, empty when it is missing or null. Raises BadRowError when it is no text."""
    value = row.get(column)
    return "" if value is None else _text(value, column)


def _text(value: object, column: str) -> str:
    if not isinstance(value, str):
        raise BadRowError(f"{column!r} is {_kind(value)}, not text")
    return value


def required_turns(row: dict[str, Any], column: str) -> list[dict[str, Any]]:
    """The list of turns under `column`. Raises BadRowError when it is missing or no list of objects."""
    if column not in row:
        raise BadRowError(f"has no {column!r} (it has: {', '.join(map(str, row)) or 'nothing'})")
    value = row[column]
    if not isinstance(value, list):
        raise BadRowError(f"{column!r} is {_kind(value)}, not a list of turns")
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, dict):
            raise BadRowError(f"turn {number} of {column!r} is {_kind(turn)}, not an object")
    return cast(list[dict[str, Any]], value)


def message(turn: dict[str, Any], number: int, role_key: str, text_key: str, roles: dict[str, Role]) -> Message:
    """One turn as a message; its own `weight` of 0 keeps it out of the loss.

    Raises:
        BadRowError: naming the turn's number (from 1) and what is wrong with it.
    """
    try:
        if role_key not in turn:
            raise BadRowError(f"has no {role_key!r} (it has: {', '.join(map(str, turn)) or 'nothing'})")
        role = checked_role(turn[role_key], roles)
        if turn.get("tool_calls"):
            raise BadRowError("has tool calls, which no template writes yet")
        weight = turn.get("weight")
        if weight not in (None, 0, 1):
            raise BadRowError(f"its weight is {weight!r}; 0 (not trained) and 1 (trained) are what is understood")
        return Message(role, required_text(turn, text_key), trained=weight != 0)
    except BadRowError as error:
        raise BadRowError(f"turn {number}: {error}") from None


def _kind(value: object) -> str:
    """What JSON calls a value's type, with its article."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), "text" if isinstance(value, str) else "an object")
