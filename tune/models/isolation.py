"""Whether a loaded model keeps packed examples apart: found out by trying, on a row of a few random tokens.

A list of families would have to be right for every version of transformers, every kernel and every device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def keeps_examples_apart(model: Any) -> bool:
    """Whether examples packed into one row, told apart by position ids alone, stay independent in this model."""
    return find_fault(model) is None


@torch.no_grad()
def find_fault(model: Any) -> str | None:
    """Probe whether examples packed into one row stay independent; return what is wrong, or None.

    Two rows hold the same example between different ones. Its logits must be bit-equal, whatever is before or behind
    it, and must agree with those of the example alone. Falcon and BLOOM fail this.
    """
    around, other, middle = _examples(model)
    with _experts_left_out(model):
        try:
            one = _logits(model, around, middle, around)
            two = _logits(model, other, middle, other)
        except TypeError:  # the model takes no position ids, so nothing could keep its examples apart
            return "takes no position ids"
        alone = _logits(model, middle)
    if not torch.equal(one, two):
        return "lets packed examples see each other"
    if _relative(one, alone) >= 0.05:
        return "computes something else for packed examples"
    return None


def find_fault_in_gradients(model: Any, name: str, chosen: str) -> str | None:
    """As `find_fault`, for the backward of a kernel that is not torch's sdpa: against that of the example alone."""
    around, _, middle = _examples(model)
    with _experts_left_out(model):
        packed = _gradient(model, around, middle, around)
        model.set_attn_implementation(chosen)
        alone = _gradient(model, middle)
        model.set_attn_implementation(name)
    start, end = len(around), len(around) + len(middle)
    if packed[:start].any() or packed[end:].any():
        return "gives gradients to other examples in the row"
    # 16 bit rounds differently in every kernel, and anew in every layer.
    if not _relative(packed[start:end], alone) < 0.1:
        return "computes another gradient than sdpa"
    return None


def _examples(model: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Two different examples of the same length, and one to stand between."""
    generator = torch.Generator().manual_seed(0)
    embeddings = model.get_input_embeddings().weight
    first, other, middle = (
        torch.randint(embeddings.shape[0], (length,), generator=generator).to(embeddings.device) for length in (5, 5, 6)
    )
    return first, other, middle


def _positions(*examples: Tensor) -> Tensor:
    return torch.cat([torch.arange(len(example), device=example.device) for example in examples])[None]


def _logits(model: Any, *examples: Tensor) -> Tensor:
    """Of the middle one of the examples."""
    ids = torch.cat(examples)[None]
    logits = model(input_ids=ids, position_ids=_positions(*examples), use_cache=False).logits[0]
    return _middle(logits, examples).float()


def _middle(of_row: Tensor, examples: Sequence[Tensor]) -> Tensor:
    start = sum(len(example) for example in examples[: len(examples) // 2])
    return of_row[start : start + len(examples[len(examples) // 2])]


def _gradient(model: Any, *examples: Tensor) -> Tensor:
    """Of a fixed function of the middle one's logits by the embeddings of all tokens, float32 [T, H]."""
    embeddings = model.get_input_embeddings()(torch.cat(examples)[None]).detach().requires_grad_()
    with torch.enable_grad():
        logits = model(inputs_embeds=embeddings, position_ids=_positions(*examples), use_cache=False).logits[0]
        torch.autograd.backward(_middle(logits, examples).float().logsumexp(-1).sum())
    gradient: Tensor = embeddings.grad[0].float()
    return gradient


def _relative(ours: Tensor, reference: Tensor) -> float:
    return float((ours - reference).norm() / reference.norm())


@contextmanager
def _experts_left_out(model: Any) -> Iterator[None]:
    """Let experts return zeros.

    They see one token at a time and cannot mix examples, but how many rows an expert's product has depends on all
    tokens of a row, and on a GPU with it how each of them is rounded.
    """
    from tune.models.experts import expert_modules

    replaced = expert_modules(model).values()
    for module in replaced:
        module.forward = lambda hidden, *_: torch.zeros_like(hidden)
    try:
        yield
    finally:
        for module in replaced:
            del module.forward
