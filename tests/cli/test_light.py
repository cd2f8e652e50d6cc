"""The command line answers at once: what is heavy is imported only by a verb that needs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "numpy", "peft", "accelerate", "bitsandbytes", "datasets", "huggingface_hub"}

PROGRAM = """
import sys
from tune.cli.main import _run
code = _run(sys.argv[1:])
heavy = set({heavy}) & set(sys.modules)
assert not heavy, heavy
sys.exit(code)
"""


def run(*command: str, folder: Path) -> tuple[float, int, str, str]:
    """CPU seconds (user and system), exit code, stdout and stderr of a command, at its best of three."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    best = float("inf")
    for _ in range(3):
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=folder
        )
        assert process.stdout is not None
        assert process.stderr is not None
        out, err = process.stdout.read(), process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        process.stdout.close()
        process.stderr.close()
        best = min(best, usage.ru_utime + usage.ru_stime)
    return best, process.returncode, out, err


def test_help_answers_at_once(tmp_path: Path) -> None:
    seconds, code, out, err = run(sys.executable, "-m", "tune", "--help", folder=tmp_path)
    assert (code, err) == (0, "")
    assert all(verb in out for verb in ("train", "check", "preview", "generate", "chat", "recipes"))
    assert seconds < 0.3


def test_a_misspelt_key_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: {base: some/model}\ndata: {train: a.jsonl}\ntrain: {epoch: 3}\n")
    seconds, code, out, err = run(sys.executable, "-m", "tune", "train", "recipe.yaml", folder=tmp_path)
    assert (code, out) == (2, "")
    assert err == "recipe.yaml:3: train.epoch: is not a key of train. Did you mean 'epochs'?\n"
    assert seconds < 0.6


@pytest.mark.parametrize("verb", ["train", "check", "preview"])
def test_a_misspelt_file_is_told_at_once(verb: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: {base: some/model}\ndata: {train: rows.jsnl}\n")
    (tmp_path / "rows.jsonl").write_text("{}")
    seconds, code, out, err = run(sys.executable, "-m", "tune", verb, "recipe.yaml", folder=tmp_path)
    assert (code, out) == (2, "")
    assert err.endswith("Did you mean 'rows.jsonl'?\n")
    assert seconds < 0.6


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["recipes"], 0),
        (["train", "recipe.yaml"], 2),
        (["check", "recipe.yaml"], 2),
        (["trian"], 2),
    ],
)
def test_nothing_heavy_is_imported(arguments: list[str], code: int, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: {base: some/model}\ndata: {train: a.jsonl}\ntrain: {epoch: 3}\n")
    command = [sys.executable, "-c", PROGRAM.format(heavy=sorted(HEAVY)), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
