"""Vicuna v1.1's prompt, as FastChat writes it: `SYSTEM USER: x ASSISTANT: y</s>USER: …`."""

from __future__ import annotations

from dataclasses import dataclass

from tune.data.conversation import Conversation
from tune.data.templates.segment import Segment
from tune.data.templates.written import ALTERNATION, WrittenTemplate, check_alternation, opened

_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

_JINJA = (
    ALTERNATION
    + """\
BOS
{{- (system if system is not none else "SYSTEM") + ' ' -}}
{%- for message in turns -%}
    {%- if message['role'] == 'user' -%}
        {{- 'USER: ' + message['content'] -}}
        {%- if message['input'] -%}
            {{- '\\n\\n' + message['input'] -}}
        {%- endif -%}
        {{- ' ASSISTANT:' -}}
    {%- else -%}
        {%- generation -%}{{- ' ' + message['content'] + eos_token -}}{%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
"""
).replace("SYSTEM", _SYSTEM, 1)


@dataclass(frozen=True)
class Vicuna(WrittenTemplate):
    """Vicuna v1.1; the answer's leading space is trained with it."""

    name: str = "vicuna"

    @property
    def jinja(self) -> str:
        """The jinja form for the bound tokenizer."""
        return self.rendering(_JINJA)

    def segments(self, conversation: Conversation, *, generation_prompt: bool = False) -> list[Segment]:
        """The conversation in segments. Raises BadRowError when the turns do not alternate."""
        system, turns = opened(conversation)
        check_alternation(turns, self.name, generation_prompt=generation_prompt)
        segments = [*self.opening(), Segment(f"{_SYSTEM if system is None else system} ")]
        for message in turns:
            if message.role == "user":
                segments.append(Segment(f"USER: {message.text} ASSISTANT:"))
            else:
                segments += [Segment(f" {message.content}", message.trained), self.closing(message)]
        return segments
