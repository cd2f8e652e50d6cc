"""A run's progress on the console: a live line on a terminal, plain lines in a file or a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.table import Table

from tune.folder import explain_os_errors
from tune.progress import Progress, size


class ConsoleProgress(Progress):
    """Prints what a run tells. Literal lines are the same on a terminal and in a file."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self._bar: Bar | None = None
        self._steps: Any = None
        self._training = False

    def line(self, text: str) -> None:
        self._print(text)

    def _print(self, what: str | Table) -> None:
        with explain_os_errors(Path("standard output"), "go on with --resume", "where it goes"):
            self.console.print(what, markup=False)

    def warn(self, text: str) -> None:
        print(f"warning: {text}", file=sys.stderr)

    @contextmanager
    def phase(self, name: str) -> Iterator[Callable[[int, int], None]]:
        if not self.console.is_terminal:
            started = time.perf_counter()
            yield lambda done, total: None
            seconds = time.perf_counter() - started
            if not self._training and seconds >= 1:  # within training, lines say what came of a phase
                self.line(f"{name}: {seconds:.1f} s")
            return
        if self._bar is not None:  # within training: one more task of the same bar
            task = self._bar.add_task(name, total=None)
            yield lambda done, total: self._bar.update(task, completed=done, total=total) if self._bar else None
            self._bar.remove_task(task)
            return
        with Bar(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=self.console) as bar:
            task = bar.add_task(name, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total or None)

    def coverage(self, coverage: Any) -> None:
        table = Table(box=None, pad_edge=False)
        for heading in ("layers", "count", coverage.storage, "adapted", "frozen", "trained"):
            table.add_column(heading, justify="left" if heading == "layers" else "right")
        for kind in coverage.kinds:
            stored = kind.quantized if coverage.storage == "nf4" else kind.layers
            table.add_row(
                kind.name,
                str(kind.layers),
                str(stored),
                str(kind.adapted),
                size(kind.bytes),
                f"{kind.adapter_parameters:,}" if kind.adapter_parameters else "-",
            )
        rest = coverage.frozen_bytes - sum(kind.bytes for kind in coverage.kinds)
        rows = coverage.trained_rows
        table.add_row("embeddings, norms, head", "", "", "", size(rest), f"{rows.parameters:,}" if rows else "-")
        table.add_row("all", "", "", "", size(coverage.frozen_bytes), f"{coverage.adapter_parameters:,}")
        self._print(table)

    def steps(self, done: int, total: int) -> None:
        self._training = True
        if self.console.is_terminal:
            self._bar = Bar(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                console=self.console,
            )  # fmt: skip
            self._bar.start()
            self._steps = self._bar.add_task("training", total=total, completed=done)

    def step(self, metrics: dict[str, Any], total: int, log: bool) -> None:
        words = (
            f"step {metrics['step']}/{total}  loss {metrics['loss']:.4f}  lr {metrics['learning_rate']:.2e}  "
            f"grad {metrics['grad_norm']:.3f}  {metrics['tokens_per_second']:,.0f} tokens/s  "
            f"{size(metrics['memory_bytes'])}"
        )
        if "router" in metrics:
            words += f"  balance {metrics['router']['balance']:.2f}"
        if self._bar is not None:
            self._bar.update(self._steps, completed=metrics["step"], description=f"loss {metrics['loss']:.4f}")
        if log:
            self.line(words)
        if metrics["step"] == total:
            self.close()

    def evaluation(self, step: int, loss: float, best: bool) -> None:
        self.line(f"step {step}: held-out loss {loss:.4f}{' (best)' if best else ''}")

    def close(self) -> None:
        """Take the live line off the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class QuietProgress(Progress):
    """Only what may not be missed."""

    def warn(self, text: str) -> None:
        print(f"warning: {text}", file=sys.stderr)

    def close(self) -> None:
        """Nothing was drawn."""
