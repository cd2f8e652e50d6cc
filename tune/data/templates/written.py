"""The common part of templates written here: segments in Python, and the same as jinja."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from tune.data.conversation import BadRowError, Conversation, Message
from tune.data.templates.segment import Segment
from tune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class WrittenTemplate:
    """A template bound to a tokenizer's tokens; unbound, those of Llama and Mistral stand in.

    `bos` is written where the tokenizer itself begins a text with it, and empty elsewhere: some tokenizers name a
    token that no text of theirs ever began with. Templates whose reference always writes it say `always_bos`.
    `space` is what must stand before a text that follows a control token for the tokenizer to read it as
    it reads a text of its own: nothing where the tokenizer prepends a space there itself, else one space.
    """

    name: str = ""
    bos: str = "<s>"
    eos: str = "</s>"
    space: str = ""
    always_bos: ClassVar[bool] = False

    @property
    def end_of_turn(self) -> str | None:
        """The control token that ends an answer."""
        return self.eos

    def control_tokens(self) -> list[str]:
        """The control tokens that the tokenizer must have."""
        return [self.eos]

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> Self:
        """This template with the tokenizer's own begin and end tokens."""
        begins = tokenizer.bos_token and (self.always_bos or tokenizer.encode("a")[0] == tokenizer.bos_token_id)
        return replace(
            self,
            bos=str(tokenizer.bos_token) if begins else "",
            eos=str(tokenizer.eos_token or ""),
            space=_space_after_control(tokenizer),
        )

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise DataError naming the control tokens that the tokenizer lacks."""
        known = tokenizer.added_tokens_encoder
        needed = self.control_tokens()
        if "" in needed:
            raise DataError(
                f"template {self.name}: the tokenizer has no end-of-sequence token, with which every answer ends. "
                "Set eos_token in its tokenizer_config.json."
            )
        if missing := [token for token in needed if token not in known]:
            raise DataError(
                f"template {self.name}: the tokenizer lacks the control tokens {', '.join(missing)}. "
                "Choose a template made of plain text, such as alpaca or vicuna, or another base model."
            )

    def rendering(self, jinja: str) -> str:
        """The jinja form for the bound tokenizer: with its space, and without `bos_token` where none is written."""
        bos = "{{- bos_token -}}\n" if self.bos else ""
        return jinja.replace("BOS\n", bos).replace("SPACE", self.space)

    def opening(self) -> list[Segment]:
        """The begin-of-sequence token, where the tokenizer has one."""
        return [Segment(self.bos, control=True)] if self.bos else []

    def closing(self, message: Message) -> Segment:
        """The end-of-sequence token of an answer, trained with it."""
        return Segment(self.eos, trained=message.trained, control=True)


def opened(conversation: Conversation) -> tuple[str | None, tuple[Message, ...]]:
    """The system prompt, None when there is none, and the turns after it."""
    if conversation.has_system:
        return conversation.messages[0].content, conversation.messages[1:]
    return None, conversation.messages


def check_alternation(turns: tuple[Message, ...], name: str, *, generation_prompt: bool) -> None:
    """Raise BadRowError unless user and assistant take turns, the user first (and last, to be answered)."""
    for number, (message, role) in enumerate(zip(turns, ("user", "assistant") * len(turns), strict=False), start=1):
        if message.role != role:
            raise BadRowError(
                f"turn {number} is {message.role}'s where template {name} has {role}'s (user and assistant alternate)"
            )
    if generation_prompt and (not turns or turns[-1].role != "user"):
        raise BadRowError("the last turn must be the user's for an answer to follow")


ALTERNATION = """\
{%- if messages and messages[0]['role'] == 'system' -%}
    {%- set system = messages[0]['content'] -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set system = none -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
        {{- raise_exception('user and assistant must take turns, the user first') -}}
    {%- endif -%}
{%- endfor -%}
"""
"""The jinja twin of `opened` and `check_alternation`: sets `system` and `turns`."""


def _space_after_control(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.eos_token:
        return ""
    alone = tokenizer.encode("a", add_special_tokens=False)
    behind = tokenizer.encode(f"{tokenizer.eos_token}a", add_special_tokens=False)[1:]
    spaced = tokenizer.encode(f"{tokenizer.eos_token} a", add_special_tokens=False)[1:]
    return " " if behind != alone and spaced == alone else ""
