"""A finished and merged run on a tiny base, made once; every test spoils a copy of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import write_recipe
from tests.security import tripwire
from tests.tiny import write_model
from tests.training.jobs import write_rows


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, train.jsonl, recipe.yaml, and run/ of two steps with a checkpoint of each and a merged model."""
    # Imported here, the forked children need not do it each.
    import tune.adapters.convert
    import tune.evaluation.generate
    import tune.export.merge
    import tune.export.push
    import tune.run
    import tune.training.trainer  # noqa: F401

    work = tmp_path_factory.mktemp("original") / "work"
    work.mkdir()
    write_model(work / "base", "mistral")
    write_rows(work / "train.jsonl", 20)
    write_recipe(work, train__save_every=1)
    for command in (["train", "recipe.yaml", "--quiet"], ["merge", "run", "--quiet"]):
        done = tripwire.run(work, *command)
        assert done.code == 0, done.said
    return work


@pytest.fixture
def work(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, in which nothing of the user's own folders is touched."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    shutil.copytree(original, tmp_path / "work")
    return tmp_path / "work"
