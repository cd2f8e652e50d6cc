"""How many tokens fit into one row, from the model's shape and the memory that is free.

An estimate on the safe side, for `train.micro_batch_tokens: auto` and `train.recompute: auto`. It counts what
autograd keeps for each token, per layer and once for the whole model, and takes at most a part of what is free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tune.recipe import schema

CPU_ROW_TOKENS = 512
"""On a CPU a longer row gains nothing: its products are large enough, and attention grows with the square."""
GPU_ROW_TOKENS = (1024, 16384)
"""Bounds of a row on a GPU; below the lower one its products no longer fill the device."""
_SHARE = 0.7
"""Of the free memory, leaving room for the allocator's gaps and the largest temporary."""


@dataclass(frozen=True, slots=True)
class RowPlan:
    """How a run uses memory for activations."""

    row_tokens: int
    recompute: bool


def activation_bytes_per_token(config: Any, dtype_bytes: int, recompute: bool) -> int:
    """Bytes that autograd keeps for one token of a row between forward and backward.

    Without recomputation a decoder layer keeps about ten tensors of hidden size (residuals, norms and their
    inputs, queries, keys, values, attention's output) and four of intermediate size; with it, its input alone.
    """
    hidden, layers = int(config.hidden_size), int(config.num_hidden_layers)
    intermediate = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    whole_layer = (10 * hidden + 4 * intermediate) * dtype_bytes
    if recompute:
        return layers * hidden * dtype_bytes + whole_layer
    return layers * whole_layer


def plan_rows(section: schema.Train, config: Any, max_length: int, dtype: torch.dtype, device: torch.device) -> RowPlan:
    """Choose the row length and whether to recompute, where the recipe says `auto`.

    Args:
        section: the recipe's `train`.
        config: the base's transformers config.
        max_length: longest example, in tokens: such a row always occurs, whatever is chosen.
        dtype: of the activations.
        device: with the base already on it, so that what is free is what is left.
    """
    if device.type != "cuda":
        recompute = section.recompute == "full"
        tokens = CPU_ROW_TOKENS if section.micro_batch_tokens == "auto" else section.micro_batch_tokens
        return RowPlan(tokens, recompute)
    torch.cuda.empty_cache()  # what quantisation left over is free again
    free = torch.cuda.mem_get_info(device)[0] * _SHARE
    size = torch.empty((), dtype=dtype).element_size()

    def fits(recompute: bool) -> int:
        return int(free // activation_bytes_per_token(config, size, recompute))

    low, high = GPU_ROW_TOKENS
    wanted = (
        max(max_length, 4096) if section.micro_batch_tokens == "auto" else max(section.micro_batch_tokens, max_length)
    )
    recompute = section.recompute == "full" or (section.recompute == "auto" and fits(False) < wanted)
    if section.micro_batch_tokens != "auto":
        return RowPlan(section.micro_batch_tokens, recompute)
    return RowPlan(max(low, min(high, fits(recompute))), recompute)


def keep_automatic(section: schema.Train, now: RowPlan, before: RowPlan) -> RowPlan:
    """Return the plan to resume with: what `auto` chose before stays, since the free memory may differ now."""
    return RowPlan(
        before.row_tokens if section.micro_batch_tokens == "auto" else now.row_tokens,
        before.recompute if section.recompute == "auto" else now.recompute,
    )
