"""How rows are read into conversations: one small file a format, and one line here.

`auto` looks at the first rows of a source and takes the format that fits most of them. A format that is read under
other names of columns than its own says so (`label`), and nothing is read where two columns could be meant.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

from tune.data.conversation import Conversation
from tune.data.formats.alpaca import Alpaca
from tune.data.formats.messages import Messages
from tune.data.formats.pair import (
    ANSWERS,
    QUESTIONS,
    Pair,
    answer_columns,
    given_columns,
    present_columns,
    question_columns,
)
from tune.data.formats.prompt_completion import PromptCompletion
from tune.data.formats.question_answer import QuestionAnswer
from tune.data.formats.sharegpt import ShareGPT
from tune.data.formats.text import Text
from tune.errors import DataError, did_you_mean


class Format(Protocol):
    """One way of writing a conversation as a row."""

    @property
    def name(self) -> str:
        """The name that a recipe gives it."""

    @property
    def label(self) -> str:
        """The name, with what differs from the format's own form: `alpaca (output: response)`."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it knows, which `columns` of a source may rename."""

    @property
    def needs(self) -> str:
        """The columns without which it reads nothing, in words."""

    def fitted(self, rows: Sequence[dict[str, Any]]) -> Format:
        """This format for rows like these: with their names for its columns where those are not in doubt."""

    def matches(self, row: dict[str, Any]) -> bool:
        """Whether a row has this format's columns; what they hold is for `parse` to judge."""

    def parse(self, row: dict[str, Any]) -> list[Conversation]:
        """The conversations in a row, one as a rule and never none. Raises BadRowError with the reason."""


# The order breaks ties: a format that is more particular about its columns comes first.
FORMATS: dict[str, Format] = {
    "messages": Messages(),
    "sharegpt": ShareGPT(),
    "prompt_completion": PromptCompletion(),
    "question_answer": QuestionAnswer(),
    "alpaca": Alpaca(),
    "text": Text(),
}

LOOKED_AT = 50
"""How many of a source's first rows decide how all of it is read."""

# Beside one of these a text may be a question, or all of a row rendered, as well as a text to learn.
_NOT_BESIDE_A_TEXT = {*QUESTIONS, *ANSWERS, "label", "summary"}


def find_format(name: str, rows: Sequence[dict[str, Any]] = ()) -> Format:
    """The format of this name, fitted to the first of some rows.

    Raises:
        DataError: with the nearest name when there is no such format.
    """
    if name not in FORMATS:
        near = did_you_mean(name, [*FORMATS, "auto"])
        raise DataError(f"format {name!r} is not known. Use auto or one of {', '.join(FORMATS)}.{near}")
    return FORMATS[name].fitted(rows[:LOOKED_AT]) if rows else FORMATS[name]


def detect_format(rows: Sequence[dict[str, Any]], renamed: Collection[str] = ()) -> Format | None:
    """The format that fits most of the first rows, fitted to them, or None when none fits or several might.

    `renamed` are the columns that a recipe has named already: a format that does not know them is passed over.
    """
    looked_at = rows[:LOOKED_AT]
    formats = [fmt for fmt in FORMATS.values() if set(renamed) <= {*fmt.columns}] or [*FORMATS.values()]
    fits: dict[Format, int] = {}
    for fmt in formats:
        fitted = fmt.fitted(looked_at)
        if count := sum(fitted.matches(row) for row in looked_at):
            fits[fitted] = count
    pairs = {fmt: count for fmt, count in fits.items() if isinstance(fmt, Pair)}
    chosen = _choose_pair(pairs, looked_at, renamed)
    likely = [fmt for fmt in fits if fmt is chosen or not isinstance(fmt, Pair | Text)]
    if likely:
        return max(likely, key=lambda fmt: fits[fmt])
    # Who names the text, and nothing else, means it.
    alone = {*renamed} == {"text"} or not _NOT_BESIDE_A_TEXT & present_columns(looked_at)
    return next((fmt for fmt in fits if isinstance(fmt, Text) and alone), None)


def fitting_pairs(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The formats of a question and an answer whose own columns these rows have; several leave a doubt."""
    looked_at = rows[:LOOKED_AT]
    fitted = {name: fmt.fitted(looked_at) for name, fmt in FORMATS.items()}
    return [
        name
        for name, fmt in fitted.items()
        if isinstance(fmt, Pair) and fmt.exact and any(fmt.matches(row) for row in looked_at)
    ]


def _choose_pair(fits: dict[Pair, int], rows: Sequence[dict[str, Any]], renamed: Collection[str]) -> Pair | None:
    """The one of several formats of a question and an answer that reads these rows, None where there is a doubt."""
    exact = [fmt for fmt in fits if fmt.exact]
    if exact:
        most = max(fits[fmt] for fmt in exact)
        best = [fmt for fmt in exact if fits[fmt] == most]
        return best[0] if len(best) == 1 else None
    questions = [name for name in question_columns(rows) if name in renamed] or question_columns(rows)
    answers = [name for name in answer_columns(rows) if name in renamed] or answer_columns(rows)
    given = given_columns(rows)
    if len(questions) != 1 or len(answers) != 1:
        return None

    history = "history" in present_columns(rows)

    def strangeness(fmt: Pair) -> tuple[bool, ...]:
        read, own = fmt.read, fmt.own
        leaves_out = any(name not in (read.question, read.given) for name in given)
        leaves_out |= history and "history" not in fmt.columns
        return leaves_out, read.question != own.question, read.answer != own.answer, fmt.name != "alpaca"

    same = [fmt for fmt in fits if (fmt.read.question, fmt.read.answer) == (questions[0], answers[0])]
    return min(same, key=strangeness, default=None)


def columns_seen(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The columns of the first rows, in the order of their appearance."""
    return list(dict.fromkeys(str(column) for row in rows[:LOOKED_AT] for column in row))
