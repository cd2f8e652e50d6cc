from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tune.planning.memory import RowPlan, activation_bytes_per_token, keep_automatic, plan_rows
from tune.recipe import schema

CONFIG = SimpleNamespace(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
BEFORE, NOW = RowPlan(4096, True), RowPlan(512, False)


@pytest.mark.parametrize(
    ("settings", "plan"),
    [
        ({}, RowPlan(4096, True)),
        ({"micro_batch_tokens": 512}, RowPlan(512, True)),
        ({"recompute": "none"}, RowPlan(4096, False)),
        ({"micro_batch_tokens": 512, "recompute": "none"}, RowPlan(512, False)),
    ],
)
def test_what_auto_chose_stays_on_resume_and_what_the_recipe_says_counts(
    settings: dict[str, object], plan: RowPlan
) -> None:
    assert keep_automatic(schema.Train(**settings), NOW, BEFORE) == plan


def test_a_cpu_follows_the_recipe() -> None:
    def planned(**settings: object) -> RowPlan:
        return plan_rows(schema.Train(**settings), CONFIG, 2048, torch.float32, torch.device("cpu"))

    assert planned() == RowPlan(512, False)
    assert planned(micro_batch_tokens=64, recompute="full") == RowPlan(64, True)


def test_recomputation_keeps_little_and_a_wider_type_keeps_more() -> None:
    kept = activation_bytes_per_token(CONFIG, 2, recompute=False)
    assert activation_bytes_per_token(CONFIG, 2, recompute=True) < kept / 10
    assert activation_bytes_per_token(CONFIG, 4, recompute=False) == 2 * kept
