from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch

from tune.kernels.nf4_linear import dequantize, nf4_lora_linear, nf4_lora_linear_reference


def packed_linear(
    in_features: int, out_features: int, bias: bool, dtype: torch.dtype = torch.float32
) -> bnb.nn.Linear4bit:
    linear = bnb.nn.Linear4bit(in_features, out_features, bias, compute_dtype=dtype, quant_type="nf4")
    state = {"weight": torch.randn(out_features, in_features, dtype=dtype) / in_features**0.5}
    if bias:
        state["bias"] = torch.randn(out_features, dtype=dtype)
    linear.load_state_dict(state)
    return linear.requires_grad_(False).to("cpu")


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    ours, reference = ours.detach().double(), reference.detach().double()
    return float((ours - reference).norm() / reference.norm())


@pytest.mark.parametrize("shape", [(1, 64), (3, 5, 64), (2, 1, 64)])
@pytest.mark.parametrize("rank", [1, 16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("out_features", [64, 97])
def test_output_and_every_gradient_equal_the_dense_reference(
    shape: tuple[int, ...], rank: int, bias: bool, out_features: int
) -> None:
    torch.manual_seed(0)
    linear = packed_linear(64, out_features, bias)
    dense = dequantize(linear.weight, linear.weight.quant_state, torch.float32)
    inputs = [torch.randn(shape), torch.randn(rank, 64), torch.randn(out_features, rank)]
    ours = [tensor.clone().requires_grad_() for tensor in inputs]
    reference = [tensor.clone().requires_grad_() for tensor in inputs]
    y = nf4_lora_linear(ours[0], linear.weight, linear.weight.quant_state, linear.bias, ours[1], ours[2], 0.5)
    expected = nf4_lora_linear_reference(reference[0], dense, linear.bias, reference[1], reference[2], 0.5)
    weight = torch.randn_like(expected)
    y.backward(weight)
    expected.backward(weight)
    assert relative(y, expected) < 1e-6
    for mine, theirs in zip(ours, reference, strict=True):
        assert theirs.grad.norm() > 0
        assert relative(mine.grad, theirs.grad) < 1e-5


def test_without_an_adapter_the_input_gets_the_frozen_layers_gradient() -> None:
    torch.manual_seed(0)
    linear = packed_linear(64, 32, bias=True)
    dense = dequantize(linear.weight, linear.weight.quant_state, torch.float32)
    x = torch.randn(7, 64, requires_grad=True)
    y = nf4_lora_linear(x, linear.weight, linear.weight.quant_state, linear.bias)
    weight = torch.randn_like(y)
    y.backward(weight)
    assert relative(y, nf4_lora_linear_reference(x, dense, linear.bias)) < 1e-6
    assert relative(x.grad, weight @ dense) < 1e-5


def test_dropout_uses_one_mask_in_forward_and_backward() -> None:
    torch.manual_seed(0)
    linear = packed_linear(64, 32, bias=False)
    dense = dequantize(linear.weight, linear.weight.quant_state, torch.float32)
    a, b = torch.randn(4, 64, requires_grad=True), torch.randn(32, 4, requires_grad=True)
    x = torch.randn(50, 64, requires_grad=True)
    y = nf4_lora_linear(x, linear.weight, linear.weight.quant_state, None, a, b, 2.0, dropout=0.25)

    # With B the identity of rank 64 the branch shows the dropped input itself.
    torch.manual_seed(1)
    eye = torch.eye(64)
    zero = packed_linear(64, 64, bias=False)
    base = nf4_lora_linear(x, zero.weight, zero.weight.quant_state)
    torch.manual_seed(1)
    shown = nf4_lora_linear(x, zero.weight, zero.weight.quant_state, None, eye, eye, 1.0, dropout=0.25) - base
    kept = shown.abs() > 1e-4
    assert 0.70 < kept.float().mean() < 0.80
    torch.testing.assert_close(shown[kept], (x / 0.75)[kept], rtol=1e-3, atol=1e-3)

    # The gradient is that of the function with the mask held fixed: read the mask from the generator's place.
    torch.manual_seed(7)
    y = nf4_lora_linear(x, linear.weight, linear.weight.quant_state, None, a, b, 2.0, dropout=0.25)
    weight = torch.randn(50, 32, generator=torch.Generator().manual_seed(3))
    y.backward(weight)
    torch.manual_seed(7)
    shown = nf4_lora_linear(torch.ones(50, 64), zero.weight, zero.weight.quant_state, None, eye, eye, 1.0, dropout=0.25)
    plain = nf4_lora_linear(torch.ones(50, 64), zero.weight, zero.weight.quant_state)
    mask = ((shown - plain).abs() > 0.5).float() / 0.75
    again = [tensor.detach().clone().requires_grad_() for tensor in (x, a, b)]
    reference = again[0] @ dense.T + 2.0 * ((again[0] * mask) @ again[1].T) @ again[2].T
    reference.backward(weight)
    assert relative(y, reference) < 1e-6
    for mine, theirs in zip((x, a, b), again, strict=True):
        assert relative(mine.grad, theirs.grad) < 1e-5


def test_only_the_input_and_the_adapter_are_saved_for_the_backward() -> None:
    linear = packed_linear(256, 512, bias=False)
    a, b = torch.randn(4, 256, requires_grad=True), torch.randn(512, 4, requires_grad=True)
    x = torch.randn(100, 256, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        nf4_lora_linear(x, linear.weight, linear.weight.quant_state, None, a, b, 2.0, dropout=0.1)
    held = {tensor.untyped_storage().data_ptr() for tensor in saved}
    allowed = {tensor.untyped_storage().data_ptr() for tensor in (x, a, b, linear.weight)}
    assert held == allowed


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_adapter_gradients() -> None:
    torch.manual_seed(0)
    linear = packed_linear(64, 96, bias=True, dtype=torch.bfloat16)
    dense = dequantize(linear.weight, linear.weight.quant_state, torch.float32)
    x = torch.randn(40, 64, dtype=torch.bfloat16, requires_grad=True)
    a, b = torch.randn(8, 64, requires_grad=True), torch.randn(96, 8, requires_grad=True)
    y = nf4_lora_linear(x, linear.weight, linear.weight.quant_state, linear.bias, a, b, 0.25)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert a.grad.dtype == b.grad.dtype == torch.float32
    again = [tensor.detach().float().requires_grad_() for tensor in (x, a, b)]
    expected = nf4_lora_linear_reference(again[0], dense, linear.bias.float(), again[1], again[2], 0.25)
    expected.sum().backward()
    assert relative(y, expected) < 1e-2
    for mine, theirs in zip((x, a, b), again, strict=True):
        assert relative(mine.grad, theirs.grad) < 2e-2


@pytest.mark.parametrize("shape", [(64, 96), (100, 80), (64, 172), (128, 128), (3, 64, 96)])
def test_a_matrix_of_any_size_is_unpacked_as_it_was_packed(shape: tuple[int, ...]) -> None:
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    dense = dequantize(packed, state, torch.float32)
    assert dense.shape == weight.shape
    assert float((dense - weight).norm() / weight.norm()) < 0.11
