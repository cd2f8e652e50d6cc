"""What to say of rows that no format reads: what the formats need, and which map of columns is near.

Nothing here decides what is read. The first rows are looked at only to find the words that a person needs next.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tune.data.formats import FORMATS, LOOKED_AT, columns_seen, detect_format, fitting_pairs
from tune.data.formats.pair import ANSWERS, QUESTIONS, Pair, answer_columns, question_columns
from tune.data.formats.transcript import is_transcript

# What others call the two columns besides, the likeliest first. None of these is read without being named.
_QUESTIONS = (*QUESTIONS, "problem", "input", "user", "human")
_ANSWERS = (*ANSWERS, "solution", "reply", "assistant", "chosen")
_ANY_COLUMNS = "Set format: and columns: of the source where its names differ, such as columns: {output: response}."
_WRAPPERS = ("data", "rows", "examples", "train", "test", "validation")
"""What a list of rows is called in an object around it."""
_TURN_KEYS = {"messages": {"role", "content"}, "conversations": {"from", "value"}}
_TURNS_AS_TEXT = re.compile(r"""\s*\[\s*\{.*?["'](role|from)["']\s*:""", re.DOTALL)
"""Holds for a list of turns written out, as JSON or as Python shows it."""


def no_format_fits(path: str, rows: Sequence[dict[str, Any]], columns: Mapping[str, str]) -> str:
    """The message for a source whose rows have no format's columns, or those of several."""
    seen = ", ".join(columns_seen(rows)) or "none"
    found = f"{path}: no format fits its rows (columns seen: {seen})."
    if words := _remedy(rows[:LOOKED_AT], columns):
        return f"{found} {words}"
    needs = "; ".join(f"{name} needs {fmt.needs}" for name, fmt in FORMATS.items())
    return f"{found} {_ANY_COLUMNS} Formats: {needs}."


def advice(rows: Sequence[dict[str, Any]], columns: Mapping[str, str], format: str = "auto") -> str:
    """A sentence on what to do with these rows; `columns` are the source's, already applied, and `format` its format.

    A map of columns that is proposed fits that format; for auto, the one that is nearest to the names seen.
    """
    return _remedy(rows[:LOOKED_AT], columns, format) or _ANY_COLUMNS


def _remedy(rows: Sequence[dict[str, Any]], columns: Mapping[str, str], format: str = "auto") -> str:
    """A sentence on what to do with just these rows, or nothing."""
    if words := otherwise_saved(rows):
        return words
    fitting = detect_format(rows, columns)
    if fitting is not None and format in ("auto", fitting.name):
        return "Its columns fit: mend what is in them."
    if format == "auto" and (words := in_doubt(rows)):
        return words
    if near := near_columns(rows, format):
        return f"Try columns: {_map({**columns, **near})} of the source."
    if words := wrapped(rows) or nothing_to_learn(rows):
        return words
    if format == "auto" and any(isinstance(row.get("text"), str) for row in rows):
        return "Set format: text of the source if its column 'text' is to be learnt whole."
    return ""


def otherwise_saved(rows: Sequence[dict[str, Any]]) -> str:
    """A sentence on rows that are a whole table, or whose lists of turns are text, or nothing."""
    if rows and all(_is_table(row, alone=len(rows) == 1) for row in rows):
        return (
            "It holds its rows column by column, as pandas writes them unless told otherwise: save them row by row, "
            'with to_json(path, orient="records", lines=True).'
        )
    for row in rows:
        for column, value in row.items():
            if isinstance(value, str) and _TURNS_AS_TEXT.match(value):
                return (
                    f"Its column {str(column)!r} is text in which a list of turns is spelled out, and not a list: save "
                    "the rows as JSON lines, where a value can be a list."
                )
    return ""


def _is_table(row: dict[str, Any], *, alone: bool) -> bool:
    """Whether a row is a table: each column an object of values by their number, or in a row alone a list of them."""
    values = [*row.values()]
    if not values or len({len(value) if isinstance(value, dict | list) else 0 for value in values} - {0}) != 1:
        return False
    if all(isinstance(value, dict) and all(str(key).isdecimal() for key in value) for value in values):
        return True
    # One list alone, of texts, may be the turns of a row.
    return alone and all(
        isinstance(value, list)
        and not any(isinstance(item, dict) for item in value)
        and (len(values) > 1 or all(isinstance(item, list) for item in value))
        for value in values
    )


def wrapped(rows: Sequence[dict[str, Any]]) -> str:
    """A sentence on a row that holds all rows in a list, or nothing."""
    lists = {
        str(column): value
        for row in rows
        for column, value in row.items()
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
    }
    found = [column for column, inner in lists.items() if column in _WRAPPERS or _is_rows(inner)]
    if not found:
        return ""
    if len(found) > 1:
        return f"Its rows are in its lists {_listed([repr(name) for name in found])}: save each of them by itself."
    return f"Its rows are in its list {found[0]!r}: save that list by itself."


def _is_rows(inner: Sequence[dict[str, Any]]) -> bool:
    fitting = detect_format(inner)
    # A text beside other things may as well be said by someone.
    return fitting is not None and (fitting.name != "text" or all(len(item) == 1 for item in inner))


def in_doubt(rows: Sequence[dict[str, Any]]) -> str:
    """A sentence on columns of which several could be meant, or nothing."""
    fitting = fitting_pairs(rows)
    if len(fitting) > 1:
        return f"Its columns are those of {_listed(fitting)}: set format: of the source to the one that is meant."
    questions, answers = question_columns(rows), answer_columns(rows)
    if fitting or not questions or not answers or len(questions) + len(answers) == 2:
        return ""
    doubts = [
        f"{_listed([repr(name) for name in names])} may each be the {what}"
        for names, what in ((questions, "question"), (answers, "answer"))
        if len(names) > 1
    ]
    chosen = _map({"instruction": questions[0], "output": answers[0]})
    return f"Its columns {', and '.join(doubts)}: name the ones that are meant, such as columns: {chosen}."


def nothing_to_learn(rows: Sequence[dict[str, Any]]) -> str:
    """A sentence on rows that hold prompts and no answers, or nothing."""
    questions = question_columns(rows) or [
        str(name)
        for row in rows
        for name, value in row.items()
        if isinstance(value, list) and value and all(isinstance(item, str) for item in value)
    ]
    if not questions or any(name in row for row in rows for name in _ANSWERS):
        return ""
    return (
        f"Its rows hold prompts (column {questions[0]!r}) and no answers, so there is nothing to learn from them. "
        "Give each row its answer, such as a column completion."
    )


def near_columns(rows: Sequence[dict[str, Any]], format: str = "auto") -> dict[str, str]:
    """The `columns` of a source with which a format may read these rows; empty where none is near."""
    for row in rows:
        for column, value in row.items():
            if ours := _list_of(column, value, row):
                return {ours: column}
    texts: dict[str, str] = {}
    for row in rows:
        for column, value in row.items():
            if isinstance(value, str | int | float):
                texts.setdefault(str(column).strip().lower(), str(column))
    pairs = [fmt for fmt in FORMATS.values() if isinstance(fmt, Pair) and format in ("auto", fmt.name)]
    # A format that has no place for what the question is about comes last.
    pairs.sort(key=lambda fmt: fmt.own.given is None and "context" in texts)
    if maps := [named for fmt in pairs if (named := _named(fmt, texts))]:
        return min(maps, key=_distance)
    spoken = [name for row in rows for name, value in row.items() if isinstance(value, str) and is_transcript(value)]
    return {"text": spoken[0]} if spoken and spoken[0] != "text" else {}


def _named(fmt: Pair, texts: Mapping[str, str]) -> dict[str, str]:
    """The columns of one format, each with the name that is nearest to its own."""
    own = fmt.own
    question = next((texts[name] for name in (own.question, *_QUESTIONS) if name in texts), None)
    answer = next((texts[name] for name in (own.answer, *_ANSWERS) if name in texts), None)
    if question is None or answer is None:
        return {}
    named = {own.question: question, own.answer: answer}
    if own.given and "context" in texts and own.given not in texts:
        named[own.given] = texts["context"]
    return {ours: theirs for ours, theirs in named.items() if ours != theirs}


def _distance(named: Mapping[str, str]) -> tuple[int, bool]:
    """How far names are from a format's own; among equals Alpaca's are the ones that people know."""
    return sum(ours != theirs.strip().lower() for ours, theirs in named.items()), "instruction" not in named


def _list_of(column: str, value: object, row: Mapping[str, Any]) -> str:
    """What a format calls a list of such objects in a row, under another name than this; empty where none has it."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return ""
    for ours, keys in _TURN_KEYS.items():
        if keys <= value[0].keys():
            return "" if column == ours else ours
    # Several answers, if there is something that they answer; else they are rows.
    asked = any(isinstance(row.get(name), str) for name in QUESTIONS)
    return "instances" if asked and "output" in value[0] and column != "instances" else ""


def _map(columns: Mapping[str, str]) -> str:
    """`columns` as a recipe has them."""
    theirs = {name: name if name.isidentifier() else json.dumps(name, ensure_ascii=False) for name in columns.values()}
    return f"{{{', '.join(f'{ours}: {theirs[name]}' for ours, name in columns.items() if ours != name)}}}"


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
