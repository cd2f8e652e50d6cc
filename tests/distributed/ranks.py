"""Ranks on one machine, over gloo, forked as accelerate's launcher would start them, and how their runs compare."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.training.processes import fork, wait
from tune.cli.main import _run

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
"""What `accelerate launch --use_fsdp --fsdp_version 2` sets and `tune` reads, or must not be misled by."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


Arguments = list[str] | Callable[[int], list[str]]
"""Of the command line, for all ranks or for each."""


def start(arguments: Arguments, count: int, log: Path, environment: Mapping[str, str] | None = None) -> list[int]:
    """Fork `count` ranks that run the command line, and return their process ids."""
    return start_work(
        lambda number: _run(arguments(number) if callable(arguments) else arguments), count, log, environment
    )


def start_work(
    work: Callable[[int], int | None], count: int, log: Path, environment: Mapping[str, str] | None = None
) -> list[int]:
    """Fork `count` ranks that each call `work` with their number, and return their process ids."""
    port, alive = free_port(), os.pipe()
    _keep_store(port, alive)

    def rank(number: int) -> int | None:
        from accelerate.state import AcceleratorState, GradientState, PartialState

        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        os.environ |= {
            "RANK": str(number),
            "LOCAL_RANK": str(number),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "ACCELERATE_USE_CPU": "true",
            **(environment or {}),
        }
        return work(number)

    children = [fork(lambda n=n: rank(n), log.with_suffix(f".{n}")) for n in range(count)]  # type: ignore[misc]
    for end in alive:
        os.close(end)
    return children


def _keep_store(port: int, alive: tuple[int, int]) -> None:
    """Fork what the launcher's agent is to the ranks: it keeps the store that they meet by, and outlives them all."""

    def agent() -> None:
        os.close(alive[1])
        store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        os.read(alive[0], 1)  # returns when the last rank has closed the other end
        del store

    if fork(lambda: fork(agent) and None) != 0:  # a grandchild, so that nobody need wait for it
        os.wait()


def finish(children: list[int]) -> list[int]:
    """Wait for ranks and return their exit codes."""
    return [wait(child) for child in children]


def launch(arguments: Arguments, count: int, log: Path, environment: Mapping[str, str] | None = None) -> list[int]:
    """Run the command line on `count` ranks, and return their exit codes."""
    return finish(start(arguments, count, log, environment))


def logs(log: Path, count: int) -> str:
    return "\n".join(log.with_suffix(f".{n}").read_text() for n in range(count))


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    ours, reference = ours.detach().double(), reference.detach().double()
    return float((ours - reference).norm() / reference.norm())


def compare(one: Path, two: Path) -> float:
    """Hold the adapters of two runs against each other, tensor by tensor, and return the largest difference."""
    reference = load_file(one / "adapter" / "adapter_model.safetensors")
    ours = load_file(two / "adapter" / "adapter_model.safetensors")
    assert ours.keys() == reference.keys()
    found = {name: relative(ours[name], tensor) for name, tensor in reference.items()}
    assert max(found.values()) < 1e-4, found
    return max(found.values())


def logged(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def together(work: Callable[[int], object], count: int, log: Path) -> list[int]:
    """Call `work` with its rank in each of `count` forked processes that form a group; return their exit codes."""
    port = free_port()

    def rank(number: int) -> int:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.distributed.init_process_group("gloo", rank=number, world_size=count)
        work(number)
        torch.distributed.barrier()
        return 0

    children = [fork(lambda n=n: rank(n), log.with_suffix(f".{n}")) for n in range(count)]  # type: ignore[misc]
    return [wait(child) for child in children]
