"""Load a base into shards: each process reads and packs its share of the layers, and every process keeps its part.

The model is built without weights. Then its layers are taken in rounds, one layer for each process. A process reads
the tensors of its own layer from safetensors, packs them as the single-process loader does, bit for bit, and sends
the packed layer to the others; each keeps its shard of every layer before the next comes. So a process reads one part
in N of the files, and holds no more than its shards and two packed layers, its own and the one that is being sent.

What is wrong with a checkpoint shows in the headers of its files, which every process reads, before any weight does.
What only one process meets (a disk that fails, a device that is full) ends all of them at the end of a round.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
import torch.distributed as dist
from bitsandbytes.functional import QuantState
from torch import Tensor, nn

from tune.errors import ElsewhereError, ModelError, UserError
from tune.models.experts import STACKS, NF4Experts, pack
from tune.models.hub import quiet_transformers
from tune.models.mapped import give_back_heap
from tune.models.nf4_quantizer import NF4Config, NF4Quantizer
from tune.models.sharding import STORAGE, decoder_layers, shard_layer, shard_rest
from tune.models.shards import Checkpoint, Stored, base_checkpoint
from tune.recipe import schema


@dataclass(frozen=True, slots=True)
class _Parameter:
    """One parameter of the model, and how the checkpoint holds it."""

    holders: tuple[tuple[nn.Module, str], ...]
    """The modules that have it, each with its name there; several where it is tied."""
    stored: Stored
    packs: bool
    dtype: torch.dtype
    """What it is cast to before it is packed or used."""
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Filled:
    """A parameter's tensor as the model computes with it, and the tensors that unpack it, if it is packed."""

    tensor: Tensor
    state: dict[str, Tensor] | None


def load_sharded(section: schema.Model, config: Any, device: torch.device, options: dict[str, Any]) -> Any:
    """Return the base as a transformers model whose parameters lie in shards over all processes, frozen.

    Args:
        section: the recipe's `model`.
        config: the base's.
        device: this process's.
        options: for transformers, such as `experts_implementation`.

    Raises:
        ModelError: the base cannot be found, read, permitted or used, here or in another process.
    """
    from torch.distributed.device_mesh import init_device_mesh

    checkpoint = base_checkpoint(section)
    model = _build(section, config, device, options)
    units = [*decoder_layers(model, section.base).values(), model]
    plans = _plan(model, units, checkpoint, section)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    rank, count = dist.get_rank(), dist.get_world_size()
    for start in range(0, len(units), count):
        filled = _read_share(plans[start : start + count], rank, checkpoint, device, section.base)
        for owner, (unit, plan) in enumerate(
            zip(units[start : start + count], plans[start : start + count], strict=True)
        ):
            for parameter, content in zip(plan, _send(filled, len(plan), owner, device), strict=True):
                _put(parameter, content)
            if owner == rank:
                filled = []
            shard_rest(unit, mesh) if unit is model else shard_layer(unit, mesh)
            give_back_heap()
    return model


def _build(section: schema.Model, config: Any, device: torch.device, options: dict[str, Any]) -> Any:
    """Return the model on the meta device, its 4-bit layers in place; only buffers are real."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, section.dtype)
    with quiet_transformers(), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=dtype, trust_remote_code=section.trust_remote_code, **options
        )
    model.tie_weights()  # the context above gave every module parameters of its own
    if section.quantization == "nf4":
        quantizer = NF4Quantizer(NF4Config(dtype, STORAGE), pre_quantized=False)
        quantizer.preprocess_model(model=model, device_map={"": device})
        quantizer.postprocess_model(model)
    return model.requires_grad_(False).eval()


def _plan(model: Any, units: list[nn.Module], checkpoint: Checkpoint, section: schema.Model) -> list[list[_Parameter]]:
    """Return the parameters of each unit, the model itself last, and refuse a checkpoint that does not hold them."""
    names = {id(module): name for name, module in model.named_modules()}
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            holders.setdefault(id(parameter), []).append((module, key))
    plans, taken, lacking, misshapen = [], set(), [], []
    for unit in units:
        plan = []
        for parameter in unit.parameters():
            if id(parameter) in taken:
                continue
            taken.add(id(parameter))
            having = tuple(holders[id(parameter)])
            module, key = having[0]
            name = f"{names[id(module)]}.{key}"
            stored = _find(checkpoint, [(names[id(owner)], owner, key) for owner, key in having], model)
            shape = module.shape_of(key) if isinstance(module, NF4Experts) else tuple(parameter.shape)
            if stored is None:
                lacking.append(name)
            elif checkpoint.shape_of(stored) != shape:
                misshapen.append(name)
            else:
                packs = isinstance(module, NF4Experts) or (isinstance(module, bnb.nn.Linear4bit) and key == "weight")
                dtype = getattr(torch, section.dtype) if packs else parameter.dtype
                plan.append(_Parameter(having, stored, packs, dtype, shape))
        plans.append(plan)
    for words, wrong in (("lacks", lacking), ("has the wrong shape for", misshapen)):
        if wrong:
            raise ModelError(
                f"model.base: the checkpoint of {section.base} {words} {len(wrong)} tensors of the model its "
                f"config.json describes, such as {wrong[0]}. It is incomplete, or belongs to another config."
            )
    return plans


def _find(checkpoint: Checkpoint, names: list[tuple[str, nn.Module, str]], model: Any) -> Stored | None:
    """Return how a checkpoint holds a parameter, under any of the names that it has in the model."""
    prefix = str(model.base_model_prefix)
    for name, module, key in names:
        stored: Stored | None = checkpoint.find(name, prefix, key)
        if stored is None and key in STACKS:
            stored = checkpoint.find_stack(name, prefix, key, int(module.num_experts))  # type: ignore[arg-type]
        if stored is not None:
            return stored
    return None


def _read_share(
    plans: list[list[_Parameter]], rank: int, checkpoint: Checkpoint, device: torch.device, base: str
) -> list[_Filled]:
    """Return this process's layer of a round, read and packed; nothing where the round has none for it.

    Raises:
        ModelError: it cannot be read or packed, here or in another process.
    """
    error: UserError | None = None
    filled: list[_Filled] = []
    try:
        filled = [_fill(parameter, checkpoint, device) for parameter in (plans[rank] if rank < len(plans) else [])]
    except UserError as caught:
        error = caught
    except torch.OutOfMemoryError:
        error = ModelError(f"model.base: {base} does not fit into the memory of {device}.")
    except OSError as caught:
        error = ModelError(f"model.base: the weights of {base} cannot be read ({caught}). Copy it again.")
    failed = torch.tensor(int(error is not None), device=device)
    dist.all_reduce(failed, dist.ReduceOp.MAX)
    if failed.item():
        raise error or ElsewhereError(f"process {rank}: another process cannot load {base}; its message says why.")
    return filled


def _fill(parameter: _Parameter, checkpoint: Checkpoint, device: torch.device) -> _Filled:
    """Read one parameter, and pack it if the model holds it packed."""
    stored = parameter.stored
    names = [stored] if isinstance(stored, str) else [name for expert in stored.experts for name in expert]
    parts = [checkpoint.read(name).to(device, parameter.dtype) for name in names]
    if parameter.packs:
        packed = pack(parts, parameter.shape)
        return _Filled(_as_storage(packed.detach().as_subclass(Tensor)), packed.quant_state.as_dict(packed=True))
    # Only a stack of experts is ever stored in several tensors.
    whole = parts[0] if len(parts) == 1 else torch.cat([part.reshape(-1) for part in parts])
    return _Filled(whole.reshape(parameter.shape).contiguous(), None)


def _as_storage(packed: Tensor) -> Tensor:
    """Return packed bytes as `STORAGE`, an odd one filled up by a zero that nothing unpacks."""
    odd = packed.numel() % STORAGE.itemsize
    return torch.nn.functional.pad(packed.view(-1), (0, odd)).view(STORAGE).unsqueeze(1)


def _send(filled: list[_Filled], count: int, owner: int, device: torch.device) -> Iterator[_Filled]:
    """Yield the parameters of one unit, as its owner has them, on every process."""
    mine = owner == dist.get_rank()
    header: list[list[Any]] = []
    for content in filled if mine else []:
        tensors = {"": content.tensor, **(content.state or {})}
        header.append([[key, str(t.dtype).removeprefix("torch."), list(t.shape)] for key, t in tensors.items()])
    text = _send_bytes(json.dumps(header).encode() if mine else b"", owner, device)
    for number, entries in enumerate(json.loads(text)):
        have = {"": filled[number].tensor, **(filled[number].state or {})} if mine else {}
        tensors = {}
        for key, dtype, shape in entries:
            empty = torch.empty(shape, dtype=getattr(torch, dtype), device="meta" if mine else device)
            tensor = have[key].to(device).contiguous() if mine else empty
            # As bytes: not every backend sends every dtype.
            dist.broadcast(tensor.view(-1).view(torch.uint8), owner)
            tensors[key] = tensor
        whole = tensors.pop("")
        yield _Filled(whole, tensors or None)
    assert len(header) in (0, count)


def _send_bytes(content: bytes, owner: int, device: torch.device) -> bytes:
    length = torch.tensor(len(content), device=device)
    dist.broadcast(length, owner)
    buffer = torch.empty(int(length.item()), dtype=torch.uint8, device=device)
    if content:
        buffer.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    dist.broadcast(buffer, owner)
    return bytes(buffer.tolist())


def _put(parameter: _Parameter, content: _Filled) -> None:
    """Give a parameter to the modules that have it, in the place of the empty one."""
    whole = nn.Parameter(content.tensor, requires_grad=False)
    state = None if content.state is None else QuantState.from_dict(content.state, device=content.tensor.device)
    for module, key in parameter.holders:
        module._parameters[key] = whole
        if isinstance(module, NF4Experts):
            module.remember(key, state)
        elif state is not None:
            module.quant_state = state
