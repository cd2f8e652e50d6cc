"""Questions with answers: `question`, `answer`, and optionally `context` and `system`; GSM8K's form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tune.data.formats.pair import Columns, Pair


@dataclass(frozen=True)
class QuestionAnswer(Pair):
    """Rows of a question and its answer, both text; a `context` stands where Alpaca's input does."""

    name: ClassVar[str] = "question_answer"
    needs: ClassVar[str] = "question and answer, both text"
    own: ClassVar[Columns] = Columns("question", "answer", "context")
    read: Columns = own
