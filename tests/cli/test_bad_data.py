"""Rows that cannot be trained on: told by file and row, with what to do, before the weights are loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli import test_bad_files, test_bad_template
from tests.cli.data_mistakes import (
    ROW,
    after_a_good_one,
    assert_refused_by_check,
    assert_told_in_the_same_words,
    data,
    source,
)
from tests.cli.mistakes import CHECK, Mistake, mistake
from tune.cli.main import _run

LONG_PROMPT = json.dumps({"instruction": "word " * 500, "output": "x"}) + "\n"
LONG_ANSWER = json.dumps({"instruction": "word", "output": "x " * 500}) + "\n"


def turns(*messages: object) -> Callable[[Path], object]:
    """A file of one good conversation and one of these messages."""
    good = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    return data("".join(json.dumps({"messages": m}) + "\n" for m in (good, list(messages))))


def said(role: str, content: object, **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


ROWS = [
    mistake("no format fits", "columns seen: foo, bar", "columns:", prepare=data('{"foo": "a", "bar": "b"}\n')),
    mistake(
        "columns in capitals",
        "Try columns: {instruction: Instruction, output: Output}",
        prepare=data('{"Instruction": "a", "Output": "b"}\n'),
    ),
    mistake(
        "preferences",
        "columns seen: prompt, chosen, rejected",
        "Try columns: {completion: chosen}",
        prepare=data('{"prompt": "a", "chosen": "b", "rejected": "c"}\n'),
    ),
    mistake("prompts without answers", "no answers", prepare=data('{"prompt": "a"}\n')),
    mistake(
        "a column that commands a terminal",
        "columns seen: a, \\x1b[31mb",
        prepare=data('{"a": "x", "\\u001b[31mb": "y"}\n'),
    ),
    mistake(
        "columns the wrong way round",
        "columns.q: there is no column 'instruction'",
        "Ours is on the left, the data's on the right: {instruction: q}",
        prepare=data('{"q": "a", "a": "b"}\n'),
        data__train=source(format="alpaca", columns={"q": "instruction", "a": "output"}),
    ),
    mistake("wrong format", "train.jsonl", "format: alpaca", data__train=source(format="sharegpt")),
    mistake(
        "column missing", "train.jsonl:2: has no 'output'", prepare=after_a_good_one({"instruction": "a"}), lines=2
    ),
    mistake("one row of another format", "train.jsonl:2", prepare=after_a_good_one({"messages": []}), lines=2),
    mistake(
        "answer no text",
        "train.jsonl:2: 'output' is an object",
        prepare=after_a_good_one({"instruction": "a", "output": {}}),
        lines=2,
    ),
    mistake(
        "answer null",
        "train.jsonl:2: 'output' is null",
        prepare=after_a_good_one({"instruction": "a", "output": None}),
        lines=2,
    ),
    mistake(
        "answer a number",
        "train.jsonl:2: 'output' is a number",
        prepare=after_a_good_one({"instruction": "a", "output": 4}),
        lines=2,
    ),
    mistake(
        "question a list",
        "train.jsonl:2: 'instruction' is a list",
        prepare=after_a_good_one({"instruction": ["a"], "output": "b"}),
        lines=2,
    ),
    mistake(
        "input a boolean",
        "train.jsonl:2: 'input' is a boolean",
        prepare=after_a_good_one({"instruction": "a", "input": True, "output": "b"}),
        lines=2,
    ),
    mistake(
        "answer empty",
        "train.jsonl:2: the answer is empty",
        prepare=after_a_good_one({"instruction": "a", "output": " "}),
        lines=2,
    ),
    mistake(
        "question empty",
        "train.jsonl:2: the user turn is empty",
        prepare=after_a_good_one({"instruction": "", "output": "b"}),
        lines=2,
    ),
    mistake(
        "column renamed wrongly",
        "'outptu'",
        "Did you mean 'output'?",
        "instruction, output, input",
        data__train=source(format="alpaca", columns={"outptu": "output"}),
    ),
    mistake(
        "column of a name that no row has",
        "columns.output: there is no column 'respons'",
        "Did you mean 'response'?",
        prepare=data('{"instruction": "a", "response": "b"}\n'),
        data__train=source(columns={"output": "respons"}),
    ),
    mistake(
        "completion missing",
        "train.jsonl:2: has no 'completion'",
        prepare=data('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n'),
        data__train=source(format="prompt_completion"),
        lines=2,
    ),
    mistake(
        "text a number",
        "train.jsonl:2: 'text' is a number",
        prepare=data('{"text": "a b"}\n{"text": 5}\n'),
        data__train=source(format="text"),
        data__template="plain",
        lines=2,
    ),
    mistake(
        "answer to a question missing",
        "train.jsonl:2: has no 'answer'",
        prepare=data('{"question": "a", "answer": "b"}\n{"question": "a"}\n'),
        data__train=source(format="question_answer"),
        lines=2,
    ),
]

CONVERSATIONS = [
    mistake(
        "role unknown",
        "train.jsonl:2: turn 1: ",
        "'usr'",
        "Did you mean 'user'?",
        prepare=turns(said("usr", "x"), said("assistant", "y")),
        lines=2,
    ),
    mistake(
        "role a number", "train.jsonl:2: turn 1: ", "role", prepare=turns(said(1, "x"), said("assistant", "y")), lines=2
    ),
    mistake("role missing", "train.jsonl:2: turn 1: has no 'role'", prepare=turns({"content": "x"}), lines=2),
    mistake(
        "speaker unknown",
        "train.jsonl:1: turn 1: ",
        "'humn'",
        "Did you mean 'human'?",
        prepare=data('{"conversations": [{"from": "humn", "value": "x"}, {"from": "gpt", "value": "y"}]}\n'),
    ),
    mistake(
        "value missing",
        "train.jsonl:1: turn 2: has no 'value'",
        prepare=data('{"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "text": "y"}]}\n'),
    ),
    mistake(
        "a role of any length",
        "train.jsonl:2: turn 1: unknown role 'uuu",
        "roles here are",
        prepare=turns(said("u" * 9000, "x"), said("assistant", "y")),
        lines=2,
    ),
    mistake("no messages", "train.jsonl:2: the conversation is empty", prepare=turns(), lines=2),
    mistake(
        "messages as text",
        "train.jsonl:2: 'messages' is text",
        prepare=data(
            '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}\n'
            '{"messages": "[]"}\n'
        ),
        lines=2,
    ),
    mistake("turn no object", "train.jsonl:2: turn 2", "is text", prepare=turns(said("user", "x"), "hello"), lines=2),
    mistake(
        "only a system prompt", "train.jsonl:2: ", "no assistant turn", prepare=turns(said("system", "x")), lines=2
    ),
    mistake(
        "no answer",
        "train.jsonl:2: ",
        "no assistant turn",
        prepare=turns(said("user", "x"), said("user", "y")),
        lines=2,
    ),
    mistake(
        "content null",
        "train.jsonl:2: turn 2: 'content' is null",
        prepare=turns(said("user", "x"), said("assistant", None)),
        lines=2,
    ),
    mistake(
        "content an image",
        "train.jsonl:2: turn 1: ",
        prepare=turns(said("user", [{"type": "image_url", "image_url": {"url": "x"}}]), said("assistant", "y")),
        lines=2,
    ),
    mistake(
        "weight of a half",
        "train.jsonl:2: turn 2: ",
        "0.5",
        prepare=turns(said("user", "x"), said("assistant", "y", weight=0.5)),
        lines=2,
    ),
    mistake(
        "no answer that counts",
        "train.jsonl:2: nothing of it is trained on (no answer of it counts)",
        "Mend the data",
        prepare=turns(said("user", "x"), said("assistant", "y", weight=0)),
        lines=2,
    ),
    mistake(
        "turn empty",
        "train.jsonl:2: turn 1, the user turn, is empty",
        prepare=turns(said("user", ""), said("assistant", "y"), said("user", "x"), said("assistant", "y")),
        lines=2,
    ),
    mistake(
        "two questions in a row",
        "train.jsonl:2: ",
        "alpaca",
        prepare=turns(said("user", "x"), said("user", "x"), said("assistant", "y")),
        lines=2,
    ),
    mistake(
        "an answer first",
        "train.jsonl:2: ",
        "mistral-v1",
        prepare=turns(said("assistant", "y"), said("user", "x"), said("assistant", "y")),
        data__template="mistral-v1",
        lines=2,
    ),
    mistake(
        "a system prompt late",
        "train.jsonl:2: ",
        "system",
        prepare=turns(said("user", "x"), said("system", "s"), said("assistant", "y")),
        lines=2,
    ),
    mistake(
        "tool calls in a template without",
        "train.jsonl:2: ",
        "tool",
        prepare=turns(
            said("user", "x"),
            said("assistant", "", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": "{}"}}]),
        ),
        lines=2,
    ),
    mistake(
        "tool result in a template without",
        "train.jsonl:2: ",
        "tool",
        prepare=turns(said("user", "x"), said("tool", "4"), said("assistant", "y")),
        lines=2,
    ),
]

LENGTHS = [
    mistake("all dropped", "data.train: no row is left", prepare=data(ROW), data__on_bad="drop", data__max_length=8),
    mistake(
        "all held-out dropped",
        "data.eval: no row is left",
        prepare=data(LONG_PROMPT, "eval.jsonl"),
        data__on_bad="drop",
        data__eval=["eval.jsonl"],
    ),
    mistake("prompt too long", "train.jsonl:2", "data.max_length 256", prepare=data(ROW + LONG_PROMPT), lines=2),
    mistake(
        "row too long", "train.jsonl:2", "data.on_long", prepare=data(ROW + LONG_ANSWER), lines=2, data__on_long="error"
    ),
    mistake(
        "weight too small",
        "data.train[0].weight: leaves none of its 40 examples",
        "0.025",
        data__train=source(weight=0.01),
    ),
    mistake("nothing but bad rows", "none of its rows (2)", prepare=data("{oops\n{again\n")),
]

MISTAKES = [*ROWS, *CONVERSATIONS, *LENGTHS]


def test_there_are_many_kinds() -> None:
    kinds = [
        parameters.id for part in (MISTAKES, test_bad_files.MISTAKES, test_bad_template.MISTAKES) for parameters in part
    ]
    assert len(set(kinds)) == len(kinds) >= 120


@pytest.mark.parametrize("wrong", MISTAKES)
def test_refused(wrong: Mistake, work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert_refused_by_check(wrong, work, capfd)


@pytest.mark.parametrize("wrong", MISTAKES[::6])
def test_training_says_the_same(wrong: Mistake, work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert_told_in_the_same_words("train", wrong, work, capfd)


@pytest.mark.parametrize("wrong", ROWS[:4])
def test_preview_says_the_same(wrong: Mistake, work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert_told_in_the_same_words("preview", wrong, work, capfd)
    assert not (work / "run").exists()


def test_no_message_is_longer_than_a_screen(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data(json.dumps({f"column {n} {'x' * 50}": "a" for n in range(900)}) + "\n")(work)
    assert _run(list(CHECK)) == 2
    assert len(capfd.readouterr().err) < 2100
