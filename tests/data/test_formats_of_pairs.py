"""Rows of one question and one answer, under all kinds of names, and what is said where two may be meant."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.data.test_formats import (
    ROWS,
    TOOL,
    detected,
    parse,
    reason,
    shape,
)
from tune.data.conversation import Message
from tune.data.formats import FORMATS, columns_seen, detect_format, find_format
from tune.data.unread import advice, no_format_fits
from tune.errors import DataError


def test_alpaca_keeps_the_input_apart_and_takes_a_system_prompt() -> None:
    parsed = parse("alpaca", {"instruction": "Sum.", "input": "1 2", "output": "3", "system": "Be brief."})
    assert parsed.messages == (
        Message("system", "Be brief."),
        Message("user", "Sum.", input="1 2"),
        Message("assistant", "3"),
    )
    assert parsed.messages[1].text == "Sum.\n\n1 2"


def test_alpaca_reads_each_instance_as_a_conversation() -> None:
    row = {"instruction": "Sum.", "instances": [{"input": "1 2", "output": "3"}, {"input": "", "output": "0"}]}
    assert [c.messages for c in FORMATS["alpaca"].parse(row)] == [
        (Message("user", "Sum.", input="1 2"), Message("assistant", "3")),
        (Message("user", "Sum."), Message("assistant", "0")),
    ]
    assert detected(row) == "alpaca"
    row["instances"][1]["output"] = ""
    assert reason("alpaca", row) == "instance 2: the answer is empty"
    assert reason("alpaca", {**row, "instances": [3]}) == "instance 1: is a number, not an object"
    assert reason("alpaca", {**row, "instances": []}) == "has no 'output' (it has: instruction, instances)"


def test_alpaca_reads_earlier_turns() -> None:
    row = {"instruction": "c", "input": "d", "output": "e", "system": "s", "history": [["a", "b"], ["x", "y"]]}
    said = [Message("user", "a"), Message("assistant", "b"), Message("user", "x"), Message("assistant", "y")]
    last = (Message("user", "c", input="d"), Message("assistant", "e"))
    assert parse("alpaca", row).messages == (Message("system", "s"), *said, *last)
    assert [m.trained for m in parse("alpaca", row).last_response_only().messages if m.role == "assistant"] == [
        False,
        False,
        True,
    ]
    assert detected(row) == "alpaca"
    for none in (None, "", []):
        assert parse("alpaca", {**row, "history": none}).messages == (Message("system", "s"), *last)
    # No format that would leave it out is taken for it.
    assert detected({"prompt": "c", "response": "e"}) == "prompt_completion (completion: response)"
    told = detected({"prompt": "c", "response": "e", "history": [["a", "b"]]})
    assert told == "alpaca (instruction: prompt, output: response)"


@pytest.mark.parametrize(
    ("history", "said"),
    [
        ("a", "'history' is text, not a list of [question, answer]"),
        ({"a": "b"}, "'history' is an object, not a list of [question, answer]"),
        (["a", "b"], "item 1 of 'history' is not [question, answer], both text"),
        ([["a", "b"], ["a"]], "item 2 of 'history' is not [question, answer], both text"),
        ([["a", None]], "item 1 of 'history' is not [question, answer], both text"),
        ([["a", " "]], "turn 2, the answer, is empty"),
    ],
)
def test_malformed_earlier_turns_are_refused(history: Any, said: str) -> None:
    assert reason("alpaca", {"instruction": "c", "output": "e", "history": history}) == said


def test_who_names_the_text_means_it() -> None:
    row = {"instruction": "x", "text": "y"}
    assert detect_format([row]) is None
    fmt = detect_format([row], {"text": "output"})
    assert fmt is not None
    assert fmt.name == "text"


def test_a_context_stands_where_the_input_does() -> None:
    parsed = parse("question_answer", {"question": "Where?", "context": "In Rome.", "answer": "Rome."})
    assert parsed.messages == (Message("user", "Where?", input="In Rome."), Message("assistant", "Rome."))


def test_prompt_and_completion_may_be_lists_of_messages() -> None:
    past = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    answer = [{"role": "assistant", "content": "d"}]
    for completion in (answer, "d"):
        parsed = parse("prompt_completion", {"prompt": past, "completion": completion, "tools": [TOOL]})
        assert shape(parsed) == [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
        assert [m.trained for m in parsed.messages if m.role == "assistant"] == [False, True]
        assert parsed.tools == (TOOL,)
    assert shape(parse("prompt_completion", {"prompt": "a", "completion": answer})) == [
        ("user", "a"),
        ("assistant", "d"),
    ]
    assert detected({"prompt": past, "completion": answer}) == "prompt_completion"
    assert reason("prompt_completion", {"prompt": past, "completion": past[:1]}) == (
        "'completion' holds no assistant turn, so there is nothing to learn"
    )
    assert reason("prompt_completion", {"prompt": [{"role": "user"}], "completion": "d"}) == (
        "'prompt': turn 1: has no 'content' (it has: role)"
    )


@pytest.mark.parametrize(
    ("columns", "label"),
    [
        ("instruction response", "alpaca (output: response)"),
        ("instruction context response category", "alpaca (output: response, input: context)"),
        ("query response", "alpaca (instruction: query, output: response)"),
        ("input output", "alpaca (instruction: input)"),
        ("input target", "alpaca (instruction: input, output: target)"),
        ("instruction input answer", "alpaca (output: answer)"),
        ("prompt context response", "alpaca (instruction: prompt, output: response, input: context)"),
        ("prompt response", "prompt_completion (completion: response)"),
        ("question response", "question_answer (answer: response)"),
        ("question input output", "question_answer (answer: output, context: input)"),
        ("system_prompt question response", "question_answer (answer: response, system: system_prompt)"),
        # whatever else there is, a format's own columns are meant
        ("instruction input output text prompt", "alpaca"),
        ("prompt completion text", "prompt_completion"),
        ("prompt question answer", "question_answer"),
        # two that may be meant, or too little
        ("prompt question response", None),
        ("prompt input output", None),
        ("instruction answer response", None),
        ("question answer prompt completion", None),
        ("prompt chosen rejected", None),
        ("id prompt", None),
        ("text label", None),
        ("text summary", None),
        ("Instruction Output", None),
        ("problem solution", None),
    ],
)
def test_usual_names_of_columns_are_read_and_said_unless_two_are_meant(columns: str, label: str | None) -> None:
    row = {name: f"the {name}" for name in columns.split()}
    assert detected(row, row) == label
    if label is not None:
        parsed = detect_format([row]).parse(row)[0].messages  # type: ignore[union-attr]
        said = "\n\n".join(m.text for m in parsed).split("\n\n")
        assert {*said} <= {*row.values()}
        assert {f"the {name}" for name in re.findall(r": (\w+)", label)} <= {*said}


def test_the_named_format_reads_usual_names_as_well() -> None:
    row = {"query": "x", "target": "y", "input": "z"}
    assert find_format("alpaca", [row]).label == "alpaca (instruction: query, output: target)"
    assert (
        find_format("question_answer", [row]).label
        == "question_answer (question: query, answer: target, context: input)"
    )
    assert parse("alpaca", row).messages == (Message("user", "x", input="z"), Message("assistant", "y"))
    # Its own column wins, and where two are left it says what is missing.
    assert (
        find_format("question_answer", [{"question": "x", "answer": "y", "response": "z"}]).label == "question_answer"
    )
    two = {"question": "x", "completion": "y", "response": "z"}
    assert find_format("question_answer", [two]).label == "question_answer"
    assert reason("question_answer", two).startswith("has no 'answer'")


def test_columns_that_are_always_null_or_blank_do_not_count() -> None:
    row = {"instruction": None, "question": "x", "output": None, "answer": "y", "text": None, "messages": None}
    assert detected(row) == "question_answer"
    assert (
        detected({"prompt": "x", "question": " ", "response": "y", "target": ""})
        == "prompt_completion (completion: response)"
    )
    assert detected({"question": None, "text": "x"}) == "text"


def test_a_column_that_the_recipe_names_leaves_no_doubt() -> None:
    assert detect_format([{"instruction": "x", "prompt": "y", "response": "z"}], ["instruction"]).label == (  # type: ignore[union-attr]
        "alpaca (output: response)"
    )
    fmt = detect_format([{"question": "x", "output": "y"}], ["output"])
    assert fmt is not None
    assert fmt.label == "alpaca (instruction: question)"


def test_detection_takes_what_fits_most_and_nothing_when_nothing_fits() -> None:
    assert detected({"x": 1}, ROWS["alpaca"], ROWS["messages"], ROWS["alpaca"]) == "alpaca"
    assert detected({"x": 1, "y": 2}) is None
    assert detect_format([]) is None
    assert columns_seen([{"x": 1}, {"y": 2, "x": 1}]) == ["x", "y"]
    with pytest.raises(DataError, match=r"Did you mean 'sharegpt'\?"):
        find_format("shareGPT")


def test_values_of_the_wrong_type_are_told_by_the_format_and_not_as_no_format() -> None:
    assert detected({"question": "x", "answer": 42}) == "question_answer"
    assert detected({"instruction": "x", "output": {}}) == "alpaca"
    assert advice([{"question": "x", "answer": 42}], {}) == "Its columns fit: mend what is in them."


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"Instruction": "x", "OUTPUT": "y"}, "Try columns: {instruction: Instruction, output: OUTPUT} of the source."),
        ({"QUESTION": "x", "Answer": "y"}, "Try columns: {question: QUESTION, answer: Answer} of the source."),
        ({" question": "x", "answer": "y"}, 'Try columns: {question: " question"} of the source.'),
        ({"Prompt": "x", "completion": "y"}, "Try columns: {prompt: Prompt} of the source."),
        ({"problem": "x", "solution": "y"}, "Try columns: {instruction: problem, output: solution} of the source."),
        ({"prompt": "x", "chosen": "y", "rejected": "z"}, "Try columns: {completion: chosen} of the source."),
        ({"dialog": ROWS["messages"]["messages"]}, "Try columns: {messages: dialog} of the source."),
        ({"turns": ROWS["sharegpt"]["conversations"]}, "Try columns: {conversations: turns} of the source."),
        ({"instruction": "x", "tasks": [{"output": "y"}]}, "Try columns: {instances: tasks} of the source."),
        ({"log": "### Human: a ### Assistant: b"}, "Try columns: {text: log} of the source."),
        (
            {"prompt": "x", "question": "y", "response": "z"},
            "Its columns 'question' and 'prompt' may each be the question: name the ones that are meant, such as "
            "columns: {instruction: question, output: response}.",
        ),
        (
            {"instruction": "x", "answer": "y", "response": "z"},
            "Its columns 'response' and 'answer' may each be the answer: name the ones that are meant, such as "
            "columns: {output: response}.",
        ),
    ],
)
def test_the_map_of_columns_that_is_near_is_said_and_works(row: dict[str, Any], said: str) -> None:
    assert detect_format([row]) is None
    assert advice([row], {}) == said
    columns = {}
    for pair in said.partition("columns: {")[2].partition("}")[0].split(", "):
        ours, _, theirs = pair.partition(": ")
        columns[ours] = theirs.strip('"')
    renamed = {name: value for name, value in row.items() if name not in columns.values()}
    renamed |= {ours: row[theirs] for ours, theirs in columns.items()}
    fmt = detect_format([renamed], columns)
    assert fmt is not None
    assert set(columns) <= set(fmt.columns)
    assert fmt.parse(renamed)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"id": "1", "prompt": "x"}, "hold prompts (column 'prompt') and no answers, so there is nothing to learn"),
        ({"turns": ["x", "y"]}, "hold prompts (column 'turns') and no answers, so there is nothing to learn"),
        ({"text": "x", "label": 3}, "Set format: text of the source if its column 'text' is to be learnt whole."),
        ({"foo": "x", "bar": "y"}, "Set format: and columns: of the source"),
        ({"prompt": "x", "response": ["y"]}, "Set format: and columns: of the source"),
        (
            {"question": "a", "answer": "b", "prompt": "c", "completion": "d"},
            "Its columns are those of prompt_completion and question_answer: set format: of the source to the one",
        ),
    ],
)
def test_what_else_may_be_wrong_is_said(row: dict[str, Any], said: str) -> None:
    assert detect_format([row]) is None
    assert said in no_format_fits("a.jsonl", [row], {})


TURNS = ROWS["messages"]["messages"]
TABLE = "column by column, as pandas writes them unless told otherwise: save them row by row"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"data": [ROWS["alpaca"]]}, "Its rows are in its list 'data': save that list by itself."),
        ({"data": [{"output": "y", "foo": "x"}]}, "Its rows are in its list 'data': save that list by itself."),
        ({"version": "1", "questions": [ROWS["question_answer"]]}, "Its rows are in its list 'questions': save"),
        ({"a": [ROWS["messages"]], "b": [ROWS["messages"]]}, "in its lists 'a' and 'b': save each of them by itself."),
        ({"dialog": [{"speaker": "a", "text": "b"}]}, "Set format: and columns: of the source"),
        ({"instruction": {"0": "x", "1": "y"}, "output": {"0": "x", "1": "y"}}, TABLE),
        ({"messages": {"0": TURNS}}, TABLE),
        ({"instruction": ["x", "y"], "output": ["x", "y"]}, TABLE),
        ({"messages": [TURNS, TURNS]}, TABLE),
        ({"messages": json.dumps(TURNS)}, "Its column 'messages' is text in which a list of turns is spelled out"),
        ({"turns": str(ROWS["sharegpt"]["conversations"])}, "Its column 'turns' is text in which a list of turns"),
    ],
)
def test_rows_saved_otherwise_are_told_what_they_are(row: dict[str, Any], said: str) -> None:
    assert said in advice([row], {})
    told = no_format_fits("a.jsonl", [row], {})
    assert said in told
    assert "instances:" not in told.partition("Formats:")[0]
    assert ("Formats: messages needs messages" in told) == said.startswith("Set format:")


def test_lists_of_several_rows_are_no_table() -> None:
    assert TABLE not in advice([{"a": ["x", "y"], "b": ["x", "y"]}] * 2, {})


def test_advice_for_a_named_format_names_its_columns() -> None:
    row = {"Query": "x", "Reply": "y"}
    assert advice([row], {}, "prompt_completion") == "Try columns: {prompt: Query, completion: Reply} of the source."
    assert advice([row], {}, "question_answer") == "Try columns: {question: Query, answer: Reply} of the source."
