"""Small finished runs to merge: each kind is trained once a process, and copied for the tests that change something."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.tiny import write_model
from tests.training.jobs import tiny_recipe
from tune.folder import RunFolder
from tune.run import train

FAMILIES = ("llama", "mistral", "falcon", "bloom")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Made:
    """A finished run in `root`/run over a base in `root`/base."""

    root: Path

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.root / "run")

    @property
    def adapter_file(self) -> Path:
        return self.run.adapter / "adapter_model.safetensors"

    def copy(self, root: Path) -> Made:
        """The same run and base elsewhere, to be changed."""
        shutil.copytree(self.root, root, dirs_exist_ok=True)
        recipe = root / "run" / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace(str(self.root), str(root)))
        return Made(root)


def made(
    family: str = "llama",
    dtype: str = "float32",
    sharded: bool = False,
    model: dict[str, Any] | None = None,
    spoil: Callable[[Path], None] | None = None,
    **recipe: Any,
) -> Made:
    """Train a run, or return the one that was trained before.

    Args:
        family: of `tests.tiny.SIZES`.
        dtype: that the base is stored in.
        sharded: whether its files are of 100 KB.
        model: changes to the config of the base.
        spoil: changes the base's folder before it is trained on.
        recipe: changes to the recipe, dotted keys with __ for the dot.
    """
    return _made(family, dtype, sharded, json.dumps(model or {}), spoil, json.dumps(recipe))


@functools.cache
def _made(
    family: str, dtype: str, sharded: bool, model: str, spoil: Callable[[Path], None] | None, recipe: str
) -> Made:
    root = Path(tempfile.mkdtemp(prefix="merges-"))
    atexit.register(_remove, root, os.getpid())
    write_model(root / "base", family, getattr(torch, dtype), **json.loads(model))
    if sharded:
        shard(root / "base")
    if spoil is not None:
        spoil(root / "base")
    # A few steps far apart from the start: the deltas are then as large as those of a real run.
    settings = {"train__max_steps": 3, "train__save_every": 3, "train__learning_rate": 0.02, **json.loads(recipe)}
    settings.setdefault("model__dtype", "float32" if dtype == "float32" else "bfloat16")
    train(tiny_recipe(root, base=root / "base", **settings))
    return Made(root)


def _remove(root: Path, process: int) -> None:
    if os.getpid() == process:
        shutil.rmtree(root, ignore_errors=True)


def shard(folder: Path, size: int = 100_000) -> None:
    """Split model.safetensors into shards of at most `size` bytes, as save_pretrained does."""
    tensors = load_file(folder / "model.safetensors")
    groups: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in tensors.items():
        if groups[-1] and sum(t.nbytes for t in groups[-1].values()) + tensor.nbytes > size:
            groups.append({})
        groups[-1][name] = tensor
    where = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        save_file(group, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(group, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "model.safetensors").unlink()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, in the order of their names."""
    return sorted(folder.glob("*.safetensors"))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a model folder, read by safetensors' own reader."""
    return {name: tensor for path in weight_files(folder) for name, tensor in load_file(path).items()}


def header_of(path: Path) -> bytes:
    """The bytes before the tensors."""
    content = path.read_bytes()
    return content[: 8 + int.from_bytes(content[:8], "little")]


def file_of(folder: Path, name: str) -> Path:
    """The file that holds a tensor."""
    return next(path for path in weight_files(folder) if name in load_file(path))


def change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Read a safetensors file, change its tensors, and write it again."""
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def change_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}, indent=2))


def files(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def relative(one: torch.Tensor, two: torch.Tensor) -> float:
    """The distance of two tensors, relative to the second."""
    return float((one.double() - two.double()).norm() / two.double().norm())
