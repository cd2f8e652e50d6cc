"""Mistral's first `[INST]` prompt, equal to `mistral-common` to the token.

v1 (7B v0.1, Mixtral 8x7B) writes `[INST]` as plain text, with spaces around the content and before the answer, and puts
the system prompt before the first user turn, a blank line apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tune.data.conversation import Message
from tune.data.templates.segment import Segment
from tune.data.templates.written import ALTERNATION, INPUT, AlternatingTemplate
from tune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TURNS = (
    """\
BOS
{%- for message in turns -%}
    {%- if message['role'] == 'user' -%}
        {{- 'SPACE[INST] ' -}}
        {%- if system and loop.first -%}
            {{- system + '\\n\\n' -}}
        {%- endif -%}
        {{- message['content'] -}}
"""
    + INPUT
    + """\
        {{- ' [/INST]' -}}
    {%- else -%}
        {%- generation -%}{{- ' ' + message['content'] + eos_token -}}{%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
"""
)


@dataclass(frozen=True)
class MistralV1(AlternatingTemplate):
    """`[INST]` as plain text."""

    name: str = "mistral-v1"
    always_bos: ClassVar[bool] = True
    source: ClassVar[str] = ALTERNATION + _TURNS

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise DataError when the tokenizer has `[INST]` as a control token: it belongs to a later version."""
        super().check_tokenizer(tokenizer)
        refuse_control_inst(self.name, tokenizer)

    def written(self, system: str | None, turns: tuple[Message, ...]) -> list[Segment]:
        """The turns, the system prompt in the first."""
        segments = self.opening()
        for number, message in enumerate(turns):
            if message.role == "user":
                content = with_system(message, system if number == 0 else None)
                segments.append(Segment(f"{self.space}[INST] {content} [/INST]"))
            else:
                segments += [Segment(f" {message.content}", message.trained), self.closing(message)]
        return segments


def with_system(message: Message, system: str | None) -> str:
    """A user turn behind the system prompt that it carries."""
    return f"{system}\n\n{message.text}" if system else message.text


def refuse_control_inst(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise DataError when the tokenizer has `[INST]` as a control token and template `name` writes it as text."""
    if "[INST]" in tokenizer.added_tokens_encoder:
        raise DataError(
            f"template {name}: writes [INST] as plain text, and this tokenizer has it as a control token. "
            "Set data.template: mistral-v3."
        )
