"""What is quantised and what is adapted, counted in the model as it stands, and the gate before the first step.

A library that is asked for 4-bit quantises the layers it knows and says nothing of the rest; one that is asked for
LoRA on a name adapts what matches and says nothing of what does not. Here the loaded model is counted against the
recipe's claim, and training does not start when they differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from tune.adapters.lora import linears
from tune.errors import ModelError


@dataclass(frozen=True, slots=True)
class Kind:
    """All layers of one name, such as `q_proj`."""

    name: str
    layers: int
    quantized: int
    adapted: int
    bytes: int
    """Of the frozen weights, as stored, quantisation constants included."""
    adapter_parameters: int


@dataclass(frozen=True, slots=True)
class Coverage:
    """The start-up table."""

    kinds: tuple[Kind, ...]
    storage: str
    """`nf4`, or the dtype of the weights."""
    claimed: int
    """Modules that the recipe says are adapted."""
    frozen_bytes: int
    """Everything frozen: the layers above, embeddings, norms and the output head."""
    adapter_parameters: int

    @property
    def lines(self) -> tuple[str, ...]:
        """The literal lines that end the table."""
        total = sum(kind.layers for kind in self.kinds)
        stored = sum(kind.quantized for kind in self.kinds) if self.storage == "nf4" else total
        adapted = sum(kind.adapted for kind in self.kinds)
        return (f"linears {stored}/{total} {self.storage}", f"adapted {adapted}/{self.claimed}")

    def to_json(self) -> dict[str, Any]:
        """The content of coverage.json."""
        return {**asdict(self), "lines": list(self.lines)}


def _stored_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of the modules' own weights and quantisation constants; a tied weight counts once."""
    seen: set[int] = set()
    total = 0
    for module in modules:
        for parameter in module.parameters(recurse=False):
            state = getattr(parameter, "quant_state", None)
            held = [parameter]
            if state is not None:
                held += [state.absmax] + ([state.state2.absmax] if state.nested else [])
            for tensor in held:
                if tensor.data_ptr() not in seen:
                    seen.add(tensor.data_ptr())
                    total += tensor.numel() * tensor.element_size()
    return total


def check_coverage(model: nn.Module, claimed: Mapping[str, int], quantization: str) -> Coverage:
    """Count what `model` (after injection) quantises and adapts, and refuse what falls short of the recipe.

    Args:
        model: the base with the adapter injected in place.
        claimed: the rank of each module that the recipe adapts, by name.
        quantization: the recipe's `model.quantization`.

    Raises:
        ModelError: a linear layer is not 4-bit though the recipe says nf4, or a claimed module carries no trainable
            adapter of its rank; the message names the modules.
    """
    import bitsandbytes as bnb
    from peft.tuners.lora import LoraLayer

    adapters = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    layers = {name.removesuffix(".base_layer"): m for name, m in linears(model).items() if not _inside_adapter(name)}
    unquantized = [
        name
        for name, module in layers.items()
        if not (isinstance(module, bnb.nn.Linear4bit) and getattr(module.weight, "quant_state", None) is not None)
    ]
    if quantization == "nf4" and unquantized:
        raise ModelError(_shortfall("model.quantization: nf4", "linear layers stayed unquantised", unquantized))
    left = sorted(_left_whole(model, layers)) if quantization == "nf4" else []
    if left:
        raise ModelError(
            _shortfall(
                "model.quantization: nf4", "weights that are no linear layer (experts?) stayed unquantised", left
            )
        )
    unadapted = [name for name, rank in claimed.items() if not _trains(adapters.get(name), rank)]
    if unadapted:
        raise ModelError(_shortfall("adapter.targets", "layers carry no trainable adapter", unadapted))

    kinds = []
    for last in dict.fromkeys(name.rsplit(".", 1)[-1] for name in layers):
        names = [name for name in layers if name.rsplit(".", 1)[-1] == last]
        kinds.append(
            Kind(
                name=last,
                layers=len(names),
                quantized=len(set(names) - set(unquantized)),
                adapted=len(set(names) & adapters.keys()),
                bytes=_stored_bytes(layers[name] for name in names),
                adapter_parameters=sum(_trained(adapters[name]) for name in names if name in adapters),
            )
        )
    dtype = str(next(iter(layers.values())).weight.dtype).removeprefix("torch.")
    return Coverage(
        kinds=tuple(kinds),
        storage="nf4" if quantization == "nf4" else dtype,
        claimed=len(claimed),
        frozen_bytes=_stored_bytes(module for name, module in model.named_modules() if not _inside_adapter(name)),
        adapter_parameters=_trained(model),
    )


def _left_whole(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[str]:
    """Yield the frozen matrices that no 4-bit layer holds; embeddings and the output head stay in 16 bit by design."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    for name, module in model.named_modules():
        known = isinstance(module, nn.Embedding) or module is head or name.removesuffix(".base_layer") in layers
        if not known and not _inside_adapter(name):
            yield from (f"{name}.{key}" for key, weight in module.named_parameters(recurse=False) if weight.dim() >= 2)


def _inside_adapter(name: str) -> bool:
    return ".lora_" in name


def _trained(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _trains(layer: Any, rank: int) -> bool:
    if layer is None or not layer.active_adapters:
        return False
    name = layer.active_adapters[0]
    trained = layer.lora_A[name].weight.requires_grad and layer.lora_B[name].weight.requires_grad
    return bool(layer.r.get(name) == rank and trained)


def _shortfall(key: str, words: str, names: list[str]) -> str:
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"{key}: {len(names)} {words}: {shown}. Nothing was trained."
