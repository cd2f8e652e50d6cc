"""One optimizer step, whole.

The loss is the sum of the cross-entropy over the trained tokens of the step, divided by their number over all
devices and rows, counted before the first backward. A token therefore weighs the same wherever it was dealt, and
the gradient does not depend on devices, micro-batches or packing. On a mixture of experts each row adds its part of
the router's balance, which is split in the same way (`router_balance`).

Shapes: T tokens of a row, N of them with a token to predict, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tune.adapters.token_rows import head_loss
from tune.data.collate import Row
from tune.models.sharding import within
from tune.training.devices import Devices
from tune.training.out_of_memory import DidNotFitError, Shortage
from tune.training.router_balance import RouterLoad, StepBalance


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step reports."""

    loss: float
    """Mean cross-entropy per trained token, in nats, without the router's balance."""
    grad_norm: float
    """Euclidean norm of the adapter's gradient, before clipping."""
    applied: bool
    """False when loss or gradient was not finite: the adapter is as it was."""
    router: RouterLoad | None = None
    """The experts' load, of a mixture of experts."""


def row_loss(model: Any, row: Row) -> Tensor:
    """Summed cross-entropy (nats, float32 scalar) of a row's trained tokens, without holding all logits."""
    return _forward(model, row)[0]


def row_loss_and_router_logits(model: Any, row: Row) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return `row_loss` of a mixture of experts, and the router logits [T, experts] of each layer."""
    loss, outputs = _forward(model, row, output_router_logits=True)
    return loss, outputs.router_logits


def _forward(model: Any, row: Row, **wanted: bool) -> tuple[Tensor, Any]:
    def forward() -> tuple[Tensor, Any]:
        outputs = model.base_model(input_ids=row.ids_1T, position_ids=row.positions_1T, use_cache=False, **wanted)
        return head_loss(model, outputs[0][0, row.predict_at_N], row.labels_N), outputs

    return within(model, forward)


def _idle_row(model: Any, row: Row, parameters: Sequence[nn.Parameter]) -> None:
    """Take part in another process's row where layers are gathered by all, and leave no trace of it."""
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    torch.autograd.backward(row_loss(model, row))
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def _row(model: Any, row: Row, trained_tokens: int, balance: StepBalance | None) -> Tensor:
    """Add a row's gradient, and return its part of the step's loss.

    A function of its own, so that nothing of a row that does not fit is held once its error is gone.
    """
    if balance is None:
        loss = objective = row_loss(model, row) / trained_tokens
    else:
        cross_entropy, router_logits = row_loss_and_router_logits(model, row)
        loss = cross_entropy / trained_tokens
        objective = loss + balance.row_loss(router_logits)
    torch.autograd.backward(objective)
    return loss.detach()


def train_step(
    model: Any,
    rows: Iterable[Row],
    trained_tokens: int,
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float,
    devices: Devices,
    balance: StepBalance | None = None,
) -> StepResult:
    """Train on this process's rows of one step.

    Args:
        model: the transformers model with the adapter injected in place, in training mode.
        rows: this process's rows; there may be none.
        trained_tokens: trained tokens of the whole step, over all processes.
        parameters: the adapter's.
        optimizer: over those parameters, its learning rate already set.
        max_grad_norm: the gradient is scaled down to this norm; 0 leaves it.
        devices: the processes.
        balance: this step's, of a mixture of experts.

    Raises:
        DidNotFitError: on every process, if memory ran out on one; adapter and optimizer are as they were.
    """
    total, short = torch.zeros((), device=devices.device), Shortage(devices, model)
    for row, counts in short.rows(rows):
        with short.caught(row):
            if counts:
                total += _row(model, row, trained_tokens, balance)
            else:
                _idle_row(model, row, parameters)
    if did_not_fit := devices.agree(short.tokens):
        optimizer.zero_grad(set_to_none=True)
        raise DidNotFitError(did_not_fit)
    devices.sum_gradients(parameters)
    loss_value = float(devices.sum(total))
    load = balance.finish(devices) if balance is not None else None
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    norm_value = float(norm)
    applied = math.isfinite(norm_value) and math.isfinite(loss_value)
    if applied:
        if max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss_value, norm_value, applied, load)
