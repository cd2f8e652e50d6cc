from __future__ import annotations

import pytest
import torch

from tune.kernels import cross_entropy
from tune.kernels.cross_entropy import cross_entropy_sum, cross_entropy_sum_reference


@pytest.mark.parametrize("tokens", [1, 7, 64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_loss_and_gradient_equal_the_reference(
    monkeypatch: pytest.MonkeyPatch, tokens: int, bias: bool, chunk: int
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", chunk * 301)
    weight = torch.randn(301, 32)
    labels = torch.randint(301, (tokens,))
    offset = torch.randn(301) if bias else None
    hidden = torch.randn(tokens, 32)
    ours, reference = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    loss = cross_entropy_sum(ours, weight, labels, offset) / 3
    expected = cross_entropy_sum_reference(reference, weight, labels, offset) / 3
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (ours.grad - reference.grad).norm() < 1e-5 * reference.grad.norm()


def test_no_token_to_predict_is_a_loss_of_zero() -> None:
    hidden = torch.randn(0, 8, requires_grad=True)
    loss = cross_entropy_sum(hidden, torch.randn(11, 8), torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad.shape == (0, 8)


def test_no_logits_of_more_than_a_chunk_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 10 * 500)
    largest = 0
    linear = torch.nn.functional.linear

    def watched(*arguments: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        out = linear(*arguments)
        largest = max(largest, out.numel())
        return out

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    hidden = torch.randn(95, 16, requires_grad=True)
    cross_entropy_sum(hidden, torch.randn(500, 16), torch.randint(500, (95,))).backward()
    assert largest == 10 * 500
