"""Llama 2 Chat's prompt: `<s>[INST] <<SYS>>\\n…\\n<</SYS>>\\n\\nx [/INST] y </s><s>[INST] …`.

Source: `chat_completion` in Meta's llama/generation.py. `[INST]` and `<<SYS>>` are plain text. Each pair of turns is a
sequence of its own between the begin and end tokens, turns are stripped of white space, and a space stands before the
end token, trained with the answer. The system prompt opens the first user turn; without one there is none: the long
default of the first release was taken out by its authors. Meta's code refuses messages that spell the marks; here they
stay the plain text that they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tune.data.conversation import Message
from tune.data.templates.mistral import refuse_control_inst
from tune.data.templates.segment import Segment
from tune.data.templates.written import ALTERNATION, AlternatingTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TURNS = """\
{%- for message in turns -%}
    {%- set content = message['content'] -%}
    {%- if message['input'] -%}
        {%- set content = content + '\\n\\n' + message['input'] -%}
    {%- endif -%}
    {%- if system is not none and loop.first -%}
        {%- set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + content -%}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
BOS
        {{- 'SPACE[INST] ' + content.strip() + ' [/INST]' -}}
    {%- else -%}
        {%- generation -%}{{- ' ' + content.strip() + ' ' + eos_token -}}{%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
"""


@dataclass(frozen=True)
class Llama2(AlternatingTemplate):
    """Every pair of turns between a begin and an end token of its own."""

    name: str = "llama-2"
    always_bos: ClassVar[bool] = True
    source: ClassVar[str] = ALTERNATION + _TURNS

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise DataError when the tokenizer has `[INST]` as a control token."""
        super().check_tokenizer(tokenizer)
        refuse_control_inst(self.name, tokenizer)

    def written(self, system: str | None, turns: tuple[Message, ...]) -> list[Segment]:
        """The pairs, the system prompt in the first."""
        segments: list[Segment] = []
        for number, message in enumerate(turns):
            if message.role == "user":
                content = message.text
                if system is not None and number == 0:
                    content = f"<<SYS>>\n{system}\n<</SYS>>\n\n{content}"
                segments += [*self.opening(), Segment(f"{self.space}[INST] {content.strip()} [/INST]")]
            else:
                segments += [Segment(f" {message.content.strip()} ", message.trained), self.closing(message)]
        return segments
