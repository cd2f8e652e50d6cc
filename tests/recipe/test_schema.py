"""Defaults, types and ranges of every key, and that a recipe cannot change."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from tune.errors import RecipeError
from tune.recipe.load import json_schema, load_recipe
from tune.recipe.problems import schema_keys
from tune.recipe.schema import Recipe, Source

SMALLEST: dict[str, Any] = {"model": {"base": "some/model"}, "data": {"train": "a.jsonl"}}

DEFAULTS: dict[str, dict[str, Any]] = {
    "model": {"base": "some/model", "revision": None, "quantization": "nf4", "dtype": "bfloat16"}
    | {"trust_remote_code": False},
    "adapter": {"method": "lora", "rank": 16, "alpha": 32, "rslora": False, "dropout": 0}
    | {"targets": ("attention", "mlp"), "init": "default", "ranks": {}, "exclude": (), "start_from": None},
    "router": {"balance_loss": 0.02, "train": "frozen"},
    "data": {"eval": 0, "template": "auto", "system": None, "max_length": 2048, "train_on": "responses"}
    | {"on_long": "truncate", "on_bad": "error", "add_tokens": False},
    "train": {"epochs": 3, "max_steps": None, "batch_size": 32, "micro_batch_tokens": "auto", "learning_rate": 2e-4}
    | {"scheduler": "cosine", "warmup": 0.03, "optimizer": "adamw", "weight_decay": 0, "max_grad_norm": 1}
    | {"recompute": "auto", "save_every": 100, "eval_every": 100, "log_every": 10, "keep": 3, "keep_best": True}
    | {"patience": None, "max_bad_steps": 3, "seed": 0},
    "tracking": {"to": (), "project": None, "name": None},
    "push": {"repo": None, "private": True, "merged": False},
}
SOURCE = {"path": "a.jsonl", "format": "auto", "split": None, "revision": None, "config": None, "columns": {}}
SOURCE |= {"weight": 1, "template": None, "limit": None}


def with_value(key: str, value: Any) -> dict[str, Any]:
    section, _, name = key.partition(".")
    sections = {name: dict(values) for name, values in SMALLEST.items()}
    sections.setdefault(section, {})[name] = value
    return sections


def read(key: str, value: Any) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(load_recipe(with_value(key, value)), section), name)


def test_defaults() -> None:
    recipe = load_recipe(SMALLEST).model_dump()
    (source,) = recipe["data"].pop("train")
    assert source == SOURCE
    assert recipe.pop("output") == "runs/recipe"
    assert recipe == DEFAULTS


def test_schema_leaves_the_output_to_the_loader() -> None:
    assert Recipe.model_validate(SMALLEST).output is None


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("train.learning_rate", "2e-4", 2e-4),
        ("train.learning_rate", "1.0e-3", 1e-3),
        ("train.max_steps", "1e3", 1000),
        ("train.max_steps", "1_000", 1000),
        ("train.max_steps", "none", None),
        ("train.epochs", "0.5", 0.5),
        ("train.keep_best", "no", False),
        ("train.micro_batch_tokens", "4096", 4096),
        ("train.micro_batch_tokens", "auto", "auto"),
        ("train.warmup", "10", 10),
        ("train.seed", str(2**32 - 1), 2**32 - 1),
        ("adapter.targets", "attention, experts", ("attention", "experts")),
        ("adapter.targets", ["q_proj"], ("q_proj",)),
        ("adapter.ranks", {"attention": "8"}, {"attention": 8}),
        ("model.revision", "none", None),
        ("model.revision", 83, "83"),
        ("tracking.to", "wandb", ("wandb",)),
        ("tracking.to", None, ()),
        ("tracking.to", "none", ()),
        ("data.eval", "0.02", 0.02),
        ("data.eval", "none", 0),
        ("data.eval", "b.jsonl", (Source(path="b.jsonl"),)),
        ("data.train", ["a", {"path": "b", "weight": "0.5"}], (Source(path="a"), Source(path="b", weight=0.5))),
        ("data.train", {"path": "b", "limit": "3"}, (Source(path="b", limit=3),)),
        ("data.template", "my/own.jinja", "my/own.jinja"),
        ("push.repo", "me/my-model", "me/my-model"),
    ],
)
def test_values_are_coerced(key: str, written: Any, value: Any) -> None:
    assert read(key, written) == value


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("adapter.rank", 0, "must be at least 1 (0)"),
        ("adapter.rank", True, "must be a whole number (True)"),
        ("adapter.rank", 1.5, "must be a whole number (1.5)"),
        ("adapter.rank", "1e-3", "must be a whole number (1e-3)"),
        ("adapter.rank", "9" * 5000, "must be a whole number (999"),
        ("adapter.alpha", "big", "must be a whole number (big)"),
        ("adapter.dropout", 1, "must be below 1 (1)"),
        ("adapter.dropout", -0.1, "must be at least 0 (-0.1)"),
        ("adapter.dropout", "nan", "(nan)"),
        ("adapter.method", "qlora", "must be lora (qlora). QLoRA is lora with model.quantization nf4."),
        ("adapter.targets", [], "must not be empty"),
        ("adapter.targets", ["mlp", "mlp"], "names 'mlp' twice"),
        ("adapter.targets", "all-linear", "write [attention, mlp]"),
        ("adapter.init", "pissa", "must be default or gaussian (pissa)"),
        ("adapter.ranks", {"mlp": 0}, "adapter.ranks.mlp: must be at least 1 (0)"),
        ("adapter.ranks", 8, "must be a mapping"),
        ("router.balance_loss", -1, "must be at least 0 (-1)"),
        ("router.train", "ful", "must be frozen or full (ful). Did you mean 'full'?"),
        ("data.train", [], "must not be empty"),
        ("data.train", [""], "must not be empty"),
        ("data.eval", 1, "must be below 1 (1). For a number of rows, write a list such as [{path: FILE, limit: 100}]."),
        ("data.eval", "20%", "or a list of data sets (20%). Write 0.2."),
        ("data.eval", "0,05", "or a list of data sets (0,05). Write 0.05."),
        ("data.train", {"path": "a", "weight": "50%"}, "weight: must be a number (50%). Write 0.5."),
        ("data.train", {"path": "a", "weight": 1e308}, "weight: must be at most 1000 (1e+308)"),
        ("data.train", {"path": ["a", "b"]}, "path: must be text. Write a list of sources, each with one path."),
        ("data.train", {"path": "a", "name": "b"}, "a data set's configuration is config."),
        ("data.train", {"file": "a"}, "Here it is data.train.path"),
        ("train.epochs", 1e308, "must be at most"),
        ("data.eval", "true", "must be a number (true)"),
        ("data.max_length", 7, "must be at least 8 (7)"),
        ("data.template", "vicunna", "Did you mean 'vicuna'?"),
        ("data.train_on", "assistant", "Write responses."),
        ("data.add_tokens", "perhaps", "must be true or false (perhaps)"),
        ("model.base", "", "must not be empty"),
        ("model.base", ["a"], "must be text"),
        ("model.dtype", "bf16", "must be bfloat16 or float32 (bf16). Write bfloat16."),
        ("model.quantization", "nf5", "must be nf4 or none (nf5). Did you mean 'nf4'?"),
        ("train.epochs", 0, "must be above 0 (0)"),
        ("train.epochs", "inf", "must be a finite number (inf)"),
        ("train.max_steps", 0, "must be at least 1 (0)"),
        ("train.batch_size", 0, "must be at least 1 (0). The default is 32."),
        ("train.batch_size", 10**12, "must be at most 1000000000"),
        ("train.micro_batch_tokens", 0, "must be at least 1 (0). The default is auto."),
        ("train.micro_batch_tokens", "many", "must be a whole number (many)"),
        ("train.learning_rate", 0, "must be above 0 (0). The default is 0.0002."),
        ("train.learning_rate", 2, "must be at most 1 (2)"),
        ("train.warmup", -1, "must be at least 0 (-1)"),
        ("train.warmup", 1.5, "a fraction below 1 or a whole number of steps (1.5)"),
        ("train.warmup", "inf", "must be a finite number (inf)"),
        ("train.scheduler", "cosin", "Did you mean 'cosine'?"),
        ("train.optimizer", "adamw_torch", "Write adamw."),
        ("train.weight_decay", -1, "must be at least 0 (-1)"),
        ("train.max_grad_norm", 0, "must be above 0 (0)"),
        ("train.recompute", "true", "Write full."),
        ("train.save_every", 0, "must be at least 1 (0)"),
        ("train.keep", 0, "must be at least 1 (0)"),
        ("train.patience", 0, "must be at least 1 (0)"),
        ("train.seed", -1, "must be at least 0 (-1)"),
        ("train.seed", 2**32, "must be at most 4294967295"),
        ("tracking.to", "wandbb", "Did you mean 'wandb'?"),
        ("push.repo", "me", "must be OWNER/NAME"),
    ],
)
def test_wrong_values_are_refused(key: str, value: Any, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(with_value(key, value))
    (problem,) = caught.value.problems
    assert problem.startswith(f"recipe: {key}")
    assert words in problem


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("weight", 0, "must be above 0 (0)"),
        ("limit", 0, "must be at least 1 (0)"),
        ("format", "json", "File types are recognised by themselves"),
        ("template", "alpcaa", "Did you mean 'alpaca'?"),
        ("columns", "output", "must be a mapping"),
    ],
)
@pytest.mark.parametrize("key", ["data.train", "data.eval"])
def test_wrong_values_of_a_source_are_refused(key: str, name: str, value: Any, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(with_value(key, ["a.jsonl", {"path": "b.jsonl", name: value}]))
    (problem,) = caught.value.problems
    assert problem.startswith(f"recipe: {key}[1].{name}: ")
    assert words in problem


def test_a_recipe_is_frozen() -> None:
    recipe = load_recipe(SMALLEST)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.train.seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        recipe.output = "elsewhere"  # type: ignore[misc]


def test_every_key_has_a_description_that_reaches_the_json_schema() -> None:
    schema = json_schema()
    assert set(schema["required"]) == {"model", "data"}
    for key, field in schema_keys().items():
        assert field.description, key
        assert field.description.endswith("."), key
    definitions = schema["$defs"]
    assert definitions["Train"]["properties"]["batch_size"]["minimum"] == 1
    assert definitions["Train"]["properties"]["learning_rate"]["exclusiveMinimum"] == 0
    assert "over all devices" in definitions["Train"]["properties"]["batch_size"]["description"]
    for name, section in definitions.items():
        assert section["additionalProperties"] is False, name
        for key, content in section["properties"].items():
            assert not {"ge", "gt", "le", "lt"} & set(content), f"{name}.{key} has a limit no editor knows"
