"""The base split over processes (`devices N fsdp2`): the same adapter as whole on each, and as on one process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.ranks import FSDP, compare, launch, logged, logs, relative
from tests.training.jobs import tiny_recipe, write_rows
from tune.run import train

DDP: dict[str, str] = {}
MIXTURE = {"adapter__targets": ["attention", "experts"]}


def run(folder: Path, name: str, count: int, environment: dict[str, str], family: str, **changes: Any) -> str:
    """Train on `count` processes into `folder/name`, and return what the first of them printed."""
    tiny_recipe(folder, family, output=folder / name, **changes)
    log = folder / f"{name}-log"
    assert launch(["train", str(folder / "recipe.yaml")], count, log, environment) == [0] * count, logs(log, count)
    assert all(not log.with_suffix(f".{n}").read_text().strip() for n in range(1, count)), "only the first prints"
    return log.with_suffix(".0").read_text()


def same_bits(one: Path, two: Path) -> bool:
    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, two))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("family", "count", "batch_size"),
    [("mistral", 2, 8), pytest.param("mixtral", 2, 8, marks=pytest.mark.slow), ("mixtral", 4, 3)],
    ids=["Mistral", "Mixtral", "Mixtral, and a process without an example"],
)
def test_a_sharded_base_trains_the_adapter_of_one_process(
    family: str, count: int, batch_size: int, tmp_path: Path
) -> None:
    held_out = write_rows(tmp_path / "held-out.jsonl", 6 if batch_size > count else count - 1, start=100)
    changes: dict[str, Any] = {
        "data__eval": [str(held_out)],
        "train__eval_every": 5,
        "train__batch_size": batch_size,
        "train__micro_batch_tokens": 200,  # rows of one or two examples, not as many on each process
        **(MIXTURE if family == "mixtral" else {}),
    }
    train(tiny_recipe(tmp_path, family, output=tmp_path / "one", **changes))
    said = run(tmp_path, "sharded", count, FSDP, family, **changes)
    run(tmp_path, "whole", count, DDP, family, **changes)
    assert f"devices {count} fsdp2" in said
    compare(tmp_path / "one", tmp_path / "sharded")
    assert same_bits(tmp_path / "whole", tmp_path / "sharded"), "gathering a layer must not change a bit of it"
    for one, ours in zip(logged(tmp_path / "one"), logged(tmp_path / "sharded"), strict=True):
        assert ours["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert ("eval_loss" in ours) == ("eval_loss" in one)
        assert ours.get("eval_loss", 0.0) == pytest.approx(one.get("eval_loss", 0.0), rel=1e-4)
        if family == "mixtral":
            assert ours["router"]["balance"] == pytest.approx(one["router"]["balance"], rel=1e-3)
            assert ours["router"]["largest_load"] == pytest.approx(one["router"]["largest_load"], rel=0.01)


def gradients(run: Path) -> dict[str, torch.Tensor]:
    """AdamW's first moments after one step, which are a tenth of the gradient."""
    moments = load_file(run / "checkpoints/step-000001/optimizer.safetensors")
    return {name: tensor for name, tensor in moments.items() if name.endswith("/exp_avg")}


@pytest.mark.parametrize("family", [pytest.param("mistral", marks=pytest.mark.slow), "mixtral"])
def test_a_step_has_the_gradients_of_one_process(family: str, tmp_path: Path) -> None:
    """From an adapter that has learned something: B is zero at the start, and A would have no gradient."""
    changes: dict[str, Any] = MIXTURE if family == "mixtral" else {}
    train(tiny_recipe(tmp_path, family, output=tmp_path / "start", train__max_steps=3, **changes))
    changes = {
        **changes,
        "adapter__start_from": str(tmp_path / "start"),
        "train__max_steps": 1,
        "train__max_grad_norm": 1e6,
        "router__balance_loss": 1.0,
    }
    train(tiny_recipe(tmp_path, family, output=tmp_path / "one", **changes))
    reference = gradients(tmp_path / "one")
    assert all(tensor.norm() > 0 for tensor in reference.values())
    for name, count, environment in (("two", 2, FSDP), ("four", 4, FSDP), ("ddp", 2, DDP)):
        run(tmp_path, name, count, environment, family, **changes)
        ours = gradients(tmp_path / name)
        assert ours.keys() == reference.keys()
        found = {key: relative(ours[key], tensor) for key, tensor in reference.items()}
        assert max(found.values()) < 1e-5, (name, found)


SETTINGS: list[tuple[str, int, dict[str, Any]]] = [
    ("mixtral", 2, {"adapter__targets": ["attention", "router"], "train__recompute": "experts"}),
    ("mixtral", 2, {**MIXTURE, "model__dtype": "bfloat16", "adapter__dropout": 0.1, "train__recompute": "full"}),
    ("qwen3_moe", 3, {**MIXTURE, "router__train": "full"}),
    ("qwen2_moe", 2, MIXTURE),
    ("olmoe", 2, MIXTURE),
    ("mistral", 2, {"model__dtype": "bfloat16", "adapter__targets": ["v_proj"], "train__recompute": "full"}),
    ("llama", 2, {"model__quantization": "none"}),
    ("falcon", 3, {}),
    ("bloom", 2, {}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "count", "changes"), SETTINGS, ids=[f"{s[0]}-{n}" for n, s in enumerate(SETTINGS)])
def test_sharded_is_replicated_bit_for_bit(family: str, count: int, changes: dict[str, Any], tmp_path: Path) -> None:
    """Other splits move a token across a router's edge here and there; the same split must not."""
    run(tmp_path, "whole", count, DDP, family, **changes)
    run(tmp_path, "sharded", count, FSDP, family, **changes)
    assert same_bits(tmp_path / "whole", tmp_path / "sharded")


def cut(folder: Path, step: int) -> None:
    """Leave a run as a kill after `step` would."""
    for path in (folder / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    shutil.rmtree(folder / "adapter")
    (folder / "finished.json").unlink()


def resume(folder: Path, name: str, count: int, environment: dict[str, str]) -> str:
    log = folder / f"{name}-again-{count}"
    arguments = ["train", str(folder / "recipe.yaml"), f"output={folder / name}", "--resume"]
    assert launch(arguments, count, log, environment) == [0] * count, logs(log, count)
    return logs(log, count)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((2, FSDP), (1, DDP)),
        pytest.param((1, DDP), (4, FSDP), marks=pytest.mark.slow),
        pytest.param((2, DDP), (4, FSDP), marks=pytest.mark.slow),
        pytest.param((2, DDP), (4, DDP), marks=pytest.mark.slow),
        pytest.param((4, DDP), (1, DDP), marks=pytest.mark.slow),
    ],
    ids=["2 sharded, then 1", "1, then 4 sharded", "2 whole, then 4 sharded", "2 whole, then 4", "4 whole, then 1"],
)
def test_a_checkpoint_resumes_on_any_number_of_processes(
    first: tuple[int, dict[str, str]], second: tuple[int, dict[str, str]], tmp_path: Path
) -> None:
    train(tiny_recipe(tmp_path, "mixtral", output=tmp_path / "one", train__save_every=5, **MIXTURE))
    run(tmp_path, "moved", *first, "mixtral", train__save_every=5, **MIXTURE)
    cut(tmp_path / "moved", 5)
    said = resume(tmp_path, "moved", *second)
    assert "resume from step 5" in said
    assert f"processes was {first[0]}, is {second[0]}" in said
    compare(tmp_path / "one", tmp_path / "moved")
