"""A checkpoint on the disk as it is: which file holds which tensor, read one tensor at a time.

safetensors' own reader maps whole files into memory, so a process that walks through a checkpoint grows with it.
Here the headers are parsed (8 bytes of length, a JSON object, then the tensors) and tensors are read by their place.
The format is described at https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tune.errors import ModelError, did_you_mean
from tune.files.foreign import open_plain, parse_json, read_object
from tune.files.pickles import pickles_among, refuse_disguised
from tune.models.hub import INDEX as INDEX
from tune.models.hub import SINGLE as SINGLE
from tune.models.hub import fetch, local_folder
from tune.recipe import schema
from tune.recipe.read import shown

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The floating-point types that a delta can be added to, by their names in a header."""

_LONGEST_HEADER = 32 * 2**20
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Bytes of an element, of the types whose tensors are checked to be as long as their shape says."""
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors")
_COPY = 8 * 2**20


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor is: its file, and its bytes there."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Stack:
    """A parameter of all experts [E, out, in] that is stored expert by expert, its rows in one matrix or in two."""

    experts: tuple[tuple[str, ...], ...]


Stored = str | Stack
"""How a checkpoint holds a parameter: as a tensor of this name, or as many."""

_PER_EXPERT = {
    "gate_up_proj": (("w1", "w3"), ("gate_proj", "up_proj")),
    "down_proj": (("w2",), ("down_proj",)),
}
"""The matrices of one expert that make up its rows of a parameter: Mixtral's names, and OLMoE's and Qwen's."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The safetensors files of one model."""

    files: tuple[Path, ...]
    """In the order of their names."""
    index: Path | None
    """The index of a sharded checkpoint."""
    places: dict[str, Place]

    def read(self, name: str) -> Tensor:
        """Return one tensor in its stored dtype, on the CPU."""
        return self.rows(name, 0, self.places[name].shape[0] if self.places[name].shape else 1)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows `start` to `stop` (along the first dimension) of one tensor in its stored dtype.

        Raises:
            ModelError: the tensor is of no floating-point type that can be computed with, or its file has changed.
        """
        place = self.places[name]
        dtype = DTYPES.get(place.dtype)
        if dtype is None:
            raise ModelError(
                f"{place.file}: {name} is of type {place.dtype}, which cannot be computed with. "
                "Use a base in float32, bfloat16 or float16."
            )
        shape = place.shape or (1,)
        row = (place.end - place.start) // max(shape[0], 1)
        data = bytearray((stop - start) * row)
        with open(place.file, "rb", buffering=0) as file:
            file.seek(place.start + start * row)
            if file.readinto(data) != len(data):
                raise ModelError(f"{place.file}: ends within {name}. Copy it again.")
        if not data:
            return torch.empty((stop - start, *shape[1:]), dtype=dtype)
        tensor = torch.frombuffer(data, dtype=dtype).view(stop - start, *shape[1:])
        return tensor if place.shape else tensor[0]

    def shape_of(self, stored: Stored) -> tuple[int, ...]:
        """Return the shape of a parameter; of a stack, [E, out, in].

        Raises:
            ModelError: the experts of a stack differ in shape.
        """
        if isinstance(stored, str):
            return self.places[stored].shape
        shapes = [[self.places[name].shape for name in names] for names in stored.experts]
        for names, found in zip(stored.experts, shapes, strict=True):
            if found != shapes[0] or any(len(shape) != 2 or shape[1] != found[0][1] for shape in found):
                raise ModelError(
                    f"{self.places[names[0]].file}: {names[0]} has another shape than the other "
                    "experts'. Copy it again."
                )
        return len(shapes), sum(shape[0] for shape in shapes[0]), *shapes[0][0][1:]

    def chunks(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of one tensor, some megabytes at a time."""
        place = self.places[name]
        with open(place.file, "rb", buffering=0) as file:
            yield from copying(file.fileno(), place.start, place.end)

    def find(self, module: str, prefix: str, parameter: str = "weight") -> str | None:
        """Return the stored name of a module's parameter, or None.

        Some checkpoints leave out the prefix of the model under the output head (BLOOM), or have it where the
        model does not; some call a block otherwise (Mixtral).

        Args:
            module: its full name in the transformers model; empty for the model itself.
            prefix: the model's `base_model_prefix`.
            parameter: the parameter's name in the module.
        """
        for block in _spellings(module, prefix):
            candidate = f"{block}.{parameter}" if block else parameter
            if candidate in self.places:
                return candidate
        return None

    def find_stack(self, module: str, prefix: str, parameter: str, experts: int) -> Stack | None:
        """Return the stored matrices of a parameter that holds all experts of a layer, or None.

        Args:
            module: the experts' full name in the transformers model.
            prefix: the model's `base_model_prefix`.
            parameter: `gate_up_proj` or `down_proj`.
            experts: how many.
        """
        for block in _spellings(module, prefix):
            for matrices in _PER_EXPERT.get(parameter, ()):
                names = tuple(
                    tuple(f"{block}.{expert}.{matrix}.weight" for matrix in matrices) for expert in range(experts)
                )
                if all(name in self.places for expert in names for name in expert):
                    return Stack(names)
        return None


def _spellings(module: str, prefix: str) -> list[str]:
    """The names that a checkpoint may have for a module."""
    found = [module, module.removeprefix(f"{prefix}."), f"{prefix}.{module}" if module else prefix]
    return found + [name.replace(".mlp.", ".block_sparse_moe.") for name in found if ".mlp." in name]


def copying(descriptor: int, start: int, end: int) -> Iterator[bytes]:
    """Yield the bytes from `start` to `end` of an open file.

    Raises:
        EOFError: it ends before.
    """
    while start < end:
        data = os.pread(descriptor, min(_COPY, end - start), start)
        if not data:
            raise EOFError
        yield data
        start += len(data)


def read_header(path: Path) -> tuple[int, dict[str, Place]]:
    """Return where the tensors of a safetensors file begin, and their places in the order of their bytes.

    Raises:
        ModelError: it is no safetensors file, or a part of it is missing.
    """

    def broken(words: str) -> ModelError:
        return ModelError(f"{path}: {words}. The download or copy may be incomplete: copy it again.")

    try:
        with open_plain(path, links=True) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                refuse_disguised(path)
                raise broken("is no whole safetensors file")
            header = dict(parse_json(file.read(length)))
        header.pop("__metadata__", None)
        first = 8 + length
        places = {name: _place(path, name, entry, first) for name, entry in header.items()}
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}). Copy it again.") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise broken(f"has a header that is no safetensors header ({error})") from error
    ordered = dict(sorted(places.items(), key=lambda item: (item[1].start, item[1].end)))
    at = first
    for name, place in ordered.items():
        if place.start != at or place.end < place.start:
            raise broken(f"has a hole before {name}")
        at = place.end
    if at != size:
        raise broken(f"is {size:,} bytes long and should be {at:,}")
    return first, ordered


def _place(path: Path, name: str, entry: Any, first: int) -> Place:
    """The place that the entry of a tensor in a header tells, where the tensors begin at `first`.

    Raises:
        ValueError: it tells none.
        KeyError, TypeError: likewise.
    """
    dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = [*shape, start, end]
    if (
        not isinstance(dtype, str)
        or len(shape) > 16
        or not all(type(number) is int and 0 <= number < 2**63 for number in numbers)
    ):
        raise ValueError(f"a type, a shape or a place of {shown(name)} is none")
    if dtype in _SIZES and math.prod(shape) * _SIZES[dtype] != end - start:
        raise ValueError(f"{end - start} bytes of {shown(name)} are not of shape {shape}"[:200])
    return Place(path, dtype, tuple(shape), first + start, first + end)


def reshaped_header(path: Path, shape_of: Callable[[str], tuple[int, ...]]) -> tuple[bytes, dict[str, int]]:
    """Return the bytes before the tensors of a safetensors file whose tensors take other shapes, and where each ends.

    Order, types and metadata stay; where no shape changes, so does every byte.

    Args:
        path: the file as it is, which `read_header` has read.
        shape_of: the new shape of each tensor, of the old one's type.
    """
    first, places = read_header(path)
    with open(path, "rb") as file:
        old = file.read(first)
    shapes = {name: shape_of(name) for name in places}
    if all(shapes[name] == place.shape for name, place in places.items()):
        return old, {name: place.end for name, place in places.items()}
    header, at, ends = dict(json.loads(old[8:])), 0, {}
    for name, place in places.items():
        size = (place.end - place.start) // max(math.prod(place.shape), 1) * math.prod(shapes[name])
        header[name] |= {"shape": list(shapes[name]), "data_offsets": [at, at + size]}
        at = ends[name] = at + size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight, as in files of safetensors' own
    return len(text).to_bytes(8, "little") + text, {name: 8 + len(text) + end for name, end in ends.items()}


def read_checkpoint(single: Path | None, index: Path | None, shards: dict[str, Path]) -> Checkpoint:
    """Read the headers of a checkpoint: one file, or the shards that an index names.

    Raises:
        ModelError: a file is broken, or index and shards disagree.
    """
    files = (single,) if single is not None else tuple(shards[name] for name in sorted(shards))
    places: dict[str, Place] = {}
    for file in files:
        for name, place in read_header(file)[1].items():
            if name in places:
                raise ModelError(f"{file}: holds {name}, and so does {places[name].file.name}. Copy both again.")
            places[name] = place
    if index is not None:
        for name, shard in weight_map(index).items():
            if name not in places or places[name].file != shards[shard]:
                raise ModelError(f"{index}: says that {name} is in {shard}, and it is not. Copy both again.")
    return Checkpoint(files, index, places)


def weight_map(index: Path) -> dict[str, str]:
    """Return the shard of each tensor, as the index of a sharded checkpoint says.

    Raises:
        ModelError: it is no index, or names a file outside its folder.
    """
    try:
        listed = read_object(index, _LONGEST_HEADER, links=True)["weight_map"]
        found = {str(name): str(shard) for name, shard in listed.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{index}: is no index of a checkpoint ({error}). Copy it again.") from error
    for shard in found.values():
        if pickles_among([shard]):
            raise ModelError(
                f"{index}: names {shard!r}, a Python pickle, which can run code when it is read. Convert the weights "
                "to safetensors, or use a revision that has them."
            )
        if not _SHARD.fullmatch(shard):
            raise ModelError(f"{index}: names {shown(shard)!r}, which is no safetensors file beside it. Copy it again.")
    if not found:
        raise ModelError(f"{index}: names no tensors. Copy it again.")
    return found


def checkpoint_in(folder: Path) -> Checkpoint:
    """Return the checkpoint in a local folder; `model.safetensors` comes before an index, as in transformers.

    Raises:
        ModelError: there is none, or it is broken.
    """
    if (folder / SINGLE).is_file():
        return read_checkpoint(folder / SINGLE, None, {})
    if not (folder / INDEX).is_file():
        names = [path.name for path in folder.glob("*.safetensors*")]
        raise ModelError(
            f"{folder}: holds neither {SINGLE} nor {INDEX}.{did_you_mean(SINGLE, names)} "
            "Save the model with transformers, or copy it again."
        )
    shards = {name: folder / name for name in set(weight_map(folder / INDEX).values())}
    return read_checkpoint(None, folder / INDEX, shards)


def base_checkpoint(section: schema.Model) -> Checkpoint:
    """Return the checkpoint of a recipe's base; what is missing of a Hub base is downloaded.

    Raises:
        ModelError: it is not there, not permitted or broken.
    """
    folder = local_folder(section.base)
    if folder is not None:
        return checkpoint_in(folder)
    single = fetch(section.base, SINGLE, section.revision)
    if single is not None:
        return read_checkpoint(single, None, {})
    index = fetch(section.base, INDEX, section.revision)
    if index is None:
        raise ModelError(f"model.base: {section.base} on the Hub holds no safetensors weights. Use a base that does.")
    shards: dict[str, Path] = {}
    for name in sorted(set(weight_map(index).values())):
        found = fetch(section.base, name, section.revision)
        if found is None:
            raise ModelError(f"model.base: {section.base} on the Hub lacks {name}, which its index names.")
        shards[name] = found
    return read_checkpoint(None, index, shards)
