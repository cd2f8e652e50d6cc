"""The common part of templates written here: segments in Python, and the same as jinja."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from tune.data.conversation import BadRowError, Conversation, Message
from tune.data.templates.segment import Segment
from tune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class WrittenTemplate(ABC):
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
    source: ClassVar[str]
    """The jinja form, with `BOS` on a line of its own and `SPACE` where those of the tokenizer belong."""

    @property
    def jinja(self) -> str:
        """The jinja form for the bound tokenizer."""
        bos = "{{- bos_token -}}\n" if self.bos else ""
        return self.source.replace("BOS\n", bos).replace("SPACE", self.space)

    @property
    def end_of_turn(self) -> str | None:
        """The control token that ends an answer."""
        return self.eos

    def control_tokens(self) -> list[str]:
        """The control tokens that the tokenizer must have; an empty one is the end token of a tokenizer without."""
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
                "Set data.add_tokens: true to add and train them, or choose a template made of plain text, such as "
                "alpaca or vicuna."
            )

    @abstractmethod
    def segments(self, conversation: Conversation, *, generation_prompt: bool = False) -> list[Segment]:
        """The conversation in segments; with `generation_prompt`, up to where the next answer starts.

        Raises:
            BadRowError: the template cannot express these turns in this order, or their tools.
        """

    def opening(self) -> list[Segment]:
        """The begin-of-sequence token, where the tokenizer has one."""
        return [Segment(self.bos, control=True)] if self.bos else []

    def closing(self, message: Message) -> Segment:
        """The end-of-sequence token of an answer, trained with it."""
        return Segment(self.eos, trained=message.trained, control=True)


@dataclass(frozen=True)
class AlternatingTemplate(WrittenTemplate):
    """A template of user and assistant turns that alternate, behind a system message or none."""

    def segments(self, conversation: Conversation, *, generation_prompt: bool = False) -> list[Segment]:
        """The conversation in segments. Raises BadRowError when the turns do not alternate, or have tools."""
        refuse_tools(conversation, self.name)
        system, turns = opened(conversation)
        check_alternation(turns, self.name, generation_prompt=generation_prompt)
        return self.written(system, turns)

    @abstractmethod
    def written(self, system: str | None, turns: tuple[Message, ...]) -> list[Segment]:
        """The checked turns in segments; a user turn ends where an answer starts."""


def opened(conversation: Conversation) -> tuple[str | None, tuple[Message, ...]]:
    """The system prompt, None when there is none, and the turns after it."""
    if conversation.has_system:
        return conversation.messages[0].content, conversation.messages[1:]
    return None, conversation.messages


def refuse_tools(conversation: Conversation, name: str) -> None:
    """Raise BadRowError when tools are offered or called: nobody defined how template `name` writes them."""
    calls = any(message.extra.get("tool_calls") for message in conversation.messages)
    if calls or conversation.tools:
        what = "calls tools" if calls else "offers tools"
        raise BadRowError(
            f"the conversation {what}, which template {name} has no way to write (mistral-v2 and mistral-v3 have, and "
            "the chat template of a base that was tuned for tools)"
        )


def check_alternation(turns: tuple[Message, ...], name: str, *, generation_prompt: bool) -> None:
    """Raise BadRowError unless user and assistant take turns, the user first (and last, to be answered)."""
    for number, (message, role) in enumerate(zip(turns, ("user", "assistant") * len(turns), strict=False), start=1):
        if message.role != role:
            raise BadRowError(
                f"turn {number} is {message.role}'s where template {name} has {role}'s (user and assistant alternate)"
            )
    if generation_prompt:
        check_answerable(turns)


def check_answerable(turns: tuple[Message, ...]) -> None:
    """Raise BadRowError unless an answer can follow the last turn."""
    if not turns or turns[-1].role not in ("user", "tool"):
        raise BadRowError("the last turn must be the user's for an answer to follow")


OPENED = """\
{%- if messages and messages[0]['role'] == 'system' -%}
    {%- set system = messages[0]['content'] -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set system = none -%}
    {%- set turns = messages -%}
{%- endif -%}
"""
"""The jinja twin of `opened`: sets `system` and `turns`."""

ALTERNATION = (
    OPENED
    + """\
{%- for message in turns -%}
    {%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
        {{- raise_exception('user and assistant must take turns, the user first') -}}
    {%- endif -%}
{%- endfor -%}
"""
)
"""The jinja twin of `opened` and `check_alternation`."""

INPUT = """\
        {%- if message['input'] -%}
            {{- '\\n\\n' + message['input'] -}}
        {%- endif -%}
"""
"""The jinja twin of what `Message.text` has behind the content."""


def _space_after_control(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.eos_token:
        return ""
    alone = tokenizer.encode("a", add_special_tokens=False)
    behind = tokenizer.encode(f"{tokenizer.eos_token}a", add_special_tokens=False)[1:]
    spaced = tokenizer.encode(f"{tokenizer.eos_token} a", add_special_tokens=False)[1:]
    return " " if behind != alone and spaced == alone else ""
