"""Zephyr's prompt: `<|system|>\\n…</s>\\n<|user|>\\nx</s>\\n<|assistant|>\\ny</s>\\n`.

Source: the chat template of HuggingFaceH4/zephyr-7b-beta, and the alignment handbook, which trained it with an empty
system message where a conversation has none; FastChat's `zephyr` writes that too. The three headings are plain text on
the tokenizers that Zephyr was made with, and control tokens where a tokenizer has them. The newline behind an answer's
end token belongs to the frame: a model that stops at the end token never has to produce it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from tune.data.conversation import Conversation, Message
from tune.data.templates.segment import Segment
from tune.data.templates.written import ALTERNATION, INPUT, AlternatingTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HEADINGS = ("<|system|>", "<|user|>", "<|assistant|>")

_TURNS = (
    """\
BOS
{{- '<|system|>\\n' + (system if system is not none else '') + eos_token + '\\n' -}}
{%- for message in turns -%}
    {%- if message['role'] == 'user' -%}
        {{- '<|user|>\\n' + message['content'] -}}
"""
    + INPUT
    + """\
        {{- eos_token + '\\n' -}}
    {%- else -%}
        {{- '<|assistant|>\\n' -}}
        {%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
        {{- '\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>\\n' -}}
{%- endif -%}
"""
)


@dataclass(frozen=True)
class Zephyr(AlternatingTemplate):
    """Every message under a heading, ended by the end-of-sequence token. `known` are headings that are tokens."""

    name: str = "zephyr"
    known: tuple[str, ...] = ()
    source: ClassVar[str] = ALTERNATION + _TURNS

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> Self:
        """This template with the tokenizer's own tokens."""
        known = tuple(heading for heading in _HEADINGS if heading in tokenizer.added_tokens_encoder)
        return replace(super().bind(tokenizer), known=known)

    def segments(self, conversation: Conversation, *, generation_prompt: bool = False) -> list[Segment]:
        """The conversation in segments. Raises BadRowError when the turns do not alternate, or have tools."""
        segments = super().segments(conversation, generation_prompt=generation_prompt)
        return [*segments, *self._heading("<|assistant|>")] if generation_prompt else segments

    def written(self, system: str | None, turns: tuple[Message, ...]) -> list[Segment]:
        """The system message, if only an empty one, then the turns."""
        segments = [*self.opening(), *self._heading("<|system|>"), Segment(system or ""), *self._frame()]
        for message in turns:
            if message.role == "user":
                segments += [*self._heading("<|user|>"), Segment(message.text), *self._frame()]
            else:
                answer = [Segment(message.content, message.trained), self.closing(message), Segment("\n")]
                segments += [*self._heading("<|assistant|>"), *answer]
        return segments

    def _heading(self, heading: str) -> list[Segment]:
        return [Segment(heading, control=heading in self.known), Segment("\n")]

    def _frame(self) -> list[Segment]:
        return [Segment(self.eos, control=True), Segment("\n")]
