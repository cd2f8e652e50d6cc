"""The shipped recipes load, fit on a screen, and `tune recipes` lists, prints and copies them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tune.cli.recipes import recipes
from tune.errors import RecipeError
from tune.recipe.load import json_schema, load_recipe, recipe_to_yaml, shipped_recipes

ROOT = Path(__file__).resolve().parents[2]


def test_they_are_the_files_of_the_recipes_folder() -> None:
    files = {path.name for path in (ROOT / "recipes").glob("*.yaml")}
    assert {path.name for path in shipped_recipes().values()} == files
    names = {"quickstart", "quickstart-mixtral", "mistral-alpaca", "mistral-vicuna", "mixtral-alpaca"}
    assert names <= set(shipped_recipes())


@pytest.mark.parametrize("name", shipped_recipes())
def test_each_loads_is_described_and_fits_on_a_screen(name: str, tmp_path: Path) -> None:
    path = shipped_recipes()[name]
    recipe = load_recipe(path)
    assert recipe.output == f"runs/{name}"
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    assert len(lines) <= 40
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(recipe_to_yaml(recipe), encoding="utf-8")
    assert load_recipe(resolved) == recipe


@pytest.mark.parametrize("name", ["quickstart", "quickstart-mixtral"])
def test_a_quickstart_names_data_that_exists(name: str) -> None:
    recipe = load_recipe(shipped_recipes()[name])
    assert isinstance(recipe.data.eval, tuple)
    for source in (*recipe.data.train, *recipe.data.eval):
        assert (ROOT / source.path).is_file()


def test_a_resolved_recipe_reads_back_equal(tmp_path: Path) -> None:
    settings = [
        "model.base=some/model",
        "model.revision='0123'",
        "data.train=[a, {path: b, weight: 0.1, columns: {output: response}, limit: 3, template: vicuna}]",
        "data.eval=[c]",
        "data.system=\"two\\nlines: 'quoted' # no comment\"",
        "train.learning_rate=1e-5",
        "train.epochs=0.3333333333333333",
        "train.micro_batch_tokens=4096",
        "adapter.ranks={attention: 4, q_proj: 8}",
        "tracking.to=[wandb, trackio]",
        "tracking.name=null-ish",
        "output=nullable/1.10",
    ]
    recipe = load_recipe({}, settings)
    path = tmp_path / "other-name.yaml"
    path.write_text(recipe_to_yaml(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


def test_the_list_shows_each_with_its_first_line(capsys: pytest.CaptureFixture[str]) -> None:
    recipes()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(shipped_recipes())
    for line, (name, path) in zip(lines, shipped_recipes().items(), strict=True):
        assert line.split()[0] == name
        assert path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ") in line
        assert "not in this version" not in line


def test_the_list_says_which_one_waits(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    waits = "runs/mistral-vicuna"
    monkeypatch.setattr("tune.recipe.later.refusals", lambda recipe: ["later"] if recipe.output == waits else [])
    recipes()
    for line in capsys.readouterr().out.splitlines():
        assert line.endswith("(not in this version yet)") is line.startswith("mistral-vicuna ")


def test_one_is_printed_whole(capsys: pytest.CaptureFixture[str]) -> None:
    recipes("quickstart")
    assert capsys.readouterr().out == shipped_recipes()["quickstart"].read_text(encoding="utf-8")


def test_a_copy_never_overwrites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipes("quickstart", copy=True)
    copied = tmp_path / "quickstart.yaml"
    assert copied.read_text(encoding="utf-8") == shipped_recipes()["quickstart"].read_text(encoding="utf-8")
    copied.write_text("mine")
    with pytest.raises(RecipeError, match="exists already and is not overwritten"):
        recipes("quickstart.yaml", copy=True)
    assert copied.read_text() == "mine"


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'quickstart'"):
        recipes("quikstart")
    with pytest.raises(RecipeError, match="needs a name"):
        recipes(copy=True)


def test_the_schema_is_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    recipes(schema=True)
    assert json.loads(capsys.readouterr().out) == json_schema()
