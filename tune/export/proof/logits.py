"""The logits part of a proof: the adapter beside its base, against the merged model, on the run's prompts.

Letters in names: N positions, H hidden features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tune.export.proof.prompts import Prompt
from tune.export.proof.stock import StockChange, StockModel, stock_changes
from tune.export.subject import Subject
from tune.models.hub import read_config
from tune.models.replaced_rows import ReplacedRows
from tune.models.shards import DTYPES, Checkpoint
from tune.models.streamed import StreamedModel, Weights, compute_device

ALLOWED = 1.5
"""So many times what rounding does to the control may the merge differ. They are the same to many digits: sums in
another order round few elements to the other neighbour."""

RELATIVE = 1e-4
"""Of the largest logit: what float32 may do to one, over all layers of a model."""
DIVERGENCE = 1e-6
"""Nats a position, likewise."""
FLIPS = 3
"""Positions whose two likeliest tokens may be so near that float32 decides between them.

Prompts of one template begin alike, so a position counts once for all prompts that are equal up to it: else one near
tie behind that beginning would count as often as there are prompts.
"""

_LOGITS = 2**23
"""Logits of one model in memory at a time."""

_ROWS = 64
"""Positions whose logits are compared at a time, in float64; rows of a matrix that are rounded at a time."""


class _Rounded(Weights):
    """The control: stock PEFT's W + ΔW, rounded to the stored type.

    To the nearest, as a merge rounds. Rounding at random would be another noise: where ΔW is smaller than half a unit,
    rounding to the nearest loses it in many elements at once, and what activations have in common adds that up.
    """

    def __init__(self, weights: Weights, changes: dict[str, list[StockChange]]) -> None:
        super().__init__(weights.checkpoint)
        self.weights, self.changes = weights, changes

    def tensor(self, name: str) -> Tensor:
        exact = self.weights.tensor(name)
        if name not in self.changes:
            return exact
        dtype = DTYPES[self.checkpoint.places[name].dtype]
        for matrix, change in zip(exact if exact.dim() == 3 else [exact], self.changes[name], strict=True):
            matrix.copy_(change.exact(matrix))
            for start in range(0, len(matrix), _ROWS):
                rows = matrix[start : start + _ROWS]
                rows.copy_(rows.to(dtype))
        return exact


@dataclass(slots=True)
class Difference:
    """How far the logits of one model are from another's, over positions."""

    positions: int = 0
    largest: float = 0.0
    """max |Δlogit|"""
    divergence: float = 0.0
    """Sum over positions of KL(first ‖ second), in nats."""
    distinct: int = 0
    """Positions that are not behind the same tokens as an earlier one."""
    flips: int = 0
    """Distinct positions where the likeliest token differs."""
    finite: bool = True

    def add(self, all_one_NV: Tensor, all_two_NV: Tensor, all_distinct_N: Tensor) -> None:
        """Count some positions more."""
        for start in range(0, len(all_one_NV), _ROWS):
            part = slice(start, start + _ROWS)
            self._add(all_one_NV[part], all_two_NV[part], all_distinct_N[part])

    def _add(self, one_NV: Tensor, two_NV: Tensor, distinct_N: Tensor) -> None:
        self.positions += len(one_NV)
        self.distinct += int(distinct_N.sum())
        difference = float((one_NV - two_NV).abs().max())
        self.finite = self.finite and difference < float("inf")  # false for NaN too
        self.largest = max(self.largest, difference)
        log_one, log_two = one_NV.double().log_softmax(1), two_NV.double().log_softmax(1)
        self.divergence += float((log_one.exp() * (log_one - log_two)).sum())
        self.flips += int(((one_NV.argmax(1) != two_NV.argmax(1)).cpu() & distinct_N).sum())

    @property
    def figures(self) -> dict[str, float]:
        """As the proof holds them."""
        return {
            "max_abs_difference": self.largest,
            "mean_kl": max(self.divergence / self.positions, 0.0),
            "top1_agreement": 1 - self.flips / self.distinct,
        }


def check_logits(
    subject: Subject,
    stock: StockModel,
    folder: Path,
    merged: Checkpoint,
    prompts: Sequence[Prompt],
    reasons: list[str],
    advance: Callable[[int, int], None],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the models and compare; add to `reasons` what is beyond its bound.

    Args:
        subject: what was merged.
        stock: the base with stock PEFT's adapter.
        folder: the merged model's.
        merged: the files in it.
        prompts: what the models are run on.
        reasons: why the proof fails, so far.
        advance: called with the models run and their total.

    Returns:
        The bounded figures with their bounds, and the reported ones.

    Raises:
        ModelError: the config.json in the merged folder describes no model, or not that of its weights.
    """
    weights = subject.weights()
    trusted = subject.trusts(folder)
    alone = StreamedModel(read_config(str(folder), trust_remote_code=trusted), str(folder), trusted)
    alone.check(merged)
    runs: dict[str, tuple[StreamedModel, Weights]] = {
        "adapter": (stock, ReplacedRows(weights, stock.rows)),
        "merged": (alone, Weights(merged)),
    }
    changes = stock_changes(subject, stock)
    if any(subject.checkpoint.places[name].dtype != "F32" for name in changes):
        rounded = {
            name: rows.rounded(DTYPES[subject.checkpoint.places[name].dtype]) for name, rows in stock.rows.items()
        }
        runs["control"] = (subject.model, ReplacedRows(_Rounded(weights, changes), rounded))
    if subject.base == "original" and subject.recipe.model.quantization == "nf4":
        dtype = getattr(torch, subject.recipe.model.dtype)
        used = {name: rows.rounded(dtype) for name, rows in stock.rows.items()}
        runs["trained"] = (stock, ReplacedRows(subject.trained_weights(), used))
    hidden = {}
    for done, (name, (model, source)) in enumerate(runs.items()):
        advance(done, len(runs) + 1)
        hidden[name] = model.last_hidden(source, [prompt.ids for prompt in prompts], compute_device())
    advance(len(runs), len(runs) + 1)
    differences, losses, largest = _measure(runs, hidden, prompts)
    bounded = _judge(differences, largest, reasons)
    reported: dict[str, Any] = {"loss": losses}
    if "trained" in runs:
        reported["trained_base"] = differences["trained", "merged"].figures
    return bounded, reported


def _judge(differences: dict[tuple[str, str], Difference], largest: float, reasons: list[str]) -> dict[str, Any]:
    """The bounded figures with their bounds; what is beyond one is added to `reasons`."""
    found = differences["adapter", "merged"]
    none = Difference(positions=found.positions, distinct=found.distinct)
    control = differences.get(("adapter", "control"), none)
    bounds = {
        "max_abs_difference": ALLOWED * control.largest + RELATIVE * largest,
        "mean_kl": ALLOWED * control.figures["mean_kl"] + DIVERGENCE,
        "top1_agreement": 1 - (ALLOWED * control.flips + FLIPS) / found.distinct,
    }
    bounded: dict[str, Any] = {"positions": found.positions, "largest_logit": largest}
    for name, figure in found.figures.items():
        bounded[name] = {"figure": figure, "bound": bounds[name]}
        holds = figure >= bounds[name] if name == "top1_agreement" else figure <= bounds[name]
        if not (holds and found.finite):
            sign = ">=" if name == "top1_agreement" else "<="
            reasons.append(f"logits: {name} is {figure:.4g} over {found.positions} positions, and should be {sign} "
                           f"{bounds[name]:.4g}")  # fmt: skip
    if ("adapter", "control") in differences:
        bounded["control"] = control.figures
    return bounded


def _measure(
    runs: dict[str, tuple[StreamedModel, Weights]], hidden_NH: dict[str, Tensor], prompts: Sequence[Prompt]
) -> tuple[dict[tuple[str, str], Difference], dict[str, float], float]:
    """The differences, the loss of each model in nats per trained token, and the largest logit."""
    pairs: list[tuple[str, str]] = [("adapter", other) for other in ("merged", "control") if other in runs]
    pairs += [("trained", "merged")] if "trained" in runs else []
    differences = {pair: Difference() for pair in pairs}
    sums, largest = dict.fromkeys(runs, 0.0), 0.0
    targets, learned = _targets(prompts)
    distinct = _distinct(prompts)
    block = max(1, _LOGITS // runs["merged"][0].vocabulary)
    for start in range(0, len(targets), block):
        part = slice(start, start + block)
        logits = {name: runs[name][0].head_logits(runs[name][1], hidden_NH[name][part]) for name in runs}
        largest = max(largest, float(logits["adapter"].abs().max()))
        for (one, two), difference in differences.items():
            difference.add(logits[one], logits[two], distinct[part])
        for name, logits_NV in logits.items():
            nll = torch.nn.functional.cross_entropy(logits_NV, targets[part].to(logits_NV.device), reduction="none")
            sums[name] += float(nll[learned[part].to(nll.device)].double().sum())
    count = int(learned.sum())
    losses = {name: total / count for name, total in sums.items() if name != "control"} if count else {}
    return differences, losses, largest


def _targets(prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
    """The token that follows each position (0 after the last of a prompt), and whether it was learned."""
    targets, learned = [], []
    for prompt in prompts:
        targets += [*prompt.ids[1:].tolist(), 0]
        learned += [*prompt.trained[1:].tolist(), False]
    return torch.tensor(targets), torch.tensor(learned)


def _distinct(prompts: Sequence[Prompt]) -> Tensor:
    """Whether no earlier prompt is equal up to a position, for each position of all prompts."""
    nodes: dict[tuple[int, int], int] = {}
    distinct = []
    for prompt in prompts:
        node = 0
        for token in prompt.ids.tolist():
            distinct.append((node, token) not in nodes)
            node = nodes.setdefault((node, token), len(nodes) + 1)
    return torch.tensor(distinct)
