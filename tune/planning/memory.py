"""How many tokens fit into one row, from the model's shape and the memory that is free.

An estimate on the safe side, for `train.micro_batch_tokens: auto` and `train.recompute: auto`. It counts what
autograd keeps for each token, per layer and once for the whole model, and takes at most a part of what is free.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

import torch

from tune.errors import ModelError
from tune.models.catalog import is_mixture
from tune.progress import size
from tune.recipe import schema

CPU_ROW_TOKENS = 512
"""On a CPU a longer row gains nothing: its products are large enough, and attention grows with the square."""
GPU_ROW_TOKENS = (1024, 16384)
"""Bounds of a row on a GPU; below the lower one its products no longer fill the device."""
_SHARE = 0.7
"""Of the free memory, leaving room for the allocator's gaps and the largest temporary."""


Recompute = Literal["none", "experts", "full"]
"""What the backward computes again: nothing, what experts have inside, or each layer but for its experts' output."""

RECOMPUTED: dict[Recompute, str] = {"none": "", "experts": ", experts recomputed", "full": ", recomputed"}
"""What the start-up table says of it."""


@dataclass(frozen=True, slots=True)
class RowPlan:
    """How a run uses memory for activations."""

    row_tokens: int
    recompute: Recompute


def activation_bytes_per_token(config: Any, dtype_bytes: int, recompute: Recompute) -> int:
    """Bytes that autograd keeps for one token of a row between forward and backward.

    Without recomputation a decoder layer keeps about ten tensors of hidden size (residuals, norms and their
    inputs, queries, keys, values, attention's output) and four of intermediate size, or for each expert of a token
    gate and up before they meet; with it, its input and its experts' output alone.
    """
    hidden, layers = int(config.hidden_size), int(config.num_hidden_layers)
    intermediate = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    if is_mixture(config):
        chosen = int(getattr(config, "num_experts_per_tok", None) or 2)
        wide = int(getattr(config, "moe_intermediate_size", None) or intermediate)
        inside = 2 * chosen * wide if recompute == "none" else 0
    else:
        inside = 4 * intermediate
    whole_layer = (10 * hidden + inside) * dtype_bytes
    if recompute == "full":
        kept = 2 * hidden if is_mixture(config) else hidden
        return layers * kept * dtype_bytes + whole_layer
    return layers * whole_layer


def plan_rows(section: schema.Train, config: Any, max_length: int, dtype: torch.dtype, device: torch.device) -> RowPlan:
    """Choose the row length and what to recompute, where the recipe says `auto`.

    Args:
        section: the recipe's `train`.
        config: the base's transformers config.
        max_length: longest example, in tokens: such a row always occurs, whatever is chosen.
        dtype: of the activations.
        device: with the base already on it, so that what is free is what is left.

    Raises:
        ModelError: the recipe names experts, and the base has none.
    """
    ways: tuple[Recompute, ...] = ("none", "experts", "full") if is_mixture(config) else ("none", "full")
    if section.recompute not in (*ways, "auto"):
        raise ModelError("train.recompute: experts: the base has no experts. Write auto, none or full.")
    chosen: Recompute = "none" if section.recompute == "auto" else section.recompute
    if device.type != "cuda":
        return RowPlan(CPU_ROW_TOKENS if section.micro_batch_tokens == "auto" else section.micro_batch_tokens, chosen)
    torch.cuda.empty_cache()  # what quantisation left over is free again
    free = torch.cuda.mem_get_info(device)[0] * _SHARE
    width = torch.empty((), dtype=dtype).element_size()

    def fits(recompute: Recompute) -> int:
        return int(free // activation_bytes_per_token(config, width, recompute))

    low, high = GPU_ROW_TOKENS
    wanted = (
        max(max_length, 4096) if section.micro_batch_tokens == "auto" else max(section.micro_batch_tokens, max_length)
    )
    if section.recompute == "auto":
        chosen = next((way for way in ways if fits(way) >= wanted), "full")
    if section.micro_batch_tokens != "auto":
        return RowPlan(section.micro_batch_tokens, chosen)
    return RowPlan(max(low, min(high, fits(chosen))), chosen)


def keep_automatic(section: schema.Train, now: RowPlan, before: RowPlan, shortened_from: int = 0) -> RowPlan:
    """Return the plan to resume with: what `auto` chose before stays, since the free memory may differ now.

    So does the length that rows were brought down to when the length in the recipe, `shortened_from`, did not fit,
    as long as the recipe still says that one.
    """
    same = section.micro_batch_tokens in ("auto", shortened_from)
    return RowPlan(
        before.row_tokens if same else now.row_tokens,
        before.recompute if section.recompute == "auto" else now.recompute,
    )


def smaller(plan: RowPlan, failed: int, longest: int, may_recompute: bool) -> RowPlan | None:
    """Return the next plan that needs less memory, or None where there is none.

    Args:
        plan: how the row was run.
        failed: tokens of the row that did not fit.
        longest: tokens of the longest example: such a row occurs whatever is planned.
        may_recompute: whether activations were kept that need not be, and the recipe leaves that open.
    """
    if failed > longest:
        return RowPlan(max(longest, failed // 2), plan.recompute)
    if may_recompute and plan.recompute != "full":
        return RowPlan(plan.row_tokens, "full")
    return None


@dataclass(frozen=True, slots=True)
class MemoryParts:
    """What a device needs memory for while a row is trained on, in bytes; estimates but for the first."""

    weights: int
    """The frozen base, as it is stored."""
    adapter: int
    """The adapter with its gradient and the optimizer's moments."""
    row: int
    """What autograd keeps of one row."""

    def words(self, tokens: int) -> str:
        """The parts of a row of `tokens` tokens, for a message."""
        return (
            f"{size(self.weights)} for weights, {size(self.adapter)} for adapter and optimizer, {size(self.row)} for "
            f"activations of {tokens:,} tokens"
        )


def memory_parts(model: Any, weights: int, section: schema.Train, plan: RowPlan, tokens: int) -> MemoryParts:
    """Return what memory is needed for when `model` (adapted, as loaded) trains on a row of `tokens` tokens.

    `weights` are the bytes of its frozen part on a device.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    moments = 8 if section.optimizer == "adamw" else 2
    width = torch.empty((), dtype=model.dtype).element_size()
    return MemoryParts(
        weights,
        trained * (4 + 4 + moments),
        tokens * activation_bytes_per_token(model.config, width, plan.recompute),
    )


def installed_bytes(device: torch.device) -> int:
    """Memory that there is in all, used or not: of the GPU, or of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
