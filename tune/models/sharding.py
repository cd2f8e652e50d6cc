"""A frozen base split over devices, with PyTorch's own `fully_shard` (FSDP2).

Each decoder layer is a unit: its parameters lie in shards, one on each device, are gathered before the layer runs
and let go behind it, forwards and backwards. Embeddings and output head are one unit more, gathered for a whole row
and not for its backward: both are frozen, and the loss forms the gradient of its input while it has the head at hand.
What else lies outside of the layers is small (norms), or a linear layer that a backward needs, and stays whole.

Nothing that is split trains, so no gradient is ever reduced here. The adapter is attached later, is unknown to FSDP
and whole on every device.

Every row gathers the same units in the same order, whatever its length, on all devices. A device that must break off a
row (out of memory) therefore knows what the others still wait for: it has counted its gathers (`Gathers`). It runs a
short row from the start, leaves out as many as it has done, and takes part in the rest (`break_off`).

FSDP puts parameters of its own into the modules. What unpacks a 4-bit weight therefore stands on its module
(`quant_state_of`), and packed bytes are kept as bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from bitsandbytes.functional import QuantState
from torch import Tensor, nn

from tune.errors import ModelError
from tune.models.experts import STACKS, NF4Experts

Result = TypeVar("Result")

STORAGE = torch.bfloat16
"""What packed bytes are kept as: FSDP gathers a layer in one piece if all of it has one dtype."""

_WITHIN = "run_within"
"""The method that FSDP gathers embeddings and head for."""

_GATHERS = "gathers_of_a_row"
"""Where a sharded model keeps its `Gathers`."""


def decoder_layers(model: Any, base: str) -> dict[str, nn.Module]:
    """Return a transformers model's decoder layers by name, in order.

    Raises:
        ModelError: the model does not say which of its modules they are.
    """
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    found = {name: module for name, module in model.named_modules() if type(module).__name__ in kinds}
    if not found:
        raise ModelError(
            f"model.base: {base} ({model.config.model_type}) does not say what its layers are, so it cannot be split "
            "over devices. Launch with --multi_gpu, which holds all of it on each."
        )
    return found


def shard_layer(layer: nn.Module, mesh: Any) -> None:
    """Keep this device's shard of a layer, and let the rest go."""
    from torch.distributed.fsdp import fully_shard

    fully_shard(layer, mesh=mesh, reshard_after_forward=True)


def shard_rest(model: Any, mesh: Any) -> None:
    """Keep this device's shard of embeddings and head. The layers are sharded already."""
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    split = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    split.append(model.get_output_embeddings())
    kept = {id(parameter) for module in split if module is not None for parameter in module.parameters()}
    whole = {parameter for parameter in model.parameters() if not is_sharded(parameter) and id(parameter) not in kept}
    fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    model.set_unshard_in_backward(False)
    setattr(model, _WITHIN, lambda work: work())
    register_fsdp_forward_method(model, _WITHIN)
    gathers = Gathers()
    setattr(model, _GATHERS, gathers)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(gathers)  # type: ignore[arg-type]


class Gathers:
    """Gathers units for FSDP, and counts those of a row."""

    def __init__(self) -> None:
        self.done = 0
        """In this row, those left out included."""
        self.broken = False
        """A gather has failed itself: which devices have it is not known, and nothing can be gathered any more."""
        self._left_out = 0

    def begin(self, left_out: int = 0) -> None:
        """Begin a row; its first `left_out` gathers are not done, and leave zeros."""
        self.done, self._left_out = 0, left_out

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return what a gather writes to."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        """Gather `input_tensor`, which lies in `output_tensor`, from all devices."""
        if self.done < self._left_out:
            output_tensor.zero_()
            self.done += 1
            return None
        # What the one is called in torch 2.13 is deprecated under the other's name.
        gather = getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor
        self.broken = True
        work = gather(output_tensor, input_tensor, group=group, async_op=async_op)
        self.broken = False
        # On a GPU it has only been queued. That is enough: what is queued runs, in this order, whatever fails after it.
        self.done += 1
        return work


def begin_row(model: Any) -> None:
    """Count the gathers of a sharded model from here."""
    gathers: Gathers | None = getattr(model, _GATHERS, None)
    if gathers is not None:
        gathers.begin()


def may_break_off(model: Any) -> bool:
    """Whether the row at hand can be broken off."""
    gathers: Gathers | None = getattr(model, _GATHERS, None)
    return gathers is None or not gathers.broken


def break_off(model: Any) -> None:
    """Let go of a row of a sharded model in whose middle an error was raised.

    All of the base lies in shards again. The next row must be a short one that does not count, forwards and backwards
    as the others' rows; its first gathers are left out, so that it meets the others where this device left them. Until
    then its layers hold zeros.
    """
    from torch.distributed.fsdp import FSDPModule

    gathers: Gathers = getattr(model, _GATHERS)
    gathers.begin(gathers.done)
    if hasattr(FSDPModule, "reset_iter_state"):
        model.reset_iter_state()
    else:
        _reset_iter_state(model)


def _reset_iter_state(model: Any) -> None:
    """What `FSDPModule.reset_iter_state` does for a base that is frozen, for versions of torch without it."""
    root = model._get_fsdp_state()
    streams = root._comm_ctx
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # no gather may still write to what is let go here
    streams.all_gather_state = None
    streams.post_forward_order.clear()
    root._state_ctx.iter_forward_root = None
    root._state_ctx.post_backward_final_callback_queued = False
    for state in root._state_ctx.all_states:
        state._training_state = type(state._training_state).IDLE
        group = state._fsdp_param_group
        if group is not None:
            group._all_gather_result = None
            group._post_forward_indices.clear()
            group._training_state = type(group._training_state).IDLE
            group._to_sharded()


def within(model: Any, work: Callable[[], Result]) -> Result:
    """Return what `work` returns, called where embeddings and head of `model` are whole.

    A forward of all of `model` needs no such care; one of a part of it does.
    """
    run: Callable[[Callable[[], Result]], Result] = getattr(model, _WITHIN, lambda work: work())
    return run(work)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor lies in shards."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that every device has all of; where it lies in shards, every process must call this."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def stored_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor on this device: of a sharded one its shard's, padding included."""
    from torch.distributed.tensor import DTensor

    if isinstance(tensor, DTensor):
        return tensor.to_local().untyped_storage().nbytes()
    return tensor.numel() * tensor.element_size()


def quant_state_of(module: Any, parameter: str = "weight") -> QuantState | None:
    """Return what unpacks a module's parameter, or None where it is not packed.

    bitsandbytes keeps it on the parameter, and FSDP puts others in the place of parameters.
    """
    if isinstance(module, NF4Experts):
        return module.state_of(parameter) if parameter in STACKS else None
    if parameter != "weight":
        return None
    state: QuantState | None = getattr(module.weight, "quant_state", None)
    return state if state is not None else getattr(module, "quant_state", None)


def state_tensors(state: QuantState) -> list[Tensor]:
    """Return the scales of a packed parameter; its codes are tables of a fixed size."""
    return [state.absmax] + ([state.state2.absmax] if state.nested else [])


def local_bytes(model: nn.Module) -> int:
    """Bytes that the frozen part of `model` takes on this device, scales of 4-bit weights included."""
    total, seen = 0, set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            state = quant_state_of(module, name)
            held = [parameter] if state is None else [parameter, *state_tensors(state)]
            total += sum(stored_bytes(tensor) for tensor in held)
    return total
