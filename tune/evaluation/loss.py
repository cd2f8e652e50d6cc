"""Held-out loss: mean cross-entropy per trained token, over all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tune.data.batches import one_a_row, pack
from tune.data.collate import Row, collate
from tune.data.examples import Examples

_GROUP = 512
"""Examples that are packed together; bounds the time that packing takes."""


def rows_of(
    examples: Examples, chosen: Sequence[int], row_tokens: int, packs: bool, device: torch.device
) -> Iterator[Row]:
    """Yield the chosen examples as rows of at most `row_tokens` tokens, one at a time."""
    packed = pack(chosen, examples.lengths, row_tokens) if packs else one_a_row(chosen, examples.lengths)
    for row in packed:
        yield collate(examples, row, device)


@torch.no_grad()
def held_out_loss(
    model: Any,
    examples: Examples,
    row_loss: Callable[[Any, Row], Tensor],
    row_tokens: int,
    packs: bool,
    device: torch.device,
    rank: int = 0,
    count: int = 1,
    sum_over: Callable[[Tensor], Tensor] = lambda values: values,
    together: Callable[[Iterable[Row]], Iterable[tuple[Row, bool]]] = lambda rows: ((row, True) for row in rows),
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """Return the mean loss in nats; the model is left in the mode it was in.

    Args:
        model: a transformers causal language model, adapted or not.
        examples: the held-out examples.
        row_loss: (model, row) -> summed cross-entropy of the row.
        row_tokens: most tokens in a row.
        packs: whether examples may share a row.
        device: where the model is.
        rank, count, sum_over: this process among others, and the sum over them.
        together: yields rows, and whether they count, so that every process has as many as it must.
        on_progress: called with (examples done, examples of this process).
    """
    training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=device)
    mine = range(rank, len(examples), count)
    try:
        for start in range(0, -(-len(examples) // count), _GROUP):  # as many groups for each process
            group = mine[start : start + _GROUP]
            rows = (row for row in rows_of(examples, group, row_tokens, packs, device) if len(row.labels_N))
            for row, counts in together(rows):
                loss = row_loss(model, row)
                if counts:
                    total[0] += loss
                    total[1] += len(row.labels_N)
            on_progress(min(start + _GROUP, len(mine)), len(mine))
    finally:
        model.train(training)
    total = sum_over(total)
    return float(total[0] / total[1])
