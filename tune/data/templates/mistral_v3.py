"""Mistral's `[INST]` prompts of control tokens, equal to `mistral-common` to the token, tools included.

v3 (7B v0.3, Mixtral 8x22B) has `[INST]` and `[/INST]` as control tokens without spaces, puts the system prompt before
the last user turn, a blank line apart, and strips trailing spaces, and only spaces, from answers. Tools stand before
the last user turn, calls are an answer of their own, and each result is fed back behind the call's id. v2 (Mistral
Small and Large of February 2024) is the same but for tools: calls have no ids, results are a list with the tool's name,
one to a turn, and calls and results before the last user turn are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Self

from tune.data.conversation import BadRowError, Conversation, Message, Role
from tune.data.templates.mistral import with_system
from tune.data.templates.segment import Segment
from tune.data.templates.tool_json import (
    JINJA_CALLS,
    JINJA_RESULT,
    JINJA_TOOLS,
    as_json,
    calls_json,
    calls_of,
    read_result,
    tools_json,
)
from tune.data.templates.written import INPUT, OPENED, WrittenTemplate, check_answerable, opened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOOL_TOKENS = ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")

_ORDER = """\
{%- set order = namespace(next=['user'], last_user=-1) -%}
{%- for message in turns -%}
    {%- if message['role'] not in order.next -%}
        {{- raise_exception('user and assistant must take turns, the user first, and results must follow calls') -}}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {%- set order.next = ['assistant'] -%}
        {%- set order.last_user = loop.index0 -%}
    {%- elif message['role'] == 'tool' -%}
        {%- set order.next = ['tool', 'assistant'] -%}
    {%- else -%}
        {%- set order.next = ['tool'] if message['tool_calls'] else ['user'] -%}
    {%- endif -%}
{%- endfor -%}
"""

_TURNS = (
    """\
BOS
{%- for message in turns -%}
    {%- set told = KEPT -%}
    {%- if message['role'] == 'user' -%}
        {%- if offered.tools and loop.index0 == order.last_user -%}
            {{- '[AVAILABLE_TOOLS]SPACE' + offered.tools|tojson + '[/AVAILABLE_TOOLS]' -}}
        {%- endif -%}
        {{- '[INST]SPACE' -}}
        {%- if system and loop.index0 == order.last_user -%}
            {{- system + '\\n\\n' -}}
        {%- endif -%}
        {{- message['content'] -}}
"""
    + INPUT
    + """\
        {{- '[/INST]' -}}
    {%- elif message['role'] == 'tool' -%}
        {%- if told -%}
            {{- '[TOOL_RESULTS]SPACE' + OUTCOME + '[/TOOL_RESULTS]' -}}
        {%- endif -%}
    {%- elif not message['tool_calls'] -%}
        {%- generation -%}{{- 'SPACE' + message['content'].rstrip(' ') + eos_token -}}{%- endgeneration -%}
    {%- elif told -%}
        {%- generation -%}
            {{- '[TOOL_CALLS]SPACE' + calls_json(message['tool_calls'], IDS) + eos_token -}}
        {%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
"""
)


def _source(kept: str, result: str, ids: str) -> str:
    turns = _TURNS.replace("KEPT", kept).replace("OUTCOME", result).replace("IDS", ids)
    return JINJA_CALLS + JINJA_RESULT + OPENED + _ORDER + JINJA_TOOLS + turns


@dataclass(frozen=True)
class MistralV3(WrittenTemplate):
    """`[INST]` and `[/INST]` as control tokens. `has_tools` says that the tokenizer has those of tools as well."""

    name: str = "mistral-v3"
    has_tools: bool = True
    always_bos: ClassVar[bool] = True
    source: ClassVar[str] = _source(
        kept="true",
        result="'{\"content\": ' + result_content(message['content']) + ', \"call_id\": '"
        " + message['tool_call_id']|tojson + '}'",
        ids="true",
    )

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> Self:
        """This template with the tokenizer's own tokens."""
        known = tokenizer.added_tokens_encoder
        return replace(super().bind(tokenizer), has_tools=all(token in known for token in _TOOL_TOKENS))

    def control_tokens(self) -> list[str]:
        """The control tokens that the tokenizer must have; those of tools are asked for by rows that have tools."""
        return ["[INST]", "[/INST]", self.eos]

    def segments(self, conversation: Conversation, *, generation_prompt: bool = False) -> list[Segment]:
        """The conversation in segments.

        Raises:
            BadRowError: turns in another order, tools that cannot be written, or without their control tokens.
        """
        system, turns = opened(conversation)
        self._check_turns(turns)
        if generation_prompt:
            check_answerable(turns)
        if not self.has_tools and (conversation.tools or any(_uses_tools(m) for m in turns)):
            raise BadRowError(f"template {self.name}: tools need {', '.join(_TOOL_TOKENS)}, which the tokenizer lacks")
        last_user = _last_user(turns)
        segments = self.opening()
        for number, message in enumerate(turns):
            if message.role == "user":
                if conversation.tools and number == last_user:
                    segments += self._between("[AVAILABLE_TOOLS]", tools_json(conversation.tools))
                content = with_system(message, system if number == last_user else None)
                segments += self._between("[INST]", content)
            elif not _uses_tools(message):
                answer = message.content.rstrip(" ")
                segments += [Segment(f"{self.space}{answer}", message.trained), self.closing(message)]
            elif number >= self._told_from(last_user):
                segments += self._result(message) if message.role == "tool" else self._calls(message)
        return segments

    def _told_from(self, last_user: int) -> int:
        """The turn from which calls and results are written."""
        return 0

    def _check_turns(self, turns: Sequence[Message]) -> None:
        expected: tuple[Role, ...] = ("user",)
        for number, message in enumerate(turns, start=1):
            if message.role not in expected:
                raise BadRowError(
                    f"turn {number} is {message.role}'s where template {self.name} has {' or '.join(expected)}'s "
                    "(user and assistant alternate, and a tool's result follows a call)"
                )
            if message.role == "user":
                expected = ("assistant",)
            elif message.role == "tool":
                expected = ("tool", "assistant")
            else:
                expected = ("tool",) if _uses_tools(message) else ("user",)

    def _between(self, opening: str, text: str) -> list[Segment]:
        closing = f"[/{opening[1:]}"
        return [
            Segment(opening, control=True),
            Segment(f"{self.space}{text}"),
            Segment(closing, control=True),
        ]

    def _calls(self, message: Message) -> list[Segment]:
        if message.content.strip():
            raise BadRowError(f"an answer holds both text and tool calls, which template {self.name} cannot write")
        calls = self._calls_json(message)
        return [
            Segment("[TOOL_CALLS]", message.trained, control=True),
            Segment(f"{self.space}{calls}", message.trained),
            self.closing(message),
        ]

    def _calls_json(self, message: Message) -> str:
        return calls_json(calls_of(message), ids=True)

    def _result(self, message: Message) -> list[Segment]:
        id = message.extra.get("tool_call_id")
        if not isinstance(id, str):
            raise BadRowError(
                f"a tool's result has no tool_call_id, which template {self.name} writes with it "
                "(mistral-v2 writes tools without ids)"
            )
        return self._between("[TOOL_RESULTS]", as_json({"content": read_result(message.content), "call_id": id}))


@dataclass(frozen=True)
class MistralV2(MistralV3):
    """The first with control tokens."""

    name: str = "mistral-v2"
    source: ClassVar[str] = _source(
        kept="loop.index0 >= order.last_user",
        result="'[{\"name\": ' + (message['name'] or none)|tojson + ', \"content\": '"
        " + result_content(message['content']) + '}]'",
        ids="false",
    )

    def _told_from(self, last_user: int) -> int:
        return last_user

    def _check_turns(self, turns: Sequence[Message]) -> None:
        super()._check_turns(turns)
        told = turns[_last_user(turns) :]
        if any(first.role == second.role == "tool" for first, second in pairwise(told)):
            raise BadRowError(f"two tool results follow one answer, which template {self.name} cannot write")

    def _calls_json(self, message: Message) -> str:
        return calls_json(calls_of(message), ids=False)

    def _result(self, message: Message) -> list[Segment]:
        result = {"name": message.extra.get("name") or None, "content": read_result(message.content)}
        return self._between("[TOOL_RESULTS]", as_json([result]))


def _last_user(turns: Sequence[Message]) -> int:
    return max((i for i, message in enumerate(turns) if message.role == "user"), default=0)


def _uses_tools(message: Message) -> bool:
    return message.role == "tool" or bool(message.extra.get("tool_calls"))
