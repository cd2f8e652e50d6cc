"""A row of packed examples as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tune.data.examples import Examples

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Row(NamedTuple):
    """One micro-batch: T tokens of which N are to be predicted. Examples are told apart by their positions alone."""

    ids_1T: Tensor
    positions_1T: Tensor
    """Counted from 0 within each example."""
    predict_at_N: Tensor
    """Places in the row whose next token is trained on."""
    labels_N: Tensor
    """Those next tokens."""


def collate(examples: Examples, chosen: Sequence[int], device: torch.device | str = "cpu") -> Row:
    """Lay the chosen examples one after the other and mark what they must predict.

    The last token of an example predicts nothing, so no label crosses from one example to the next.
    """
    import torch

    parts = [examples.example(number) for number in chosen]
    total = sum(len(ids) for ids, _ in parts)
    row_ids, positions = np.empty((1, total), dtype=np.int64), np.empty((1, total), dtype=np.int64)
    places, start = [], 0
    for ids, trained in parts:
        end = start + len(ids)
        row_ids[0, start:end], positions[0, start:end] = ids, np.arange(len(ids))
        places.append(start + np.flatnonzero(trained[1:]))
        start = end
    predict_at = np.concatenate(places)
    values = (row_ids, positions, predict_at, row_ids[0, predict_at + 1])
    return Row(*(torch.from_numpy(value).to(device, non_blocking=True) for value in values))
