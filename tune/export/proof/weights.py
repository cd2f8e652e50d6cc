"""The weights part of a proof: every tensor of the merged files against the base's and stock PEFT's ΔW."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tune.data.hub import one_line
from tune.errors import ModelError
from tune.export.proof.stock import StockChange, StockModel, stock_changes
from tune.export.subject import Subject
from tune.models.replaced_rows import ReplacedRows
from tune.models.shards import Checkpoint, Place, checkpoint_in, weight_map
from tune.models.streamed import Weights

_NAMED = 3
"""So many tensors are named in a reason; the rest are counted."""

_ROWS = 256
"""Rows of a matrix that are compared at a time."""


def open_merged(folder: Path) -> Checkpoint:
    """Return a merged checkpoint, whose files safetensors' own reader opens too.

    Raises:
        ModelError: a file is missing or broken.
    """
    merged = checkpoint_in(folder)
    for file in merged.files:
        try:
            with safe_open(file, framework="pt") as opened:
                names = set(opened.keys())
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file}: safetensors cannot open it ({one_line(error)})") from error
        if names != {name for name, place in merged.places.items() if place.file == file}:
            raise ModelError(f"{file}: safetensors finds other tensors in it")
    return merged


def check_weights(
    subject: Subject,
    stock: StockModel,
    merged: Checkpoint,
    reasons: list[str],
    advance: Callable[[int, int], None],
) -> dict[str, Any]:
    """Compare every tensor; add to `reasons` what is wrong, and return the figures.

    Args:
        subject: what was merged.
        stock: the base with stock PEFT's adapter.
        merged: the files on the disk.
        reasons: why the proof fails, so far.
        advance: called with the tensors compared and their total.
    """
    base, weights, changes = subject.checkpoint, subject.weights(), stock_changes(subject, stock)
    wrong: dict[str, list[str]] = {}
    worst, equal = 0.0, 0
    for done, (name, place) in enumerate(base.places.items()):
        advance(done, len(base.places))
        other = merged.places.get(name)
        if other is None:
            wrong.setdefault("are missing", []).append(name)
        elif other.shape != expected_shape(stock, name, place) and name in stock.rows:
            wrong.setdefault("have another shape than vocabulary and added tokens need", []).append(name)
        elif (other.dtype, other.shape, other.file.name) != (
            place.dtype,
            expected_shape(stock, name, place),
            place.file.name,
        ):
            wrong.setdefault("have another type, shape or file than in the base", []).append(name)
        elif name in stock.rows:
            if rows := _wrong_rows(name, merged, ReplacedRows(weights, {name: stock.rows[name]})):
                listed = ", ".join(map(str, rows[:_NAMED]))
                wrong.setdefault("are not the base with the trained rows", []).append(f"{name} (rows {listed})")
        elif name in changes:
            units = _distance_of(name, merged, weights, changes[name])
            worst = max(worst, units)
            if not units <= 1:  # NaN included
                wrong.setdefault("are not the base plus the adapter", []).append(f"{name} ({units:.3g} half units off)")
        elif subject.is_rewritten(name):
            found = merged.read(name)
            if not torch.equal(found, weights.tensor(name).to(found.dtype)):
                wrong.setdefault("are not those of the 4-bit base", []).append(name)
        elif not _same_bytes(base, merged, name):
            wrong.setdefault("should be as in the base and are not", []).append(name)
        else:
            equal += 1
    extra = sorted(merged.places.keys() - base.places.keys())
    if extra:
        wrong["are not in the base"] = extra
    if base.index is not None and merged.index is not None and weight_map(merged.index) != weight_map(base.index):
        reasons.append(f"weights: {merged.index.name} does not name the tensors that the base's names")
    for words, names in wrong.items():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        reasons.append(f"weights: {len(names)} tensors {words}: {', '.join(names[:_NAMED])}{more}")
    return {
        "tensors": len(base.places),
        "adapted": len(changes) + len(stock.rows),
        "equal_to_base": equal,
        "largest_error": {"figure": worst, "bound": 1.0, "unit": "half a unit in the last place"},
    }


def expected_shape(stock: StockModel, name: str, place: Place) -> tuple[int, ...]:
    """The shape that a tensor of the base, at `place`, should have in the merged model."""
    rows = stock.rows.get(name)
    return place.shape if rows is None else (rows.height(place.shape[0]), *place.shape[1:])


def _wrong_rows(name: str, merged: Checkpoint, exact: Weights) -> list[int]:
    """The rows of a merged matrix that are not, to the last bit, the exact ones in the stored type."""
    found: list[int] = []
    for start in range(0, exact.count(name), _ROWS):
        stop = min(start + _ROWS, exact.count(name))
        rows = merged.rows(name, start, stop)
        different = (rows != exact.rows(name, start, stop).to(rows.dtype)).any(1)  # NaN differs from itself
        found += (start + different.nonzero().flatten()).tolist()
    return found


def _same_bytes(base: Checkpoint, merged: Checkpoint, name: str) -> bool:
    return all(one == two for one, two in zip_longest(base.chunks(name), merged.chunks(name)))


def _distance_of(name: str, merged: Checkpoint, weights: Weights, changes: list[StockChange]) -> float:
    """The largest error of a stored tensor: of a matrix, or of each expert in it."""
    if len(merged.places[name].shape) == 2:
        (change,) = changes
        return _distance(merged.read(name), weights.tensor(name), change)
    worst = 0.0
    for expert, change in enumerate(changes):
        found, weight = merged.rows(name, expert, expert + 1)[0], weights.rows(name, expert, expert + 1)[0]
        error = _distance(found, weight, change)
        worst = error if not error <= worst else worst  # NaN wins, and stays
    return worst


def _distance(merged: Tensor, weight: Tensor, change: StockChange) -> float:
    """The largest error of a merged matrix, where 1 is what rounding W + ΔW once may do.

    Rounding moves a value by half a unit in its last place at most; computing W + ΔW in float32, in whatever order,
    moves it by some 2⁻²⁴ of the numbers that are summed, for which 2⁻²¹ is allowed.
    """
    info = torch.finfo(merged.dtype)
    digits = round(-math.log2(info.eps))  # of the significand, behind the point
    smallest = round(math.log2(info.tiny)) + 1
    rows_O, columns_I = change.sizes()
    exact = change.exact(weight)
    worst = 0.0
    for start in range(0, len(merged), _ROWS):
        part = slice(start, start + _ROWS)
        found = merged[part].float()
        exponents = found.frexp().exponent.clamp_min_(smallest)
        allowed = torch.ldexp(torch.ones_like(found), exponents - 2 - digits)  # half a unit
        allowed += 2.0**-21 * (weight[part].abs() + torch.outer(rows_O[part], columns_I))
        error = float(((found - exact[part]).abs() / allowed.clamp_min_(torch.finfo(torch.float32).tiny)).max())
        worst = error if not error <= worst else worst  # NaN wins, and stays
    return worst
