"""One question and one answer a row: what Alpaca's rows, prompts with completions and questions with answers share.

Data sets name the two columns in many ways. Where a format's own column is missing from every row and exactly one
column with a usual name for it is there, that one is read, and said. Two such columns are never guessed between.

A question may hold a transcript (`### Human: … ### Assistant:`): it is read as the turns that it is, the answers in
it are not trained on, and the answer column is the last turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

from tune.data.conversation import BadRowError, Conversation, Message, checked
from tune.data.formats.fields import label, optional_text, required_text
from tune.data.formats.order import in_order
from tune.data.formats.transcript import are_transcripts, read_transcript

QUESTIONS = ("instruction", "question", "prompt", "query")
ANSWERS = ("output", "response", "answer", "completion", "target")
GIVEN = ("input", "context")
SYSTEMS = ("system", "system_prompt")


class Columns(NamedTuple):
    """What holds the question, the answer, what the question is about, and the system prompt."""

    question: str
    answer: str
    given: str | None
    system: str = "system"


@dataclass(frozen=True)
class Pair:
    """Rows of one question and one answer. `own` are the format's names of columns, `read` those that are read."""

    name: ClassVar[str]
    needs: ClassVar[str]
    own: ClassVar[Columns]
    read: Columns
    transcripts: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it knows."""
        return tuple(column for column in self.own if column is not None)

    @property
    def exact(self) -> bool:
        """Whether question and answer stand under the format's own names."""
        return self.read[:2] == self.own[:2]

    @property
    def label(self) -> str:
        """The format's name, with the data's names of columns where they differ."""
        pairs = zip(self.own, self.read, strict=True)
        renamed = {ours: theirs for ours, theirs in pairs if ours and theirs and ours != theirs}
        return label(self.name, renamed, transcripts=self.transcripts)

    def fitted(self, rows: Sequence[dict[str, Any]]) -> Self:
        """This format with the names that these rows have for its columns."""
        own, present, texts = self.own, present_columns(rows), text_columns(rows)
        question = own.question if own.question in present else _only(question_columns(rows), own.question)
        answer = own.answer if own.answer in present else _only(answer_columns(rows), own.answer)
        given = None
        if own.given is not None:
            names = [own.given] if own.given in present else [name for name in GIVEN if name in texts]
            given = next((name for name in names if name != question), own.given if question != own.given else None)
        system = next((name for name in SYSTEMS if name in present), own.system)
        transcripts = given not in texts and are_transcripts(row.get(question) for row in rows)
        return replace(self, read=Columns(question, answer, given, system), transcripts=transcripts)

    def matches(self, row: dict[str, Any]) -> bool:
        """Whether a row has this format's columns."""
        return row.get(self.read.question) is not None and row.get(self.read.answer) is not None

    def parse(self, row: dict[str, Any]) -> list[Conversation]:
        """One user turn, with what it is about kept apart for the template, and one assistant turn.

        Raises:
            BadRowError: a column is missing, of the wrong type, or empty.
        """
        read = self.read
        question, answer = required_text(row, read.question), required_text(row, read.answer)
        messages = self._earlier(row)
        if system := optional_text(row, read.system):
            messages.insert(0, Message("system", system))
        if self.transcripts:
            return [in_order(checked(_continued(question, answer, messages, read)))]
        given = optional_text(row, read.given) if read.given else ""
        messages += (Message("user", question, given or None), Message("assistant", answer))
        return [checked(messages)]

    def _earlier(self, row: dict[str, Any]) -> list[Message]:
        """The turns before the question, which only some formats have."""
        return []


def _continued(question: str, answer: str, opening: list[Message], read: Columns) -> list[Message]:
    """The turns of a transcript with the answer as the last; only that one is trained on."""
    turns = read_transcript(question)
    if turns[-1].role == "assistant":
        if turns[-1].content:
            raise BadRowError(
                f"the transcript in {read.question!r} ends with an answer, and {read.answer!r} is another"
            )
        turns.pop()
    turns = [replace(turn, trained=False) if turn.role == "assistant" else turn for turn in turns]
    return [*opening, *turns, Message("assistant", answer)]


def question_columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The columns that may hold the question; only where there is one is there no doubt."""
    texts = text_columns(rows)
    likely = [name for name in (*QUESTIONS, "input") if name in texts]
    spoken = [name for name in likely if are_transcripts((row.get(name) for row in rows), from_the_start=True)]
    if len(spoken) == 1:
        return spoken
    # What a question is about; but a prompt may be the whole of it, and may not.
    if len(likely) > 1 and "prompt" not in likely and "input" in likely:
        likely.remove("input")
    return likely


def answer_columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The columns that may hold the answer; only where there is one is there no doubt."""
    texts = text_columns(rows)
    return [name for name in ANSWERS if name in texts]


def given_columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The columns that may hold what the question is about."""
    texts = text_columns(rows)
    return [name for name in GIVEN if name in texts]


def text_columns(rows: Iterable[dict[str, Any]]) -> set[str]:
    """The columns that hold text, more than white space, in some row."""
    return {name for row in rows for name, value in row.items() if isinstance(value, str) and value.strip()}


def present_columns(rows: Iterable[dict[str, Any]]) -> set[str]:
    """The columns that are not null in some row."""
    return {name for row in rows for name, value in row.items() if value is not None}


def _only(names: list[str], otherwise: str) -> str:
    return names[0] if len(names) == 1 else otherwise
