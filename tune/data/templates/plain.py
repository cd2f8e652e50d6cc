"""No words of its own: what the user says, a newline, the answer, the end-of-sequence token.

For prompts that are written out in the data. A system message stands first, a blank line apart, and a further turn
follows the end token directly. White space at the end of what the user says becomes that one newline: many tokenizers
cut a run of white space otherwise where nothing follows it, so a prompt that ends in several could not be written for
an answer as it was trained.
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
    {{- system + '\\n\\n' -}}
{%- endif -%}
{%- for message in turns -%}
    {%- if message['role'] == 'user' -%}
        {%- set content = message['content'] -%}
        {%- if message['input'] -%}
            {%- set content = content + '\\n\\n' + message['input'] -%}
        {%- endif -%}
        {{- content.rstrip() + '\\n' -}}
    {%- else -%}
        {%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
"""


@dataclass(frozen=True)
class Plain(AlternatingTemplate):
    """Turns without headings."""

    name: str = "plain"
    source: ClassVar[str] = ALTERNATION + _TURNS

    def written(self, system: str | None, turns: tuple[Message, ...]) -> list[Segment]:
        """The turns as they are."""
        segments = self.opening()
        if system is not None:
            segments.append(Segment(f"{system}\n\n"))
        for message in turns:
            if message.role == "user":
                segments.append(Segment(f"{message.text.rstrip()}\n"))
            else:
                segments += [Segment(message.content, message.trained), self.closing(message)]
        return segments
