"""Data sets that others made, read whole, and what is said of those that hold nothing to learn."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from tests.data.conftest import fixture_path
from tune.data.formats import FORMATS, detect_format
from tune.data.unread import no_format_fits


def fixture_rows(name: str) -> list[dict[str, Any]]:
    text = fixture_path(f"data/{name}").read_text(encoding="utf-8")
    return (
        json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.split("\n") if line]
    )


@pytest.mark.parametrize(
    ("name", "rows", "label", "conversations"),
    [
        ("gpteacher-roleplay.json", 1923, "alpaca (output: response)", {"ua": 1923}),
        ("gsm8k-train.jsonl", 7473, "question_answer", {"ua": 7473}),
        ("gsm8k-test.jsonl", 1319, "question_answer", {"ua": 1319}),
        (
            "oasst-human-assistant.jsonl",
            953,
            "alpaca (instruction: input, transcripts)",
            {"ua": 517, "uaua": 414, "uauaua": 22},
        ),
        ("self-instruct-seed-tasks.jsonl", 175, "alpaca", {"ua": 175}),
        ("sharegpt-identity.json", 500, "sharegpt", {"ua": 167, "uaua": 166, "uauaua": 167}),
    ],
)
def test_real_data_is_read_whole(name: str, rows: int, label: str, conversations: dict[str, int]) -> None:
    values = fixture_rows(name)
    fmt = detect_format(values)
    assert fmt is not None
    assert fmt.label == label
    parsed = [conversation for row in values for conversation in fmt.parse(row)]
    assert len(values) == rows
    assert Counter("".join(m.role[0] for m in c.messages) for c in parsed) == conversations
    assert not any(c.mended for c in parsed)
    assert not any("### Human" in m.content for c in parsed for m in c.messages)


def test_real_seed_tasks_keep_every_instance() -> None:
    tasks = fixture_rows("self-instruct-seed-tasks.jsonl")
    doubled = [{**task, "instances": task["instances"] * 2} for task in tasks]
    parsed = [c for task in doubled for c in FORMATS["alpaca"].parse(task)]
    assert len(parsed) == 2 * 175
    assert [c.messages[-1].content for c in parsed[::2]] == [task["instances"][0]["output"] for task in tasks]


@pytest.mark.parametrize(
    ("name", "column"), [("koala_test_set.jsonl", "prompt"), ("vicuna-bench-questions.jsonl", "turns")]
)
def test_real_data_without_answers_is_refused_in_words(name: str, column: str) -> None:
    values = fixture_rows(name)
    assert detect_format(values) is None
    assert f"Its rows hold prompts (column {column!r}) and no answers" in no_format_fits(name, values, {})


def test_a_table_of_real_turns_reads_as_the_lines_do() -> None:
    """Tables fill the keys that a row or a turn lacks with null."""
    for name in ("sharegpt-identity.json", "gpteacher-roleplay.json"):
        values = fixture_rows(name)[:50]
        absent = dict.fromkeys(("system", "tools", "text", "messages", "instances"))
        filled = [{**absent, **row} for row in values]
        for row in filled:
            for turn in row.get("conversations", ()):
                turn |= dict.fromkeys(("weight", "tool_calls", "name", "function_call"))
        fmt = detect_format(filled)
        assert fmt == detect_format(values)
        assert fmt is not None
        assert [fmt.parse(row) for row in filled] == [fmt.parse(row) for row in fixture_rows(name)[:50]]
