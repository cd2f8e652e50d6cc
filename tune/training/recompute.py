"""What the backward computes again, put into effect: before the first step, or when memory has run out."""

from __future__ import annotations

from peft import PeftModel

from tune.adapters.expert_lora import keep_activations
from tune.models.load import recompute_activations
from tune.planning.memory import Recompute


def recompute(model: PeftModel, way: Recompute) -> None:
    """Let `model` compute again what `way` says; from `none` or `experts` to `full` it may be called again."""
    if way == "full":
        recompute_activations(model.get_base_model())
    keep_activations(model, "activations" if way == "none" else "inputs")
