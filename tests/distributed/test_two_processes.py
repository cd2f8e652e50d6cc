"""Two processes on one machine, over gloo: the same recipe gives the same adapter as one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.jobs import tiny_recipe
from tests.training.processes import fork, wait
from tune.cli.main import _run
from tune.run import train


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours.double() - reference.double()).norm() / reference.double().norm())


def launch(arguments: list[str], count: int, log: Path) -> list[int]:
    """Fork `count` ranks as accelerate's launcher would start them, and return their exit codes."""
    port = free_port()

    def rank(number: int) -> int:
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
        return _run(arguments)

    children = [fork(lambda n=n: rank(n), log.with_suffix(f".{n}")) for n in range(count)]  # type: ignore[misc]
    return [wait(child) for child in children]


def compare(one: Path, two: Path) -> None:
    reference = load_file(one / "adapter" / "adapter_model.safetensors")
    ours = load_file(two / "adapter" / "adapter_model.safetensors")
    assert ours.keys() == reference.keys()
    for name, tensor in reference.items():
        assert relative(ours[name], tensor) < 1e-4, name


def test_two_processes_train_the_adapter_of_one(tmp_path: Path) -> None:
    evaluated = {"data__eval": [str(tmp_path / "eval.jsonl")], "train__eval_every": 5}
    train(tiny_recipe(tmp_path, output=tmp_path / "one", **evaluated))
    tiny_recipe(tmp_path, output=tmp_path / "two", **evaluated)
    log = tmp_path / "log"
    assert launch(["train", str(tmp_path / "recipe.yaml")], 2, log) == [0, 0], log.with_suffix(".0").read_text()
    first, second = (log.with_suffix(f".{n}").read_text() for n in range(2))
    assert "devices 2 ddp" in first
    assert second.strip() == "", "only the first process prints"
    compare(tmp_path / "one", tmp_path / "two")


def test_a_process_without_an_example_takes_part(tmp_path: Path) -> None:
    train(tiny_recipe(tmp_path, output=tmp_path / "one", train__batch_size=1, train__max_steps=4))
    tiny_recipe(tmp_path, output=tmp_path / "two", train__batch_size=1, train__max_steps=4)
    assert launch(["train", str(tmp_path / "recipe.yaml")], 2, tmp_path / "log") == [0, 0]
    compare(tmp_path / "one", tmp_path / "two")


def test_what_the_first_process_refuses_ends_all(tmp_path: Path) -> None:
    train(tiny_recipe(tmp_path, train__max_steps=1))
    log = tmp_path / "log"
    assert launch(["train", str(tmp_path / "recipe.yaml")], 2, log) == [2, 2]
    assert "--resume" in log.with_suffix(".0").read_text()


@pytest.mark.slow
def test_the_launch_line_of_the_readme_starts_two(tmp_path: Path) -> None:
    train(tiny_recipe(tmp_path, output=tmp_path / "one"))
    tiny_recipe(tmp_path, output=tmp_path / "two")
    line = (
        f"{sys.executable} -m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 "
        f"--mixed_precision no --dynamo_backend no --main_process_port {free_port()} -m tune train"
    )
    done = subprocess.run(
        [*line.split(), str(tmp_path / "recipe.yaml")],
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "devices 2 ddp" in done.stdout
    compare(tmp_path / "one", tmp_path / "two")
