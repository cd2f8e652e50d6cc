"""Child processes forked from this one, which has torch and the rest already imported: a start in no time."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

# Forking is safe only while torch has started no threads of its own.
torch.set_num_threads(1)


def fork(work: Callable[[], int | None], output: Path | None = None) -> int:
    """Run `work` in a child, its output in a file, and return the child's process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    # A pool of threads does not outlive a fork. torch makes another when it is first asked for, but not safely where
    # two of its own threads ask at once.
    torch.set_num_threads(torch.get_num_threads())
    try:
        if output is not None:
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        code = work() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(child: int, seconds: float = 120) -> int:
    """Return the child's exit code, negative for a signal."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError(f"the child was still running after {seconds} s")


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Return as soon as `condition` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
