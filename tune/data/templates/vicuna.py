"""Vicuna v1.1's prompt, as FastChat writes it: `SYSTEM USER: x ASSISTANT: y</s>USER: …`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tune.data.conversation import Message
from tune.data.templates.segment import Segment
from tune.data.templates.written import ALTERNATION, INPUT, AlternatingTemplate

_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

SPOKEN = (
    ALTERNATION
    + """\
BOS
{{- (system if system is not none else "SYSTEM") + ' ' -}}
{%- for message in turns -%}
    {%- if message['role'] == 'user' -%}
        {{- 'USER: ' + message['content'] -}}
"""
    + INPUT
    + """\
        {{- ' ASSISTANT:' -}}
    {%- else -%}
        {%- generation -%}{{- ' ' + message['content'] + eos_token -}}{%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
"""
)


@dataclass(frozen=True)
class Vicuna(AlternatingTemplate):
    """Vicuna v1.1; the answer's leading space is trained with it."""

    name: str = "vicuna"
    source: ClassVar[str] = SPOKEN.replace("SYSTEM", _SYSTEM, 1)
    default_system: ClassVar[str] = _SYSTEM
    answerer: ClassVar[str] = "ASSISTANT"

    def written(self, system: str | None, turns: tuple[Message, ...]) -> list[Segment]:
        """The system prompt, then every turn behind its speaker."""
        segments = [*self.opening(), Segment(f"{self.default_system if system is None else system} ")]
        for message in turns:
            if message.role == "user":
                segments.append(Segment(f"USER: {message.text} {self.answerer}:"))
            else:
                segments += [Segment(f" {message.content}", message.trained), self.closing(message)]
        return segments
