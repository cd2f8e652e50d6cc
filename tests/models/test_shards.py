"""Checkpoints on the disk: headers, places, indexes, and what is wrong with broken ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.export.merges import change_json, shard
from tests.tiny import write_model
from tune.errors import ModelError
from tune.models.shards import (
    INDEX,
    SINGLE,
    base_checkpoint,
    checkpoint_in,
    copying,
    read_header,
    weight_map,
)
from tune.recipe import schema

TENSORS = {
    "b.odd": torch.randn(5, 3),
    "a.half": torch.randn(7, 2, 3).half(),
    "c.brain": torch.randn(64, 64).bfloat16(),
    "d.double": torch.randn(3).double(),
    "e.scalar": torch.tensor(1.5),
    "f.empty": torch.empty(0, 4),
    "g.one": torch.randn(1),
    "h.integers": torch.arange(9),
    "i.flags": torch.tensor([True, False, True]),
}
FLOATING = [name for name, tensor in TENSORS.items() if tensor.is_floating_point()]


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / SINGLE, metadata={"format": "pt"})
    return tmp_path


@pytest.fixture
def sharded(single: Path) -> Path:
    shard(single, 200)
    assert len(list(single.glob("model-*.safetensors"))) >= 3
    return single


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_every_tensor_is_read_as_it_was_written(kind: str, request: pytest.FixtureRequest) -> None:
    checkpoint = checkpoint_in(request.getfixturevalue(kind))
    assert set(checkpoint.places) == set(TENSORS)
    assert (checkpoint.index is None) == (kind == "single")
    assert list(checkpoint.files) == sorted(checkpoint.files)
    for name in FLOATING:
        read = checkpoint.read(name)
        assert read.dtype == TENSORS[name].dtype
        assert read.shape == TENSORS[name].shape
        assert torch.equal(read, TENSORS[name])
    for name, tensor in TENSORS.items():
        raw = tensor.flatten().view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
        assert b"".join(checkpoint.chunks(name)) == bytes(raw.tolist())
        assert checkpoint.places[name].shape == tuple(tensor.shape)


def test_rows_are_those_of_the_whole(single: Path) -> None:
    checkpoint = checkpoint_in(single)
    for name in ("b.odd", "a.half", "c.brain", "g.one"):
        whole = TENSORS[name]
        for start in range(len(whole)):
            assert torch.equal(checkpoint.rows(name, start, len(whole)), whole[start:])
            assert torch.equal(checkpoint.rows(name, start, start + 1), whole[start : start + 1])
        assert checkpoint.rows(name, 1, 1).shape == (0, *whole.shape[1:])


def test_a_tensor_that_cannot_be_computed_with_is_named(single: Path) -> None:
    with pytest.raises(ModelError, match=r"h\.integers is of type I64"):
        checkpoint_in(single).read("h.integers")


def test_a_file_that_shrank_since_its_header_was_read_is_told(single: Path) -> None:
    checkpoint = checkpoint_in(single)
    last = max(FLOATING, key=lambda name: checkpoint.places[name].end)
    with open(single / SINGLE, "r+b") as file:
        file.truncate(checkpoint.places[last].start + 1)
    with pytest.raises(ModelError, match=f"ends within {last}"):
        checkpoint.read(last)


def test_places_are_in_the_order_of_their_bytes(single: Path) -> None:
    first, places = read_header(single / SINGLE)
    assert first == 8 + int.from_bytes((single / SINGLE).read_bytes()[:8], "little")
    at = first
    for place in places.values():
        assert place.start == at
        at = place.end
    assert at == (single / SINGLE).stat().st_size
    assert list(places) != sorted(places), "the case does not show that the order is not the names'"


def with_header(change: Callable[[dict[str, Any]], object], data: bytes | None = None) -> Callable[[Path], object]:
    def spoil(path: Path) -> None:
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        new = json.dumps(change(header) or header).encode()
        path.write_bytes(len(new).to_bytes(8, "little") + new + (content[8 + length :] if data is None else data))

    return spoil


def shifted(name: str, by: int) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        start, end = header[name]["data_offsets"]
        header[name]["data_offsets"] = [start + by, end + by]

    return change


def without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["b.odd"].pop(key)


def with_offsets(offsets: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["b.odd"].update(data_offsets=offsets)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.write_bytes(b""), "no whole safetensors file"),
        (lambda path: path.write_bytes(b"1234567"), "no whole safetensors file"),
        (lambda path: path.write_bytes(b"\xff" * 64), "no whole safetensors file"),
        (lambda path: path.write_bytes((5).to_bytes(8, "little") + b"{nono"), "no safetensors header"),
        (lambda path: path.write_bytes((2).to_bytes(8, "little") + b"[]x"), "should be"),
        (lambda path: path.write_bytes((2).to_bytes(8, "little") + b"17"), "no safetensors header"),
        (lambda path: path.write_bytes((4).to_bytes(8, "little") + b"\xff\xfe\xff\xfe"), "no safetensors header"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes long and should be"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "bytes long and should be"),
        (lambda path: path.write_bytes(path.read_bytes()[:300]), "no whole safetensors file"),
        (with_header(lambda header: header.pop("b.odd") and None), "has a hole before"),
        (with_header(shifted("b.odd", 4)), "has a hole before"),
        (with_header(shifted("b.odd", -4)), "has a hole before"),
        (with_header(without("dtype")), "no safetensors header"),
        (with_header(without("shape")), "no safetensors header"),
        (with_header(without("data_offsets")), "no safetensors header"),
        (with_header(with_offsets(["0", "60"])), "no safetensors header"),
        (with_header(with_offsets([0])), "no safetensors header"),
        (with_header(with_offsets([0, 60, 120])), "no safetensors header"),
        (with_header(with_offsets(None)), "no safetensors header"),
        (lambda path: path.unlink(), "cannot be read"),
    ],
)
def test_a_broken_file_is_told_from_a_whole_one(single: Path, spoil: Callable[[Path], object], words: str) -> None:
    spoil(single / SINGLE)
    with pytest.raises(ModelError, match=words) as error:
        read_header(single / SINGLE)
    assert str(single / SINGLE) in str(error.value)
    assert len(error.value.problems) == 1


def index_with(**changes: Any) -> Callable[[Path], None]:
    """Set where the index says that tensors are."""

    def spoil(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"] |= {name.replace("_", "."): shard for name, shard in changes.items()}
        (folder / INDEX).write_text(json.dumps(index))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / INDEX).unlink(), "holds neither"),
        (lambda folder: (folder / INDEX).write_text("{"), "is no index"),
        (lambda folder: (folder / INDEX).write_text("[]"), "is no index"),
        (lambda folder: (folder / INDEX).write_text("{}"), "is no index"),
        (lambda folder: change_json(folder / INDEX, weight_map={}), "names no tensors"),
        (lambda folder: change_json(folder / INDEX, weight_map=[1]), "is no index"),
        (index_with(b_odd="../model-00001.safetensors"), r"\.\./model.*no safetensors file beside it"),
        (index_with(b_odd="/tmp/model.safetensors"), r"/tmp/model.*no safetensors file beside it"),
        (index_with(b_odd=".."), r"'\.\.', which is no safetensors file beside it"),
        (index_with(b_odd="weights.bin"), r"weights\.bin"),
        (index_with(b_odd="more.safetensors"), r"more\.safetensors: cannot be read"),
        (lambda folder: sorted(folder.glob("*.safetensors"))[1].unlink(), "cannot be read"),
    ],
)
def test_a_broken_sharded_checkpoint_is_told(sharded: Path, spoil: Callable[[Path], object], words: str) -> None:
    spoil(sharded)
    with pytest.raises(ModelError, match=words) as error:
        checkpoint_in(sharded)
    assert len(error.value.problems) == 1


def test_an_index_that_names_the_wrong_shard_is_told(sharded: Path) -> None:
    names = weight_map(sharded / INDEX)
    one, other = (sorted(set(names.values()))[number] for number in (0, 1))
    moved = next(name for name, file in names.items() if file == one)
    index_with(**{moved.replace(".", "_"): other})(sharded)
    with pytest.raises(ModelError, match=f"says that {moved} is in {other}, and it is not"):
        checkpoint_in(sharded)


def test_a_tensor_in_two_shards_is_told(sharded: Path) -> None:
    one, other = sorted(sharded.glob("*.safetensors"))[:2]
    twice = next(iter(load_file(one)))
    save_file({**load_file(other), twice: load_file(one)[twice]}, other)
    with pytest.raises(ModelError, match=f"holds {twice}, and so does {one.name}"):
        checkpoint_in(sharded)


def test_a_misnamed_single_file_is_guessed(single: Path) -> None:
    (single / SINGLE).rename(single / "model.safetensor")
    with pytest.raises(ModelError, match="holds neither"):
        checkpoint_in(single)
    (single / "model.safetensor").rename(single / "models.safetensors")
    with pytest.raises(ModelError, match=r"Did you mean 'models\.safetensors'"):
        checkpoint_in(single)


def test_a_single_file_comes_before_an_index_as_in_transformers(sharded: Path) -> None:
    save_file({"alone": torch.zeros(2)}, sharded / SINGLE)
    assert set(checkpoint_in(sharded).places) == {"alone"}


def test_copying_ends_where_it_should_and_says_when_it_cannot(single: Path) -> None:
    content = (single / SINGLE).read_bytes()
    with open(single / SINGLE, "rb") as file:
        assert b"".join(copying(file.fileno(), 3, 77)) == content[3:77]
        assert list(copying(file.fileno(), 5, 5)) == []
        with pytest.raises(EOFError):
            list(copying(file.fileno(), 0, len(content) + 1))


@pytest.mark.parametrize(
    ("stored", "asked", "prefix", "found"),
    [
        ("transformer.h.0.weight", "transformer.h.0", "transformer", "transformer.h.0.weight"),
        ("h.0.weight", "transformer.h.0", "transformer", "h.0.weight"),
        ("transformer.h.0.weight", "h.0", "transformer", "transformer.h.0.weight"),
        ("h.0.bias", "transformer.h.0", "transformer", None),
        ("transformers.h.0.weight", "h.0", "transformer", None),
        ("h.10.weight", "transformer.h.1", "transformer", None),
    ],
)
def test_a_parameter_is_found_with_and_without_the_models_prefix(
    tmp_path: Path, stored: str, asked: str, prefix: str, found: str | None
) -> None:
    save_file({stored: torch.zeros(2)}, tmp_path / SINGLE)
    assert checkpoint_in(tmp_path).find(asked, prefix) == found


def test_a_parameter_of_the_model_itself_is_found(tmp_path: Path) -> None:
    save_file({"scale": torch.zeros(2), "m.bias": torch.zeros(2)}, tmp_path / SINGLE)
    checkpoint = checkpoint_in(tmp_path)
    assert checkpoint.find("", "model", "scale") == "scale"
    assert checkpoint.find("m", "model", "bias") == "m.bias"


def test_the_checkpoint_of_a_recipe_is_that_of_its_base(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "base", "llama")
    checkpoint = base_checkpoint(schema.Model(base=str(folder)))
    assert checkpoint.files == (folder / SINGLE,)
    with pytest.raises(ModelError, match="does not exist"):
        base_checkpoint(schema.Model(base=str(tmp_path / "bases" / "none")))
