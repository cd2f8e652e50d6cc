"""The same promises on a CUDA device. Run with `scripts/test -m gpu`."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file

from tests.training.jobs import tiny_recipe
from tune.evaluation.generate import load_run
from tune.folder import RunFolder
from tune.kernels.cross_entropy import cross_entropy_sum, cross_entropy_sum_reference
from tune.kernels.nf4_linear import dequantize, nf4_lora_linear, nf4_lora_linear_reference
from tune.run import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    ours, reference = ours.detach().double(), reference.detach().double()
    return float((ours - reference).norm() / reference.norm())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_linear_layer_equals_its_reference(dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(0)
    linear = bnb.nn.Linear4bit(256, 384, False, compute_dtype=dtype, quant_type="nf4")
    linear.load_state_dict({"weight": torch.randn(384, 256, dtype=dtype) / 16})
    linear = linear.requires_grad_(False).cuda()
    dense = dequantize(linear.weight, linear.weight.quant_state, torch.float32)
    inputs = [torch.randn(100, 256).cuda().to(dtype), torch.randn(16, 256).cuda(), torch.randn(384, 16).cuda()]
    ours = [tensor.clone().requires_grad_() for tensor in inputs]
    reference = [tensor.clone().float().requires_grad_() for tensor in inputs]
    y = nf4_lora_linear(ours[0], linear.weight, linear.weight.quant_state, None, ours[1], ours[2], 0.5)
    expected = nf4_lora_linear_reference(reference[0], dense, None, reference[1], reference[2], 0.5)
    weight = torch.randn_like(expected)
    y.backward(weight.to(dtype))
    expected.backward(weight)
    assert relative(y, expected) < bound
    for mine, theirs in zip(ours, reference, strict=True):
        assert relative(mine.grad, theirs.grad) < bound


def test_the_chunked_loss_equals_its_reference() -> None:
    torch.manual_seed(0)
    weight, labels = torch.randn(50_000, 128).cuda(), torch.randint(50_000, (700,)).cuda()
    ours = torch.randn(700, 128).cuda().requires_grad_()
    reference = ours.detach().clone().requires_grad_()
    loss, expected = cross_entropy_sum(ours, weight, labels), cross_entropy_sum_reference(reference, weight, labels)
    loss.backward()
    expected.backward()
    assert relative(loss.detach(), expected.detach()) < 1e-5
    assert relative(ours.grad, reference.grad) < 1e-4


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tiny_model_trains_and_answers(tmp_path: Path, optimizer: str, dtype: str) -> None:
    recipe = tiny_recipe(
        tmp_path,
        train__optimizer=optimizer,
        model__dtype=dtype,
        train__max_steps=8,
        adapter__rank=64,
        adapter__dropout=0.1,
    )
    result = train(recipe)
    assert result.loss_after < result.loss_before - 0.3
    loaded = load_run(tmp_path / "run")
    assert loaded.model.device.type == "cuda"
    assert loaded.answer("Say 3 things.", max_new_tokens=5) is not None


def test_a_resumed_run_ends_in_the_same_bytes(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, output=tmp_path / "whole", train__save_every=2)
    train(recipe)
    recipe = tiny_recipe(tmp_path, train__save_every=2)
    train(recipe)
    run = RunFolder(tmp_path / "run")
    for step in run.steps()[1:]:
        for path in run.checkpoint(step).iterdir():
            path.unlink()
    run.finished.unlink()
    train(recipe, resume=True)
    files = [folder / "adapter" / "adapter_model.safetensors" for folder in (tmp_path / "whole", run.root)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_rows_change_nothing_but_rounding(tmp_path: Path) -> None:
    adapters = []
    for number, row_tokens in enumerate((64, 100_000)):
        recipe = tiny_recipe(tmp_path, output=tmp_path / f"run{number}", train__micro_batch_tokens=row_tokens)
        adapters.append(load_file(train(recipe).adapter / "adapter_model.safetensors"))
    for name, tensor in adapters[0].items():
        assert relative(tensor, adapters[1][name]) < 1e-3, name
