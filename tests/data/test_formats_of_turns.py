"""Rows that hold a list of turns: who speaks, in which order, and with which tools."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.data.test_formats import (
    ANSWERED,
    ASKED,
    CALL,
    CALLING,
    RESULT,
    ROWS,
    TOOL,
    detected,
    messages,
    parse,
    reason,
    shape,
    sharegpt,
)
from tune.data.conversation import Conversation, Message
from tune.data.formats.order import JOINED, LEFT_OUT


def test_lists_of_turns_are_read_under_each_others_names() -> None:
    turns, scraped = ROWS["messages"]["messages"], ROWS["sharegpt"]["conversations"]
    assert detected({"conversations": turns}) == "messages (messages: conversations)"
    assert detected({"conversation": turns}) == "messages (messages: conversation)"
    assert detected({"messages": scraped}) == "sharegpt (conversations: messages)"
    assert parse("messages", {"conversations": turns}) == Conversation((ASKED, ANSWERED))
    # Two lists: the format's own is meant, and neither where neither is its own.
    assert detected({"messages": turns, "conversations": turns}) == "messages"
    assert detected({"conversation": turns, "conversations": turns}) is None


def test_messages_come_before_everything_else() -> None:
    row = {"prompt": "x", "completion": "y", "text": "z", "instruction": "x", "output": "y", **ROWS["messages"]}
    assert detected(row, row) == "messages"
    # Even where some rows lack them: the rest says what it is, and is not learnt as a text.
    assert detected(row, *[{"text": "z", "messages": None}] * 5) == "messages"


def test_speakers_of_all_kinds() -> None:
    turns = [("system", "s"), ("user", "a"), ("chatgpt", "b"), ("human", "c"), ("gpt", "d"), ("observation", "e")]
    assert [m.role for m in parse("sharegpt", sharegpt(*turns)).messages] == [
        "system", "user", "assistant", "user", "assistant", "tool",
    ]  # fmt: skip
    roles = ["developer", "user", "model", "function", "assistant"]
    parsed = parse("messages", messages(*({"role": role, "content": "x"} for role in roles)))
    assert [m.role for m in parsed.messages] == ["system", "user", "assistant", "tool", "assistant"]


def test_a_blank_system_message_counts_as_none() -> None:
    turns = [{"role": "system", "content": " "}, *ROWS["messages"]["messages"]]
    assert not parse("messages", messages(*turns)).has_system


def test_a_system_prompt_may_stand_in_a_column_of_its_own() -> None:
    pair = ROWS["messages"]["messages"]
    assert parse("messages", messages(*pair, system="s")).messages == (Message("system", "s"), ASKED, ANSWERED)
    assert parse("sharegpt", {**ROWS["sharegpt"], "system": "s"}).messages[0] == Message("system", "s")
    for column in (None, "", " "):
        assert parse("messages", messages(*pair, system=column)).messages == (ASKED, ANSWERED)
    for own in (" s\n", ""):
        both = parse("messages", messages({"role": "system", "content": own}, *pair, system="s"))
        assert both.messages == (Message("system", "s"), ASKED, ANSWERED)
    other = messages({"role": "system", "content": "t"}, *pair, system="s")
    assert reason("messages", other) == "has a column 'system' and a system message that says something else"


def test_weights_of_messages() -> None:
    question, answer = ROWS["messages"]["messages"]
    turns = [question, {**answer, "weight": 0}, question, {**answer, "weight": 1}, question, {**answer, "weight": None}]
    assert [m.trained for m in parse("messages", messages(*turns)).messages] == [True, False, *[True] * 4]
    assert "weight is 0.5" in reason("messages", messages(question, {**answer, "weight": 0.5}))


@pytest.mark.parametrize("key", ["train", "training"])
def test_a_switch_of_a_turn_is_read_like_its_weight(key: str) -> None:
    question, answer = ROWS["messages"]["messages"]
    turns = [question, {**answer, key: False}, question, {**answer, key: True}, question, {**answer, key: None}]
    assert [m.trained for m in parse("messages", messages(*turns)).messages] == [True, False, *[True] * 4]
    asked, answered = ROWS["sharegpt"]["conversations"]
    row = {"conversations": [asked, {**answered, key: False}]}
    assert [m.trained for m in parse("sharegpt", row).messages] == [True, False]
    agreeing = parse("messages", messages(question, {**answer, key: False, "weight": 0}))
    assert not agreeing.messages[1].trained
    for weight, switch in ((1, False), (0, True)):
        said = reason("messages", messages(question, {**answer, key: switch, "weight": weight}))
        assert said.endswith(f"trained on and that it is not (weight: {weight}, {key}: {str(switch).lower()})")
    both = messages(question, {**answer, "train": True, "training": False})
    assert "(train: true, training: false)" in reason("messages", both)
    for value, words in ((0, "a number"), ("no", "text"), ([], "a list")):
        assert f"its {key!r} is {words}; false" in reason("messages", messages(question, {**answer, key: value}))


def test_last_response_only() -> None:
    turns = ROWS["messages"]["messages"] * 3
    parsed = parse("messages", messages(*turns)).last_response_only()
    assert [m.trained for m in parsed.messages if m.role == "assistant"] == [False, False, True]


def test_content_in_parts() -> None:
    def said(*parts: Any) -> dict[str, Any]:
        return messages({"role": "user", "content": list(parts)}, {"role": "assistant", "content": "x"})

    # A table has null under the keys of other kinds of part.
    parts = {"type": "text", "text": "a", "image_url": None}, {"type": "text", "text": "b"}
    assert parse("messages", said(*parts)).messages[0].content == "a\n\nb"
    image = {"type": "image_url", "image_url": {"url": "x"}, "text": None}
    assert (
        reason("messages", said(image)) == "turn 1: part 1 of its 'content' is of type 'image_url'; only text is learnt"
    )
    assert reason("messages", said({"type": "text"})) == "turn 1: part 1 of its 'content' has no 'text'"
    assert reason("messages", said("a")) == "turn 1: part 1 of its 'content' is text, not an object"
    assert reason("messages", said()) == "the user turn is empty"


@pytest.mark.parametrize(
    ("turns", "ordered", "mended"),
    [
        ("u:a g:b", "u:a g:b", ()),
        ("s:x u:a g:b u:c g:d", "s:x u:a g:b u:c g:d", ()),
        ("u:a g:b u:c", "u:a g:b u:c", ()),
        ("g:a u:b g:c", "u:b g:c", (LEFT_OUT,)),
        ("s:x g:a g:b u:c g:d", "s:x u:c g:d", (LEFT_OUT,)),
        ("u:a u:b g:c", "u:a\n\nb g:c", (JOINED,)),
        ("u:a g:b g:c u:d g:e", "u:a g:b\n\nc u:d g:e", (JOINED,)),
        ("u:a g:b g:c g:d", "u:a g:b\n\nc\n\nd", (JOINED,)),
        ("s:x s:y u:a g:b", "s:x\n\ny u:a g:b", (JOINED,)),
        ("s:x s:y g:z u:a u:b g:c", "s:x\n\ny u:a\n\nb g:c", (LEFT_OUT, JOINED)),
        # what stays is the template's to write or to refuse
        ("u:a s:x g:b", "u:a s:x g:b", ()),
        ("g:a", "g:a", ()),
        ("g:a u:b", "g:a u:b", ()),
        ("u:a g:b t:c t:d g:e", "u:a g:b t:c t:d g:e", ()),
    ],
)
def test_odd_orders_of_scraped_turns(turns: str, ordered: str, mended: tuple[str, ...]) -> None:
    names = {"s": "system", "u": "human", "g": "gpt", "t": "tool"}

    def row(words: str) -> list[tuple[str, str]]:
        return [(names[word[0]], word[2:]) for word in words.split(" ")]

    parsed = parse("sharegpt", sharegpt(*row(turns)))
    roles = {"human": "user", "gpt": "assistant"}
    assert shape(parsed) == [(roles.get(speaker, speaker), said) for speaker, said in row(ordered)]
    assert parsed.mended == mended
    # Messages are what a template is given: not one of them is touched.
    same = messages(*({"role": speaker, "content": said} for speaker, said in row(turns)))
    untouched = parse("messages", same)
    assert [said for _, said in shape(untouched)] == [said for _, said in row(turns)]
    assert untouched.mended == ()


def test_turns_of_one_speaker_stay_apart_where_one_is_not_trained() -> None:
    row = sharegpt(("human", "a"), ("gpt", "b"), ("gpt", "c"))
    row["conversations"][1]["weight"] = 0
    assert [(m.content, m.trained) for m in parse("sharegpt", row).messages] == [("a", True), ("b", False), ("c", True)]


@pytest.mark.parametrize(
    "tools",
    [
        [TOOL],
        json.dumps([TOOL]),
        TOOL,
        [json.dumps(TOOL)],
        [TOOL["function"]],
        [{"type": "function", "function": {**TOOL["function"], "description": None, "strict": None}, "extra": None}],
    ],
)
def test_tools_are_passed_on_in_one_form(tools: object) -> None:
    asked, answer = ROWS["messages"]["messages"]
    assert parse("messages", messages(asked, answer, tools=tools)).tools == (TOOL,)
    assert parse("messages", messages(asked, answer, functions=tools)).tools == (TOOL,)
    assert parse("sharegpt", {**ROWS["sharegpt"], "tools": tools}).tools == (TOOL,)


@pytest.mark.parametrize("tools", [None, [], "", " ", "[]", "null"])
def test_no_tools(tools: object) -> None:
    assert parse("messages", messages(*ROWS["messages"]["messages"], tools=tools)).tools == ()


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        (3, "its 'tools' is a number, not a list of objects"),
        ("add(a, b)", "its 'tools' is text that is not JSON (Expecting value)"),
        ([3], "its 'tools' holds a number, not an object"),
        ([{"description": "x"}], "an entry of its 'tools' names no function"),
        ([{"function": "add"}], "an entry of its 'tools' names no function"),
        ([{"name": "a", "when": b"x"}], "its 'tools' holds a value that is of type bytes"),
        ([{"name": "\udfff"}], "the text holds half a surrogate pair (U+DFFF), which is no character"),
    ],
)
def test_malformed_tools_are_refused(tools: object, said: str) -> None:
    assert reason("messages", messages(*ROWS["messages"]["messages"], tools=tools)) == said


@pytest.mark.parametrize("arguments", [{"a": 1, "b": 2}, '{"a": 1, "b": 2}', {"a": 1, "b": 2, "c": None}])
def test_calls_and_results_are_passed_on(arguments: object) -> None:
    call = {"id": "123456789", "type": "function", "function": {"name": "add", "arguments": arguments}}
    turns = [{"role": "user", "content": "1 + 2?"}, {**CALLING, "tool_calls": [call]}, RESULT]
    parsed = parse("messages", messages(*turns, {"role": "assistant", "content": "3"}, tools=[TOOL]))
    assert shape(parsed) == [("user", "1 + 2?"), ("assistant", ""), ("tool", "3"), ("assistant", "3")]
    assert parsed.messages[1].extra == {"tool_calls": [CALL]}
    assert parsed.messages[2].extra == {"tool_call_id": "123456789", "name": "add"}
    empty = [*turns[:2], {**RESULT, "content": ""}, {"role": "assistant", "content": "Done."}]
    assert shape(parse("messages", messages(*empty)))[2] == ("tool", "")
    bare = {"name": "add", "arguments": arguments}
    older = [
        turns[0],
        {"role": "assistant", "content": "", "function_call": bare},
        {"role": "function", "content": "3"},
    ]
    parsed = parse("messages", messages(*older, tools=None))
    assert parsed.messages[1].extra == {"tool_calls": [{"type": "function", "function": CALL["function"]}]}
    assert parsed.messages[2] == Message("tool", "3")


def test_calls_that_are_malformed_are_refused() -> None:
    def said(**keys: Any) -> str:
        return reason(
            "messages", messages({"role": "user", "content": "x"}, {"role": "assistant", "content": "", **keys})
        )

    assert said(tool_calls=3) == "turn 2: its 'tool_calls' is a number, not a list of objects"
    assert said(tool_calls=[{"id": "1"}]) == "turn 2: an entry of its 'tool_calls' names no function"
    assert said(tool_calls="x") == "turn 2: its 'tool_calls' is text that is not JSON (Expecting value)"
    assert said(tool_calls=[]) == "the answer is empty"
    asked = messages({"role": "user", "content": "x", "tool_calls": [CALL]})
    assert reason("messages", asked) == "turn 1: has calls of tools, and is user's; only the assistant calls"


def test_thoughts_and_names_are_passed_on_and_other_keys_are_not() -> None:
    answer = {"role": "assistant", "content": "x", "reasoning_content": "y", "thinking": None, "id": 3, "model": "m"}
    parsed = parse("messages", messages({"role": "user", "content": "a", "name": "Ann"}, answer))
    assert [m.extra for m in parsed.messages] == [{"name": "Ann"}, {"reasoning_content": "y"}]


def test_sharegpt_with_calls_as_turns() -> None:
    call = json.dumps({"name": "add", "arguments": {"a": 1, "b": 2}})
    turns = ("human", "1 + 2?"), ("function_call", call), ("observation", "3"), ("gpt", "It is 3.")
    parsed = parse("sharegpt", sharegpt(*turns, tools=json.dumps([TOOL["function"]]), system="Calculate."))
    assert parsed.tools == (TOOL,)
    assert shape(parsed)[1:] == [("user", "1 + 2?"), ("assistant", ""), ("tool", "3"), ("assistant", "It is 3.")]
    linked = {"type": "function", "function": CALL["function"], "id": "call00001"}
    assert parsed.messages[2].extra == {"tool_calls": [linked]}
    assert parsed.messages[3].extra == {"tool_call_id": "call00001", "name": "add"}
    assert parsed.mended == ()
    assert reason("sharegpt", sharegpt(("human", "a"), ("function_call", "add(1)"))) == (
        "turn 2: its 'value' is text that is not JSON (Expecting value)"
    )
    assert reason("sharegpt", sharegpt(("human", "a"), ("function_call", "[]"))) == "turn 2: its 'value' is empty"


def test_tools_that_a_system_message_spells_out_are_not_given_twice() -> None:
    turns = ("human", "1 + 2?"), ("gpt", "<tool_call>{}</tool_call>"), ("tool", "<tool_response>3</tool_response>")
    spelled = sharegpt(("system", "You may call: <tools> [] </tools>"), *turns, tools=[TOOL])
    assert parse("sharegpt", spelled).tools == ()
    assert shape(parse("sharegpt", spelled))[2] == ("assistant", "<tool_call>{}</tool_call>")
    assert parse("sharegpt", sharegpt(("system", "Call tools."), *turns, tools=[TOOL])).tools == (TOOL,)


def called(name: str, id: str | None = None) -> dict[str, Any]:
    return {"from": "function_call", "value": json.dumps({"function": {"name": name}} | ({"id": id} if id else {}))}


def links(*turns: dict[str, Any]) -> list[Any]:
    """The ids of calls, and the id and name of results, in order."""
    row = {"conversations": [{"from": "human", "value": "x"}, *turns, {"from": "gpt", "value": "y"}]}
    found: list[Any] = []
    for message in parse("sharegpt", row).messages:
        found += [call.get("id") for call in message.extra.get("tool_calls", ())]
        if message.role == "tool":
            found.append((message.extra.get("tool_call_id"), message.extra.get("name")))
    return found


def test_calls_and_results_without_ids_are_linked_by_their_order() -> None:
    result = {"from": "observation", "value": "3"}
    again = links(called("f"), result, called("g"), result)
    assert again == ["call00001", ("call00001", "f"), "call00002", ("call00002", "g")]
    two = {"from": "function_call", "value": json.dumps([{"name": "f"}, {"name": "g"}])}
    assert links(two, result, result) == ["call00001", "call00002", ("call00001", "f"), ("call00002", "g")]
    # What the data says is kept, and no new id is one that it has.
    given = {**result, "tool_call_id": "call00001"}
    assert links(called("f"), result, called("g"), given) == [
        "call00002", ("call00002", "f"), "call00001", ("call00001", "g"),
    ]  # fmt: skip
    assert links(called("f", "mine"), result) == ["mine", ("mine", "f")]
    assert links(called("f")) == ["call00001"], "a call without its result"


def test_where_it_is_not_clear_which_result_is_of_which_call_nothing_is_filled_in() -> None:
    result = {"from": "observation", "value": "3"}
    two = {"from": "function_call", "value": json.dumps([{"name": "f"}, {"name": "g"}])}
    assert links(two, result) == [None, None, (None, None)]
    assert links(called("f"), result, result) == [None, (None, None), (None, None)]
    assert links(two, {**result, "name": "g"}, {**result, "name": "f"}) == [None, None, (None, "g"), (None, "f")]
    assert links(called("f", "one"), {**result, "tool_call_id": "two"}) == ["one", ("two", None)]
    bare = messages({"role": "user", "content": "x"}, {**CALLING, "tool_calls": [{"name": "f"}]}, RESULT)
    assert "id" not in parse("messages", bare).messages[1].extra["tool_calls"][0], "messages are taken as they are"
