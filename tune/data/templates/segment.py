"""What a template writes a conversation as, and the contract that every template keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from tune.data.conversation import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Segment(NamedTuple):
    """A stretch of the prompt. `control` is exactly one special token, encoded to its id and never as text."""

    text: str
    trained: bool = False
    control: bool = False


class Template(Protocol):
    """How a conversation becomes a prompt. Its segments' texts, joined, equal what `jinja` renders."""

    @property
    def name(self) -> str:
        """The name that a recipe gives it."""

    @property
    def jinja(self) -> str:
        """The same rendering as a Hugging Face chat template, with {% generation %} around what is trained."""

    @property
    def end_of_turn(self) -> str | None:
        """The control token that ends an answer, at which generation stops; None when it is not known."""

    def control_tokens(self) -> list[str]:
        """The control tokens that the tokenizer must have; none are known of a template in jinja."""

    def segments(self, conversation: Conversation, *, generation_prompt: bool = False) -> list[Segment]:
        """The conversation in segments; with `generation_prompt`, up to where the next answer starts.

        Raises:
            BadRowError: the template cannot express these turns in this order, or their tools.
        """

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> Template:
        """This template with the tokenizer's own begin and end tokens."""

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise DataError naming the control tokens that the tokenizer lacks."""
