"""Training a router: by LoRA, or in full.

In transformers a router is a module with a bare weight [E, H] that returns logits, scores and choices, so neither
PEFT's LoRA for linear layers nor a change of its output would do. Both ways here call the frozen router with another
weight, rounded to the dtype of its input: what trains in 16 bit is exactly what a merge in 16 bit will hold, while A
and B, or the weight in full, stay in float32.

Shapes: E experts, H hidden.
"""

from __future__ import annotations

from typing import Any

from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.func import functional_call

from tune.adapters.expert_lora import NeverMergedWrapper, plain_name
from tune.models.experts import expert_modules
from tune.models.sharding import whole


class ParamWrapper(NeverMergedWrapper):
    """LoRA on a router's weight, saved as stock PEFT's. PEFT knows such a class by this name."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what the router returns for x [T, H], with the active adapters."""
        self._check_forward_args(x, *args, **kwargs)
        names = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]
        base = self.get_base_layer()
        if not names:
            return base(x, *args, **kwargs)
        weight_EH = base.weight.float()
        for name in names:
            weight_EH = weight_EH + self.scaling[name] * (self.lora_B[name].weight @ self.lora_A[name].weight).float()
        return functional_call(base, {"weight": weight_EH.to(x.dtype)}, (x, *args), kwargs)


class TrainedRouter(nn.Module):
    """A router whose own weight trains, in float32, saved under the router's name as PEFT saves whole modules."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        weight = router.weight
        assert isinstance(weight, Tensor)
        self.weight = nn.Parameter(whole(weight.detach()).float().clone())
        self._frozen = (router,)  # in a tuple, so that it is not saved twice

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what the router returns for x [T, H]."""
        return functional_call(self._frozen[0], {"weight": self.weight.to(x.dtype)}, (x, *args), kwargs)


def routers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the routers by name: what stands beside a layer's experts with a weight [E, H] and is no linear layer.

    Adapted ones are returned as PEFT wrapped them.
    """
    found: dict[str, nn.Module] = {}
    for name, experts in expert_modules(model).items():
        block = plain_name(name).rpartition(".")[0]
        shape = [experts.num_experts, experts.hidden_dim]
        for child, module in model.get_submodule(block).named_children():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and list(weight.shape) == shape and not isinstance(module, nn.Linear):
                found[f"{block}.{child}"] = module
    return found


def train_in_full(model: nn.Module, adapter: str) -> None:
    """Let the copies of routers that PEFT made for `modules_to_save` train in float32, whatever the base's dtype."""
    for module in routers(model).values():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save[adapter] = TrainedRouter(module.original_module)
