from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tune.errors import ModelError
from tune.planning.memory import RowPlan, activation_bytes_per_token, keep_automatic, plan_rows
from tune.recipe import schema

CONFIG = SimpleNamespace(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
BEFORE, NOW = RowPlan(4096, "full"), RowPlan(512, "none")


@pytest.mark.parametrize(
    ("settings", "plan"),
    [
        ({}, RowPlan(4096, "full")),
        ({"micro_batch_tokens": 512}, RowPlan(512, "full")),
        ({"recompute": "none"}, RowPlan(4096, "none")),
        ({"micro_batch_tokens": 512, "recompute": "none"}, RowPlan(512, "none")),
    ],
)
def test_what_auto_chose_stays_on_resume_and_what_the_recipe_says_counts(
    settings: dict[str, object], plan: RowPlan
) -> None:
    assert keep_automatic(schema.Train(**settings), NOW, BEFORE) == plan


def test_a_cpu_follows_the_recipe() -> None:
    def planned(**settings: object) -> RowPlan:
        return plan_rows(schema.Train(**settings), CONFIG, 2048, torch.float32, torch.device("cpu"))

    assert planned() == RowPlan(512, "none")
    assert planned(micro_batch_tokens=64, recompute="full") == RowPlan(64, "full")


def test_recomputation_keeps_little_and_a_wider_type_keeps_more() -> None:
    kept = activation_bytes_per_token(CONFIG, 2, recompute="none")
    assert activation_bytes_per_token(CONFIG, 2, recompute="full") < kept / 10
    assert activation_bytes_per_token(CONFIG, 4, recompute="none") == 2 * kept


def test_a_mixture_counts_the_experts_of_a_token_and_a_dense_base_has_none() -> None:
    mixture = SimpleNamespace(**vars(CONFIG), num_local_experts=8, num_experts_per_tok=2, model_type="mixtral")
    kept = [activation_bytes_per_token(mixture, 2, recompute) for recompute in ("none", "experts", "full")]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] - kept[1] == 32 * 2 * 2 * 14336 * 2

    def planned(config: SimpleNamespace) -> RowPlan:
        return plan_rows(schema.Train(recompute="experts"), config, 64, torch.float32, torch.device("cpu"))

    assert planned(mixture) == RowPlan(512, "experts")
    with pytest.raises(ModelError, match="the base has no experts"):
        planned(CONFIG)
