"""One mistake of a user, and what the command line must answer: a message, exit code 2, and nothing lost."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import write_recipe
from tune.cli.main import _run

TRAIN = ("train", "recipe.yaml")
CHECK = ("check", "recipe.yaml")
HARMLESS = re.compile(r"(reading data|loading the base): \d+\.\d s|resume from step 0: no checkpoint yet")
"""What may stand on stdout before a mistake is found: no part of a result."""


@dataclass(frozen=True)
class Mistake:
    """What is wrong, and `words` that the message must hold: the place, the value, the remedy, the nearest name."""

    name: str
    words: tuple[str, ...]
    prepare: Callable[[Path], object] | None
    arguments: tuple[str, ...]
    lines: int
    settings: dict[str, Any]


def mistake(
    name: str,
    *words: str,
    prepare: Callable[[Path], object] | None = None,
    arguments: tuple[str, ...] = TRAIN,
    lines: int = 1,
    **settings: Any,
) -> Any:
    """A parameter of a test; `prepare` spoils the folder, `settings` (with __ for the dot) the recipe."""
    return pytest.param(Mistake(name, words, prepare, arguments, lines, settings), id=name.replace(" ", "-"))


def files(folder: Path) -> dict[Path, bytes]:
    """Every file under a folder, with its content."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}


def assert_refused(wrong: Mistake, work: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """Make the mistake in `work`, type the command, check what every mistake has in common; return the message."""
    write_recipe(work, **wrong.settings)
    if wrong.prepare is not None:
        wrong.prepare(work)
    before = files(work)
    capfd.readouterr()
    code = _run(list(wrong.arguments))
    out, err = capfd.readouterr()
    assert code == 2, err
    assert len(err.splitlines()) == wrong.lines, err
    assert err.rstrip()[-1] in ".?", err
    assert not re.search(r"Traceback|\b[A-Z]\w*(Error|Exception)\b|__|\[transformers\]", err), err
    assert all(HARMLESS.fullmatch(line) for line in out.splitlines()), out
    for words in wrong.words:
        assert words in err, err
    after = files(work)
    assert {path: after.get(path) for path in before} == before, "a file was lost or changed"
    new = {path.name for path in after.keys() - before.keys()}
    assert new <= {".lock"}, "something was left behind, so that the mended command would be refused"
    return err


def change_json(path: str, **changes: Any) -> Callable[[Path], object]:
    """Spoil keys of a JSON file; None removes one."""

    def change(work: Path) -> None:
        content = {**json.loads((work / path).read_text()), **changes}
        (work / path).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


def write(path: str, content: str | bytes) -> Callable[[Path], object]:
    """Put a file there."""

    def put(work: Path) -> None:
        (work / path).parent.mkdir(exist_ok=True, parents=True)
        (work / path).write_bytes(content if isinstance(content, bytes) else content.encode())

    return put


def cut_in_half(path: str) -> Callable[[Path], object]:
    """What an interrupted download or copy leaves."""

    def cut(work: Path) -> None:
        content = (work / path).read_bytes()
        (work / path).write_bytes(content[: len(content) // 2])

    return cut


def remove(*patterns: str) -> Callable[[Path], object]:
    """Remove files."""

    def gone(work: Path) -> None:
        for pattern in patterns:
            for path in list(work.glob(pattern)):
                path.unlink()

    return gone
