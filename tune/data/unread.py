"""What to say of rows that no format reads: what the formats need, and which map of columns is near.

Nothing here decides what is read. The first rows are looked at only to find the words that a person needs next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tune.data.formats import FORMATS, columns_seen

# What others call Alpaca's columns, the likeliest first.
_QUESTIONS = ("instruction", "question", "prompt", "query", "problem", "input", "user", "human")
_ANSWERS = ("output", "response", "answer", "completion", "target", "solution", "reply", "assistant")
_TURN_KEYS = {"messages": {"role", "content"}, "conversations": {"from", "value"}}
_SPEAKERS = ("### Human:", "### Assistant:", "### User:")

_LOOKED_AT = 50


def no_format_fits(path: str, rows: Sequence[dict[str, Any]], columns: Mapping[str, str]) -> str:
    """The message for a source whose rows have no format's columns."""
    seen = ", ".join(columns_seen(rows)) or "none"
    needs = "; ".join(f"{name} needs {fmt.needs}" for name, fmt in FORMATS.items())
    return f"{path}: no format fits its rows (columns seen: {seen}). {advice(rows, columns)} Formats: {needs}."


def advice(rows: Sequence[dict[str, Any]], columns: Mapping[str, str]) -> str:
    """A sentence on what to do with these rows; `columns` are the source's, already applied."""
    if words := not_read(rows):
        return words
    near = near_columns(rows)
    if not near:
        return "Set format: and columns: of the source where its names differ, such as columns: {output: response}."
    listed = ", ".join(f"{ours}: {theirs}" for ours, theirs in {**columns, **near}.items())
    return f"Try columns: {{{listed}}} of the source."


def not_read(rows: Sequence[dict[str, Any]]) -> str:
    """A sentence on a form of rows that this version does not read, or nothing."""
    for row in rows[:_LOOKED_AT]:
        for column, value in row.items():
            if isinstance(value, str) and value.lstrip().startswith(_SPEAKERS):
                speaker = value.lstrip().partition(":")[0]
                return (
                    f"Its column {column!r} holds whole transcripts ('{speaker}:'), which are not read in this "
                    "version. Save each as messages, a list of {role, content}."
                )
            if _is_nested(value):
                return (
                    f"Its column {column!r} holds several answers in one row, which are not read in this version. "
                    "Save each as a row of its own, with instruction, input and output."
                )
    return ""


def near_columns(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The `columns` of a source with which a format may read these rows; empty where none is near."""
    for row in rows[:_LOOKED_AT]:
        for column, value in row.items():
            if isinstance(value, list) and value and isinstance(value[0], dict):
                for ours, keys in _TURN_KEYS.items():
                    if keys <= value[0].keys() and column != ours:
                        return {ours: column}
    texts = {str(c).lower(): str(c) for row in rows[:_LOOKED_AT] for c, value in row.items() if isinstance(value, str)}
    question = next((texts[name] for name in _QUESTIONS if name in texts), None)
    answer = next((texts[name] for name in _ANSWERS if name in texts), None)
    if question is None or answer is None:
        return {}
    named = {"instruction": question, "output": answer}
    if "context" in texts and "input" not in texts:
        named["input"] = texts["context"]
    return {ours: theirs for ours, theirs in named.items() if ours != theirs}


def _is_nested(value: object) -> bool:
    """A list of objects that are answers and no turns of a conversation."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return False
    return any(name in value[0] for name in _ANSWERS) and not any(
        keys <= value[0].keys() for keys in _TURN_KEYS.values()
    )
