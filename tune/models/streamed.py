"""A model run straight from its files, one matrix in memory at a time.

The model is built without weights. When a module is called, its own parameters are read and given to it in float32;
when it returns, they are let go. So a model of any size runs in the memory of its largest matrix and of its
activations, and each forward reads every file once: slow for many short calls, right for one long one.

The output head is not run: what it would be given is kept, so that logits can be computed for some positions at a
time (`head_logits`). A vocabulary times a thousand positions is the largest tensor there is.

Which numbers a module gets is the caller's: `Weights` reads a checkpoint as it is, and a subclass may change a
matrix on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tune.errors import ModelError
from tune.kernels.nf4_linear import as_trained, dequantize
from tune.models.catalog import is_mixture
from tune.models.experts import STACKS, holds, pack
from tune.models.hub import quiet_transformers
from tune.models.shards import Checkpoint, Stack, Stored

_VOCABULARY_ROWS = 4096


def compute_device() -> torch.device:
    """Where a streamed model is computed: on a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Weights:
    """The parameters of a model as a checkpoint holds them, in float32."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def whole(self, stored: Stored) -> Tensor:
        """Return one parameter in float32, on the CPU."""
        if isinstance(stored, str):
            return self.tensor(stored)
        shape = self.checkpoint.shape_of(stored)
        whole = torch.empty(shape)
        for expert, names in enumerate(stored.experts):
            start = 0
            for name in names:
                part = self.tensor(name)
                whole[expert, start : start + len(part)] = part
                start += len(part)
        return whole

    def count(self, name: str) -> int:
        """Return how many rows one stored tensor has."""
        return self.checkpoint.places[name].shape[0]

    def tensor(self, name: str) -> Tensor:
        """Return one stored tensor in float32, on the CPU."""
        return self.checkpoint.read(name).float()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return some rows of one stored tensor in float32, on the CPU."""
        return self.checkpoint.rows(name, start, stop).float()


class TrainedWeights(Weights):
    """The parameters as a run with a 4-bit base saw them.

    Args:
        checkpoint: the original base.
        packed: the parameters that are held in NF4.
        dtype: the recipe's model.dtype, which a matrix is cast to before it is packed and after it is unpacked.
    """

    def __init__(self, checkpoint: Checkpoint, packed: Collection[Stored], dtype: torch.dtype) -> None:
        super().__init__(checkpoint)
        self.packed, self.dtype = set(packed), dtype
        self._stacks = {
            name: (stack, expert, part)
            for stack in self.packed
            if isinstance(stack, Stack)
            for expert, names in enumerate(stack.experts)
            for part, name in enumerate(names)
        }
        self._last: tuple[Stored, Tensor] | None = None

    def whole(self, stored: Stored) -> Tensor:
        if stored not in self.packed:
            return super().whole(stored).to(self.dtype).float()
        if isinstance(stored, str) and len(self.checkpoint.places[stored].shape) == 2:
            weight = self.checkpoint.read(stored).to(compute_device())
            return as_trained(weight, self.dtype).cpu().float()
        return self._unpacked(stored).float()

    def _unpacked(self, stored: Stored) -> Tensor:
        """A stack of experts, packed as a whole. The last is kept: its matrices are asked for one after the other."""
        if self._last is None or self._last[0] != stored:
            self._last = None
            shape = self.checkpoint.shape_of(stored)
            names = [stored] if isinstance(stored, str) else [name for expert in stored.experts for name in expert]
            parts = [self.checkpoint.read(name).to(compute_device(), self.dtype) for name in names]
            packed = pack(parts, shape)
            del parts
            self._last = stored, dequantize(packed, packed.quant_state, self.dtype).view(shape).cpu()
        return self._last[1]

    def tensor(self, name: str) -> Tensor:
        if name in self.packed:
            return self.whole(name)
        if name not in self._stacks:
            return self.checkpoint.read(name).to(self.dtype).float()
        stack, expert, part = self._stacks[name]
        before = sum(self.checkpoint.places[other].shape[0] for other in stack.experts[expert][:part])
        count = self.checkpoint.places[name].shape[0]
        return self._unpacked(stack)[expert, before : before + count].float()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if name in self.packed or name in self._stacks:
            return self.tensor(name)[start:stop]
        return self.checkpoint.rows(name, start, stop).to(self.dtype).float()


class StreamedModel:
    """A causal language model without weights of its own, ready to be run with any.

    Args:
        config: the transformers config.
        name: of the model, for messages.
        trust_remote_code: whether code that comes with it may run.

    Raises:
        ModelError: the config describes no model that can be built.
    """

    def __init__(self, config: Any, name: str, trust_remote_code: bool = False) -> None:
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

        try:
            # Buffers are real: most are computed from the config, such as the frequencies of the positions.
            with quiet_transformers(), init_empty_weights(include_buffers=False):
                self.model = AutoModelForCausalLM.from_config(
                    config, dtype=torch.float32, trust_remote_code=trust_remote_code, **_plainest(config)
                )
        except (ValueError, RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise ModelError(f"{name}: the model that its config.json describes cannot be built ({error}).") from error
        self.model.tie_weights()  # the context above gave every module parameters of its own
        self.model.eval().requires_grad_(False)
        self.name = name
        self.prefix = str(self.model.base_model_prefix)
        self.head: Any = self.model.get_output_embeddings()
        self.embedding: Any = self.model.get_input_embeddings()
        self.tied = self.head.weight is self.embedding.weight
        self.vocabulary = int(self.head.weight.shape[0])
        # Names in the model as it was built: an adapter that is attached later puts other modules around these.
        self.modules = dict(self.model.named_modules())

    def linears(self) -> dict[str, nn.Linear]:
        """Return the linear layers by name, without the output head: those that a 4-bit base holds in NF4."""
        return {
            name: module
            for name, module in self.modules.items()
            if isinstance(module, nn.Linear) and module is not self.head
        }

    def experts(self) -> dict[str, nn.Module]:
        """Return the modules that hold all experts of a layer, by name: a 4-bit base holds both parameters in NF4."""
        return {name: module for name, module in self.modules.items() if holds(module)}

    def packable(self, checkpoint: Checkpoint) -> set[Stored]:
        """Return how a checkpoint holds the parameters that a 4-bit base holds in NF4."""
        linears = {self.stored(checkpoint, name) for name in self.linears()}
        return linears | {self.stored(checkpoint, name, stack) for name in self.experts() for stack in STACKS}

    def stored(self, checkpoint: Checkpoint, module: str, parameter: str = "weight") -> Stored:
        """Return how a checkpoint holds a parameter.

        Raises:
            ModelError: it does not.
        """
        found: Stored | None = checkpoint.find(module, self.prefix, parameter)
        if found is None and parameter in STACKS:
            count = self.modules[module].get_parameter(parameter).shape[0]
            found = checkpoint.find_stack(module, self.prefix, parameter, count)
        if found is None and self.tied and self.modules[module] is self.head and parameter == "weight":
            names = [name for name, other in self.modules.items() if other is self.embedding]
            found = checkpoint.find(names[0], self.prefix)
        if found is None:
            raise ModelError(
                f"{self.name}: the checkpoint lacks {module}.{parameter}, which config.json describes. Copy both again."
            )
        return found

    def _stored_whole(self, checkpoint: Checkpoint, module: str) -> str:
        stored = self.stored(checkpoint, module)
        assert isinstance(stored, str)
        return stored

    def check(self, checkpoint: Checkpoint) -> frozenset[str]:
        """Return the stored names of all parameters; refuse a checkpoint that lacks one, or holds another shape.

        Raises:
            ModelError: names it.
        """
        found: set[str] = set()
        for name, module in self.modules.items():
            for parameter, value in module.named_parameters(recurse=False):
                stored = self.stored(checkpoint, name, parameter)
                found |= {stored} if isinstance(stored, str) else {n for expert in stored.experts for n in expert}
                shape = checkpoint.shape_of(stored)
                if shape != tuple(value.shape):
                    where = stored if isinstance(stored, str) else f"{name}.{parameter}"
                    raise ModelError(
                        f"{self.name}: {where} has shape {list(shape)}, not {list(value.shape)} as "
                        "config.json describes. Copy both again."
                    )
        return frozenset(found)

    @torch.inference_mode()
    def last_hidden(self, weights: Weights, prompts: Sequence[np.ndarray], device: torch.device) -> Tensor:
        """Run prompts through all but the output head.

        Args:
            weights: the parameters to run with.
            prompts: token ids, [tokens] each.
            device: where it is computed, in float32.

        Returns:
            [tokens of all prompts, hidden], float32 on `device`: what the head would be given, prompt after prompt.
        """
        width = max(len(prompt) for prompt in prompts)
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.from_numpy(np.asarray(prompt, dtype=np.int64))
        kept: list[Tensor] = []
        remove = self._hook(weights, kept.append, device)
        try:
            for name, buffer in list(self.model.named_buffers()):
                owner, _, last = name.rpartition(".")
                self.model.get_submodule(owner)._buffers[last] = buffer.to(device)
            # What follows a prompt is padding, which no token of a causal model looks at: no mask is needed.
            self.model(input_ids=ids.to(device), use_cache=False)
        finally:
            remove()
        assert [tuple(hidden.shape[:2]) for hidden in kept] == [tuple(ids.shape)]
        return torch.cat([kept[0][row, : len(prompt)] for row, prompt in enumerate(prompts)])

    def _hook(self, weights: Weights, keep: Callable[[Tensor], None], device: torch.device) -> Callable[[], None]:
        """Give every module its parameters while it runs; return what undoes this."""
        handles: list[Any] = []
        around = self._wrappers()
        for name, module in self.modules.items():
            if module is self.head:
                self.head.forward = _keeping(keep)
            elif module is self.embedding and type(module) is nn.Embedding:
                self.embedding.forward = partial(_look_up, weights, self._stored_whole(weights.checkpoint, name))
            elif any(True for _ in module.named_parameters(recurse=False)):
                stored_names = {
                    parameter: self.stored(weights.checkpoint, name, parameter)
                    for parameter, _ in module.named_parameters(recurse=False)
                }
                caller = around.get(id(module)) or module
                handles.append(caller.register_forward_pre_hook(_filling(module, weights, stored_names, device)))
                handles.append(caller.register_forward_hook(_emptying(module)))

        def remove() -> None:
            for handle in handles:
                handle.remove()
            for module in (self.head, self.embedding):
                vars(module).pop("forward", None)

        return remove

    def _wrappers(self) -> dict[int, nn.Module]:
        """The outermost wrapper that PEFT put around a module's bare parameter, by the module's identity.

        It looks at the parameter before it calls the module, so it must be there by then.
        """
        found: dict[int, nn.Module] = {}
        for module in self.model.modules():  # outer before inner
            if getattr(module, "parameter_name", None) is not None:
                found.setdefault(id(module.get_base_layer()), module)
        return found

    @torch.inference_mode()
    def head_logits(self, weights: Weights, hidden_TH: Tensor) -> Tensor:
        """Return the logits [tokens, vocabulary] of some positions, in float32.

        The head is read some thousand rows at a time.
        """
        name = next(name for name, module in self.modules.items() if module is self.head)
        stored = self._stored_whole(weights.checkpoint, name)
        count = weights.count(stored)
        logits = hidden_TH.new_empty(len(hidden_TH), count)
        for start in range(0, count, _VOCABULARY_ROWS):
            stop = min(start + _VOCABULARY_ROWS, count)
            logits[:, start:stop] = hidden_TH @ weights.rows(stored, start, stop).to(hidden_TH.device).T
        if getattr(self.head, "bias", None) is not None:
            logits += weights.whole(self.stored(weights.checkpoint, name, "bias")).to(logits.device)
        return logits


def _plainest(config: Any) -> dict[str, str]:
    """A loop over experts in plain PyTorch, where there are experts: it works at every size on every device."""
    return {"experts_implementation": "eager"} if is_mixture(config) else {}


def _keeping(keep: Callable[[Tensor], None]) -> Callable[[Tensor], Tensor]:
    """In the head's place: neither its weight nor the logits come to be."""

    def forward(hidden: Tensor) -> Tensor:
        keep(hidden)
        return hidden

    return forward


def _look_up(weights: Weights, stored: str, ids: Tensor) -> Tensor:
    """The embeddings of some tokens, without the rest of the matrix."""
    tokens = sorted(set(ids.flatten().tolist()))
    rows = torch.cat([weights.rows(stored, token, token + 1) for token in tokens])
    return rows[torch.bucketize(ids.cpu(), torch.tensor(tokens))].to(ids.device)


def _filling(
    module: nn.Module, weights: Weights, stored: dict[str, Stored], device: torch.device
) -> Callable[..., None]:
    def fill(*_: Any) -> None:
        for parameter, name in stored.items():
            module._parameters[parameter] = nn.Parameter(weights.whole(name).to(device), requires_grad=False)

    return fill


def _emptying(module: nn.Module) -> Callable[..., None]:
    empty = dict(module._parameters)

    def drop(*_: Any) -> None:
        module._parameters.update(empty)

    return drop
