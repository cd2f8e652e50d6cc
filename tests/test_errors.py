"""What an error quotes may hold anything; what is shown is one line that prints."""

from __future__ import annotations

import pytest

from tune.errors import DataError, as_line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("train.jsonl:2: has no 'output'.", "train.jsonl:2: has no 'output'."),
        ("Ærø 你好 🙂", "Ærø 你好 🙂"),
        ("a\x1b[31mb\r\n\tc", "a\\x1b[31mb\\r\\n\\tc"),
        ("turned \u202e round, \ud83d", "turned \\u202e round, \\ud83d"),
    ],
)
def test_what_does_not_print_is_spelled_out(text: str, line: str) -> None:
    assert as_line(text) == line
    assert str(DataError([text, text])) == f"{line}\n{line}"


def test_a_long_text_keeps_its_beginning_and_its_remedy() -> None:
    line = as_line(f"train.jsonl:2: has {'x' * 10_000}. Remove it.")
    assert len(line) < 2010
    assert line.startswith("train.jsonl:2: has xxx")
    assert line.endswith("xxx. Remove it.")
