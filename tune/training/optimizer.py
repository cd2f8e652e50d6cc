"""The optimizer and the schedule, by the names the recipe uses, and their state as tensors and plain numbers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tune.errors import RecipeError
from tune.recipe import schema
from tune.recipe.read import shown

_CODES, _BLOCK = 256, 256
"""Of bitsandbytes' 8-bit moments: the values that a byte stands for, and the elements that share a scale."""

NamedParameters = list[tuple[str, nn.Parameter]]


def check_optimizer(section: schema.Train, device: torch.device) -> None:
    """Refuse an optimizer that this device does not have, before anything is loaded.

    Raises:
        RecipeError: paged moments without a GPU: there is no memory to page out of.
    """
    if section.optimizer == "paged_adamw_8bit" and device.type != "cuda":
        raise RecipeError("train.optimizer: paged_adamw_8bit needs a CUDA device. Use adamw_8bit or adamw here.")


def build_optimizer(section: schema.Train, named: NamedParameters, device: torch.device) -> torch.optim.Optimizer:
    """AdamW over the adapter, in full precision or with 8-bit moments (Dettmers et al. 2022, arXiv:2110.02861)."""
    check_optimizer(section, device)
    parameters = [parameter for _, parameter in named]
    settings: dict[str, Any] = {"lr": section.learning_rate, "weight_decay": section.weight_decay}
    if section.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **settings)
    import bitsandbytes as bnb

    if section.optimizer == "paged_adamw_8bit":
        return bnb.optim.PagedAdamW8bit(parameters, **settings)  # type: ignore[no-any-return]
    return bnb.optim.AdamW8bit(parameters, **settings)  # type: ignore[no-any-return]


def warmup_steps(section: schema.Train, total: int) -> int:
    """`train.warmup` in steps: below 1 it is a fraction of the run."""
    return math.ceil(section.warmup * total) if section.warmup < 1 else int(section.warmup)


def build_scheduler(
    section: schema.Train, optimizer: torch.optim.Optimizer, total: int, step: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate of a run of `total` steps, standing at `step`.

    The schedule is a function of the step's number, so a run that was made longer gets the longer run's schedule.
    It is transformers', one place further on where there is a warm-up: theirs has a learning rate of zero at its
    first place, and a step there would train nothing.
    """
    from transformers import get_scheduler

    name = {"constant": "constant_with_warmup"}.get(section.scheduler, section.scheduler)
    warmup = warmup_steps(section, total)
    ahead = 1 if warmup else 0
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total + ahead)
    place = scheduler.last_epoch = step + ahead
    rates = [base * factor(place) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
    return scheduler  # type: ignore[no-any-return]


def optimizer_state(
    optimizer: torch.optim.Optimizer, named: NamedParameters
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the optimizer's tensors by `parameter/key`, and its plain numbers, both ready to be written."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for name, parameter in named:
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                # Cloned, since 8-bit optimizers share one quantisation map and a file holds no shared memory.
                tensors[f"{name}/{key}"] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            else:
                numbers[f"{name}/{key}"] = value
    return tensors, numbers


def all_finite(optimizer: torch.optim.Optimizer, named: NamedParameters) -> bool:
    """Whether no trained parameter and none of its moments holds an infinity or NaN."""
    held = [tensor for _, p in named for tensor in (p.detach(), *optimizer.state.get(p, {}).values())]
    floating = [tensor for tensor in held if isinstance(tensor, Tensor) and tensor.is_floating_point()]
    return all(bool(torch.isfinite(tensor).all()) for tensor in floating)


def _fits(held: dict[str, Any], shape: torch.Size, full: bool) -> bool:
    """Whether a parameter of this shape can have these moments: of AdamW in full precision, or of its 8-bit form."""
    moments = ("exp_avg", "exp_avg_sq") if full else ("state1", "state2")
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = dict.fromkeys(moments, (torch.float32, tuple(shape)))
    packed = not full and isinstance(held.get("state1"), Tensor) and held["state1"].dtype == torch.uint8
    if packed:
        wanted = dict.fromkeys(moments, (torch.uint8, tuple(shape)))
        wanted |= dict.fromkeys(("qmap1", "qmap2"), (torch.float32, (_CODES,)))
        wanted |= dict.fromkeys(("absmax1", "absmax2"), (torch.float32, (math.ceil(shape.numel() / _BLOCK),)))
    found = {
        key: (value.dtype, tuple(value.shape))
        for key, value in held.items()
        if isinstance(value, Tensor) and key != "step"
    }
    step = held.get("step")
    steps = step.numel() if isinstance(step, Tensor) else isinstance(step, int)
    return found == wanted and steps == 1 and held.keys() == {*wanted, "step"}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, named: NamedParameters, tensors: dict[str, Tensor], numbers: dict[str, Any]
) -> None:
    """Put back what `optimizer_state` returned.

    Raises:
        ValueError: it is of other parameters or of another optimizer, whose step would read beyond it.
    """
    places = {name: number for number, (name, _) in enumerate(named)}
    state: dict[int, dict[str, Any]] = {}
    for full, value in (*tensors.items(), *numbers.items()):
        name, _, key = full.rpartition("/")
        if name not in places:
            raise ValueError(f"holds {shown(full)}, which is no parameter that trains")
        state.setdefault(places[name], {})[key] = value
    for number, held in state.items():
        name, parameter = named[number]
        if not _fits(held, parameter.shape, isinstance(optimizer, torch.optim.AdamW)):
            raise ValueError(f"what it holds of {name} {list(parameter.shape)} is not this optimizer's")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
