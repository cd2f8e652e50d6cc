"""The loss that keeps a mixture of experts using all of its experts, and what a step tells about their load.

For one layer, with f_e the share of tokens that have expert e among their top k and P_e the mean probability that
the router gives to e, the balance is E · Σ_e f_e P_e (Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6, with
k choices in place of one). f sums to k and P to one, so a balanced layer reads k, and one whose tokens all go to the
same k experts reads E. It is taken layer by layer and then averaged: averaging f and P over the layers first would
read k from layers that have collapsed onto different experts.

f cannot be differentiated, and f of the step at hand is known only after its last row, on the last device. The loss
therefore takes f from the step before. With f given it is linear in P, so that a row adds

    weight · 1/L · Σ_l E · Σ_e f_le · (Σ_t p_lte) / (tokens of the step)

and the sum over rows and devices is the same however the step was split. Before the first step f is taken as even:
then the loss is k whatever the router does, and has no gradient.

Every token of a row counts, trained on or not; rows hold no padding. The router logits are those that the model
returns. A count in a forward hook would see every token twice where activations are computed again.

Shapes: L layers with a router, T tokens of a row, E experts of a layer, K chosen for each token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tune.training.devices import Devices


@dataclass(frozen=True, slots=True)
class Routers:
    """The routers of a model."""

    layers: int
    experts: int
    """Experts of each layer."""
    top_k: int
    """Experts that each token goes to."""


@dataclass(frozen=True, slots=True)
class RouterLoad:
    """What a step sent to which expert, over all devices."""

    counts: list[list[int]]
    """[L][E]: tokens that have the expert among their top k."""
    balance: float
    """Mean over the layers of E · Σ f P, both of this step: k when balanced, E when collapsed."""

    def metrics(self) -> dict[str, Any]:
        """For metrics.jsonl, with one number a layer.

        `largest_load`: the busiest expert's tokens over the mean expert's; 1 is balanced. `entropy`: of an expert's
        share in all choices, in nats; ln E is balanced. `dead_experts`: how many no token chose.
        """
        shares = [[count / sum(layer) for count in layer] for layer in self.counts]
        return {
            "balance": self.balance,
            "largest_load": [round(max(layer) * len(layer), 4) for layer in shares],
            "entropy": [round(-math.fsum(share * math.log(share) for share in layer if share), 4) for layer in shares],
            "dead_experts": [layer.count(0) for layer in self.counts],
        }


def routers_of(model: Any) -> Routers | None:
    """Return the routers whose logits a transformers causal language model returns, or None when it is dense."""
    recorded = (getattr(model.base_model, "_can_record_outputs", None) or {}).get("router_logits")
    if recorded is None:
        return None
    routers = [module for module in model.modules() if isinstance(module, recorded.target_class)]
    for module in model.modules():
        recompute = getattr(module, "_gradient_checkpointing_func", None)
        reentrant = getattr(recompute, "keywords", {}).get("use_reentrant", True)
        # It runs the forward without gradients, so the logits that the model returns would train nothing.
        assert recompute is None or not reentrant, "reentrant recomputation detaches the router logits"
    return Routers(len(routers), routers[0].num_experts, routers[0].top_k)


class StepBalance:
    """The balance of one step: a loss for each row of this process, then the load over all processes."""

    def __init__(
        self,
        routers: Routers,
        weight: float,
        tokens: int,
        previous: Sequence[Sequence[int]] | None,
        device: torch.device,
    ) -> None:
        """Begin a step.

        Args:
            routers: of the model.
            weight: of the balance in the loss; 0 only counts.
            tokens: of the whole step, over all rows and devices, trained on or not.
            previous: the `RouterLoad.counts` of the step before; None before the first.
            device: the model's.
        """
        self._routers = routers
        self._tokens = tokens
        self._counts_LE = torch.zeros(routers.layers, routers.experts, dtype=torch.float64, device=device)
        self._probabilities_LE = torch.zeros_like(self._counts_LE)
        self._slope_LE: Tensor | None = None
        """What the loss grows by with each unit of a token's probability."""
        if weight and previous is not None:
            counts_LE = torch.tensor(previous, dtype=torch.float64, device=device)
            load_LE = counts_LE * (routers.top_k / counts_LE.sum(1, keepdim=True))
            self._slope_LE = (load_LE * (weight * routers.experts / (routers.layers * tokens))).float()

    def row_loss(self, router_logits: Sequence[Tensor]) -> Tensor:
        """Count a row and return its part of the step's loss (float32 scalar), weight included.

        Args:
            router_logits: [T, E] of each layer, as the model returns them.
        """
        with torch.set_grad_enabled(self._slope_LE is not None):
            # The router's own way from logits to choices, layer by layer, so that ties fall to the same expert.
            p_TE_of_L = [logits_TE.float().softmax(-1) for logits_TE in router_logits]
            p_LE = torch.stack([p_TE.sum(0) for p_TE in p_TE_of_L])
            loss = (self._slope_LE * p_LE).sum() if self._slope_LE is not None else p_LE.new_zeros(())
        chosen_LTK = torch.stack([p_TE.detach().topk(self._routers.top_k).indices for p_TE in p_TE_of_L])
        experts_E = torch.arange(self._routers.experts, device=p_LE.device)
        self._counts_LE += (chosen_LTK[..., None] == experts_E).sum((1, 2))
        self._probabilities_LE += p_LE.detach()
        return loss

    def finish(self, devices: Devices) -> RouterLoad:
        """Return the load of the step over all processes; each must call this once, with or without rows."""
        counts_LE, p_LE = devices.sum(torch.stack((self._counts_LE, self._probabilities_LE)))
        counts = [[int(count) for count in layer] for layer in counts_LE.tolist()]
        assert all(sum(layer) == self._tokens * self._routers.top_k for layer in counts), "a token was not counted once"
        balance = self._routers.experts * (counts_LE * p_LE).sum(1).mean() / self._tokens**2
        return RouterLoad(counts, float(balance))
