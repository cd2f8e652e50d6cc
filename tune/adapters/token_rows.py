"""Rows of the embedding and of the output head that train: those of tokens that were added to the vocabulary.

PEFT's `trainable_token_indices` says which, saves them as `…token_adapter.trainable_tokens_delta` [tokens, hidden]
(the rows themselves, in spite of the name), and ties the head's to the embedding's where the base ties the two. What
differs here is how they are used: PEFT copies the whole matrix with these rows in it at every forward, and takes a
gradient of that size; here the frozen matrix is used as it is, and a few rows or columns of its result are replaced.

The rows train in float32 and are used in the matrix's type, as PEFT does.

Shapes: T tokens, H hidden size, K trained rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn

from tune.errors import ModelError
from tune.kernels.cross_entropy import HeadRows, cross_entropy_sum


class TrainedRows(TrainableTokensLayer):  # type: ignore[misc]
    """PEFT's layer for trained tokens, without a copy of the matrix."""

    @classmethod
    def of(cls, layer: TrainableTokensLayer, adapter: str, tied: TrainedRows | None) -> TrainedRows:
        """The same rows of the same matrix as PEFT's `layer` for `adapter`; those of `tied` where it is tied to one."""
        ours = cls(layer.base_layer, adapter, tied_adapter=tied)
        if tied is None:
            ours.trainable_tokens_delta = layer.trainable_tokens_delta
            ours.trainable_tokens_original = layer.trainable_tokens_original
            ours.token_indices = layer.token_indices
        ours.register_buffer(
            "ids_K", torch.tensor(layer.token_indices[adapter], device=layer.base_layer.weight.device), persistent=False
        )
        return ours

    def rows(self) -> Tensor | None:
        """The rows [K, H] that are in use, in float32; None while adapters are switched off or in the weight."""
        active = [name for name in self.active_adapters if name in self.trainable_tokens_delta]
        if self.disable_adapters or self.merged or not active:
            return None
        value: Tensor = self.trainable_tokens_delta[active[0]]
        return value

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what the layer with these rows makes of x: token ids [..., T], or hidden states [..., T, H]."""
        rows_KH = self.rows()
        if rows_KH is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        result: Tensor = self.base_layer(x, *args, **kwargs)
        used_KH = rows_KH.to(result.dtype)
        if isinstance(self.base_layer, nn.Linear):
            return result.index_copy(-1, self.ids_K, nn.functional.linear(x, used_KH))
        is_row_TK = x.unsqueeze(-1) == self.ids_K
        # A product with one 1 in a row is exact, and its gradient a sum in a fixed order.
        return torch.where(is_row_TK.any(-1, keepdim=True), is_row_TK.to(result.dtype) @ used_KH, result)


def targets(model: Any, ids: Sequence[int]) -> dict[str, list[int]] | None:
    """What `LoraConfig.trainable_token_indices` says for these tokens; None for none.

    A head that is tied to the embedding has no entry: PEFT gives it the embedding's.
    """
    if not ids:
        return None
    modules = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    wanted = [embedding] if head.weight is embedding.weight else [embedding, head]
    return {modules[id(module)].rpartition(".")[2]: sorted(ids) for module in wanted}


def trained_tokens(indices: Any) -> tuple[int, ...]:
    """The tokens that `trainable_token_indices` of an adapter names, ascending: it may be a list, or one a module."""
    lists = indices.values() if isinstance(indices, dict) else [indices or ()]
    return tuple(sorted({int(token) for tokens in lists for token in tokens}))


def check_same(folder: Path, config: dict[str, Any], ours: Any) -> None:
    """Refuse an adapter that trained the rows of other tokens than `trainable_token_indices` of ours names.

    Its rows lie in the order in which it names them, so these must be in ours.

    Raises:
        ModelError: says which each has.
    """
    theirs, mine = config.get("trainable_token_indices"), trained_tokens(ours)
    lists = [tuple(tokens) for tokens in (theirs.values() if isinstance(theirs, dict) else [theirs or ()])]
    for tokens in lists:
        if tokens != mine:
            raise ModelError(
                f"{folder}: the adapter trained the rows of {_listed(tokens)}, and the recipe adds {_listed(mine)}. "
                "Give the recipe the data.template and data.add_tokens that it was trained with."
            )


def _listed(tokens: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, tokens[:8])) + (" …" if len(tokens) > 8 else "")
    return f"{len(tokens)} tokens ({shown})" if tokens else "no token"


def train_rows(model: nn.Module, adapter: str) -> None:
    """Put our layers in the place of PEFT's, around the same rows, which PEFT holds in float32."""
    wrappers = trained_wrappers(model)
    ours: dict[int, TrainedRows] = {}
    for wrapper in sorted(wrappers.values(), key=lambda wrapper: wrapper.token_adapter.tied_adapter is not None):
        layer = wrapper.token_adapter
        tied = layer.tied_adapter
        rows = TrainedRows.of(layer, adapter, None if tied is None else ours[id(tied)])
        rows.set_adapter(adapter)
        ours[id(layer)] = wrapper.token_adapter = rows


def trained_wrappers(model: nn.Module) -> dict[str, TrainableTokensWrapper]:
    """PEFT's wrappers around embedding and head of which rows train, by the name that each had before."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TrainableTokensWrapper)}


def unwrapped(module: Any) -> Any:
    """An embedding or head without the wrapper for its trained rows, if it has one."""
    return module.original_module if isinstance(module, TrainableTokensWrapper) else module


def vocabulary_rows(model: Any) -> int:
    """How many tokens a model has an embedding for."""
    return int(unwrapped(model.get_input_embeddings()).weight.shape[0])


def head_loss(model: Any, hidden_NH: Tensor, labels_N: Tensor) -> Tensor:
    """Summed cross-entropy of a model's output head, rows of which may train (nats, a float32 scalar).

    Args:
        model: a causal language model.
        hidden_NH: [N, H], its last hidden states at the positions that predict a trained token.
        labels_N: [N] int64, the tokens to predict.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, TrainableTokensWrapper):
        return cross_entropy_sum(hidden_NH, head.weight, labels_N, head.bias)
    layer = head.token_adapter
    rows_KH = layer.rows()
    trained = None if rows_KH is None else HeadRows(layer.ids_K, rows_KH)
    plain = unwrapped(head)
    return cross_entropy_sum(hidden_NH, plain.weight, labels_N, plain.bias, trained)
