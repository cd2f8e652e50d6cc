"""Processes that end together: one message for all of them, whichever of them met the mistake.

Nothing here waits for another process: one that has failed or gone cannot take part in anything. They leave notes in
the key-value store that the process group was made with instead.

  * A process that fails leaves a note before it ends. The others, whose next transfer breaks off, find it and end
    quietly, since the message has been printed.
  * A process that was killed leaves none. Those on the same machine look for it by its process id, which all told
    each other at the start, and say that it is gone.
  * A mistake that all of them meet is said by the first that asks.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tune.errors import ElsewhereError, RunError, TuneError

_BROKEN_OFF = re.compile(
    r"connection (closed|reset|refused|was likely closed)|broken pipe|socket (closed|error)|timed? ?out|"
    r"remote (process|peer)|communicator was aborted|unhandled system error",
    re.IGNORECASE,
)
"""What gloo's and NCCL's errors say of a process at the other end that does not answer. Their classes tell no more."""


_PATIENCE = 3.0
"""Seconds."""


def introduction() -> str:
    """Who this process is, for the others."""
    return f"{socket.gethostname()} {os.getpid()}"


def first_to_say(message: str) -> bool:
    """Whether this process is the one to print a message that others may have as well."""
    store = _store()
    if store is None:  # before the processes have met: one for each machine
        return int(os.environ.get("LOCAL_RANK", "0")) == 0
    try:
        return bool(store.add(f"tune/said/{hashlib.sha256(message.encode()).hexdigest()}", 1) == 1)
    except RuntimeError:  # the store ended with the process that kept it
        return True


@contextlib.contextmanager
def ending_together(rank: int, processes: Sequence[str], run: str) -> Iterator[None]:
    """Run this process's part of a run.

    Args:
        rank: this process.
        processes: the `introduction` of each.
        run: where the run is, for the message.

    Raises:
        ElsewhereError: another process failed, and has said why.
        RunError: another process is gone.
    """
    try:
        yield
    except BaseException as error:
        if len(processes) == 1 or isinstance(error, ElsewhereError):
            raise
        if not _broke_off(error):
            _leave_note(rank)
            raise
        _outlast_the_launcher()
        raise _lost(rank, processes, run) from error


def _broke_off(error: BaseException) -> bool:
    """Whether a transfer ended for want of another process, or this is what somebody took that for."""
    while isinstance(error, TuneError) and error.__cause__ is not None:
        error = error.__cause__
    return isinstance(error, RuntimeError) and _BROKEN_OFF.search(str(error)) is not None


def _outlast_the_launcher() -> None:
    """Let the next SIGTERM pass: a launcher that misses a process sends it to the others, before they can say why."""

    def pass_by(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    with contextlib.suppress(ValueError):  # not the main thread: whoever runs it handles signals
        signal.signal(signal.SIGTERM, pass_by)


def _lost(rank: int, processes: Sequence[str], run: str) -> TuneError:
    count = len(processes)
    failed: list[int] = []
    gone: list[int] = []
    patience = time.monotonic() + _PATIENCE
    while not (failed or gone) and time.monotonic() < patience:  # a connection may close before its process has ended
        failed = [other for other in range(count) if _has_failed(other)]
        gone = [other for other, process in enumerate(processes) if other != rank and _is_gone(process)]
        time.sleep(0.05)
    if failed:
        return ElsewhereError(f"process {failed[0]} of {count} ended with an error, and said why.")
    who = f"process {gone[0]} of {count} is gone" if gone else f"another process of {count} does not answer"
    return RunError(
        _agreed(
            f"{run}: {who} (killed, or out of memory?), so the others stop. The system's log may say why. "
            "Go on with the same command and --resume."
        )
    )


def _agreed(message: str) -> str:
    """What the first process that missed another said of it: by now that one may be gone as well."""
    store = _store()
    try:
        return message if store is None else store.compare_set("tune/lost", "", message).decode()
    except RuntimeError:  # the store ended with the process that kept it
        return message


def _has_failed(rank: int) -> bool:
    store = _store()
    try:
        return store is not None and bool(store.check([f"tune/failed/{rank}"]))
    except RuntimeError:  # the store ended with the process that kept it
        return False


def _is_gone(introduced: str) -> bool:
    """Whether a process of this machine has ended, its parent told or not."""
    host, _, process = introduced.rpartition(" ")
    if host != socket.gethostname():
        return False
    try:
        os.kill(int(process), 0)
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        return status.rpartition(")")[2].split()[0] in "ZX"
    except ProcessLookupError:
        return True
    except OSError:
        return False


def _leave_note(rank: int) -> None:
    store = _store()
    try:
        if store is not None:
            store.set(f"tune/failed/{rank}", "1")
    except RuntimeError:
        pass  # the store ended with the process that kept it


def _store() -> Any:
    """The store of the process group, or None where there is no group."""
    return dist.distributed_c10d._get_default_store() if dist.is_initialized() else None
