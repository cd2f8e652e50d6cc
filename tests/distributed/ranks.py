"""Processes of one run, forked from this one, which has everything imported: gloo between them, as on any CPU."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

from tests.training.processes import fork, wait


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start(work: Callable[[int], int | None], count: int, log: Path) -> list[int]:
    """Fork `count` ranks as accelerate's launcher would start them, each doing `work(rank)`; return their ids."""
    port = free_port()

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
            "ACCELERATE_USE_CPU": "true",
        }
        return work(number)

    return [fork(lambda n=n: rank(n), log.with_suffix(f".{n}")) for n in range(count)]  # type: ignore[misc]


def finish(children: list[int]) -> list[int]:
    """Wait for the ranks and return their exit codes."""
    return [wait(child) for child in children]
