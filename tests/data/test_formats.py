"""Every format: what it reads, what it refuses and why, and that `auto` finds it."""

from __future__ import annotations

import pytest

from tune.data.conversation import BadRowError, Message
from tune.data.formats import FORMATS, columns_seen, detect_format, find_format
from tune.errors import DataError

# One good row a format; a new format must add its own.
ROWS = {
    "alpaca": {"instruction": "Say hi.", "input": "", "output": "Hi."},
    "sharegpt": {"conversations": [{"from": "human", "value": "Say hi."}, {"from": "gpt", "value": "Hi."}]},
    "messages": {"messages": [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "Hi."}]},
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_reads_its_row_and_is_detected(name):
    fmt = find_format(name)
    assert fmt.name == name
    assert fmt.parse(ROWS[name]).messages == (Message("user", "Say hi."), Message("assistant", "Hi."))
    assert detect_format([ROWS[name]]) is fmt
    assert set(ROWS[name]) <= set(fmt.columns)
    others = [other for other in FORMATS if other != name]
    assert not any(FORMATS[other].matches(ROWS[name]) for other in others)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [None, 3, [], {}, [3], [{}], "", "\ud800"])
def test_no_value_makes_a_format_do_anything_but_refuse(name, value):
    for column in ROWS[name]:
        if column == "input" and value in (None, ""):
            continue
        with pytest.raises(BadRowError):
            FORMATS[name].parse({**ROWS[name], column: value})


def reason(name: str, row: dict) -> str:
    with pytest.raises(BadRowError) as caught:
        FORMATS[name].parse(row)
    return str(caught.value)


def test_reasons_are_said():
    assert reason("alpaca", {"instruction": "x", "response": "y"}) == "has no 'output' (it has: instruction, response)"
    assert reason("alpaca", {"instruction": "x", "output": 3}) == "'output' is a number, not text"
    assert reason("alpaca", {"instruction": "x", "output": " \n"}) == "the answer is empty"
    assert reason("alpaca", {"instruction": "", "output": "y"}) == "the user turn is empty"
    turns = [{"role": "user", "content": "x"}, {"role": "assistent", "content": "y"}]
    assert reason("messages", {"messages": turns}).startswith("turn 2: unknown role 'assistent'")
    assert "Did you mean 'assistant'?" in reason("messages", {"messages": turns})
    assert reason("messages", {"messages": turns[:1]}).startswith("the conversation has no assistant turn")
    assert reason("messages", {"messages": []}) == "the conversation is empty"
    called = [*turns[:1], {"role": "assistant", "content": "", "tool_calls": [{}]}]
    assert "turn 2: has tool calls" in reason("messages", {"messages": called})
    unsaid = [{"from": "human", "text": "x"}]
    assert reason("sharegpt", {"conversations": unsaid}) == "turn 1: has no 'value' (it has: from, text)"
    assert "half a surrogate pair (U+D800)" in reason("alpaca", {"instruction": "x", "output": "\ud800"})


def test_alpaca_keeps_the_input_apart_and_takes_a_system_prompt():
    parsed = FORMATS["alpaca"].parse({"instruction": "Sum.", "input": "1 2", "output": "3", "system": "Be brief."})
    assert parsed.messages == (
        Message("system", "Be brief."),
        Message("user", "Sum.", input="1 2"),
        Message("assistant", "3"),
    )
    assert parsed.messages[1].text == "Sum.\n\n1 2"


def test_a_blank_system_message_counts_as_none():
    turns = [{"role": "system", "content": " "}, *ROWS["messages"]["messages"]]
    assert not FORMATS["messages"].parse({"messages": turns}).has_system


def test_weights_of_messages():
    question, answer = ROWS["messages"]["messages"]
    turns = [question, {**answer, "weight": 0}, question, {**answer, "weight": 1}]
    assert [m.trained for m in FORMATS["messages"].parse({"messages": turns}).messages] == [True, False, True, True]
    assert "weight is 0.5" in reason("messages", {"messages": [question, {**answer, "weight": 0.5}]})


def test_last_response_only():
    turns = ROWS["messages"]["messages"] * 3
    parsed = FORMATS["messages"].parse({"messages": turns}).last_response_only()
    assert [m.trained for m in parsed.messages if m.role == "assistant"] == [False, False, True]


def test_detection_takes_what_fits_most_and_nothing_when_nothing_fits():
    assert detect_format([{"x": 1}, ROWS["alpaca"], ROWS["messages"], ROWS["alpaca"]]) is FORMATS["alpaca"]
    assert detect_format([{"x": 1, "y": 2}]) is None
    assert columns_seen([{"x": 1}, {"y": 2, "x": 1}]) == ["x", "y"]
    with pytest.raises(DataError, match=r"Did you mean 'sharegpt'\?"):
        find_format("shareGPT")
