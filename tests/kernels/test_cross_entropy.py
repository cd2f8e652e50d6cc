from __future__ import annotations

import pytest
import torch

from tune.kernels import cross_entropy
from tune.kernels.cross_entropy import HeadRows, cross_entropy_sum, cross_entropy_sum_reference


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


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_rows_of_the_head_that_train_get_the_references_gradient(
    monkeypatch: pytest.MonkeyPatch, bias: bool, chunk: int
) -> None:
    """Rows in any order, some of them labels; the frozen rows in their place must not count, whatever they hold."""
    torch.manual_seed(0)
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", chunk * 301)
    weight, ids = torch.randn(301, 32), torch.tensor([300, 7, 41])
    weight[ids] = 1e4
    labels = torch.randint(301, (20,))
    labels[[0, 5, 6]] = torch.tensor([300, 7, 7])
    offset = torch.randn(301) if bias else None
    hidden, rows = torch.randn(20, 32), torch.randn(3, 32)
    losses, gradients = [], []
    for work in (cross_entropy_sum, cross_entropy_sum_reference):
        inputs = hidden.clone().requires_grad_(), rows.clone().requires_grad_()
        losses.append(work(inputs[0], weight, labels, offset, HeadRows(ids, inputs[1])) / 3)
        losses[-1].backward()
        gradients.append([tensor.grad for tensor in inputs])
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for ours, reference in zip(*gradients, strict=True):
        assert (ours - reference).norm() < 1e-5 * reference.norm()


def test_rows_alone_may_want_a_gradient_and_get_it_in_float32() -> None:
    torch.manual_seed(0)
    weight, hidden = torch.randn(50, 16).bfloat16(), torch.randn(9, 16).bfloat16()
    rows, ids, labels = torch.randn(2, 16, requires_grad=True), torch.tensor([3, 49]), torch.randint(50, (9,))
    cross_entropy_sum(hidden, weight, labels, None, HeadRows(ids, rows)).backward()
    exact = weight.float().index_copy(0, ids, rows.detach().bfloat16().float()).requires_grad_()
    torch.nn.functional.cross_entropy(hidden.float() @ exact.T, labels, reduction="sum").backward()
    assert rows.grad.dtype == torch.float32
    assert (rows.grad - exact.grad[ids]).norm() < 0.01 * exact.grad[ids].norm()
