"""The processes of a run: which one this is, and the two things they do together (sum, and wait).

Only the adapter trains, so only the adapter's gradients meet: one flat sum per step, no wrapper around the model.
Ranks need not have the same number of rows, and one may have none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tune.errors import RunError, UserError

if TYPE_CHECKING:
    from accelerate import Accelerator


class Devices:
    """This process among those of the run, as accelerate's launcher started them."""

    def __init__(self) -> None:
        """Join the process group, if there is one.

        Raises:
            RunError: the launcher asked for something that this version does not do, or that does not add up.
        """
        for variable, what in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
            if os.environ.get(variable, "").lower() in ("1", "true"):
                raise RunError(
                    f"accelerate launch: its configuration asks for {what}, which this version does not use. "
                    "Launch with --multi_gpu: each device holds the packed base, and only the adapter's gradients meet."
                )
        from accelerate import Accelerator

        self.accelerator: Accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.rank = self.accelerator.process_index
        self.count = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        asked = os.environ.get("WORLD_SIZE", "1")
        if asked != str(self.count):
            raise RunError(
                f"accelerate launch: the environment says WORLD_SIZE={asked}, accelerate counts {self.count} "
                "processes. They would train apart. On CPUs launch with ACCELERATE_USE_CPU=true accelerate launch "
                f"--multi_gpu --num_processes {asked}."
            )

    @property
    def is_main(self) -> bool:
        return bool(self.rank == 0)

    @property
    def line(self) -> str:
        """The literal line of the start-up table."""
        return f"devices {self.count}" + (" ddp" if self.count > 1 else "")

    @property
    def unused_gpus(self) -> int:
        """GPUs here that this run leaves idle because it was started without a launcher."""
        return torch.cuda.device_count() - 1 if self.count == 1 and self.device.type == "cuda" else 0

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
            raise error or RunError(f"process {self.rank}: the first process cannot start; its message says why.")

    def wait(self) -> None:
        """Return when every process has come here."""
        self.accelerator.wait_for_everyone()
