"""Keys that are right one by one and cannot be meant together."""

from __future__ import annotations

from typing import Any

import pytest

from tune.errors import RecipeError
from tune.recipe.load import load_recipe

SMALLEST = ["model.base=some/model", "data.train=a.jsonl"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ["train.patience=3"],
            "train.patience=3 (command line): counts evaluations (3), and there is no held-out",
        ),
        (
            ["train.max_steps=5", "train.warmup=5"],
            "is not shorter than the whole training (5 steps, train.max_steps",
        ),
        (["push.merged=true"], "push.merged=true (command line): has nowhere to go. Set push.repo to OWNER/NAME."),
        (["tracking.project=p"], "has no tracker to be shown at (p). Set tracking.to"),
        (["tracking.name=n"], "has no tracker to be shown at (n). Set tracking.to"),
        (["adapter.targets=[router]", "router.train=full"], "trains the router's own weights"),
        (["adapter.targets=[attention]", "adapter.ranks={experts: 4}"], "gives experts a rank"),
        (["adapter.exclude=[mlp, attention]"], "leaves nothing to adapt"),
        (["adapter.start_from=runs/a", "adapter.init=gaussian"], "has no effect (gaussian)"),
        (["data.eval=[{path: b, weight: 2}]"], "repeats rows for training (2)"),
        (
            ["data.train={path: b, columns: {instruction: q, output: q}}"],
            "columns: reads 'q' as both instruction and output. Remove one.",
        ),
    ],
)
def test_contradictions_are_refused(settings: list[str], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe({}, SMALLEST + settings)
    (problem,) = caught.value.problems
    assert words in problem


@pytest.mark.parametrize(
    "settings",
    [
        ["train.patience=3", "data.eval=0.1"],
        ["train.patience=3", "data.eval=b.jsonl"],
        ["train.max_steps=5", "train.warmup=0.5"],
        ["train.warmup=500"],
        ["push.merged=true", "push.repo=me/mine"],
        ["tracking.project=p", "tracking.to=wandb"],
        ["adapter.ranks={experts: 4}"],
        ["adapter.ranks={q_proj: 4}"],
        ["adapter.targets=[q_proj]", "adapter.ranks={attention: 4}"],
        ["adapter.exclude=[attention]"],
        ["adapter.exclude=[lm_head]"],
        ["train.keep_best=true", "data.eval=0"],
        ["router.train=full"],
        ["data.max_length=4096", "train.micro_batch_tokens=1024"],
    ],
)
def test_what_only_looks_like_a_contradiction_is_allowed(settings: list[str]) -> None:
    load_recipe({}, SMALLEST + settings)


def test_a_contradiction_is_found_beside_wrong_values() -> None:
    recipe: dict[str, Any] = {"model": {"bse": "x"}, "data": {"train": "a"}, "train": {"patience": 3, "seed": -1}}
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    keys = {problem.split(": ")[1] for problem in caught.value.problems}
    assert keys == {"model.bse", "train.patience", "train.seed"}


def test_a_contradiction_that_rests_on_a_wrong_value_is_not_reported() -> None:
    recipe: dict[str, Any] = {"model": {"base": "x"}, "data": {"train": "a", "eval": 7}, "train": {"patience": 3}}
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    (problem,) = caught.value.problems
    assert "data.eval: must be below 1 (7)" in problem
