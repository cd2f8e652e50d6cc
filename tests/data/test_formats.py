"""Every format: what it reads, what it refuses and why, and that `auto` finds it."""

from __future__ import annotations

import copy
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tune.data.conversation import BadRowError, Conversation, Message
from tune.data.formats import FORMATS, detect_format, find_format
from tune.data.formats.pair import ANSWERS, QUESTIONS, SYSTEMS
from tune.data.formats.turns import SPEAKERS
from tune.data.unread import advice, no_format_fits
from tune.recipe import fields
from tune.recipe.later import FORMATS_LATER

# One good row a format; a new format must add its own.
ROWS: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "Say hi.", "input": "", "output": "Hi."},
    "sharegpt": {"conversations": [{"from": "human", "value": "Say hi."}, {"from": "gpt", "value": "Hi."}]},
    "messages": {"messages": [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "Hi."}]},
    "prompt_completion": {"prompt": "Say hi.", "completion": "Hi."},
    "question_answer": {"question": "Say hi.", "answer": "Hi."},
    "text": {"text": "Say hi. Hi."},
}
WRONG = [None, 3, True, 1.5, [], {}, [3], [{}], [None], "", " \n", "\ud800", {"a": 1}]
ASKED, ANSWERED = Message("user", "Say hi."), Message("assistant", "Hi.")
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "123456789", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "123456789", "name": "add", "content": "3"}


def parse(name: str, row: dict[str, Any], *others: dict[str, Any]) -> Conversation:
    """The one conversation of a row, read by the named format as it is fitted to the row and others."""
    (parsed,) = find_format(name, [row, *others]).parse(row)
    return parsed


def reason(name: str, row: dict[str, Any]) -> str:
    with pytest.raises(BadRowError) as caught:
        FORMATS[name].parse(row)
    return str(caught.value)


def detected(*rows: dict[str, Any]) -> str | None:
    fmt = detect_format(rows)
    return None if fmt is None else fmt.label


def shape(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation.messages]


def messages(*turns: dict[str, Any], **columns: Any) -> dict[str, Any]:
    return {"messages": list(turns), **columns}


def sharegpt(*turns: tuple[str, str], **columns: Any) -> dict[str, Any]:
    return {"conversations": [{"from": speaker, "value": said} for speaker, said in turns], **columns}


def test_every_format_of_a_recipe_is_there() -> None:
    assert {*FORMATS} == {*fields.FORMATS} - {"auto"}
    assert FORMATS_LATER == ()


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_reads_its_row_and_is_detected(name: str) -> None:
    fmt, row = find_format(name), ROWS[name]
    assert fmt.name == fmt.label == name
    if name == "text":
        assert fmt.parse(row) == [Conversation((), text="Say hi. Hi.")]
    else:
        assert fmt.parse(row) == [Conversation((ASKED, ANSWERED))]
    assert detect_format([row]) == find_format(name, [row]) == fmt
    assert set(row) <= set(fmt.columns)
    assert not any(FORMATS[other].matches(row) for other in FORMATS if other != name)
    assert fmt.needs.startswith(next(iter(row)))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_no_value_of_a_column_makes_a_format_do_anything_but_refuse(name: str, value: object) -> None:
    for column in ROWS[name]:
        if column == "input" and (value is None or value in ("", " \n")):
            assert FORMATS[name].parse({**ROWS[name], column: value})[0].messages[0].input is None
            continue
        with pytest.raises(BadRowError):
            FORMATS[name].parse({**ROWS[name], column: value})
    with pytest.raises(BadRowError):
        FORMATS[name].parse({})


KEYS = ["messages", "conversations", "role", "content", "from", "value", "instruction", "input", "output", "prompt"]
KEYS += ["completion", "question", "answer", "context", "text", "instances", "tools", "functions", "system", "weight"]
KEYS += ["train", "training", "history"]
KEYS += ["tool_calls", "function_call", "arguments", "name", "type", "function", "x"]
TEXTS = [
    "",
    " ",
    "a",
    "user",
    "assistant",
    "human",
    "gpt",
    "system",
    "tool",
    "function_call",
    "\ud800",
    "{",
    "[]",
    "null",
]
TEXTS += [
    '{"name": "f", "arguments": "{}"}',
    '[{"name": "f"}]',
    "### Human: a ### Assistant: b",
    "### Assistant:",
    "text",
]


def anything(rng: random.Random, depth: int = 0) -> Any:
    """A random JSON value, of the keys and words that formats look for."""
    kind = rng.randrange(10 if depth < 5 else 6)
    if kind < 4:
        return rng.choice(TEXTS)
    if kind < 6:
        return rng.choice([None, 0, 1, -2.5, True, False, 10**30, float("nan")])
    if kind < 8:
        return [anything(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(KEYS): anything(rng, depth + 1) for _ in range(rng.randrange(5))}


def mutated(rng: random.Random, value: Any) -> Any:
    """A good row with something changed somewhere inside."""
    if rng.random() < 0.15:
        return anything(rng, 3)
    if isinstance(value, dict):
        changed = {key: mutated(rng, item) if rng.random() < 0.5 else item for key, item in value.items()}
        return {**changed, rng.choice(KEYS): anything(rng, 3)} if rng.random() < 0.5 else changed
    if isinstance(value, list):
        return [mutated(rng, item) if rng.random() < 0.5 else item for item in value]
    return value


def test_random_rows_are_parsed_or_refused_and_never_changed() -> None:
    rng = random.Random(0)
    parsed = refused = 0
    for number in range(4000):
        good = {**rng.choice([*ROWS.values()]), **(messages(CALLING, RESULT, tools=[TOOL]) if number % 5 == 0 else {})}
        row = mutated(rng, good) if number % 4 else anything(rng)
        if not isinstance(row, dict):
            continue
        before = copy.deepcopy(row)
        found = detect_format([row, row])
        assert no_format_fits("a", [row], {})
        assert all(advice([row], {}, name) for name in FORMATS)
        for fmt in (*FORMATS.values(), *(find_format(name, [row]) for name in FORMATS), *([found] if found else [])):
            try:
                conversations = fmt.parse(row)
            except BadRowError:
                refused += 1
                continue
            parsed += 1
            assert conversations
            for conversation in conversations:
                answered = any(m.role == "assistant" for m in conversation.messages)
                assert answered != (conversation.text is not None)
                json.dumps([conversation.tools, [m.extra for m in conversation.messages]])
                for message in conversation.messages:
                    message.text.encode()
        assert repr(row) == repr(before)
    assert parsed > 1000
    assert refused > 1000


def test_depth_is_refused_and_not_a_crash() -> None:
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    for row in (
        messages({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, tools=[{"name": deep}]),
    ):
        assert "nested too deeply" in reason("messages", row)
    assert "not JSON (nested too deeply)" in reason(
        "messages", messages(*ROWS["messages"]["messages"], tools="[" * 99_999)
    )
    while isinstance(deep, list) and deep:
        deep = deep.pop()  # taken apart by hand, since freeing it at once recurses as deeply


def test_reasons_are_said() -> None:
    assert reason("alpaca", {"instruction": "x", "response": "y"}) == "has no 'output' (it has: instruction, response)"
    assert reason("alpaca", {"instruction": "x", "input": None}) == "has no 'output' (it has: instruction)"
    assert reason("alpaca", {"instruction": "x", "output": 3}) == "'output' is a number, not text"
    assert reason("question_answer", {"question": "x", "answer": 42}) == "'answer' is a number, not text"
    assert reason("question_answer", {"question": "x", "answer": None}) == "'answer' is null, not text"
    assert reason("alpaca", {"instruction": "x", "output": b"y"}) == "'output' is of type bytes, not text"
    assert reason("alpaca", {"instruction": "x", "output": " \n"}) == "the answer is empty"
    assert reason("alpaca", {"instruction": "", "input": "some", "output": "y"}) == "the user turn is empty"
    assert reason("alpaca", {"instruction": "x", "output": "y", "system": 1}) == "'system' is a number, not text"
    assert reason("text", {"text": " \n"}) == "the text is empty"
    turns = [{"role": "user", "content": "x"}, {"role": "assistent", "content": "y"}]
    assert reason("messages", messages(*turns)) == (
        "turn 2: unknown role 'assistent'; roles here are system, user, assistant, tool. Did you mean 'assistant'?"
    )
    assert "roles here are system, human, gpt, tool" in reason("sharegpt", sharegpt(("humna", "x")))
    assert "Did you mean 'human'?" in reason("sharegpt", sharegpt(("humna", "x")))
    assert reason("messages", messages(*turns[:1])).startswith("the conversation has no assistant turn")
    assert reason("messages", messages()) == "the conversation is empty"
    empty = [*turns[:1], {"role": "assistant", "content": "y"}, {"role": "user", "content": " "}]
    assert reason("messages", messages(*empty)) == "turn 3, the user turn, is empty"
    unsaid = {"from": "human", "text": "x", "value": None}
    assert reason("sharegpt", {"conversations": [unsaid]}) == "turn 1: 'value' is null, not text"
    del unsaid["value"]
    assert reason("sharegpt", {"conversations": [unsaid]}) == "turn 1: has no 'value' (it has: from, text)"
    assert reason("sharegpt", {"conversations": ["x"]}) == "turn 1 of 'conversations' is text, not an object"
    assert "half a surrogate pair (U+D800)" in reason("alpaca", {"instruction": "x", "output": "\ud800"})


def test_the_examples_of_the_page_are_read_as_it_says() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    rows = [
        json.loads(row) for row in re.findall(r"```json\n(.*?)```", page, re.S) + re.findall(r"`(\{\".*?\})`", page)
    ]
    labels = Counter(detected(row) for row in rows)
    table = re.findall(r"^\| `(\w+)` \| `(\{.*\})` \|$", page, re.M)
    assert [name for name, _ in table] == [*FORMATS]
    assert all(detected(json.loads(row)) == name for name, row in table)
    assert labels.keys() == {*FORMATS, "text (transcripts)", "alpaca (instruction: input, transcripts)"}
    read = [conversation for row in rows for conversation in detect_format([row]).parse(row)]  # type: ignore[union-attr]
    assert len(read) == len(rows) + 1 == len(table) + 6
    for kind, names in (("question", (*QUESTIONS, "input")), ("answer", ANSWERS), ("system prompt", SYSTEMS)):
        (listed,) = re.findall(rf"^\| the {kind} \| (.*) \|$", page, re.M)
        assert re.findall(r"`(\w+)`", listed) == [*names]
    (speakers,) = re.findall(r"Speakers may be called (.*?)\. A turn", page, re.S)
    assert {*re.findall(r"`(\w+)`", speakers)} == {*SPEAKERS}
