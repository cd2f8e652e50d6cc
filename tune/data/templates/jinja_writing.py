"""What a chat template in jinja writes of a conversation, cut into segments. It runs in the confined process.

What is trained comes from the template's {% generation %} blocks; without them, from rendering prefixes: the
prompt up to an answer, as the template would write it for generation, must be the beginning of the prompt
with the answer in it, and what follows up to the turn's end token is the answer.

Special tokens are control tokens only where the template itself writes them. A message whose own text spells
one (or a tool, a call, any other value that the template is given) is rendered a second time with that spelling broken
up by a private-use character, which tells the template's tokens from the text's; where the template does something else
with the changed text, the row is refused rather than guessed.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

from tune.data.conversation import BadRowError, Conversation, Role
from tune.data.templates.left_out import Messages, Part, Tools, check_nothing_left_out, parts_written
from tune.data.templates.segment import Segment
from tune.errors import DataError

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""The opening of a block around what is trained, as transformers looks for it."""

_MARKS = tuple(chr(point) for point in range(0xF8E0, 0xF8FF))

_PROBES: tuple[tuple[tuple[Role, str], ...], ...] = (
    (("user", "a question"), ("assistant", "the answer")),
    (("system", "a rule"), ("user", "a question"), ("assistant", "the answer")),
)

# A prompt may hold so many characters of the template's own, and so many for each that it is given.
_OWN, _EACH = 1 << 18, 16
_WHY = 300
"""Characters of an error's own words that are told: a template may make them as long as it likes."""

Span = tuple[int, int]


Turn = tuple[str, str, bool, Mapping[str, Any] | None]
"""A message's role, text, whether it is trained if it is an answer, and what it holds besides."""
Turns = tuple[list[Turn], Sequence[Mapping[str, Any]]]
"""The turns of a conversation, and the tools that they may call."""


def turns_of(conversation: Conversation) -> Turns:
    """A conversation as it is sent to the process: as few objects as will do."""
    return [(m.role, m.text, m.trained, m.extra or None) for m in conversation.messages], conversation.tools


class _Given(NamedTuple):
    """What a template is rendered with, in plain lists and dictionaries."""

    messages: Messages
    tools: Tools

    def without_after(self, count: int) -> _Given:
        return _Given(self.messages[:count], self.tools)


class _FailedError(BadRowError):
    """The template itself is at fault, rather than the messages that it refuses."""


@dataclass(frozen=True)
class JinjaWriting:
    """A chat template with all that it depends on, in plain values.

    `name` is what messages call it; `special` are the tokenizer's special tokens by their names, which the template
    may write; `tokens` are the strings that are control tokens where it writes them.
    """

    name: str
    jinja: str
    special: Mapping[str, Any]
    tokens: Sequence[str] = ()

    def fields(self) -> tuple[str, str, Mapping[str, Any], Sequence[str]]:
        """What makes the same again."""
        return self.name, self.jinja, self.special, self.tokens

    @cached_property
    def _control(self) -> re.Pattern[str]:
        # Longest first: a token wins over the tokens that it contains.
        return re.compile("|".join(re.escape(t) for t in sorted(self.tokens, key=len, reverse=True)) or "(?!)")

    @cached_property
    def _writes(self) -> frozenset[Part]:
        """Of tools, calls and results, what the template is known to write."""
        return parts_written(self._text)

    def end_of_turn(self) -> str | None:
        """The control token that ends an answer, found by rendering one."""
        turns = turns_of(Conversation.of(*_PROBES[0]))
        try:
            text, spans = self._rendered(turns, _given(turns))
        except (BadRowError, DataError):
            return None
        found = [m.group() for start, end in spans for m in self._control.finditer(text, start, end)]
        return found[-1] if found else None

    def check(self) -> None:
        """Raise DataError when the template cannot be compiled.

        A file is tried out besides: whether it renders anything, and marks an answer as generated.
        """
        marked, failures = list[str](), list[BadRowError]()
        for probe in _PROBES:
            try:
                text, spans = self._render(_given(turns_of(Conversation.of(*probe))))
                marked.append("".join(text[start:end] for start, end in spans))
            except BadRowError as error:
                failures.append(error)
        if not self.name.endswith(".jinja"):
            return
        if not marked and isinstance(failures[0], _FailedError):
            raise DataError(f"{failures[0]}. Mend the template there.")
        if marked and not any("the answer" in text for text in marked):
            raise DataError(
                f"template {self.name}: its {{% generation %}} blocks do not hold the answer of a conversation. Put "
                "them around an assistant's content and its end token, outside of macros and of set blocks."
            )

    def plain(self, messages: Messages) -> str:
        """What the template writes of messages. Raises BadRowError or DataError where it cannot."""
        return self._render(_Given(messages, None))[0]

    def segments(self, turns: Turns, generation_prompt: bool = False) -> list[Segment]:
        """A rendered conversation, cut at the special tokens that the template writes.

        Raises:
            BadRowError: the template refuses these messages, leaves out their tools or calls, or a special token
                spelled in a message cannot be told from the template's own.
            DataError: the template's prefixes do not allow to find the answers.
        """
        plain = given = _given(turns)
        mark = self._mark(given)
        if mark is not None:
            given = self._marked(given, mark, generation_prompt)
        if generation_prompt:
            text, spans = self._render(given, generation_prompt=True)
        else:
            text, spans = self._rendered(turns, given)
        if any(besides or role == "tool" for role, _, _, besides in turns[0]) or turns[1]:
            written = text.replace(mark, "") if mark else text
            check_nothing_left_out(self.name, self._text, written, plain, self._writes)
        return list(self._cut(text, spans, mark or ""))

    def _rendered(self, turns: Turns, given: _Given) -> tuple[str, list[Span]]:
        """The prompt and the spans of characters that are trained."""
        trained = {i: trained for i, (role, _, trained, _) in enumerate(turns[0]) if role == "assistant"}
        answers = list(trained)
        if GENERATION.search(self.jinja):
            text, spans = self._render(given)
        else:
            text, spans = self._by_prefixes(given, answers)
        if len(spans) == len(answers):
            return text, [span for span, kept in zip(spans, trained.values(), strict=True) if kept]
        if all(trained.values()):
            return text, spans
        raise BadRowError(
            f"template {self.name}: marks {len(spans)} stretches as generated for {len(answers)} answers, "
            "so an answer that is not trained cannot be found"
        )

    def _by_prefixes(self, given: _Given, answers: list[int]) -> tuple[str, list[Span]]:
        text = self._render(given)[0]
        spans = []
        for i in answers:
            before = self._render(given.without_after(i), generation_prompt=True)[0] if i else ""
            after = text if i == len(given.messages) - 1 else self._render(given.without_after(i + 1))[0]
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

    def _text(self, messages: Messages, tools: Tools) -> str:
        return self._render(_Given(messages, tools))[0]

    def _render(self, given: _Given, *, generation_prompt: bool = False) -> tuple[str, list[Span]]:
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                conversations=[given.messages],
                tools=given.tools,
                chat_template=self.jinja,
                return_assistant_tokens_mask=bool(GENERATION.search(self.jinja)),
                add_generation_prompt=generation_prompt,
                **self.special,
            )
            texts[0].encode("utf-8")
        except jinja2.TemplateSyntaxError as error:
            raise DataError(
                f"template {self.name}:{error.lineno}: is not valid jinja ({_said(error.message)}). "
                "Mend the template there."
            ) from None
        # A template is a program, so it may raise anything; whatever that is, it is about the template and this row.
        except Exception as error:
            if type(error) is jinja2.TemplateError:
                raise BadRowError(f"template {self.name}: refuses these messages ({_said(error)})") from None
            why = "it takes more memory than there is for it" if isinstance(error, MemoryError) else _said(error)
            raise _FailedError(f"template {self.name}{_line(error)}: fails on these messages ({why})") from None
        if len(texts[0]) > _OWN:
            self._check_size(texts[0], given)
        return texts[0], [(start, end) for start, end in spans[0]] if spans else []

    def _check_size(self, text: str, given: _Given) -> None:
        size = sum(map(len, _strings(given)))
        if len(text) > _OWN + _EACH * size:
            raise _FailedError(
                f"template {self.name}: fails on these messages (it writes {len(text)} characters for {size})"
            )

    def _mark(self, given: _Given) -> str | None:
        """A character that no message holds, or None when no message spells a special token."""
        contents = "\0".join(_strings(given))
        if not self._control.search(contents):
            return None
        free = next((mark for mark in _MARKS if mark not in contents), None)
        if free is None:
            raise BadRowError("the text spells special tokens and uses the private characters that mark them")
        return free

    def _marked(self, given: _Given, mark: str, generation_prompt: bool) -> _Given:
        """What is given, with every special token that it spells broken up; checked to render the same besides."""
        messages = [
            {key: value if key == "role" else self._broken(value, mark) for key, value in message.items()}
            for message in given.messages
        ]
        broken = _Given(messages, self._broken(given.tools, mark))
        plain = self._render(given, generation_prompt=generation_prompt)[0]
        if self._render(broken, generation_prompt=generation_prompt)[0].replace(mark, "") != plain:
            spelled = sorted({s for text in _strings(given) for s in self._control.findall(text)})
            raise BadRowError(
                f"a message spells {', '.join(map(repr, spelled))}, special tokens that template {self.name} "
                "gives a meaning inside messages"
            )
        return broken

    def _broken(self, value: Any, mark: str) -> Any:
        """`value` with every string in it broken up, the names of arguments and parameters included."""
        if isinstance(value, str):
            return self._control.sub(lambda match: mark.join(match.group()), value)
        if isinstance(value, dict):
            return {self._broken(key, mark): self._broken(item, mark) for key, item in value.items()}
        if isinstance(value, list):
            return [self._broken(item, mark) for item in value]
        return value

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


def _given(turns: Turns) -> _Given:
    """What apply_chat_template would be given: `messages`, with what each holds besides, and `tools`."""
    messages = []
    for role, text, _, besides in turns[0]:
        message = {"role": role, "content": text}
        if besides:
            message |= _plain({key: value for key, value in besides.items() if key not in message})
        messages.append(message)
    return _Given(messages, _plain(turns[1]) or None)


def _plain(value: Any) -> Any:
    """Mappings as dictionaries and sequences as lists, all the way down."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


def _strings(value: Any) -> Iterator[str]:
    """Every string in a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)


def _said(error: object) -> str:
    words = str(error)
    return words if len(words) <= _WHY else f"{words[:_WHY]} ..."


def _line(error: Exception) -> str:
    """`:line` of the template where an error was raised, as jinja tells it."""
    frames = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in frames if frame.f_code.co_filename == "<template>"]
    return f":{lines[-1]}" if lines else ""
