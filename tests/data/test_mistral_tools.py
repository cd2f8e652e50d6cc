"""Tools in Mistral's templates: equal to mistral-common to the token, and the same in jinja."""

from __future__ import annotations

import json
import random

import pytest

from tests.data.conftest import LOOKALIKES, PIECES
from tests.data.test_mistral_parity import reference
from tests.data.test_templates import encoder, prompt_ids, rendered, trained_characters
from tune.data.conversation import BadRowError, Conversation, Message
from tune.data.formats import FORMATS
from tune.data.templates import TEMPLATES
from tune.data.templates.jinja_template import JinjaTemplate
from tune.data.templates.resolve import resolve_template

mistral_common = pytest.importorskip("mistral_common")

CASES = [("mistral-v2", "mistral_v2", 2), ("mistral-v3", "mistral_v3", 3), ("mistral-v3", "metaspace_v3", 3)]
ANY = (*PIECES, *LOOKALIKES, '"', "\\", "]}", "{", "\u2028", "&<>'")
PLAIN_RESULTS = ("22 degrees", "NaN miles", "a {b}", "12:30", "01", "[x", '"a" or "b"', "True", " spaced ", "日本", "")
JSON_RESULTS = ("true", "null", "22", "-3", "2.5", '"quoted"', "[1, 2]", "{}", ' {"a": null}\n', "1e+16")
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather now.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}


def tool_dialogues(count: int, *, results: tuple[str, ...], seed: int, parallel: bool) -> list[Conversation]:
    """Dialogues with calls, results and plain turns; `parallel` has several calls in an answer, and their results."""
    rng = random.Random(seed)

    def text() -> str:
        return " ".join(rng.choices(ANY, k=rng.randint(1, 3))) + "x"

    def value(depth: int = 0) -> object:
        kinds = [text(), rng.randint(-9, 10**12), rng.random(), True, None, "", 1e300]
        return rng.choice([*kinds, {text(): value(depth + 1)}, [value(depth + 1), text()]] if depth < 2 else kinds)

    def tool() -> dict:
        function = {"name": f"f{rng.randint(0, 99)}", "parameters": {"type": "object", "properties": {text(): {}}}}
        if rng.random() < 0.7:
            function["description"] = rng.choice((text(), ""))
        if rng.random() < 0.2:
            function["strict"] = True
        return {"type": "function", "function": function}

    def asking() -> list[Message]:
        calls, answers = [], []
        for _ in range(rng.randint(1, 3) if parallel else 1):
            id = "".join(rng.choices("abcdefXYZ0123456789", k=9))
            call = {"type": "function", "function": {"name": "f1", "arguments": {text(): value()}}}
            if rng.random() < 0.2:
                call["function"]["arguments"] = {}
            calls.append({"id": id, **call} if rng.random() < 0.9 else call)
            # The jinja form knows a JSON object by its braces; a JSON string with an escape in it, it takes for text.
            result = rng.choice((*results, json.dumps({text(): value()}, ensure_ascii=False)))
            answers.append(Message("tool", result, extra={"tool_call_id": id, "name": rng.choice(("f1", "weather"))}))
        return [Message("assistant", "", extra={"tool_calls": calls}), *answers]

    made = []
    for _ in range(count):
        messages = [Message("system", text())] if rng.random() < 0.4 else []
        for _ in range(rng.randint(1, 3)):
            messages.append(Message("user", text()))
            for _ in range(rng.choice((0, 1, 1, 2))):
                messages += asking()
            messages.append(Message("assistant", text() + rng.choice(("", "  "))))
        if rng.random() < 0.3:  # ends in a call
            messages = [*messages, Message("user", text()), asking()[0]]
        made.append(Conversation(tuple(messages), tuple(tool() for _ in range(rng.randint(0, 2)))))
    return made


def reference_ids(instruct, conversation: Conversation) -> list[int]:
    from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, ToolMessage, UserMessage
    from mistral_common.protocol.instruct.normalize import InstructRequestNormalizer
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.tool_calls import Tool, ToolCall

    def message(m: Message):
        if m.role == "tool":
            return ToolMessage(content=m.content, tool_call_id=m.extra["tool_call_id"], name=m.extra["name"])
        if m.role == "assistant":
            calls = [ToolCall.from_openai(call) for call in m.extra.get("tool_calls", [])]
            return AssistantMessage(content=m.content or None, tool_calls=calls or None)
        return {"system": SystemMessage, "user": UserMessage}[m.role](content=m.content)

    tools = [Tool.from_openai(dict(tool)) for tool in conversation.tools]
    request = ChatCompletionRequest(messages=[message(m) for m in conversation.messages], tools=tools or None)
    normal = InstructRequestNormalizer.normalizer().from_chat_completion_request(request)
    return instruct.encode_instruct(normal).tokens


@pytest.mark.parametrize(("name", "fixture", "version"), CASES)
def test_tools_equal_mistral_common(name, fixture, version, request):
    tokenizer = request.getfixturevalue(fixture)
    instruct = reference(version)
    template = resolve_template(name, tokenizer)
    results = (
        *PLAIN_RESULTS,
        *JSON_RESULTS,
        '{"b":1,\n"a":"\\u00e9"}',
        '"a \\\\ b"',
        '"\\""',
        "1e5",
        "{broken",
        "[1,2]",
    )
    conversations = tool_dialogues(300, results=results, seed=version, parallel=version == 3)
    every = encoder(tokenizer).encode([template.segments(c) for c in conversations])
    for conversation, ours in zip(conversations, every, strict=True):
        assert ours.ids.tolist() == reference_ids(instruct, conversation), conversation
    for conversation in conversations[:60]:
        number = max(i for i, m in enumerate(conversation.messages) if m.role != "assistant") + 1
        asked = Conversation(conversation.messages[:number], conversation.tools)
        assert prompt_ids(asked, template, tokenizer) == reference_ids(instruct, asked)


@pytest.mark.parametrize(("name", "fixture", "version"), CASES)
def test_the_jinja_form_writes_the_same(name, fixture, version, request):
    tokenizer = request.getfixturevalue(fixture)
    template = resolve_template(name, tokenizer)
    saved = JinjaTemplate("saved", template.jinja).bind(tokenizer)
    results = (*PLAIN_RESULTS, *JSON_RESULTS)
    conversations = tool_dialogues(120, results=results, seed=30 + version, parallel=version == 3)
    written = [template.segments(c) for c in conversations]
    for conversation, segments in zip(conversations, written, strict=True):
        tools = [dict(tool) for tool in conversation.tools] or None
        text, spans = rendered(template, tokenizer, conversation, tools=tools)
        assert text == "".join(segment.text for segment in segments)
        marked = [any(a <= i < b for a, b in spans) for i in range(len(text))]
        assert marked == trained_characters(segments)
    assert encoder(tokenizer).encode(written) == encoder(tokenizer).encode([saved.segments(c) for c in conversations])


def test_a_call_is_trained_and_its_result_is_not(mistral_v3):
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": '{"place":"Oslo"}'}}
    conversation = Conversation(
        (
            Message("user", "Is it cold in Oslo?"),
            Message("assistant", "", extra={"tool_calls": [call]}),
            Message("tool", '{"celsius":-3}', extra={"tool_call_id": "abcdefghi"}),
            Message("assistant", "Yes."),
        ),
        (WEATHER,),
    )
    segments = resolve_template("mistral-v3", mistral_v3).segments(conversation)
    assert "".join(s.text for s in segments if s.trained) == (
        '[TOOL_CALLS][{"name": "weather", "arguments": {"place": "Oslo"}, "id": "abcdefghi"}]</s>Yes.</s>'
    )
    text = "".join(s.text for s in segments)
    assert '[TOOL_RESULTS]{"content": {"celsius": -3}, "call_id": "abcdefghi"}[/TOOL_RESULTS]Yes.' in text
    assert text.startswith('<s>[AVAILABLE_TOOLS][{"type": "function", "function": {"name": "weather", "descr')
    kept = conversation.last_response_only()
    segments = resolve_template("mistral-v3", mistral_v3).segments(kept)
    assert "".join(s.text for s in segments if s.trained) == "Yes.</s>"


def call_of(**function) -> dict:
    return {"tool_calls": [{"id": "abcdefghi", "function": function}]}


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([Message("assistant", "text", extra=call_of(name="f"))], "holds both text and tool calls"),
        ([Message("assistant", "", extra={"tool_calls": [{"id": "1"}]})], "a tool call is no {id, function"),
        ([Message("assistant", "", extra={"tool_calls": "f()"})], "tool_calls is no list"),
        (
            [Message("assistant", "", extra=call_of(name="f", arguments="{1}"))],
            "arguments of the call of f are not JSON",
        ),
        ([Message("assistant", "", extra=call_of(name="f", arguments="[1]"))], "f are no JSON object"),
        ([Message("assistant", "", extra=call_of(name="f", arguments={"a": {1}}))], "JSON cannot express"),
        ([Message("assistant", "", extra=call_of(name="f", arguments='{"a": "\\ud800"}'))], "half a surrogate"),
        ([Message("assistant", "", extra=call_of(name="f")), Message("tool", "1")], "no tool_call_id"),
        ([Message("assistant", "", extra=call_of(name="f")), Message("user", "x")], r"turn 3 is user's .* has tool's"),
        ([Message("assistant", "a"), Message("tool", "1")], r"turn 3 is tool's .* has user's"),
    ],
)
def test_what_cannot_be_written_is_a_bad_row(messages, words):
    with pytest.raises(BadRowError, match=words):
        TEMPLATES["mistral-v3"].segments(Conversation((Message("user", "x"), *messages)))


def test_a_tool_without_a_name_is_a_bad_row():
    whole = Conversation((Message("user", "x"), Message("assistant", "y")), ({"name": "f"},))
    with pytest.raises(BadRowError, match=r"a tool is no \{type: function"):
        TEMPLATES["mistral-v3"].segments(whole)


def test_v2_has_one_result_to_a_turn():
    extra = {"tool_call_id": "abcdefghi", "name": "f"}
    asked = (Message("user", "x"), Message("assistant", "", extra=call_of(name="f")))
    told = (Message("tool", "1", extra=extra), Message("tool", "2", extra=extra), Message("assistant", "y"))
    with pytest.raises(BadRowError, match="two tool results follow one answer"):
        TEMPLATES["mistral-v2"].segments(Conversation((*asked, *told)))
    # Results before the last question are not written, so there may be any number of them.
    later = Conversation((*asked, *told, Message("user", "z"), Message("assistant", "w")))
    assert (
        "".join(s.text for s in TEMPLATES["mistral-v2"].segments(later)) == "<s>[INST]x[/INST]y</s>[INST]z[/INST]w</s>"
    )


def test_a_tokenizer_without_the_tokens_of_tools_refuses_rows_with_tools(mistral_v1):
    import copy

    tokenizer = copy.deepcopy(mistral_v1)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[INST]", "[/INST]"]})
    template = resolve_template("mistral-v3", tokenizer)
    plain = (Message("user", "x"), Message("assistant", "y"))
    assert encoder(tokenizer).encode([template.segments(Conversation(plain))])[0].ids
    with pytest.raises(BadRowError, match=r"tools need .*\[TOOL_CALLS\].* which the tokenizer lacks"):
        template.segments(Conversation(plain, (WEATHER,)))


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in ("mistral-v2", "mistral-v3")])
def test_other_templates_refuse_tools_by_name(name):
    plain = (Message("user", "x"), Message("assistant", "y"))
    with pytest.raises(BadRowError, match=f"offers tools, which template {name} has no way to write"):
        TEMPLATES[name].segments(Conversation(plain, (WEATHER,)))
    calling = (Message("user", "x"), Message("assistant", "", extra=call_of(name="f")))
    with pytest.raises(BadRowError, match=f"calls tools, which template {name} has no way to write"):
        TEMPLATES[name].segments(Conversation(calling))
    with pytest.raises(BadRowError, match="mistral-v2 and mistral-v3 have"):
        TEMPLATES[name].segments(Conversation(calling))


@pytest.mark.parametrize(("name", "fixture", "version"), CASES)
def test_sharegpt_without_ids_is_written_as_mistral_common_writes_it(name, fixture, version, request):
    tokenizer = request.getfixturevalue(fixture)
    call = json.dumps({"name": "weather", "arguments": {"place": "Oslo"}})
    turns = ("human", "Rain?"), ("function_call", call), ("observation", '{"rain": true}'), ("gpt", "Yes.")
    row = {"conversations": [{"from": who, "value": what} for who, what in turns], "tools": [WEATHER]}
    (conversation,) = FORMATS["sharegpt"].parse(row)
    template = resolve_template(name, tokenizer)
    segments = template.segments(conversation)
    expected = reference_ids(reference(version), conversation)
    assert encoder(tokenizer).encode([segments])[0].ids.tolist() == expected
    text = "".join(segment.text for segment in segments)
    assert ('"call_id": "call00001"' in text, '"name": "weather", "content"' in text) == (version == 3, version == 2)
