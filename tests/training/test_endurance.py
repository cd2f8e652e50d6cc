"""A run of many steps needs no more memory and no more time for its last than for its first."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.scripts.conftest import load_script  # noqa: F401  the fixture
from tests.training.endurance import many_steps, slope

STEPS = 100 * int(os.environ.get("TUNE_SLOW_COUNT", "6"))


@pytest.fixture
def endurance(load_script: Callable[[str], ModuleType]) -> ModuleType:  # noqa: F811
    return load_script("endurance")


@pytest.mark.slow
def test_memory_and_time_stay_flat(tmp_path: Path) -> None:
    """Short beside `scripts/endurance`, so the bounds are wide: allocators settle for hundreds of steps."""
    figures = many_steps(tmp_path, STEPS)
    assert figures["steps"] == STEPS
    assert figures["bytes_last"] - figures["bytes_first"] < 3_000_000
    assert figures["cpu_seconds_a_step_last_third"] < 1.3 * figures["cpu_seconds_a_step_first_third"]
    assert figures["open_files"][0] == figures["open_files"][1]
    assert figures["metrics_bytes_a_step"] < 400
    assert figures["printed_bytes_a_step"] < 40


@pytest.mark.slow
def test_a_leak_is_seen(tmp_path: Path, endurance: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step keeps 400 kB, more than free lists hold for long, and takes a little longer than the one before."""
    import time

    import torch

    from tune.training import trainer

    plain, kept = trainer.train_step, []

    def leaking(*args: Any, **kwargs: Any) -> Any:
        kept.append(torch.ones(100_000))
        end = time.process_time() + 2e-5 * len(kept)
        while time.process_time() < end:
            pass
        return plain(*args, **kwargs)

    monkeypatch.setattr(trainer, "train_step", leaking)
    figures = many_steps(tmp_path, 500)
    assert figures["bytes_a_step"] > 300_000
    problems = list(endurance.too_much({**figures}))
    assert any("bytes of memory a step" in problem for problem in problems)
    assert any("times the CPU seconds" in problem for problem in problems)


def test_the_slope_of_samples() -> None:
    samples = [{"step": n, "bytes": 1000.0 + 3 * n} for n in range(0, 100, 5)]
    assert slope(samples, "bytes") == pytest.approx(3)
    samples[7]["bytes"] += 1e6
    assert slope(samples, "bytes") == pytest.approx(3), "one burst is no leak"


def test_the_script_says_what_is_beyond_its_bounds(
    endurance: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = {
        "bytes_a_step": 100.0,
        "cpu_seconds_a_step_first_third": 0.01,
        "cpu_seconds_a_step_last_third": 0.011,
        "open_files": [9, 9],
        "metrics_bytes_a_step": 190.0,
        "printed_bytes_a_step": 9.0,
    }
    from tests.training import endurance as trials

    stops = {"stops": 4, "longest_seconds": 3.0}
    monkeypatch.setattr(trials, "stop_and_resume", lambda folder, stops_wanted: stops)
    monkeypatch.setattr(trials, "kill_and_resume", lambda folder, kills, moments, **changes: {"kills": kills})
    file = tmp_path / "figures" / "endurance.json"
    for worse, code in (({}, 0), ({"bytes_a_step": 9e3}, 3), ({"open_files": [9, 10]}, 3),
                        ({"cpu_seconds_a_step_last_third": 0.02}, 3)):  # fmt: skip
        monkeypatch.setattr(trials, "many_steps", lambda folder, steps, base: {**sound, **worse, "steps": steps})  # noqa: B023
        assert endurance.main(["--kills", "3", "--steps", "50", "--output", str(file)]) == code
        written = json.loads(file.read_text())
        assert written["kills"] == {"kills": 3}
        assert written["steps"]["steps"] == 50
        assert len(written["problems"]) == (1 if code else 0)
        assert ("endurance: steps:" in capsys.readouterr().err) is bool(code)
    stops["longest_seconds"] = 31.0
    assert endurance.main(["--kills", "0", "--steps", "0", "--output", str(file)]) == 3
    assert "31.0 s from signal to end" in capsys.readouterr().err
    stops["longest_seconds"] = 3.0

    def parted(*args: Any, **changes: Any) -> None:
        raise AssertionError("the killed run ended in another adapter")

    monkeypatch.setattr(trials, "kill_and_resume", parted)
    assert endurance.main(["--kills", "3", "--steps", "0", "--output", str(file)]) == 3
    assert "another adapter" in capsys.readouterr().err
    assert "steps" not in json.loads(file.read_text())
