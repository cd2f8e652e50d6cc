"""The processes of a run: which one this is, and the two things they do together (sum, and wait).

Only the adapter trains, so only the adapter's gradients meet: one flat sum per step, no wrapper around the model.
Ranks need not have the same number of rows, and one may have none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tune.data.collate import Row
from tune.errors import ElsewhereError, RunError, UserError
from tune.training.together import introduction

if TYPE_CHECKING:
    from accelerate import Accelerator


class Devices:
    """This process among those of the run, as accelerate's launcher started them."""

    def __init__(self) -> None:
        """Join the process group, if there is one.

        Raises:
            RunError: the launcher asked for something that this version does not do, or that does not add up.
        """
        if _asked("ACCELERATE_USE_DEEPSPEED"):
            raise RunError(
                "accelerate launch: its configuration asks for DeepSpeed, which this version does not use. Launch with "
                "--multi_gpu, where each device holds the packed base and only the adapter's gradients meet, or with "
                "--use_fsdp --fsdp_version 2, which splits the base over the devices as ZeRO stage 3 does."
            )
        asked = os.environ.get("WORLD_SIZE", "1")
        if asked != "1" and not any(name in os.environ for name in _RANKS):
            raise RunError(_apart(asked, 1))  # accelerate would wait for the others, which nobody has started
        from accelerate import Accelerator

        with _without(_FSDP):  # the base is split by us, and accelerate is not to wrap it
            self.accelerator: Accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.rank = self.accelerator.process_index
        self.count = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        self.sharded = _asked(_FSDP) and self.count > 1
        """Whether the base is split over the devices, so that all must run as many rows."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        if asked != str(self.count):
            raise RunError(_apart(asked, self.count))
        self.processes = self.gather(introduction())
        """Each process by its machine and number, so that one that is gone can be told."""

    @property
    def is_main(self) -> bool:
        return bool(self.rank == 0)

    @property
    def line(self) -> str:
        """The literal line of the start-up table."""
        return f"devices {self.count}" + ("" if self.count == 1 else " fsdp2" if self.sharded else " ddp")

    @property
    def unused_gpus(self) -> int:
        """GPUs here that this run leaves idle because it was started without a launcher."""
        return torch.cuda.device_count() - 1 if self.count == 1 and self.device.type == "cuda" else 0

    def together(self, rows: Iterable[Row]) -> Iterator[tuple[Row, bool]]:
        """Yield this process's rows; where the base is sharded, then as many idle ones as another process has more.

        With each comes whether it counts. The layers of a sharded base are gathered by all processes at once, so each
        must run as many rows as any other, forwards and backwards.
        """
        if not self.sharded:
            yield from ((row, True) for row in rows)
            return
        mine = list(rows)
        idle = self.agree(len(mine)) - len(mine)
        yield from ((row, True) for row in mine)
        yield from ((self.idle_row(), False) for _ in range(idle))

    def idle_row(self) -> Row:
        """Return the shortest row that goes through all of a model: two tokens of which one is to be predicted."""
        zero = torch.zeros(1, dtype=torch.int64, device=self.device)
        ids, positions = zero.expand(1, 2).clone(), torch.arange(2, device=self.device)[None]
        return Row(ids, positions, zero, zero)

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every gradient by its sum over the processes, in one transfer. A missing gradient counts as zero."""
        if self.count == 1:
            return
        ours = list(parameters)
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).reshape(-1) for p in ours])
        torch.distributed.all_reduce(flat)
        for parameter, gradient in zip(ours, torch.split(flat, [p.numel() for p in ours]), strict=True):
            parameter.grad = gradient.view_as(parameter)

    def sum(self, values: Tensor) -> Tensor:
        """Return `values` summed over the processes."""
        if self.count > 1:
            torch.distributed.all_reduce(values)
        return values

    def agree(self, flag: int) -> int:
        """Return the largest flag of any process, so that all take the same way."""
        if self.count == 1:
            return flag
        largest = torch.tensor(flag, device=self.device)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        return int(largest.item())

    def first(self, work: Callable[[], object]) -> None:
        """Let the first process alone do `work`; if the user must mend something there, every process ends.

        Raises:
            UserError: what `work` raised, on the first process; a word to look there on the others.
        """
        error: UserError | None = None
        if self.is_main:
            try:
                work()
            except UserError as caught:
                error = caught
        if self.agree(1 if error else 0):
            raise error or ElsewhereError(f"process {self.rank}: the first process cannot go on; its message says why.")

    def gather(self, text: str) -> list[str]:
        """Return the text of every process, in their order."""
        if self.count == 1:
            return [text]
        data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(self.device)
        padded = torch.zeros(self.agree(len(data)), dtype=torch.uint8, device=self.device)
        padded[: len(data)] = data
        all_padded = [torch.empty_like(padded) for _ in range(self.count)]
        torch.distributed.all_gather(all_padded, padded)
        return [bytes(each.tolist()).rstrip(b"\0").decode() for each in all_padded]

    def wait(self) -> None:
        """Return when every process has come here."""
        self.accelerator.wait_for_everyone()


_FSDP = "ACCELERATE_USE_FSDP"
"""What accelerate's launcher sets where its configuration asks for FSDP; on a CPU it does no more than that."""

_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
"""Where launchers say which process this is, and accelerate looks for it."""


def _apart(asked: str, count: int) -> str:
    return (
        f"accelerate launch: the environment says WORLD_SIZE={asked}, accelerate counts {count} processes. They would "
        "train apart. On CPUs launch with ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes "
        f"{asked}."
    )


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true")


@contextmanager
def _without(variable: str) -> Iterator[None]:
    value = os.environ.pop(variable, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[variable] = value
