"""Falcon Instruct's prompt: `User: x\\n\\nAssistant: y<|endoftext|>\\n\\nUser: …`.

Source: the chat template of tiiuae/falcon-7b-instruct and FastChat's `falcon`. Both make blank lines inside a message
single line ends, since a blank line is what parts the turns, and so does this one; as in the former, messages are
stripped and a system prompt stands before the first turn, a blank line apart. It is all plain text. Two differences:
neither ends an answer with a token (FastChat stops at `\\nUser`), and a model learns to stop only from an end that it
sees, so here the end-of-sequence token follows every answer and is trained; and the former opens a conversation without
a system prompt with two empty lines, which FastChat and this one leave out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tune.data.conversation import Message
from tune.data.templates.segment import Segment
from tune.data.templates.written import ALTERNATION, AlternatingTemplate

_TURNS = """\
BOS
{%- if system is not none -%}
    {{- system.strip() -}}
{%- endif -%}
{%- for message in turns -%}
    {%- set content = message['content'] -%}
    {%- if message['input'] -%}
        {%- set content = content + '\\n\\n' + message['input'] -%}
    {%- endif -%}
    {%- set content = content.strip().replace('\\r\\n', '\\n').replace('\\n\\n', '\\n') -%}
    {%- if message['role'] == 'user' -%}
        {%- if not loop.first or system is not none -%}
            {{- '\\n\\n' -}}
        {%- endif -%}
        {{- 'User: ' + content + '\\n\\nAssistant:' -}}
    {%- else -%}
        {%- generation -%}{{- ' ' + content + eos_token -}}{%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
"""


@dataclass(frozen=True)
class Falcon(AlternatingTemplate):
    """Turns a blank line apart, and no blank line within them."""

    name: str = "falcon"
    source: ClassVar[str] = ALTERNATION + _TURNS

    def written(self, system: str | None, turns: tuple[Message, ...]) -> list[Segment]:
        """The system prompt, then every turn behind its speaker."""
        segments = self.opening()
        if system is not None:
            segments.append(Segment(system.strip()))
        for number, message in enumerate(turns):
            if message.role == "user":
                gap = "\n\n" if number or system is not None else ""
                segments.append(Segment(f"{gap}User: {_without_blank_lines(message.text)}\n\nAssistant:"))
            else:
                answer = _without_blank_lines(message.content)
                segments += [Segment(f" {answer}", message.trained), self.closing(message)]
        return segments


def _without_blank_lines(text: str) -> str:
    return text.strip().replace("\r\n", "\n").replace("\n\n", "\n")
