"""What the backward computes again changes the memory, and no bit of the adapter."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.jobs import tiny_recipe
from tune.errors import ModelError
from tune.progress import Progress
from tune.run import train


class Heard(Progress):
    """Keeps the lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def test_every_way_trains_the_same_mixture(tmp_path: Path) -> None:
    adapters, told = {}, {}
    for way in ("none", "experts", "full"):
        heard = Heard()
        run = train(
            tiny_recipe(
                tmp_path,
                "mixtral",
                adapter__targets=["attention", "experts"],
                train__recompute=way,
                train__max_steps=4,
                output=tmp_path / way,
            ),
            progress=heard,
        )
        adapters[way] = (run.adapter / "adapter_model.safetensors").read_bytes()
        (told[way],) = [line for line in heard.lines if line.startswith("rows of")]
    assert adapters["none"] == adapters["experts"] == adapters["full"]
    assert told["none"] == "rows of 512 tokens"
    assert told["experts"] == "rows of 512 tokens, experts recomputed"
    assert told["full"] == "rows of 512 tokens, recomputed"


def test_a_resume_may_choose_otherwise_and_old_checkpoints_are_read(tmp_path: Path) -> None:
    settings = {"adapter__targets": ["experts"], "train__max_steps": 4, "train__save_every": 2}
    whole = train(tiny_recipe(tmp_path, "mixtral", **settings, output=tmp_path / "whole"))
    train(tiny_recipe(tmp_path, "mixtral", **{**settings, "train__max_steps": 2, "train__scheduler": "constant"}))
    longer = {**settings, "train__scheduler": "constant", "train__recompute": "experts"}
    state = tmp_path / "run/checkpoints/step-000002/state.json"
    assert '"recompute": "none"' in state.read_text()
    assert train(tiny_recipe(tmp_path, "mixtral", **longer), resume=True).steps == whole.steps


def test_a_dense_base_has_no_experts_to_recompute(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"train\.recompute: experts: the base has no experts"):
        train(tiny_recipe(tmp_path, train__recompute="experts"))
