"""A frozen base split over devices, with PyTorch's own `fully_shard` (FSDP2).

Each decoder layer is a unit: its parameters lie in shards, one on each device, are gathered before the layer runs
and let go behind it, forwards and backwards. Embeddings and output head are one unit more, gathered for a whole row
and not for its backward: both are frozen, and the loss forms the gradient of its input while it has the head at hand.
What else lies outside of the layers is small (norms), or a linear layer that a backward needs, and stays whole.

Nothing that is split trains, so no gradient is ever reduced here. The adapter is attached later, is unknown to FSDP
and whole on every device.

FSDP puts parameters of its own into the modules. What unpacks a 4-bit weight therefore stands on its module
(`quant_state_of`), and packed bytes are kept as bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
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
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    split = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    split.append(model.get_output_embeddings())
    kept = {id(parameter) for module in split if module is not None for parameter in module.parameters()}
    whole = {parameter for parameter in model.parameters() if not is_sharded(parameter) and id(parameter) not in kept}
    fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    model.set_unshard_in_backward(False)
    setattr(model, _WITHIN, lambda work: work())
    register_fsdp_forward_method(model, _WITHIN)


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
