"""Mistral's `[INST]` prompts, equal to `mistral-common` to the token.

v1 (7B v0.1, Mixtral 8x7B) writes `[INST]` as plain text, with spaces around the content and before the
answer, and puts the system prompt before the first user turn. v3 (7B v0.3, Mixtral 8x22B) has `[INST]` and
`[/INST]` as control tokens without spaces, puts the system prompt before the last user turn, and strips
trailing spaces, and only spaces, from answers. Both join a system prompt and its turn by a blank line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tune.data.conversation import Conversation, Message
from tune.data.templates.segment import Segment
from tune.data.templates.written import ALTERNATION, WrittenTemplate, check_alternation, opened
from tune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_JINJA_V1 = (
    ALTERNATION
    + """\
BOS
{%- for message in turns -%}
    {%- if message['role'] == 'user' -%}
        {{- 'SPACE[INST] ' -}}
        {%- if system and loop.first -%}
            {{- system + '\\n\\n' -}}
        {%- endif -%}
        {{- message['content'] -}}
        {%- if message['input'] -%}
            {{- '\\n\\n' + message['input'] -}}
        {%- endif -%}
        {{- ' [/INST]' -}}
    {%- else -%}
        {%- generation -%}{{- ' ' + message['content'] + eos_token -}}{%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
"""
)

_JINJA_V3 = (
    ALTERNATION
    + """\
BOS
{%- for message in turns -%}
    {%- if message['role'] == 'user' -%}
        {{- '[INST]SPACE' -}}
        {%- if system and loop.index0 == (turns|length - 1) // 2 * 2 -%}
            {{- system + '\\n\\n' -}}
        {%- endif -%}
        {{- message['content'] -}}
        {%- if message['input'] -%}
            {{- '\\n\\n' + message['input'] -}}
        {%- endif -%}
        {{- '[/INST]' -}}
    {%- else -%}
        {%- generation -%}{{- 'SPACE' + message['content'].rstrip(' ') + eos_token -}}{%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
"""
)


@dataclass(frozen=True)
class MistralV1(WrittenTemplate):
    """`[INST]` as plain text."""

    name: str = "mistral-v1"
    always_bos: ClassVar[bool] = True

    @property
    def jinja(self) -> str:
        """The jinja form for the bound tokenizer."""
        return self.rendering(_JINJA_V1)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise DataError when the tokenizer has `[INST]` as a control token: it belongs to a later version."""
        super().check_tokenizer(tokenizer)
        if "[INST]" in tokenizer.added_tokens_encoder:
            raise DataError(
                f"template {self.name}: writes [INST] as plain text, and this tokenizer has it as a control token. "
                "Set data.template: mistral-v3."
            )

    def segments(self, conversation: Conversation, *, generation_prompt: bool = False) -> list[Segment]:
        """The conversation in segments. Raises BadRowError when the turns do not alternate."""
        system, turns = opened(conversation)
        check_alternation(turns, self.name, generation_prompt=generation_prompt)
        segments = self.opening()
        for number, message in enumerate(turns):
            if message.role == "user":
                content = _with_system(message, system if number == 0 else None)
                segments.append(Segment(f"{self.space}[INST] {content} [/INST]"))
            else:
                segments += [Segment(f" {message.content}", message.trained), self.closing(message)]
        return segments


@dataclass(frozen=True)
class MistralV3(WrittenTemplate):
    """`[INST]` and `[/INST]` as control tokens."""

    name: str = "mistral-v3"
    always_bos: ClassVar[bool] = True

    @property
    def jinja(self) -> str:
        """The jinja form for the bound tokenizer."""
        return self.rendering(_JINJA_V3)

    def control_tokens(self) -> list[str]:
        """The control tokens that the tokenizer must have."""
        return ["[INST]", "[/INST]", self.eos]

    def segments(self, conversation: Conversation, *, generation_prompt: bool = False) -> list[Segment]:
        """The conversation in segments. Raises BadRowError when the turns do not alternate."""
        system, turns = opened(conversation)
        check_alternation(turns, self.name, generation_prompt=generation_prompt)
        last_user = (len(turns) - 1) // 2 * 2
        segments = self.opening()
        for number, message in enumerate(turns):
            if message.role == "user":
                content = _with_system(message, system if number == last_user else None)
                segments += [
                    Segment("[INST]", control=True),
                    Segment(f"{self.space}{content}"),
                    Segment("[/INST]", control=True),
                ]
            else:
                answer = message.content.rstrip(" ")
                segments += [Segment(f"{self.space}{answer}", message.trained), self.closing(message)]
        return segments


def _with_system(message: Message, system: str | None) -> str:
    return f"{system}\n\n{message.text}" if system else message.text
