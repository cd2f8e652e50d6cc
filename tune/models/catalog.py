"""The model families that tune knows by name: where each keeps its attention and its feed-forward layers.

To add a family, add an entry to `FAMILIES`; a contract test builds a tiny model of every entry, checks that the
names below find all of its linear layers, trains it for a step and reloads the adapter with stock PEFT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tune.errors import ModelError


@dataclass(frozen=True, slots=True)
class Family:
    """Names of the linear layers of one architecture, as suffixes of their module names."""

    name: str
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    experts: bool = False
    """The feed-forward layers are experts behind a router, stored as 3-D parameters."""


_LLAMA_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_LLAMA_MLP = ("gate_proj", "up_proj", "down_proj")
_FUSED_ATTENTION = ("query_key_value", "dense")
_FUSED_MLP = ("dense_h_to_4h", "dense_4h_to_h")

FAMILIES: dict[str, Family] = {
    "mistral": Family("mistral", _LLAMA_ATTENTION, _LLAMA_MLP),
    "mixtral": Family("mixtral", _LLAMA_ATTENTION, (), experts=True),
    "llama": Family("llama", _LLAMA_ATTENTION, _LLAMA_MLP),
    "falcon": Family("falcon", _FUSED_ATTENTION, _FUSED_MLP),
    "bloom": Family("bloom", _FUSED_ATTENTION, _FUSED_MLP),
}
"""By `model_type` of the model's config. CodeLlama is a Llama."""

KINDS = ("attention", "mlp", "experts", "router")
"""What a recipe's `adapter.targets` may name besides modules."""


def family_of(config: Any) -> Family | None:
    """Return the family of a transformers config, or None when it is not one of ours."""
    return FAMILIES.get(getattr(config, "model_type", ""))


def target_suffixes(target: str, config: Any, base: str) -> tuple[str, ...]:
    """Return the module-name suffixes that one entry of `adapter.targets` stands for.

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
    names = {"attention": family.attention, "mlp": family.mlp}.get(target, ())
    if not names:
        raise ModelError(
            f"adapter.targets: {base} ({family.name}) has no {target} that this version can adapt. "
            f"Use one of: {', '.join(k for k in ('attention', 'mlp') if getattr(family, k))}."
        )
    return names
