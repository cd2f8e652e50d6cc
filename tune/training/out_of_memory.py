"""When memory runs out: what to notice, what to free, and what to say where nothing smaller is left.

A row that does not fit costs no more than its time. The step, or the evaluation, is begun anew with shorter rows, and
where rows are as short as the longest example, with activations that are computed again (`planning.memory.smaller`).
Rows change the speed of a step and never what it computes, so the run goes on as if it had been planned so. All
processes take the same way: each notes the row that did not fit, and they agree on the longest.

Where the base is split over the devices, the others are in the middle of the same row and wait for this one's part in
each layer. It frees what it held, follows them through the row with one of two tokens, and runs such rows to the end.
"""

from __future__ import annotations

import errno
import gc
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tune.data.collate import Row
from tune.errors import RecipeError
from tune.models.sharding import begin_row, break_off, may_break_off
from tune.planning.memory import MemoryParts, RowPlan, installed_bytes
from tune.progress import size
from tune.recipe.schema import Recipe
from tune.training.devices import Devices

_SAID = re.compile(
    r"out of memory|DefaultCPUAllocator|not enough memory|can'?t allocate memory|CUBLAS_STATUS_ALLOC_FAILED|bad_alloc",
    re.IGNORECASE,
)
"""What allocators say that have no class of error to themselves."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or in this process."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _SAID.search(str(error)) is not None


class DidNotFitError(Exception):
    """A row of a step did not fit, here or on another process: nothing was changed. It never leaves the trainer."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        """Of the longest row that did not fit, on any process."""
        super().__init__(f"a row of {tokens} tokens does not fit")


class Shortage:
    """The rows of a piece of work (a step, an evaluation), and whether memory ran out at one of them."""

    def __init__(self, devices: Devices, model: Any) -> None:
        self.tokens = 0
        """Of the longest row that did not fit; 0 while every row has."""
        self._devices, self._model = devices, model
        self._at = 1
        self._broke_off = self._rejoins = False

    def rows(self, mine: Iterable[Row]) -> Iterator[tuple[Row, bool]]:
        """Yield the rows to run, and whether each counts; each must be run within `caught`.

        Where a row does not fit, a process with a base of its own has no further rows. One that shares its base with
        others has as many as they, and none of them counts.
        """
        if self._devices.sharded:
            yield from self._rows_of_all(mine)
            return
        rows = iter(mine)
        while not self.tokens:
            row = None
            with self.caught():
                row = next(rows, None)
            if row is None:
                return
            yield row, True

    def _rows_of_all(self, mine: Iterable[Row]) -> Iterator[tuple[Row, bool]]:
        ours: list[Row] = []
        with self.caught():
            ours.extend(mine)
        self._broke_off = False
        for row, counts in self._devices.together(ours):
            yield (self._devices.idle_row(), False) if self.tokens else (row, counts)
            if self._broke_off:
                free(self._devices.device)
                break_off(self._model)
                self._broke_off, self._rejoins = False, True
                yield self._devices.idle_row(), False
                self._rejoins = False

    @contextmanager
    def caught(self, row: Row | None = None) -> Iterator[None]:
        """End the block where memory runs out, and note the row; any other error passes."""
        if row is not None and not self._rejoins:
            self._at = row.ids_1T.shape[1]
            begin_row(self._model)
        try:
            yield
        except Exception as error:
            # A second time at the same place: with a row of two tokens there is nothing left to free.
            if not is_out_of_memory(error) or self._rejoins or not may_break_off(self._model):
                raise
            # The error leads to every frame below, and with them to all that was computed: it must not be kept.
            self.tokens, self._broke_off = max(self.tokens, self._at), True


def free(device: torch.device) -> None:
    """Give back what a piece of work that was broken off still holds."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def said_of(before: RowPlan, after: RowPlan, failed: int, dropout: bool) -> str:
    """The line that tells of a smaller plan."""
    how = f"rows of at most {after.row_tokens:,} tokens" if after.row_tokens < before.row_tokens else "recomputation"
    return (
        f"memory ran out at a row of {failed:,} tokens: it is done again with {how}, and so is the rest of the run. "
        f"That changes the speed{' and the dropout masks' if dropout else ''}, and nothing else of a step"
    )


def does_not_fit(
    recipe: Recipe, plan: RowPlan, parts: MemoryParts, failed: int, longest: int, saved: str, device: torch.device
) -> RecipeError:
    """What to raise when a row does not fit and nothing smaller is left to try.

    Args:
        recipe: names the keys that would help.
        plan: how the row was run.
        parts: what the memory is needed for.
        failed: tokens of the row.
        longest: tokens of the longest example.
        saved: what of the run is on the disk.
        device: where there was no room.
    """
    ways = [f"lower data.max_length (the longest example has {longest:,} tokens)", "lower adapter.rank"]
    if recipe.model.quantization == "none":
        ways.append("set model.quantization: nf4")
    if recipe.train.optimizer == "adamw":
        ways.append("set train.optimizer: adamw_8bit")
    remedy = f"{_list(ways)}, with another output."
    if plan.recompute != "full":
        remedy = f"set train.recompute: full and go on with --resume. Or {remedy}"
    return RecipeError(
        f"train.micro_batch_tokens: memory ran out at a row of {failed:,} tokens, and no row can be shorter than the "
        f"longest example. Needed are about {parts.words(failed)}; there are {size(installed_bytes(device))} on this "
        f"{device.type}. {saved} {remedy[0].upper()}{remedy[1:]}"
    )


@contextmanager
def explained(device: torch.device) -> Iterator[None]:
    """Turn what runs out of memory outside of a row (loading, attaching, the optimizer) into one message.

    Raises:
        RecipeError: with the keys that would help.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        said = " ".join(str(error).split())
        short = said.split(". ")[0][:200].rstrip(".") or type(error).__name__
        raise RecipeError(
            f"model.base: memory ran out outside of any row ({short}); there are {size(installed_bytes(device))} on "
            f"this {device.type}. Set model.quantization: nf4 or train.optimizer: adamw_8bit if they are not, lower "
            "adapter.rank, take a smaller base, or end what else uses this memory. What a checkpoint holds is kept: "
            "go on with --resume."
        ) from error


def _list(words: list[str]) -> str:
    return ", ".join(words[:-1]) + f" or {words[-1]}"
