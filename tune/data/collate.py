"""A row of packed examples as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tune.data.encode import Examples

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

    ids, positions, predict_at, labels = [], [], [], []
    start = 0
    for number in chosen:
        example_ids, trained = examples.example(number)
        targets = np.flatnonzero(trained[1:]) + 1
        ids.append(example_ids)
        positions.append(np.arange(len(example_ids)))
        predict_at.append(start + targets - 1)
        labels.append(example_ids[targets])
        start += len(example_ids)

    def tensor(parts: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device, non_blocking=True)

    return Row(tensor(ids)[None], tensor(positions)[None], tensor(predict_at), tensor(labels))
