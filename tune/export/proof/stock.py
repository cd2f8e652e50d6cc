"""The adapter as stock PEFT has it: the truth that a merge is held against."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tune.errors import ModelError
from tune.export.subject import Subject
from tune.models.streamed import StreamedModel


def with_stock_adapter(subject: Subject, device: torch.device) -> StreamedModel:
    """Return the base without weights and PEFT's own LoRA layers around its linears, with the adapter's weights.

    Raises:
        ModelError: PEFT finds other layers to adapt than the adapter has tensors for.
    """
    from peft import PeftConfig, PeftModel

    section = subject.recipe.model
    streamed = StreamedModel(subject.config, section.base, section.trust_remote_code)
    config = PeftConfig.from_pretrained(str(subject.adapter))
    config.inference_mode = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel(streamed.model, config, low_cpu_mem_usage=True)
    model.eval()
    _fill(model, subject.adapter, device)
    return streamed


def _fill(model: Any, adapter: Path, device: torch.device) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, module in model.named_modules():
        parent, _, last = name.rpartition(".")
        if last == "default" and isinstance(module, nn.Linear):
            tensor = tensors.pop(f"{parent}.weight", None)
            if tensor is None or tensor.shape != module.weight.shape:
                raise ModelError(f"{adapter}: stock PEFT expects {parent}.weight of {list(module.weight.shape)} there.")
            module.weight = nn.Parameter(tensor.to(device, torch.float32), requires_grad=False)
    if tensors:
        raise ModelError(f"{adapter}: stock PEFT has no place for {min(tensors)}.")


def stock_layers(subject: Subject, stock: StreamedModel) -> dict[str, Any]:
    """Return PEFT's LoRA layers by the stored names of the matrices that they change."""
    from peft.tuners.lora import LoraLayer

    names = {id(module): name for name, module in stock.modules.items()}
    found = [module for module in stock.model.modules() if isinstance(module, LoraLayer)]
    return {stock.stored(subject.checkpoint, names[id(layer.get_base_layer())]): layer for layer in found}


def stock_delta(layer: Any) -> Tensor:
    """Return ΔW [out, in] of a PEFT layer, in float32 on the CPU."""
    delta: Tensor = layer.get_delta_weight("default")
    return delta.float().cpu()


def stock_sizes(layer: Any) -> tuple[Tensor, Tensor]:
    """Return s·‖bᵢ‖ [out] and ‖aⱼ‖ [in] of a PEFT layer, on the CPU.

    Their product bounds the numbers that are summed to each element of ΔW (Cauchy-Schwarz): what float32 loses in a
    sum grows with those, and not with the sum.
    """
    a_RI, b_OR = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return (abs(layer.scaling["default"]) * b_OR.norm(dim=1)).cpu(), a_RI.norm(dim=0).cpu()
