"""Kill a tiny run again and again, stop another, let a third take many steps; print and write down the figures.

    scripts/endurance [--kills 100] [--stops 40] [--steps 20000] [--base FOLDER] [--output FILE]

The first must end in the bytes of a run that nobody killed. The second must end soon, with its exit code and one line.
The third must need no more memory and no more time for its last steps than for its first. docs/reliability.md has the
figures of one machine.

Exit codes: 0 all hold; 2 wrong arguments; 3 one does not (what and by how much is said).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

BYTES_A_STEP = 500.0
"""What memory may grow by in a step: a megabyte in 2,000. One tensor of these tiny runs that is kept is more."""
SLOWER = 1.3
"""What the median step of the last third may take of the CPU, in those of the first."""
GRACE = 30.0
"""Seconds from SIGTERM to SIGKILL that SLURM and Kubernetes leave a job, unless told otherwise."""
METRICS_BYTES = 400.0
"""Of metrics.jsonl, for each step."""
PRINTED_BYTES = 40.0
"""Printed for each step: a line of some 80 characters every ten steps, and those around them."""


def count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError
    return number


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="endurance", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=count, default=100, help="how often to kill; 0 leaves it out (%(default)s)")
    parser.add_argument("--stops", type=count, default=40, help="how often to stop; 0 leaves it out (%(default)s)")
    parser.add_argument("--steps", type=count, default=20_000, help="how many steps; 0 leaves it out (%(default)s)")
    parser.add_argument("--base", type=Path, help="what the many steps train (a random Mistral of two tiny layers)")
    parser.add_argument("--output", type=Path, default=Path("runs/endurance.json"), help="the figures (%(default)s)")
    return parser.parse_args(given)


def too_much(figures: dict[str, Any]) -> Iterator[str]:
    """What of a long run is beyond its bound."""
    slower = figures["cpu_seconds_a_step_last_third"] / figures["cpu_seconds_a_step_first_third"]
    for name, value, bound in (
        ("bytes of memory a step", figures["bytes_a_step"], BYTES_A_STEP),
        ("times the CPU seconds of a step in the first third, in the last", round(slower, 3), SLOWER),
        ("bytes of metrics.jsonl a step", figures["metrics_bytes_a_step"], METRICS_BYTES),
        ("printed bytes a step", figures["printed_bytes_a_step"], PRINTED_BYTES),
        ("open files more", figures["open_files"][1] - figures["open_files"][0], 0),
    ):
        if value > bound:
            yield f"{value} {name}; at most {bound:g} were to be expected"


def main(given: list[str] | None = None) -> int:
    chosen = arguments(given)
    from tests.training.endurance import kill_and_resume, many_steps, stop_and_resume
    from tune.training.checkpoint import machine

    found: dict[str, Any] = {"machine": machine()}
    problems: list[str] = []
    with tempfile.TemporaryDirectory(prefix="endurance-") as folder:
        if chosen.kills:
            try:
                found["kills"] = kill_and_resume(
                    Path(folder) / "kills",
                    chosen.kills,
                    ("any", "write", "any", "start"),
                    train__max_steps=max(120, 6 * chosen.kills),
                    train__save_every=1,
                    adapter__dropout=0.1,
                )
            except AssertionError as error:
                problems.append(f"kills: {error}")
        if chosen.stops:
            try:
                found["stops"] = stop_and_resume(Path(folder) / "stops", chosen.stops)
                if found["stops"]["longest_seconds"] > GRACE:
                    problems.append(
                        f"stops: {found['stops']['longest_seconds']} s from signal to end; {GRACE:g} at most"
                    )
            except AssertionError as error:
                problems.append(f"stops: {error}")
        if chosen.steps:
            found["steps"] = many_steps(Path(folder) / "steps", chosen.steps, chosen.base)
            problems += [f"steps: {problem}" for problem in too_much(found["steps"])]
    found["problems"] = problems
    text = json.dumps(found, indent=1)
    print(text)
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(text + "\n", encoding="utf-8")
    for problem in problems:
        print(f"endurance: {problem}", file=sys.stderr)
    return 3 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
