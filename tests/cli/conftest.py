"""A tiny base and a finished run on it, made once for all tests of the command line."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path

import pytest
import yaml

from tests.tiny import write_model
from tests.training.jobs import write_rows

HELD_OUT = 6
ROWS = 40


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mistral of two layers with its tokenizer."""
    with contextlib.redirect_stderr(io.StringIO()):
        return write_model(tmp_path_factory.mktemp("base") / "base", "mistral")


@pytest.fixture
def work(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a person about to train: base/, train.jsonl, eval.jsonl and a recipe."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, tmp_path / "base")
    write_rows(tmp_path / "train.jsonl", ROWS)
    write_rows(tmp_path / "eval.jsonl", HELD_OUT, start=100)
    write_recipe(tmp_path)
    return tmp_path


def write_recipe(folder: Path, **changes: object) -> None:
    """Write recipe.yaml; `changes` are dotted keys with __ for the dot."""
    settings: dict[str, object] = {
        "model.base": "base",
        "model.dtype": "float32",
        "adapter.rank": 4,
        "data.train": "train.jsonl",
        "data.template": "alpaca",
        "data.max_length": 256,
        "train.batch_size": 8,
        "train.max_steps": 2,
        "train.learning_rate": 0.01,
        "train.warmup": 0,
        "output": "run",
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    nested: dict[str, object] = {}
    for key, value in settings.items():
        *outer, last = key.split(".")
        place = nested
        for name in outer:
            inner = place.setdefault(name, {})
            assert isinstance(inner, dict)
            place = inner
        place[last] = value
    (folder / "recipe.yaml").write_text(yaml.safe_dump(nested, sort_keys=False))


@pytest.fixture(scope="session")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory like `work`, with a run of two steps in run/ that is done."""
    from tune.cli.main import _run

    folder = tmp_path_factory.mktemp("finished")
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        shutil.copytree(base, folder / "base")
        write_rows(folder / "train.jsonl", ROWS)
        write_rows(folder / "eval.jsonl", HELD_OUT, start=100)
        write_recipe(folder)
        assert _run(["train", "recipe.yaml", "--quiet"]) == 0
    return folder
