"""Text: a column `text` that is learnt whole, as in pre-training, or that holds a transcript.

A plain text is written without any template: begin-of-sequence token, text, end-of-sequence token, all of it trained
on. Where most of the first rows are transcripts (`### Human: … ### Assistant: …`), every row is read as a
conversation instead, and written with the recipe's template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from tune.data.conversation import BadRowError, Conversation, check_unicode, checked
from tune.data.formats.fields import label, required_text
from tune.data.formats.order import in_order
from tune.data.formats.transcript import are_transcripts, read_transcript
from tune.data.templates.plain import Plain
from tune.data.templates.segment import Segment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Text:
    """Rows of one text each. `transcripts` says that the texts are conversations written out."""

    name: ClassVar[str] = "text"
    columns: ClassVar[tuple[str, ...]] = ("text",)
    needs: ClassVar[str] = "text, which is learnt whole"
    transcripts: bool = False

    @property
    def label(self) -> str:
        """The format's name, and whether the texts are transcripts."""
        return label(self.name, {}, transcripts=self.transcripts)

    def fitted(self, rows: Sequence[dict[str, Any]]) -> Text:
        """This format, told whether these rows are transcripts."""
        return replace(self, transcripts=are_transcripts(row.get("text") for row in rows))

    def matches(self, row: dict[str, Any]) -> bool:
        """Whether a row has this format's column."""
        return row.get("text") is not None

    def parse(self, row: dict[str, Any]) -> list[Conversation]:
        """The text, or the conversation that it writes out.

        Raises:
            BadRowError: there is no text, it is empty, or it is no transcript among transcripts.
        """
        text = required_text(row, "text")
        if not text or text.isspace():
            raise BadRowError("the text is empty")
        if self.transcripts:
            return [in_order(checked(read_transcript(text)))]
        check_unicode(text)
        return [Conversation((), text=text)]


class WholeTexts:
    """What a tokenizer makes of whole texts: its own begin token where it writes one, the text, its end token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises DataError when the tokenizer has no end-of-sequence token."""
        self._plain = Plain().bind(tokenizer)
        self._plain.check_tokenizer(tokenizer)

    def segments(self, text: str) -> list[Segment]:
        """The text in segments, all of it trained on."""
        plain = self._plain
        # Where the tokenizer sets a text apart from the begin token by a space, it does so unless there is one.
        spaced = text if text.startswith((" ", "\u2581")) else plain.space + text
        end = Segment(plain.eos, trained=True, control=True)
        return [*plain.opening(), Segment(spaced, trained=True), end]
