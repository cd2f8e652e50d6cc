"""A Hugging Face chat template in jinja: the tokenizer's own, or a file's.

What is trained comes from the template's {% generation %} blocks; without them, from rendering prefixes: the
prompt up to an answer, as the template would write it for generation, must be the beginning of the prompt
with the answer in it, and what follows up to the turn's end token is the answer.

Special tokens are control tokens only where the template itself writes them. A message whose own text spells
one is rendered a second time with that spelling broken up by a private-use character, which tells the
template's tokens from the text's; where the template does something else with the changed text, the row
is refused rather than guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tune.data.conversation import BadRowError, Conversation
from tune.data.templates.segment import Segment
from tune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARKS = tuple(chr(point) for point in range(0xF8E0, 0xF8FF))

Span = tuple[int, int]


@dataclass(frozen=True)
class JinjaTemplate:
    """A chat template rendered by transformers' own sandboxed jinja.

    `name` is what messages call it; `bound` is the tokenizer whose special tokens it may write.
    """

    name: str
    jinja: str
    bound: PreTrainedTokenizerBase | None = field(default=None, repr=False, compare=False)

    @cached_property
    def _special(self) -> dict[str, Any]:
        assert self.bound is not None, "bind() comes first"
        return dict(self.bound.special_tokens_map)

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """The strings that are control tokens where the template writes them."""
        assert self.bound is not None, "bind() comes first"
        added = self.bound.added_tokens_decoder.values()
        tokens = {t.content for t in added if t.special or (t.content.strip() and t.content in self.jinja)}
        # Longest first: a token wins over the tokens that it contains.
        return re.compile("|".join(re.escape(t) for t in sorted(tokens, key=len, reverse=True)) or "(?!)")

    @cached_property
    def end_of_turn(self) -> str | None:
        """The control token that ends an answer, found by rendering one."""
        probe = Conversation.of(("user", "a"), ("assistant", "b"))
        try:
            text, spans = self._rendered(probe, self._messages(probe))
        except (BadRowError, DataError):
            return None
        found = [m.group() for start, end in spans for m in self._control.finditer(text, start, end)]
        return found[-1] if found else None

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> JinjaTemplate:
        """This template with the tokenizer's special tokens."""
        return JinjaTemplate(self.name, self.jinja, tokenizer)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise DataError when the template cannot be compiled; its special tokens come from the tokenizer."""
        self.bind(tokenizer)._render([{"role": "user", "content": "a"}], probing=True)

    def segments(self, conversation: Conversation, *, generation_prompt: bool = False) -> list[Segment]:
        """The rendered conversation, cut at the special tokens that the template writes.

        Raises:
            BadRowError: the template refuses these messages, or a special token spelled in a message cannot
                be told from the template's own.
            DataError: the template's prefixes do not allow to find the answers.
        """
        messages = self._messages(conversation)
        mark = self._mark(messages)
        if mark is not None:
            self._check_marked(messages, mark, generation_prompt)
            messages = [{**m, "content": self._broken(m["content"], mark)} for m in messages]
        if generation_prompt:
            text, spans = self._render(messages, generation_prompt=True)
        else:
            text, spans = self._rendered(conversation, messages)
        return list(self._cut(text, spans, mark or ""))

    def _messages(self, conversation: Conversation) -> list[dict[str, str]]:
        return [{"role": m.role, "content": m.text} for m in conversation.messages]

    def _rendered(self, conversation: Conversation, messages: list[dict[str, str]]) -> tuple[str, list[Span]]:
        """The prompt and the spans of characters that are trained."""
        answers = [i for i, m in enumerate(conversation.messages) if m.role == "assistant"]
        if _GENERATION.search(self.jinja):
            text, spans = self._render(messages)
        else:
            text, spans = self._by_prefixes(messages, answers)
        if len(spans) == len(answers):
            return text, [s for s, i in zip(spans, answers, strict=True) if conversation.messages[i].trained]
        if all(conversation.messages[i].trained for i in answers):
            return text, spans
        raise BadRowError(
            f"template {self.name}: marks {len(spans)} stretches as generated for {len(answers)} answers, "
            "so an answer that is not trained cannot be found"
        )

    def _by_prefixes(self, messages: list[dict[str, str]], answers: list[int]) -> tuple[str, list[Span]]:
        text = self._render(messages)[0]
        spans = []
        for i in answers:
            before = self._render(messages[:i], generation_prompt=True)[0] if i else ""
            after = text if i == len(messages) - 1 else self._render(messages[: i + 1])[0]
            if not (after.startswith(before) and text.startswith(after)):
                raise DataError(
                    f"template {self.name}: answers cannot be found in what it writes, since a message changes what "
                    "was written for the messages before it, and it has no {% generation %} blocks. "
                    "Put those blocks around the answers in a .jinja file and give its path as data.template, "
                    "or choose another template."
                )
            spans.append((len(before), self._answer_end(after, len(before))))
        return text, spans

    def _answer_end(self, text: str, start: int) -> int:
        """Where an answer ends: after its last special token, when only white space follows that."""
        ends = [match.end() for match in self._control.finditer(text, start)]
        return ends[-1] if ends and not text[ends[-1] :].strip() else len(text)

    def _render(
        self, messages: list[dict[str, str]], *, generation_prompt: bool = False, probing: bool = False
    ) -> tuple[str, list[Span]]:
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                chat_template=self.jinja,
                return_assistant_tokens_mask=bool(_GENERATION.search(self.jinja)),
                add_generation_prompt=generation_prompt,
                **self._special,
            )
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"template {self.name}:{error.lineno}: is not valid jinja ({error.message}).") from None
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            if probing:
                return "", []
            raise BadRowError(f"template {self.name}: refuses these messages ({error})") from None
        return texts[0], [(start, end) for start, end in spans[0]] if spans else []

    def _mark(self, messages: list[dict[str, str]]) -> str | None:
        """A character that no message holds, or None when no message spells a special token."""
        contents = "\0".join(m["content"] for m in messages)
        if not self._control.search(contents):
            return None
        free = next((mark for mark in _MARKS if mark not in contents), None)
        if free is None:
            raise BadRowError("the text spells special tokens and uses the private characters that mark them")
        return free

    def _broken(self, text: str, mark: str) -> str:
        return self._control.sub(lambda match: mark.join(match.group()), text)

    def _check_marked(self, messages: list[dict[str, str]], mark: str, generation_prompt: bool) -> None:
        broken = [{**m, "content": self._broken(m["content"], mark)} for m in messages]
        plain = self._render(messages, generation_prompt=generation_prompt)[0]
        if self._render(broken, generation_prompt=generation_prompt)[0].replace(mark, "") != plain:
            spelled = sorted({s for m in messages for s in self._control.findall(m["content"])})
            raise BadRowError(
                f"a message spells {', '.join(map(repr, spelled))}, special tokens that template {self.name} "
                "gives a meaning inside messages"
            )

    def _cut(self, text: str, spans: list[Span], mark: str) -> Iterator[Segment]:
        """Segments between special tokens and the ends of spans, without the mark."""
        control = [(m.start(), m.end()) for m in self._control.finditer(text)]
        edges = {0, len(text), *(edge for pair in control for edge in pair)}
        edges |= {edge for span in spans for edge in span if not any(start < edge < end for start, end in control)}
        is_control = set(control)
        for start, end in pairwise(sorted(edges)):
            trained = any(s <= start < e for s, e in spans)
            piece = text[start:end].replace(mark, "") if mark else text[start:end]
            if piece:
                yield Segment(piece, trained, (start, end) in is_control)
