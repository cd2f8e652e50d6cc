"""LoRA on a layer's experts as a PEFT layer: one adapter for all experts of a stack, computed by our op.

PEFT's own layer for a bare parameter, `ParamWrapper`, adds B A to the weights of all experts on every forward: as
much memory as the experts, as much again for the gradient, no dropout, and nothing that works on packed weights. The
subclass below keeps all that PEFT knows of it (names, shapes, saving, loading, switching) and replaces the forward.

One wrapper adapts one parameter, so two are nested: gate_up_proj inside, down_proj around it. The outermost collects
the active A and B of both and calls the op once. Its layout is stock PEFT's: A [E·R, in] with rows expert-major,
B [out, R·E] with columns rank-major, the expert fastest.

The class is registered for the experts' class on the LoraConfig (`register`); PEFT does not save that, so whoever
loads an adapter onto packed experts registers it again.

Shapes: E experts, R rank.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from peft import LoraConfig
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn

from tune.errors import ModelError
from tune.kernels.nf4_experts import ExpertLora, experts
from tune.models.experts import STACKS, NF4Experts, expert_modules, weights_of

MERGE_REFUSED = (
    "An adapter on experts or a router is not merged in memory: PEFT's merge would need all experts unpacked, or "
    "round them to 4 bit again. Use `tune merge RUN`, which streams the base's own weights and proves the result."
)


class NeverMergedWrapper(peft_layer.ParamWrapper):  # type: ignore[misc]
    """PEFT's wrapper of a bare parameter, for what must not be merged in memory."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse, with what to do instead."""
        raise ModelError(MERGE_REFUSED)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the module without the adapter.

        Raises:
            ModelError: the adapter is to be merged.
        """
        if merge:
            self.merge()
        base: nn.Module = self.get_base_layer()
        return base


class ParamWrapper(NeverMergedWrapper):
    """LoRA on gate_up_proj or down_proj of an experts module, packed or dense.

    It must bear this name: PEFT knows its wrappers of parameters by their class's name.
    """

    keep: Literal["inputs", "activations"] = "inputs"
    """What the op keeps for its backward; see `tune.kernels.nf4_experts`."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, parameter_name: str, config: LoraConfig, **kwargs: Any
    ) -> None:
        inside = getattr(base_layer, "parameter_name", None)
        # The names of saved tensors say which is which by this nesting alone.
        assert inside in (None, STACKS[0]), f"{parameter_name} around {inside}"
        super().__init__(base_layer, adapter_name, parameter_name, config=_without_dropout(config), **kwargs)
        self._set_dropout(adapter_name, config)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        base = self.get_base_layer()
        packed = isinstance(base, NF4Experts)
        shape = base.shape_of(self.parameter_name) if packed else getattr(base, self.parameter_name).shape
        self.num_experts, self._param_ndim = shape[0], 3
        return shape[1], shape[2]  # PEFT's layer exchanges the two itself

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter, as PEFT does, with dropout on the input of A."""
        super().update_layer(adapter_name, r, lora_alpha, config=_without_dropout(config), **kwargs)
        self._set_dropout(adapter_name, config)

    def _set_dropout(self, adapter_name: str, config: LoraConfig) -> None:
        if config.lora_dropout > 0:
            self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout)

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, **kwargs: Any) -> Tensor:
        """Return the weighted sum of every token's chosen experts, [T, H], with the active adapters.

        Args:
            x: [T, H].
            top_k_index: [T, K], each token's experts.
            top_k_weights: [T, K], the router's weights for them.
        """
        self._check_forward_args(x, **kwargs)
        loras: dict[str, ExpertLora | None] = {}
        layer: Any = self
        while isinstance(layer, ParamWrapper):
            loras[layer.parameter_name] = layer.active_lora()
            layer = layer.base_layer
        if not any(loras.values()):
            return layer(x, top_k_index, top_k_weights)  # type: ignore[no-any-return]
        gate_up, down = (loras.get(name) for name in STACKS)
        return experts(x, top_k_index, top_k_weights, weights_of(layer), gate_up, down, keep=self.keep)

    def active_lora(self) -> ExpertLora | None:
        """Return what the active adapters add to this parameter, as one LoRA, or None when there are none.

        Raises:
            ModelError: several are active with different dropouts, which one LoRA cannot have.
        """
        names = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]
        if not names:
            return None
        dropouts = {self.lora_dropout[name].p if self._drops(name) else 0.0 for name in names}
        if len(dropouts) > 1:
            raise ModelError(
                f"The active adapters {', '.join(names)} have different dropouts on the same experts. "
                "Train one at a time, or give all the same."
            )
        (dropout,) = dropouts
        if len(names) == 1:
            (name,) = names
            return ExpertLora(self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name], dropout)
        count = self.num_experts
        a_ERI = [self.lora_A[name].weight.unflatten(0, (count, -1)) for name in names]
        b_ORE = [self.lora_B[name].weight.unflatten(1, (-1, count)) * self.scaling[name] for name in names]
        return ExpertLora(torch.cat(a_ERI, 1).flatten(0, 1), torch.cat(b_ORE, 1).flatten(1, 2), 1.0, dropout)

    def _drops(self, name: str) -> bool:
        return self.training and isinstance(self.lora_dropout[name], nn.Dropout)


def _without_dropout(config: LoraConfig) -> LoraConfig:
    """PEFT's layer refuses dropout, since it cannot drop what goes into A alone; ours can."""
    config = copy.copy(config)
    config.lora_dropout = 0.0
    return config


def expert_parameters(model: nn.Module) -> dict[str, nn.Module]:
    """Return the module of each of the experts' stacks, by the stack's full name, such as `….experts.down_proj`."""
    return {f"{plain_name(name)}.{stack}": module for name, module in expert_modules(model).items() for stack in STACKS}


def plain_name(name: str) -> str:
    """Return the name that a module had before PEFT wrapped it."""
    return name.replace(".token_adapter", "").replace(".base_layer", "").replace(".original_module", "")


def keep_activations(model: nn.Module, keep: Literal["inputs", "activations"]) -> None:
    """Choose what the adapted experts keep for their backward."""
    for module in model.modules():
        if isinstance(module, ParamWrapper):
            module.keep = keep
