"""What to say of rows that no format reads: what the formats need, and which map of columns is near.

Nothing here decides what is read. The first rows are looked at only to find the words that a person needs next.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tune.data.formats import FORMATS, LOOKED_AT, columns_seen, detect_format, fitting_pairs
from tune.data.formats.pair import ANSWERS, QUESTIONS, Pair, answer_columns, question_columns
from tune.data.formats.transcript import is_transcript

# What others call the two columns besides, the likeliest first. None of these is read without being named.
_QUESTIONS = (*QUESTIONS, "problem", "input", "user", "human")
_ANSWERS = (*ANSWERS, "solution", "reply", "assistant", "chosen")
_TURN_KEYS = {"messages": {"role", "content"}, "conversations": {"from", "value"}}


def no_format_fits(path: str, rows: Sequence[dict[str, Any]], columns: Mapping[str, str]) -> str:
    """The message for a source whose rows have no format's columns, or those of several."""
    seen = ", ".join(columns_seen(rows)) or "none"
    needs = "; ".join(f"{name} needs {fmt.needs}" for name, fmt in FORMATS.items())
    return f"{path}: no format fits its rows (columns seen: {seen}). {advice(rows, columns)} Formats: {needs}."


def advice(rows: Sequence[dict[str, Any]], columns: Mapping[str, str], format: str = "auto") -> str:
    """A sentence on what to do with these rows; `columns` are the source's, already applied, and `format` its format.

    A map of columns that is proposed fits that format; for auto, the one that is nearest to the names seen.
    """
    rows = rows[:LOOKED_AT]
    fitting = detect_format(rows, columns)
    if fitting is not None and format in ("auto", fitting.name):
        return "Its columns fit: mend what is in them."
    if format == "auto" and (words := in_doubt(rows)):
        return words
    if near := near_columns(rows, format):
        return f"Try columns: {_map({**columns, **near})} of the source."
    if words := nothing_to_learn(rows):
        return words
    if format == "auto" and any(isinstance(row.get("text"), str) for row in rows):
        return "Set format: text of the source if its column 'text' is to be learnt whole."
    return "Set format: and columns: of the source where its names differ, such as columns: {output: response}."


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
            if ours := _list_of(column, value):
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


def _list_of(column: str, value: object) -> str:
    """What a format calls a list of such objects, under another name than this; empty where none has it."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return ""
    for ours, keys in _TURN_KEYS.items():
        if keys <= value[0].keys():
            return "" if column == ours else ours
    return "instances" if "output" in value[0] and column != "instances" else ""


def _map(columns: Mapping[str, str]) -> str:
    """`columns` as a recipe has them."""
    theirs = {name: name if name.isidentifier() else json.dumps(name, ensure_ascii=False) for name in columns.values()}
    return f"{{{', '.join(f'{ours}: {theirs[name]}' for ours, name in columns.items() if ours != name)}}}"


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
