"""Data that cannot be trained on: told by file and line before the weights are loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.mistakes import Mistake, assert_refused, mistake, write

ROW = '{"instruction": "a", "output": "b c d"}\n'
LONG_PROMPT = json.dumps({"instruction": "word " * 500, "output": "x"}) + "\n"
LONG_ANSWER = json.dumps({"instruction": "word", "output": "x " * 500}) + "\n"


def rename(work: Path) -> None:
    (work / "train.jsonl").rename(work / "trian.jsonl")


def data(content: str | bytes, path: str = "train.jsonl"):
    return write(path, content)


MISTAKES = [
    mistake("missing", "train.jsonl: there is no such file", "Did you mean 'trian.jsonl'?", prepare=rename),
    mistake("missing folder", "dta/train.jsonl", "no folder 'dta'", data__train="dta/train.jsonl"),
    mistake("held-out missing", "evl.jsonl: there is no such file", data__eval=["evl.jsonl"]),
    mistake("empty", "train.jsonl: is empty", prepare=data("")),
    mistake("white space only", "train.jsonl: is empty", prepare=data(" \n\n")),
    mistake(
        "broken line",
        "train.jsonl:3: is not valid JSON",
        "data.on_bad: drop",
        prepare=data(ROW * 2 + "{oops\n"),
        lines=2,
    ),
    mistake("broken array", "train.jsonl:2: is not valid JSON", prepare=data('[{"instruction": "a",\n "output')),
    mistake("one object", "holds one object", "'rows'", prepare=data('{"a": 1,\n "rows": [1, 2]}')),
    mistake("wrong format", "train.jsonl", "format: alpaca", data__train={"path": "train.jsonl", "format": "sharegpt"}),
    mistake("no format fits", "columns seen: foo, bar", "columns:", prepare=data('{"foo": "a", "bar": "b"}\n')),
    mistake("column missing", "train.jsonl:2: has no 'output'", prepare=data(ROW + '{"instruction": "a"}\n'), lines=2),
    mistake(
        "column renamed wrongly",
        "'outptu'",
        "instruction, input, output",
        data__train={"path": "train.jsonl", "format": "alpaca", "columns": {"outptu": "output"}},
    ),
    mistake(
        "field no text",
        "train.jsonl:2: 'output' is",
        prepare=data(ROW + '{"instruction": "a", "output": {}}\n'),
        lines=2,
    ),
    mistake("row no object", "train.jsonl:2: is no object but [1, 2]", prepare=data(ROW + "[1, 2]\n"), lines=2),
    mistake(
        "role unknown",
        "train.jsonl",
        "'usr'",
        "Did you mean 'user'?",
        prepare=data('{"messages": [{"role": "usr", "content": "x"}, {"role": "assistant", "content": "y"}]}\n'),
    ),
    mistake(
        "not UTF-8",
        "train.jsonl:2: is not UTF-8 (byte 0xff)",
        prepare=data(ROW.encode() + b'{"instruction": "\xff"}\n'),
    ),
    mistake("a folder", "base: is a folder", data__train="base"),
    mistake(
        "unsupported extension", "train.csv", ".jsonl", prepare=data("a,b\n", "train.csv"), data__train="train.csv"
    ),
    mistake("all dropped", "data.train: no row is left", prepare=data(ROW), data__on_bad="drop", data__max_length=8),
    mistake("prompt too long", "train.jsonl:2", "data.max_length 256", prepare=data(ROW + LONG_PROMPT), lines=2),
    mistake(
        "row too long", "train.jsonl:2", "data.on_long", prepare=data(ROW + LONG_ANSWER), lines=2, data__on_long="error"
    ),
    mistake("split of a file", "split:", "Remove it", data__train={"path": "train.jsonl", "split": "train"}),
    mistake("data set out of reach", "someone/some-data", "HF_HUB_OFFLINE", data__train="someone/some-data"),
    mistake("template of other tokens", "mistral-v3", "[INST], [/INST]", "alpaca", data__template="mistral-v3"),
    mistake("tokenizer without template", "no chat template", "alpaca", data__template="tokenizer"),
]


@pytest.mark.parametrize("wrong", MISTAKES)
def test_refused(wrong: Mistake, work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert_refused(wrong, work, capfd)


@pytest.mark.parametrize("verb", ["check", "preview"])
def test_told_by_the_verbs_that_only_look(verb: str, work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wrong = mistake(
        verb,
        "train.jsonl:2: has no 'output'",
        prepare=data(ROW + '{"instruction": "a"}\n'),
        lines=2,
        arguments=(verb, "recipe.yaml"),
    ).values[0]
    assert_refused(wrong, work, capfd)
    assert not (work / "run").exists()
