"""The model families that tune knows by name: where each keeps its attention and its feed-forward layers.

To add a family, add an entry to `FAMILIES`; a contract test builds a tiny model of every entry, checks that the
names below find all of its linear layers, trains it for a step and reloads the adapter with stock PEFT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tune.errors import ModelError


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """What a checkpoint that keeps every expert apart calls what transformers stacks."""

    block: str
    """The module that holds router and experts, which transformers calls `mlp`."""
    gate: str
    up: str
    down: str


@dataclass(frozen=True, slots=True)
class Family:
    """Names of the linear layers of one architecture, as suffixes of their module names."""

    name: str
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    experts: bool = False
    """The feed-forward layers are experts behind a router, stored as 3-D parameters."""
    per_expert: ExpertNames | None = None
    """Names of the layout that servers read adapters in, one expert at a time; None where PEFT does not read it."""

    def parts(self, kind: str) -> tuple[str, ...]:
        """Return the names that one of `KINDS` stands for; none when this family has no such layers."""
        experts = EXPERTS if self.experts else ()
        return {
            "attention": self.attention,
            "mlp": self.mlp + experts,
            "experts": experts,
            "router": ROUTER if self.experts else (),
        }[kind]


EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
"""The stacks of all experts of a layer, in every family."""
ROUTER = ("gate.weight",)
_MIXTRAL = ExpertNames("block_sparse_moe", gate="w1", up="w3", down="w2")
_QWEN = ExpertNames("mlp", gate="gate_proj", up="up_proj", down="down_proj")

_LLAMA_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_LLAMA_MLP = ("gate_proj", "up_proj", "down_proj")
_FUSED_ATTENTION = ("query_key_value", "dense")
_FUSED_MLP = ("dense_h_to_4h", "dense_4h_to_h")

FAMILIES: dict[str, Family] = {
    "mistral": Family("mistral", _LLAMA_ATTENTION, _LLAMA_MLP),
    "mixtral": Family("mixtral", _LLAMA_ATTENTION, (), experts=True, per_expert=_MIXTRAL),
    "llama": Family("llama", _LLAMA_ATTENTION, _LLAMA_MLP),
    "falcon": Family("falcon", _FUSED_ATTENTION, _FUSED_MLP),
    "bloom": Family("bloom", _FUSED_ATTENTION, _FUSED_MLP),
    "olmoe": Family("olmoe", _LLAMA_ATTENTION, (), experts=True, per_expert=_QWEN),
    "qwen2_moe": Family("qwen2_moe", _LLAMA_ATTENTION, (), experts=True),
    "qwen3_moe": Family("qwen3_moe", _LLAMA_ATTENTION, (), experts=True, per_expert=_QWEN),
}
"""By `model_type` of the model's config. CodeLlama is a Llama."""

KINDS = ("attention", "mlp", "experts", "router")
"""What a recipe's `adapter.targets` may name besides modules."""


_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts")
"""What configs call the number of experts."""


def is_mixture(config: Any) -> bool:
    """Whether a transformers config describes a mixture of experts, of ours or of another family."""
    family = family_of(config)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    parts = (config, text, getattr(config, "ffn_config", None))
    counted = any(getattr(part, name, None) for part in parts for name in _COUNTS)
    return counted or (family is not None and family.experts)


def family_of(config: Any) -> Family | None:
    """Return the family of a transformers config, or None when it is not one of ours."""
    return FAMILIES.get(getattr(config, "model_type", ""))


def target_suffixes(target: str, config: Any, base: str) -> tuple[str, ...]:
    """Return the suffixes of modules' and parameters' names that one entry of `adapter.targets` stands for.

    Raises:
        ModelError: a kind (such as `attention`) on a model whose family is not known, or that has no such layers.
    """
    if target not in KINDS:
        return (target,)
    family = family_of(config)
    if family is None:
        raise ModelError(
            f"adapter.targets: {target!r} has no meaning for {base}, whose model_type "
            f"{getattr(config, 'model_type', None)!r} is not one of {', '.join(sorted(FAMILIES))}. "
            "Name its linear layers instead, such as targets: [q_proj, v_proj]."
        )
    names = family.parts(target)
    if not names:
        raise ModelError(
            f"adapter.targets: {base} ({family.name}) has no {target} that could be adapted. "
            f"Use one of: {', '.join(kind for kind in KINDS if family.parts(kind))}."
        )
    return names
