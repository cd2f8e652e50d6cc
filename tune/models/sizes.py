"""Whether a base is as large as its config.json says, asked before anything is built from it.

Somebody else wrote the config, and a library believes it: of 10**9 layers it begins to make a list, of a hidden size
of 10**6 it allocates what the weights on the disk never fill. No size can be right that the weights do not have, so
their headers bound what a config may say; where they are not here yet, what no model comes near does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tune.errors import ModelError
from tune.recipe.read import shown

# The first pattern that a key fits says how large its number may be. The largest models have 126 layers, 512 experts,
# 262 thousand tokens and a hidden size of 18 thousand.
_MOST = (
    (re.compile(r"(partial_)?rotary_(factor|pct|percent)|partial_rotary_factor"), 1),
    (re.compile(r".*layer.*|n_blocks|depth"), 4096),
    (re.compile(r".*expert.*"), 65_536),
    (re.compile(r".*vocab.*"), 2**26),
    (re.compile(r".*label.*"), 2**16),
    (re.compile(r".*heads?(_|$).*|.*head_dim.*|.*kv.*"), 2**16),
    (re.compile(r".*(hidden|size|dim|embd|width|rank|channels|state).*"), 2**22),
    (re.compile(r".*positions?(_|$).*|n_ctx|max_seq.*"), 2**40),
)
_INFINITE = ("time_step_limit",)
"""A key whose number may be infinite, in good configs."""
_BEYOND = 1.25
"""So many times the weights' elements may a model have: tied or derived ones are not stored."""
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


def check_numbers(base: str, content: Any) -> None:
    """Refuse a parsed config.json in which a number is beyond every model's.

    Raises:
        ModelError: names the key and the number.
    """
    for key, value in _numbers("", content):
        if isinstance(value, float) and not math.isfinite(value):
            if key in _INFINITE:
                continue
            raise _refused(base, key, value, "which is no number")
        most = next((most for pattern, most in _MOST if pattern.fullmatch(key)), 2**63)
        if value > most:
            raise _refused(base, key, value, "far beyond any model")
        if value < 0 and most < 2**63:
            raise _refused(base, key, value, "below zero")


def check_layers(base: str, folder: Path, config: Any) -> None:
    """Refuse a local base whose weights have fewer layers than its config says.

    Raises:
        ModelError: says which is the first that is missing.
    """
    from tune.models.shards import checkpoint_in  # which needs a module that needs this one

    try:
        names = checkpoint_in(folder).places
    except ModelError:  # whoever reads the weights says so in better words
        return
    found = [(int(match[1]), match) for name in names if (match := _LAYER.search(name))]
    layers = getattr(config, "num_hidden_layers", None)
    if not found or not isinstance(layers, int):
        return
    last, match = max(found, key=lambda one: one[0])
    if layers > 2 * (last + 1) + 16:
        missing = f"{match.string[: match.start(1)]}{last + 1}"
        raise ModelError(
            f"model.base: the checkpoint of {base} lacks {layers - last - 1} of the {layers} layers that its "
            f"config.json describes, from {missing} on. It is incomplete, or belongs to another config."
        )


def check_experts(base: str, config: Any) -> None:
    """Refuse a mixture whose tokens go to more experts than there are, or to none.

    Raises:
        ModelError: says how many.
    """
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    if isinstance(experts, int) and isinstance(chosen, int) and not 0 < chosen <= experts:
        raise ModelError(
            f"model.base: {base}/config.json says that each token goes to {chosen} of {experts} experts "
            "(num_experts_per_tok). Compare it with the original model's."
        )


def check_elements(base: str, folder: Path | None, model: Any) -> None:
    """Refuse a local base whose weights are far fewer than those of the model that its config describes, or no weights.

    Args:
        base: for the message.
        folder: of its weights; None where they are not here yet.
        model: built on the meta device.

    Raises:
        ModelError: names the largest parameter that has no place in the weights, or one whose type is not a weight's.
    """
    from tune.models.shards import DTYPES, checkpoint_in

    if folder is None:
        return
    try:
        places = checkpoint_in(folder).places
    except ModelError:  # as above
        return
    stored = sum(math.prod(place.shape) for place in places.values())
    parameters = dict(model.named_parameters())  # tied ones once
    for name, place in places.items():
        if name in parameters and place.dtype not in DTYPES:
            raise ModelError(
                f"model.base: {place.file}: {name} is of type {shown(place.dtype)}, and weights are float32, bfloat16 "
                "or float16. Copy it again from the original model."
            )
    described = sum(parameter.numel() for parameter in parameters.values())
    if described > _BEYOND * stored + 2**24:
        name, largest = max(parameters.items(), key=lambda item: item[1].numel())
        raise ModelError(
            f"model.base: the config.json of {base} describes {described:,} weights, such as {name} of shape "
            f"{list(largest.shape)}, and its checkpoint has the wrong shape for them: it holds {stored:,}. "
            "It is incomplete, or belongs to another config."
        )


def _numbers(key: str, content: Any) -> Iterator[tuple[str, int | float]]:
    """Every number with the key that it stands under, at any depth."""
    waiting = [(key, content)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(key, item) for item in value]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield key, value


def _refused(base: str, key: str, value: float, why: str) -> ModelError:
    return ModelError(
        f"model.base: {base}/config.json says {shown(key)} {shown(value)}, {why}. Compare it with the original model's."
    )
