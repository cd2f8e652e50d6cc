"""Loading a base into shards: each process reads its part, and all parts make up what one process would have loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.distributed.ranks import logs, together
from tests.models.test_experts import same_state
from tests.tiny import SIZES, write_model
from tune.errors import ElsewhereError, ModelError
from tune.models import sharded_load
from tune.models.load import LoadedBase, load_base
from tune.models.sharding import STORAGE, local_bytes, quant_state_of, whole
from tune.models.shards import Checkpoint
from tune.recipe import schema

CPU = torch.device("cpu")


def load(path: Path, sharded: bool, **section: Any) -> LoadedBase:
    settings = {"base": str(path), "dtype": "float32", **section}
    return load_base(schema.Model(**settings), CPU, STORAGE, sharded)


def plain(tensor: Tensor) -> Tensor:
    return tensor.detach().as_subclass(torch.Tensor)


def assert_same(ours: Any, reference: Any) -> None:
    """All frozen parameters, gathered, and what unpacks them."""
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in reference.named_parameters()]
    for (name, module), other in zip(ours.named_modules(), reference.modules(), strict=True):
        for key, parameter in module.named_parameters(recurse=False):
            gathered, theirs = whole(parameter), plain(other.get_parameter(key))
            assert gathered.dtype == theirs.dtype, (name, key)
            # As bytes: packed ones make NaNs of bfloat16.
            assert torch.equal(plain(gathered).view(torch.uint8), theirs.view(torch.uint8)), (name, key)
            state, expected = quant_state_of(module, key), quant_state_of(other, key)
            assert (state is None) == (expected is None), (name, key)
            assert state is None or same_state(state, expected), (name, key)
    for (name, buffer), other in zip(ours.named_buffers(), reference.buffers(), strict=True):
        assert torch.equal(buffer, other), name


FAMILIES = [pytest.param(name, marks=[] if name == "mixtral" else pytest.mark.slow) for name in sorted(SIZES)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_shards_are_those_of_what_one_process_loads(family: str, quantization: str, tmp_path: Path) -> None:
    path = write_model(tmp_path / "base", family, torch.bfloat16, num_hidden_layers=3)

    def work(rank: int) -> None:
        ours = load(path, True, quantization=quantization)
        assert_same(ours.model, load(path, False, quantization=quantization).model)
        assert ours.packs == (family not in ("falcon", "bloom"))

    assert together(work, 2, tmp_path / "log") == [0, 0], logs(tmp_path / "log", 2)


def test_tied_and_unequal_shards(tmp_path: Path) -> None:
    """33 rows of embeddings do not divide by 4, and head and embeddings are one."""
    path = write_model(tmp_path / "base", "mistral", tie_word_embeddings=True, vocab_size=33)

    def work(rank: int) -> None:
        ours = load(path, True).model
        assert ours.get_output_embeddings().weight is ours.get_input_embeddings().weight
        assert_same(ours, load(path, False).model)

    assert together(work, 4, tmp_path / "log") == [0] * 4, logs(tmp_path / "log", 4)


@pytest.mark.parametrize("count", [2, 4])
def test_each_process_reads_its_part_and_keeps_its_part(count: int, tmp_path: Path) -> None:
    path = write_model(tmp_path / "base", "mixtral", num_hidden_layers=7)
    every = set(load_file(path / "model.safetensors"))
    plain_rows = Checkpoint.rows

    def work(rank: int) -> None:
        read: list[str] = []

        def rows(self: Checkpoint, name: str, start: int, stop: int) -> Tensor:
            read.append(name)
            return plain_rows(self, name, start, stop)

        Checkpoint.rows = rows  # type: ignore[method-assign]
        held = local_bytes(load(path, True).model)
        (tmp_path / f"read.{rank}").write_text(json.dumps({"read": read, "held": held}))

    assert together(work, count, tmp_path / "log") == [0] * count, logs(tmp_path / "log", count)
    found = [json.loads((tmp_path / f"read.{rank}").read_text()) for rank in range(count)]
    names = [name for entry in found for name in entry["read"]]
    assert len(names) == len(every), "no tensor is read twice"
    assert set(names) == every
    assert max(len(entry["read"]) for entry in found) <= len(every) / count + 20, "a layer has 19 tensors"
    alone = local_bytes(load(path, False).model)
    replicated = alone * 0.02  # scales
    for entry in found:
        assert entry["held"] == pytest.approx(alone / count + replicated, rel=0.05)


def damage(path: Path, name: str, tensor: Tensor | None) -> None:
    file = path / "model.safetensors"
    tensors = load_file(file)
    del tensors[name]
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("tensor", "words"),
    [(None, "lacks 1 tensors"), (torch.zeros(3, 5), "has the wrong shape for 1 tensors")],
    ids=["missing", "misshapen"],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_every_process(
    tensor: Tensor | None, words: str, tmp_path: Path
) -> None:
    path = write_model(tmp_path / "base", "mistral")
    damage(path, "model.layers.1.mlp.up_proj.weight", tensor)

    def work(rank: int) -> None:
        with pytest.raises(ModelError, match=words + r".*such as model\.layers\.1\.mlp\.up_proj\.weight"):
            load(path, True)

    assert together(work, 2, tmp_path / "log") == [0, 0], logs(tmp_path / "log", 2)


def test_a_disk_that_fails_one_process_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_model(tmp_path / "base", "mistral")
    plain_fill = sharded_load._fill

    def work(rank: int) -> None:
        def fill(*arguments: Any) -> Any:
            if rank == 1:
                raise OSError(5, "Input/output error")
            return plain_fill(*arguments)

        monkeypatch.setattr(sharded_load, "_fill", fill)
        said = "Input/output error" if rank == 1 else "another process cannot load"
        with pytest.raises(ModelError if rank == 1 else ElsewhereError, match=said):
            load(path, True)

    assert together(work, 2, tmp_path / "log") == [0, 0], logs(tmp_path / "log", 2)
