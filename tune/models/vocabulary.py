"""A base with room for tokens that its tokenizer did not have.

The rows of a new token in the embedding and in the output head start as the mean of the rows that the tokenizer knew
(Hewitt 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html): a random row may be far larger than any trained
one, and then every next-token distribution goes to it. The sum is taken in float64 and rounded to float32 and to the
weight's type, so that it does not depend on a device or a thread count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tune.errors import ModelError
from tune.models.hub import quiet_transformers
from tune.models.load import LoadedBase

_ROWS = 4096
"""Summed at a time, since float64 takes four times the memory of bfloat16."""


def rows_needed(rows: int, ids: Sequence[int]) -> int:
    """How many rows an embedding of `rows` has when there is one for each of the added tokens `ids`."""
    return max([rows, *(token + 1 for token in ids)])


def grow_vocabulary(base: LoadedBase, base_name: str, ids: Sequence[int]) -> None:
    """Give the tokens `ids` a row in embedding and output head, and start each as the mean of the rows before them.

    Nothing is resized where the rows are there already, as padding of the vocabulary.

    Args:
        base: the loaded base; its model is changed in place.
        base_name: the recipe's `model.base`, for messages.
        ids: of the added tokens.

    Raises:
        ModelError: the base cannot take them: the rows before them are missing, or the output head has a bias.
    """
    if not ids:
        return
    model = base.model
    check_room(model, base_name, ids)
    rows = int(model.get_input_embeddings().weight.shape[0])
    wanted = rows_needed(rows, ids)
    if wanted > rows:
        with quiet_transformers():
            model.resize_token_embeddings(wanted, mean_resizing=False)
        model.requires_grad_(False)
        model.eval()
    weights = [model.get_input_embeddings().weight]
    if model.get_output_embeddings().weight is not weights[0]:
        weights.append(model.get_output_embeddings().weight)
    for weight in weights:
        weight.data[list(ids)] = _mean(weight.data[: min(ids)]).to(weight.device, weight.dtype)


def check_room(model: Any, base_name: str, ids: Sequence[int]) -> None:
    """Refuse added tokens that a base cannot take, by its shape alone.

    Raises:
        ModelError: as `grow_vocabulary`.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])
    if min(ids) > rows:
        raise ModelError(
            f"model.base: the tokenizer of {base_name} has {min(ids)} tokens before any is added, and the model has "
            f"{rows} embeddings. Tokenizer and weights belong to different models: copy both from one."
        )
    if max(ids) >= rows + len(ids):  # they stand one behind the other; a gap would be filled, however wide
        raise ModelError(
            f"model.base: {base_name} has {rows} embeddings, and a token that is added would be number {max(ids)} for "
            f"{len(ids)} of them. Tokenizer and weights belong to different models: copy both from one."
        )
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise ModelError(
            f"data.add_tokens: the output head of {base_name} has a bias, which stock PEFT would leave out once rows "
            "of the head train. Choose a template whose control tokens the tokenizer has."
        )


def _mean(weight_VH: Tensor) -> Tensor:
    total_H = torch.zeros(weight_VH.shape[1], dtype=torch.float64)
    for start in range(0, len(weight_VH), _ROWS):
        total_H += weight_VH[start : start + _ROWS].cpu().double().sum(0)
    return (total_H / max(len(weight_VH), 1)).float()
