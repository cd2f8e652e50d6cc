"""What the tables of mistakes in data have in common: small files that hold one each."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cli.mistakes import CHECK, Mistake, assert_refused, write

ROW = '{"instruction": "a", "output": "b c d"}\n'
DROP = "data.on_bad: drop"


def data(content: str | bytes, path: str = "train.jsonl") -> Callable[[Path], object]:
    return write(path, content)


def after_a_good_one(row: object) -> Callable[[Path], object]:
    """A file whose second row is bad."""
    text = row if isinstance(row, str) else json.dumps(row)
    return data(f"{ROW}{text}\n")


def both(*steps: Callable[[Path], object]) -> Callable[[Path], None]:
    def do(work: Path) -> None:
        for step in steps:
            step(work)

    return do


def folder(path: str) -> Callable[[Path], object]:
    return lambda work: (work / path).mkdir()


def source(path: str = "train.jsonl", **keys: object) -> dict[str, object]:
    return {"path": path, **keys}


def assert_refused_by_check(wrong: Mistake, work: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """Make the mistake, and let `tune check` find it; return the message."""
    return assert_refused(replace(wrong, arguments=CHECK), work, capfd)


def assert_told_in_the_same_words(verb: str, wrong: Mistake, work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Make the mistake, and let `tune check` and then another verb find it."""
    said = assert_refused_by_check(wrong, work, capfd)
    assert assert_refused(replace(wrong, arguments=(verb, "recipe.yaml"), prepare=None), work, capfd) == said
