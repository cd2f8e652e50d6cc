"""How formats take a value out of a row: with one wording for what is missing or of the wrong type.

A key whose value is null counts as absent: tables fill the keys that a row lacks with nulls.
"""

from __future__ import annotations

from typing import Any, cast

from tune.data.conversation import BadRowError


def required_text(row: dict[str, Any], column: str) -> str:
    """The text under `column`. Raises BadRowError when it is missing or no text."""
    if column not in row:
        raise missing(row, column)
    return _text(row[column], column)


def optional_text(row: dict[str, Any], column: str) -> str:
    """The text under `column`, empty when it is missing, null or blank. Raises BadRowError when it is no text."""
    value = row.get(column)
    if value is None:
        return ""
    text = _text(value, column)
    return "" if text.isspace() else text


def _text(value: object, column: str) -> str:
    if not isinstance(value, str):
        raise BadRowError(f"{column!r} is {kind(value)}, not text")
    return value


def required_turns(row: dict[str, Any], column: str) -> list[dict[str, Any]]:
    """The list of turns under `column`. Raises BadRowError when it is missing or no list of objects."""
    if column not in row:
        raise missing(row, column)
    value = row[column]
    if not isinstance(value, list):
        raise BadRowError(f"{column!r} is {kind(value)}, not a list of turns")
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, dict):
            raise BadRowError(f"turn {number} of {column!r} is {kind(turn)}, not an object")
    return cast(list[dict[str, Any]], value)


def missing(row: dict[str, Any], column: str) -> BadRowError:
    """The error for a row without `column`, with what it has."""
    has = ", ".join(str(name) for name, value in row.items() if value is not None)
    return BadRowError(f"has no {column!r} (it has: {has or 'nothing'})")


def kind(value: object) -> str:
    """What JSON calls a value's type, with its article."""
    names = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    if isinstance(value, str):
        return "text"
    return names.get(type(value), f"of type {type(value).__name__}")


def label(name: str, renamed: dict[str, str], *, transcripts: bool = False) -> str:
    """What a report calls a format: its name, and how these rows differ from it."""
    told = [f"{ours}: {theirs}" for ours, theirs in renamed.items()]
    if transcripts:
        told.append("transcripts")
    return f"{name} ({', '.join(told)})" if told else name
