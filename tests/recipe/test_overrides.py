"""`key=value` on the command line goes through the same checks, and is named in their messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tune.errors import RecipeError
from tune.recipe.load import load_recipe

RECIPE = """model: {base: some/model}
data:
  train:
    - a.jsonl
    - {path: b.jsonl, limit: 5}
train:
  seed: 1
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    return "recipe.yaml"


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.learning_rate=1e-4", 1e-4),
        ("train.seed=7", 7),
        ("adapter.targets=[attention,mlp]", ("attention", "mlp")),
        ("adapter.targets=attention,router", ("attention", "router")),
        ("adapter.ranks={attention: 4}", {"attention": 4}),
        ("data.system=a = b", "a = b"),
        ("data.system=", None),
        ("tracking.to=none", ()),
        ("model.base='quoted/name'", "quoted/name"),
        ("train.keep_best=false", False),
    ],
)
def test_values_are_yaml(recipe: str, override: str, value: Any) -> None:
    section, _, key = override.partition("=")[0].partition(".")
    assert getattr(getattr(load_recipe(recipe, [override]), section), key) == value


def test_later_ones_win_and_lists_are_reached_by_number(recipe: str) -> None:
    read = load_recipe(recipe, ["train.seed=2", "train.seed=3", "data.train.1.limit=9", "data.train.0=c.jsonl"])
    assert read.train.seed == 3
    assert [(source.path, source.limit) for source in read.data.train] == [("c.jsonl", None), ("b.jsonl", 9)]
    assert [source.path for source in load_recipe(recipe, ["data.train=d.jsonl"]).data.train] == ["d.jsonl"]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train.learnin_rate=1e-4", "is not a key of train. Did you mean 'learning_rate'?"),
        ("lora_r=8", "is not a key of a recipe. Here it is adapter.rank."),
        ("train.seed=-1", "must be at least 0 (-1). The default is 0."),
        ("train.seed=", "has no value. Seed of everything"),
        ("train=5", "is a section, not a value (5)."),
        ("train.patience=2", "counts evaluations (2), and there is no held-out data."),
        ("adapter.targets=[", "the value is not valid YAML (column 2: "),
        ("adapter.targets=!!set {a}", "the value: a YAML tag has no meaning in a recipe (!!set). Remove it."),
        ("data.train.7.limit=1", "data.train has no item 7. It is a list of 2, counted from 0."),
        ("data.train.path=x", "data.train has no item path."),
        ("data.train[2].limit=1", "data.train has no item 2. It is a list of 2, counted from 0."),
        ("data.train[0].limt=1", "is not a key of data.train[0]. Did you mean 'limit'?"),
        ("model.base=''", "must not be empty. The base model"),
        ("adapter.targets=all", "has no word 'all': write [attention, mlp], which is every linear layer of a block. "),
        ("model.base.x=1", "model.base is a value and has no keys (some/model). Set it as a whole."),
        ("seed", "is not an override. Write it as key=value, such as train.seed=1."),
        ("=3", "is not an override."),
        ("train..seed=3", "is not an override."),
    ],
)
def test_mistakes_name_the_override(recipe: str, override: str, problem: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, [override])
    (found,) = caught.value.problems
    assert found.startswith(f"{override} (command line): {problem}")


def test_an_override_that_mends_the_file_leaves_no_complaint(recipe: str) -> None:
    Path("recipe.yaml").write_text(RECIPE.replace("seed: 1", "seed: -1"))
    assert load_recipe("recipe.yaml", ["train.seed=1"]).train.seed == 1


def test_file_and_command_line_are_reported_together(recipe: str) -> None:
    Path("recipe.yaml").write_text(RECIPE.replace("seed: 1", "seed: -1"))
    with pytest.raises(RecipeError) as caught:
        load_recipe("recipe.yaml", ["train.keep=0", "nonsense"])
    assert caught.value.problems == [
        "recipe.yaml:7: train.seed: must be at least 0 (-1). The default is 0.",
        "train.keep=0 (command line): must be at least 1 (0). The default is 3.",
        "nonsense (command line): is not an override. Write it as key=value, such as train.seed=1.",
    ]


@pytest.mark.parametrize("override", ["data.train[0].limit=3", "data.train.0.limit=3"])
@pytest.mark.parametrize("written", ["a.jsonl", ["a.jsonl"], {"path": "a.jsonl"}, [{"path": "a.jsonl"}]])
def test_a_key_inside_a_source_however_the_source_is_written(written: Any, override: str) -> None:
    mapping = {"model": {"base": "x"}, "data": {"train": written, "eval": written}}
    read = load_recipe(mapping, [override, override.replace("train", "eval").replace("3", "4")])
    assert isinstance(read.data.eval, tuple)
    assert [(source.path, source.limit) for source in read.data.train] == [("a.jsonl", 3)]
    assert [(source.path, source.limit) for source in read.data.eval] == [("a.jsonl", 4)]


def test_a_bare_path_is_a_list_of_one_source(recipe: str) -> None:
    mapping = {"model": {"base": "x"}, "data": {"train": "a.jsonl", "eval": "0.1"}}
    assert load_recipe(mapping, ["data.train.limit=3"]).data.train[0].limit == 3
    for override, words in (
        ("data.train[1].limit=3", "data.train has no item 1. It is a list of 1, counted from 0."),
        ("data.eval[0].limit=3", "data.eval is a value and has no keys (0.1). Set it as a whole."),
    ):
        with pytest.raises(RecipeError) as caught:
            load_recipe(mapping, [override])
        assert caught.value.problems == [f"{override} (command line): {words}"]


def test_a_mapping_is_not_changed() -> None:
    mapping: dict[str, Any] = {"model": {"base": "x"}, "data": {"train": [Path("a.jsonl")]}}
    read = load_recipe(mapping, ["model.base=y", "data.train.0=b.jsonl"])
    assert (read.model.base, read.data.train[0].path) == ("y", "b.jsonl")
    assert mapping == {"model": {"base": "x"}, "data": {"train": [Path("a.jsonl")]}}


def test_a_mapping_with_wrong_keys_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"recipe: a key must be text \(3\)"):
        load_recipe({"model": {3: "x"}})
    looped: dict[str, Any] = {}
    looped["model"] = looped
    with pytest.raises(RecipeError, match="nested in itself"):
        load_recipe(looped)
