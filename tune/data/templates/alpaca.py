"""Stanford Alpaca's prompt, to the character.

A first turn with an input and one without have preambles of their own; a system message takes the
preamble's place. The answer follows `### Response:` directly, without a newline, and ends with the
end-of-sequence token: that is how Alpaca itself was trained. Alpaca has one turn; further turns repeat
`### Instruction:` … `### Response:` right after the end-of-sequence token, as FastChat does. FastChat's own
`alpaca` writes `### Instruction: x` on one line and a space before the answer; this one does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tune.data.conversation import Message
from tune.data.templates.segment import Segment
from tune.data.templates.written import ALTERNATION, AlternatingTemplate

_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)

_TURNS = """\
BOS
{%- for message in turns -%}
    {%- if loop.first -%}
        {%- if system is not none -%}
            {{- system -}}
        {%- elif message['input'] -%}
            {{- 'WITH_INPUT' -}}
        {%- else -%}
            {{- 'WITHOUT_INPUT' -}}
        {%- endif -%}
        {{- '\\n\\n' -}}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{- '### Instruction:\\n' + message['content'] -}}
        {%- if message['input'] -%}
            {{- '\\n\\n### Input:\\n' + message['input'] -}}
        {%- endif -%}
        {{- '\\n\\n### Response:' -}}
    {%- else -%}
        {%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
"""


@dataclass(frozen=True)
class Alpaca(AlternatingTemplate):
    """Stanford Alpaca's two prompts."""

    name: str = "alpaca"
    source: ClassVar[str] = ALTERNATION + _TURNS.replace("WITH_INPUT", _WITH_INPUT).replace(
        "WITHOUT_INPUT", _WITHOUT_INPUT
    )

    def written(self, system: str | None, turns: tuple[Message, ...]) -> list[Segment]:
        """A preamble, then every turn under its heading."""
        segments = self.opening()
        for number, message in enumerate(turns):
            if message.role == "assistant":
                segments += [Segment(message.content, message.trained), self.closing(message)]
                continue
            prompt = _prompt(message)
            if number == 0:
                preamble = _WITH_INPUT if message.input else _WITHOUT_INPUT
                prompt = f"{preamble if system is None else system}\n\n{prompt}"
            segments.append(Segment(prompt))
        return segments


def _prompt(message: Message) -> str:
    given = f"\n\n### Input:\n{message.input}" if message.input else ""
    return f"### Instruction:\n{message.content}{given}\n\n### Response:"
