"""The layout of scripts/compare_answers.py, and what it does around the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def compare(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("compare_answers")


@pytest.mark.parametrize("width", [60, 80, 100])
def test_columns_fit_and_lose_no_word(compare: ModuleType, width: int) -> None:
    left = "I am a language model and I am happy to help you with anything that you need today. " * 3
    right = "Ship ahoy!\n\nThe lamp is lit."
    lines = compare.side_by_side(left, right, width)
    assert max(map(len, lines)) <= width
    column = (width - 3) // 2
    assert {line[column : column + 3].rstrip() for line in lines} == {" |"}
    assert " ".join(line[:column].strip() for line in lines[2:]).split() == left.split()
    # The empty line between two paragraphs is kept.
    assert [line[column + 3 :] for line in lines[:5]] == [
        "with the adapter", "-" * column, "Ship ahoy!", "", "The lamp is lit.",
    ]  # fmt: skip


def test_an_unbroken_word_is_cut_to_the_column(compare: ModuleType) -> None:
    assert max(map(len, compare.side_by_side("x" * 500, "", 80))) <= 80


def test_an_empty_answer_is_said(compare: ModuleType) -> None:
    assert "(nothing)" in compare.side_by_side("", "yes", 80)[2]


def test_control_characters_never_reach_the_terminal(compare: ModuleType) -> None:
    text = "\n".join(compare.side_by_side("\x1b[31mred\ttab", "\x07bell", 80))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "red tab" in text


def test_prompts_are_lines_without_the_empty_ones(compare: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("Who are you?\n\n  Wie heißt du?  \n", encoding="utf-8")
    assert compare.read_prompts(path) == ["Who are you?", "Wie heißt du?"]


def test_each_prompt_is_printed_with_both_answers(
    compare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answers(run: Path, prompts: list[str], max_new_tokens: int) -> Iterator[tuple[str, str, str]]:
        for prompt in prompts:
            yield prompt, f"base {max_new_tokens}", "adapted"

    monkeypatch.setattr(compare, "answers", answers)
    (tmp_path / "p.txt").write_text("Who?\nWhy?\n")
    assert compare.main(["runs/x", str(tmp_path / "p.txt"), "--max-new-tokens", "7"]) == 0
    out = capsys.readouterr().out
    assert out.index("> Who?") < out.index("base 7") < out.index("> Why?")
    assert out.count("adapted") == 2


def test_missing_or_empty_prompts_exit_2(
    compare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    for name in ("none.txt", "empty.txt"):
        assert compare.main(["runs/x", str(tmp_path / name)]) == 2
        assert name in capsys.readouterr().err


def test_errors_of_tune_are_one_line_and_their_exit_code(
    compare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tune.errors import RunError

    def answers(*_: object) -> Iterator[tuple[str, str, str]]:
        raise RunError("runs/x: no such run. Train it first.")

    monkeypatch.setattr(compare, "answers", answers)
    (tmp_path / "p.txt").write_text("Who?\n")
    assert compare.main(["runs/x", str(tmp_path / "p.txt")]) == 2
    assert capsys.readouterr().err == "runs/x: no such run. Train it first.\n"
