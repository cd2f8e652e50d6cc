"""Tiny mixtures of experts with adapters on them, ours beside stock PEFT's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.tiny import VOCABULARY, dequantized_twin
from tune.adapters.lora import ADAPTER, adapter_bytes, adapter_config_text, adapter_parameters, attach
from tune.models.load import LoadedBase, load_base
from tune.recipe import schema

CPU = torch.device("cpu")


def load(
    path: Path, quantization: str = "nf4", dtype: str = "float32", storage: torch.dtype = torch.uint8
) -> LoadedBase:
    return load_base(schema.Model(base=str(path), dtype=dtype, quantization=quantization), CPU, storage)


def relative(ours: Tensor, reference: Tensor) -> float:
    ours, reference = ours.detach().double(), reference.detach().double()
    scale = float(reference.norm())
    return float((ours - reference).norm()) / scale if scale else float(ours.norm())


def tokens(count: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, (1, count), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def trained(model: PeftModel) -> PeftModel:
    """Give every B, and every router that trains in full, other values than it starts with."""
    for number, (name, parameter) in enumerate(adapter_parameters(model)):
        if ".lora_A." not in name:
            generator = torch.Generator().manual_seed(number)
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def adapted(base: LoadedBase, section: schema.Adapter, router: schema.Router | None = None) -> PeftModel:
    return trained(attach(base, section, "tiny", 3, router)).eval()


def write(model: PeftModel, folder: Path) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(adapter_config_text(model))
    (folder / "adapter_model.safetensors").write_bytes(adapter_bytes(model))
    return folder


def stock(path: Path, base: LoadedBase | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """A stock transformers model with the weights of `base`, dequantised, or of the file."""
    if base is not None:
        return dequantized_twin(base.model, path)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def load_stock(model: Any, adapter: Path, trainable: bool = False) -> PeftModel:
    with warnings.catch_warnings():
        # PEFT looks for the patterns of ranks and alphas among modules, and applies them to parameters as well.
        warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys")
        return PeftModel.from_pretrained(model, adapter, is_trainable=trainable).eval()


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=ids).logits
    return out


def gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Every gradient of an uneven function of the logits, for any number of tokens."""
    model.zero_grad()
    out = model(input_ids=ids).logits.float()
    (out * torch.linspace(-1, 1, out.numel()).view_as(out).sin()).sum().backward()
    return {
        name.replace(f".{ADAPTER}", ""): parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def choices(model: Any, ids: Tensor, top: int) -> list[list[int]]:
    """Which experts each token goes to, in every layer."""
    with torch.no_grad():
        layers = model(input_ids=ids, output_router_logits=True).router_logits
    return [sorted(row) for layer in layers for row in layer.float().topk(top).indices.tolist()]
