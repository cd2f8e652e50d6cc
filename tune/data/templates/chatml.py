"""ChatML: every message between `<|im_start|>role` and `<|im_end|>`, in any order of roles.

No begin-of-sequence token is written, as in the models that introduced it. The newline after `<|im_end|>`
belongs to the frame, not to the answer: a model that stops at `<|im_end|>` never has to produce it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tune.data.conversation import Conversation
from tune.data.templates.segment import Segment
from tune.data.templates.written import WrittenTemplate, refuse_tools

_JINJA = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- message['content'] -}}
        {%- if message['input'] -%}
            {{- '\\n\\n' + message['input'] -}}
        {%- endif -%}
        {{- '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


@dataclass(frozen=True)
class ChatML(WrittenTemplate):
    """`<|im_start|>role`, a newline, the content, `<|im_end|>`, a newline."""

    name: str = "chatml"
    source: ClassVar[str] = _JINJA

    @property
    def end_of_turn(self) -> str | None:
        """The control token that ends an answer."""
        return "<|im_end|>"

    def control_tokens(self) -> list[str]:
        """The control tokens that the tokenizer must have."""
        return ["<|im_start|>", "<|im_end|>"]

    def segments(self, conversation: Conversation, *, generation_prompt: bool = False) -> list[Segment]:
        """The conversation in segments. Raises BadRowError when it has tools."""
        refuse_tools(conversation, self.name)
        segments: list[Segment] = []
        for message in conversation.messages:
            trained = message.role == "assistant" and message.trained
            segments += [
                Segment("<|im_start|>", control=True),
                Segment(f"{message.role}\n"),
                Segment(message.text, trained),
                Segment("<|im_end|>", trained, control=True),
                Segment("\n"),
            ]
        if generation_prompt:
            segments += [Segment("<|im_start|>", control=True), Segment("assistant\n")]
        return segments
