"""A base from the Hub moves on; a run that began on one commit of it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

import tune.models.hub as hub
from tests.training.jobs import tiny_recipe
from tune.folder import RunFolder
from tune.recipe.load import recipe_to_yaml
from tune.recipe.schema import Recipe
from tune.run import _pinned


def with_revision(recipe: Recipe, revision: str | None) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"revision": revision})})


def test_a_run_goes_on_with_the_commit_that_it_began_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = ["first"]
    monkeypatch.setattr(
        hub, "commit_of", lambda base, revision=None: newest[0] if revision in (None, "main") else revision
    )
    monkeypatch.setattr(hub, "read_config", lambda *_: None)
    recipe, run = tiny_recipe(tmp_path), RunFolder(tmp_path / "run")
    began = _pinned(recipe, run)
    assert began.model.revision == "first"
    run.root.mkdir()
    run.recipe.write_text(recipe_to_yaml(began))
    newest[0] = "second"
    assert _pinned(recipe, run).model.revision == "first"
    assert _pinned(with_revision(recipe, "main"), run).model.revision == "second", "asked for by name"
    run.recipe.unlink()
    assert _pinned(recipe, run).model.revision == "second"


def test_a_folder_has_no_commit(tmp_path: Path) -> None:
    assert _pinned(tiny_recipe(tmp_path), RunFolder(tmp_path / "run")).model.revision is None
