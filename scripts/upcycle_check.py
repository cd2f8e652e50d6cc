"""Whether an upcycled Mixtral is what it should be: the finished folder, loaded and held against the dense model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smollm2 import Refused, Wrong, largest_difference
from upcycle_weights import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from tune.models.shards import Checkpoint

TEXT = """The harbour wakes before the town does. At four the bakers light their ovens, at five the first boats come in,
and by six there is nobody on the quay who has time to talk. A crate of mackerel costs 12.50 today; yesterday it was 9.

Question: why does a lamp turn? Answer: so that a sailor can tell one light from another by counting the seconds.

def flashes(period, minutes):
    return [second for second in range(60 * minutes) if second % period == 0]
"""
"""What the finished folder is tried on: prose, numbers, a question and code."""


@dataclass(frozen=True)
class Measured:
    """What the finished folder does, beside the dense model, on TEXT."""

    clean: float
    """Largest difference of logits with the noise taken out, relative to the largest logit."""
    noisy: float
    """The same for the folder as it is."""
    same_token: float
    """Share of places where both find the same next token most likely."""
    noise: float
    """The noise as stored, as in Settings."""
    first: float
    """Weight of the first of the chosen experts, mean over tokens and layers."""
    load: float
    """Tokens of a layer's busiest expert over the mean of its experts, mean over layers."""


def logits_of(model: Any, ids: Tensor, router: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Logits `[tokens, vocabulary]`, and with `router` (of a Mixtral) those of each router, `[tokens, experts]`."""
    import torch

    with torch.inference_mode():
        result = model(input_ids=ids, **({"output_router_logits": True} if router else {}))
    return result.logits[0], list(result.router_logits) if router else []


def routing(layers: list[Tensor], top_k: int) -> tuple[float, float]:
    """`first` and `load` of Measured, from the router logits `[tokens, experts]` of each layer."""
    import torch

    first, load = [], []
    for logits in layers:
        chosen = logits.float().softmax(-1).topk(top_k, dim=-1)
        first.append(float((chosen.values[:, 0] / chosen.values.sum(-1)).mean()))
        counts = torch.bincount(chosen.indices.flatten(), minlength=logits.shape[-1]).float()
        load.append(float(counts.max() / counts.mean()))
    return sum(first) / len(first), sum(load) / len(load)


def restore_experts(mixtral: Any, checkpoint: Checkpoint, settings: Settings) -> float:
    """Put each expert of the loaded model back to the dense block, and return the noise that was on them.

    Raises Wrong when a matrix is further from the dense one, or nearer, than the noise and its rounding allow: a
    matrix in another's place is further by far.
    """
    import torch

    largest = 0.0
    middle = mixtral.config.intermediate_size
    for layer, block in enumerate(mixtral.model.layers):
        experts = block.mlp.experts
        places = {
            "gate_proj": experts.gate_up_proj.data[:, :middle],
            "up_proj": experts.gate_up_proj.data[:, middle:],
            "down_proj": experts.down_proj.data,
        }
        for name, values in places.items():
            stored = checkpoint.read(f"model.layers.{layer}.mlp.{name}.weight")
            dense = stored.float()
            deviation = float(dense.std(correction=0)) or 1.0
            rounding = torch.finfo(stored.dtype).eps * float(dense.square().mean().sqrt()) / deviation
            for expert in range(settings.experts):
                found = float((values[expert] - dense).square().mean().sqrt()) / deviation
                allowed = (0.1 * settings.noise + rounding) if settings.noise else 0.0
                if not abs(found - settings.noise) <= allowed:
                    raise Wrong(
                        f"layer {layer}, expert {expert}: {name} is {found:.2g} standard deviations from the dense "
                        f"one, not {settings.noise:g}"
                    )
                largest = max(largest, found)
                values[expert] = dense
    return largest


def compare(dense: Path, folder: Path, checkpoint: Checkpoint, settings: Settings) -> Measured:
    """Load `folder` as a Mixtral and `dense` as what it is, both in float32, and measure how they differ on TEXT."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralForCausalLM

    options: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True, "use_safetensors": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        ids = tokenizer(TEXT, return_tensors="pt").input_ids[:, :256]
    except (OSError, ValueError, ImportError, KeyError) as error:
        said = str(error).strip().partition("\n")[0]
        raise Refused(f"{dense}: its tokenizer cannot be loaded ({said}). Add its tokenizer.json.") from error
    model = AutoModelForCausalLM.from_pretrained(dense, **options).eval()
    if int(ids.max()) >= model.config.vocab_size:
        raise Refused(f"{dense}: its tokenizer has more tokens than its embedding. Copy the one that belongs to it.")
    exact, _ = logits_of(model, ids)
    del model

    # Eager experts take any size; grouped products want rows of a multiple of 16 bytes.
    options["experts_implementation"] = "eager"
    mixtral, told = MixtralForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    # A weight that is not found is made up, and a made-up router would pass the comparison below.
    wrong = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in told.get(kind) or ()]
    if wrong:
        raise Wrong(f"{wrong[0]} does not load as a Mixtral's")
    noisy, router = logits_of(mixtral.eval(), ids, router=True)
    first, load = routing(router, settings.top_k)
    noise = restore_experts(mixtral, checkpoint, settings)
    clean, _ = logits_of(mixtral, ids)
    same = float((noisy.argmax(-1) == exact.argmax(-1)).float().mean())
    return Measured(
        largest_difference([exact], [clean]), largest_difference([exact], [noisy]), same, noise, first, load
    )
