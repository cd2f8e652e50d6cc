"""The tensors of an upcycled Mixtral: which there are, what each holds, and the safetensors files they go into."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from smollm2 import Refused

if TYPE_CHECKING:
    from torch import Tensor

    from tune.models.shards import Checkpoint

ROUTER_SPREAD = 1.5
SHARD_BYTES = 5 * 10**9
EXPERT_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


@dataclass(frozen=True)
class Settings:
    """What decides the result besides the dense model."""

    experts: int = 4
    top_k: int = 2
    noise: float = 0.01
    """Standard deviation of the noise on an expert's matrix, in standard deviations of that matrix."""
    seed: int = 0

    def check(self) -> None:
        """Refuse what makes no mixture."""
        if self.top_k < 1:
            raise Refused(f"--top-k: must be at least 1 ({self.top_k}). Write 2 for the usual choice.")
        if self.experts < 2:
            raise Refused(f"--experts: must be at least 2 ({self.experts}). One expert is the dense model.")
        if self.experts < self.top_k:
            raise Refused(
                f"--experts: {self.experts} experts are fewer than the {self.top_k} that a token chooses. "
                "Write more --experts or a smaller --top-k."
            )
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise Refused(f"--noise: must be 0 or a positive number ({self.noise}). 0.01 is one per cent.")


@dataclass(frozen=True)
class Part:
    """One tensor of the Mixtral: its name, and the dense tensor that it is made from."""

    name: str
    source: str
    kind: Literal["copy", "expert", "router"]
    shape: tuple[int, ...]
    dtype: str
    """The stored type, by its name in a safetensors header."""
    size: int
    """Bytes."""


def head_dim(config: Any) -> int:
    """The size of one attention head, which older configurations leave to be derived."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def dense_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor that a model of this configuration has, in the order of its layers."""
    hidden, middle, head = config.hidden_size, config.intermediate_size, head_dim(config)
    query, key = head * config.num_attention_heads, head * config.num_key_value_heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        inside: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (query, hidden),
            "self_attn.k_proj": (key, hidden),
            "self_attn.v_proj": (key, hidden),
            "self_attn.o_proj": (hidden, query),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (middle, hidden),
            "mlp.up_proj": (middle, hidden),
            "mlp.down_proj": (hidden, middle),
        }
        shapes.update({f"model.layers.{layer}.{name}.weight": shape for name, shape in inside.items()})
    return {**shapes, "model.norm.weight": (hidden,), "lm_head.weight": (config.vocab_size, hidden)}


def plan(dense: Path, config: Any, checkpoint: Checkpoint, settings: Settings) -> list[Part]:
    """The tensors to write; refuses a checkpoint that is not the dense form that `config` describes."""
    from tune.models.shards import DTYPES

    shapes = dense_shapes(config)
    # Old Llama files carry their rotary frequencies along; they follow from the configuration.
    stored = {name: place for name, place in checkpoint.places.items() if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings and "lm_head.weight" not in stored:
        del shapes["lm_head.weight"]
    for name in stored:
        if name not in shapes:
            raise Refused(f"{dense}: holds {name}, which is not part of a Mistral. Give a model of that form.")
    parts: list[Part] = []
    for name, shape in shapes.items():
        if name not in stored:
            raise Refused(f"{dense}: lacks {name}. The download or copy may be incomplete: copy it again.")
        place = stored[name]
        if place.shape != shape:
            raise Refused(f"{dense}: {name} is {place.shape}, and by config.json it is {shape}. Copy it again.")
        if place.dtype not in DTYPES:
            raise Refused(f"{dense}: {name} is of type {place.dtype}. Give the model in float32, float16 or bfloat16.")
        parts.extend(parts_of(name, shape, place.dtype, settings.experts))
    return parts


def parts_of(name: str, shape: tuple[int, ...], dtype: str, experts: int) -> Iterator[Part]:
    """The tensors of the Mixtral that the dense tensor `name` becomes."""
    from tune.models.shards import DTYPES

    width = DTYPES[dtype].itemsize
    layer, found, inside = name.partition(".mlp.")
    if found:
        for expert in range(experts):
            new = f"{layer}.block_sparse_moe.experts.{expert}.{EXPERT_NAMES[inside.removesuffix('.weight')]}.weight"
            yield Part(new, name, "expert", shape, dtype, width * math.prod(shape))
        return
    yield Part(name, name, "copy", shape, dtype, width * math.prod(shape))
    layer, found, _ = name.partition(".post_attention_layernorm.")
    if found:
        router = f"{layer}.block_sparse_moe.gate.weight"
        yield Part(router, name, "router", (experts, *shape), dtype, width * experts * math.prod(shape))


def normal(shape: tuple[int, ...], seed: int, name: str) -> Tensor:
    """Standard normal float32 numbers that depend on the seed and the tensor's name alone."""
    import torch

    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator)


def tensor_of(part: Part, checkpoint: Checkpoint, settings: Settings) -> Tensor:
    """The values of one tensor of the Mixtral, in its stored type."""
    source = checkpoint.read(part.source)
    if part.kind == "router":
        # A normalised hidden state is this weight times numbers of mean square 1, so its length is about the norm's.
        length = float(source.float().norm()) or 1.0
        return (normal(part.shape, settings.seed, part.name) * (ROUTER_SPREAD / length)).to(source.dtype)
    if part.kind == "copy" or settings.noise == 0:
        return source
    exact = source.float()
    deviation = float(exact.std(correction=0))
    return (exact + normal(part.shape, settings.seed, part.name) * (settings.noise * deviation)).to(source.dtype)


def shards(parts: list[Part]) -> list[list[Part]]:
    """`parts` in their order, in groups of at most SHARD_BYTES (a larger tensor is a group by itself)."""
    groups: list[list[Part]] = [[]]
    size = 0
    for part in parts:
        if groups[-1] and size + part.size > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += part.size
    return groups


def write_weights(folder: Path, parts: list[Part], checkpoint: Checkpoint, settings: Settings) -> None:
    """Write the safetensors files of the Mixtral, and their index when there are several."""
    groups = shards(parts)
    names = [f"model-{index + 1:05d}-of-{len(groups):05d}.safetensors" for index in range(len(groups))]
    if len(groups) == 1:
        names = ["model.safetensors"]
    for name, group in zip(names, groups, strict=True):
        write_shard(folder / name, group, checkpoint, settings)
    if len(groups) > 1:
        where = {part.name: name for name, group in zip(names, groups, strict=True) for part in group}
        index = {"metadata": {"total_size": sum(part.size for part in parts)}, "weight_map": where}
        write_json(folder / "model.safetensors.index.json", index)


def write_shard(path: Path, parts: list[Part], checkpoint: Checkpoint, settings: Settings) -> None:
    """Write one safetensors file (a length, a JSON header, the tensors), holding one tensor at a time."""
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for part in parts:
        header[part.name] = {"dtype": part.dtype, "shape": part.shape, "data_offsets": [at, at + part.size]}
        at += part.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers map the file, and want the numbers aligned
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            values = tensor_of(part, checkpoint, settings).contiguous().flatten().view(torch.uint8)
            assert len(values) == part.size, part.name
            file.write(values.numpy().data)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
