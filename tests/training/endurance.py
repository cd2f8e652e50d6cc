"""Long trials of a run: killed again and again, and left to itself for many steps. Each returns its figures."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.training.jobs import tiny_recipe, write_rows
from tests.training.processes import fork, wait, wait_until
from tune.cli.progress import ConsoleProgress
from tune.folder import RunFolder
from tune.run import train


def adapter(run: RunFolder) -> bytes:
    return (run.adapter / "adapter_model.safetensors").read_bytes()


def steps_logged(run: RunFolder) -> list[int]:
    return [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()]


def ended(child: int) -> bool:
    """Whether a child has ended; it can still be waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def between_checkpoints(run: RunFolder) -> float:
    """Seconds from one checkpoint to the next, of a run that has several."""
    written = [run.checkpoint(step).stat().st_mtime for step in run.steps()]
    return (written[-1] - written[0]) / (len(written) - 1)


def half_written(run: RunFolder) -> bool:
    """Whether a killed process was writing: what it leaves then is swept away by the next one."""
    return any(any(folder.glob(".unfinished-*")) for folder in (run.root, run.checkpoints))


def kill(child: int, run: RunFolder, moment: str, chance: random.Random, window: float) -> None:
    """Kill a child that trains at a random moment of a kind: while it starts, at any time after, or while it writes.

    Args:
        child: its process id.
        run: what it trains.
        moment: `start`, `any` or `write`.
        chance: draws the moment.
        window: seconds from the start to the first new checkpoint, or of two checkpoints.
    """
    if moment == "write":
        end = time.monotonic() + 60
        while not half_written(run) and not ended(child) and time.monotonic() < end:
            pass  # a checkpoint of this size takes milliseconds
        time.sleep(chance.uniform(0, 0.001))
    else:
        time.sleep(chance.uniform(0, window))
    os.kill(child, signal.SIGKILL)


def kill_and_resume(folder: Path, kills: int, moments: tuple[str, ...] = ("any",), **changes: Any) -> dict[str, Any]:
    """Train once without interruption and once killed `kills` times; both must end in the same adapter.

    The kinds of `moments` take turns. A kill of the kind `any` comes within the time of two checkpoints after the first
    new one of its attempt: while training or while writing the next one. One of the kind `write` comes when that next
    one is being written, and one of the kind `start` before the first: while data, base or checkpoint are read.
    """
    whole, cut = RunFolder(folder / "whole"), RunFolder(folder / "cut")
    recipe = tiny_recipe(folder, output=whole.root, **changes)
    began = time.monotonic()
    train(recipe)  # in this process: its children then start with everything imported
    window = 2 * between_checkpoints(whole)

    recipe = tiny_recipe(folder, output=cut.root, **changes)
    chance, log = random.Random(kills), folder / "log"
    done, early, writing, start = 0, 0, 0, 0.5
    for _ in range(10 * kills + 10):
        before, forked = max(cut.steps(), default=0), time.monotonic()
        child = fork(lambda: train(recipe, resume=True) and None, log)
        moment = moments[done % len(moments)]
        if done < kills:
            if moment != "start":
                wait_until(lambda: max(cut.steps(), default=0) > before or ended(child))  # noqa: B023
                start = time.monotonic() - forked
            kill(child, cut, moment, chance, start if moment == "start" else window)
        code = wait(child)
        if code == 0:
            if done >= kills:
                break
            shutil.rmtree(cut.root)  # it got to the end before the kill came: begin again
            done = early = writing = 0
        else:
            assert code == -signal.SIGKILL, log.read_text()
            done += 1
            writing += half_written(cut)
            early += max(cut.steps(), default=0) == before
    else:
        raise AssertionError(f"{kills} kills did not fit into one run")
    logged = steps_logged(cut)
    assert logged == steps_logged(whole) == list(range(1, len(logged) + 1))
    assert adapter(cut) == adapter(whole), "the killed run ended in another adapter"
    return {
        "kills": done,
        "before_a_new_checkpoint": early,
        "while_writing": writing,
        "steps": len(logged),
        "adapters_equal": True,
        "seconds": round(time.monotonic() - began, 1),
    }


STOPPED = {signal.SIGTERM: 143, signal.SIGINT: 130}
"""The exit code that each signal leads to."""


def stop_and_resume(folder: Path, stops: int) -> dict[str, Any]:
    """Start `tune train` as a user does and stop it, again and again; return how long it took to end.

    SIGTERM and SIGINT take turns, and so do moments while it starts, and while it trains and evaluates. Each time it
    must end with its code and one line that says how to go on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held_out = [str(folder / "eval.jsonl")]
    tiny_recipe(folder, data__eval=held_out, train__eval_every=3, train__max_steps=100_000, train__save_every=50)
    run, chance, line = RunFolder(folder / "run"), random.Random(stops), [sys.executable, "-m", "tune", "train"]
    taken: list[float] = []
    for trial in range(stops):
        number, log = list(STOPPED)[trial % 2], folder / f"log{trial}"
        with open(log, "w") as output:
            process = subprocess.Popen([*line, str(folder / "recipe.yaml"), "--resume"], stdout=output, stderr=output)
        if trial % 4 < 2:
            before = run.steps()
            wait_until(lambda: run.steps() != before, 120)  # noqa: B023
            time.sleep(chance.uniform(0, 1.0))
        else:
            time.sleep(chance.uniform(2.0, 10.0))  # its handlers are there once the recipe is read
        sent = time.monotonic()
        process.send_signal(number)
        try:
            code = process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"{number.name} did not end it: {log.read_text()}") from None
        taken.append(time.monotonic() - sent)
        said = log.read_text()
        assert code == STOPPED[number], said
        assert "Traceback" not in said, said
        assert f"stopped by {number.name}" in said.splitlines()[-1], said
        assert "--resume" in said.splitlines()[-1], said
    return {
        "stops": stops,
        "median_seconds": round(statistics.median(taken), 2),
        "longest_seconds": round(max(taken), 2),
    }


class Sampled(ConsoleProgress):
    """Prints what `tune train` prints, and writes down memory and time as the steps go by."""

    def __init__(self, file: Path, every: int) -> None:
        super().__init__()
        self._file, self._every = file, every
        self._since = (time.perf_counter(), time.process_time())

    def step(self, metrics: dict[str, Any], total: int, log: bool) -> None:
        super().step(metrics, total, log)
        if metrics["step"] % self._every:
            return
        now = (time.perf_counter(), time.process_time())
        sample = {
            "step": metrics["step"],
            "bytes": own_memory(),
            "seconds": (now[0] - self._since[0]) / self._every,
            "cpu_seconds": (now[1] - self._since[1]) / self._every,
            "files": len(os.listdir("/proc/self/fd")),
        }
        with self._file.open("a") as file:
            file.write(json.dumps(sample) + "\n")
        self._since = (time.perf_counter(), time.process_time())


def own_memory() -> int:
    """Bytes of this process that no file backs and that are in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = [line.split()[1] for line in lines if line.startswith("RssAnon:")]
    return 1024 * int(kilobytes)


def slope(samples: list[dict[str, float]], of: str) -> float:
    """What `of` grows by in a step, by the median of the slopes between all pairs (Theil 1950, Sen 1968).

    One burst of another process, or one step of the allocator, then weighs no more than any other sample.
    """
    pairs = [(a, b) for place, a in enumerate(samples) for b in samples[place + 1 :]]
    return statistics.median((b[of] - a[of]) / (b["step"] - a["step"]) for a, b in pairs)


def many_steps(folder: Path, steps: int, base: Path | None = None) -> dict[str, Any]:
    """Train for many tiny steps, with evaluations and checkpoints in between; return how memory and time went.

    The first fifth is left out: allocators, caches and moments have grown by then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "train.jsonl", 40)
    write_rows(folder / "eval.jsonl", 4, start=100)
    every = max(1, steps // 100)
    cadences = {"train__save_every": 5 * every, "train__eval_every": 5 * every}
    recipe = tiny_recipe(
        folder,
        base=base,
        data__eval=[str(folder / "eval.jsonl")],
        train__max_steps=steps,
        train__batch_size=2,
        train__learning_rate=1e-4,
        **cadences,
    )
    samples_file, log = folder / "samples.jsonl", folder / "log"
    began = time.monotonic()
    child = fork(lambda: train(recipe, progress=Sampled(samples_file, every)) and None, log)
    code = wait(child, 24 * 3600)
    assert code == 0, log.read_text()[-2000:]
    samples = [json.loads(line) for line in samples_file.read_text().splitlines()]
    settled = samples[len(samples) // 5 :]
    third = len(settled) // 3
    times = {  # another process on the machine changes the first of the two, and hardly the second
        f"{kind}_a_step_{which}_third": round(statistics.median(sample[kind] for sample in part), 5)
        for kind in ("seconds", "cpu_seconds")
        for which, part in (("first", settled[:third]), ("last", settled[-third:]))
    }
    metrics = RunFolder(folder / "run").metrics
    return {
        "steps": steps,
        "seconds": round(time.monotonic() - began, 1),
        "bytes_first": settled[0]["bytes"],
        "bytes_last": settled[-1]["bytes"],
        "bytes_a_step": round(slope(settled, "bytes"), 1),
        **times,
        "open_files": [settled[0]["files"], settled[-1]["files"]],
        "metrics_bytes_a_step": round(metrics.stat().st_size / steps, 1),
        "printed_bytes_a_step": round(log.stat().st_size / steps, 1),
    }
