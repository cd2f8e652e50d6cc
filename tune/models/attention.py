"""Attention over rows of packed examples: which implementation a model gets, and whether it may be trusted with them.

transformers tells from position ids that start anew that a row holds several examples. Its `sdpa` then builds a mask
[1, 1, T, T] and computes all T² scores, of which a row of k equal examples needs a k-th, without the fast kernels,
which take no mask. Two implementations of ours compute the diagonal blocks alone:

  * `sdpa`, example by example, through torch's scaled_dot_product_attention: on every device, in every dtype. What a
    token may see within its example is asked of transformers' own mask function, so that windows stay what they are;
  * `varlen`, all examples in one call of the FlashAttention kernel that torch carries (torch.nn.attention.varlen;
    Dao 2023, arXiv:2307.08691), on a GPU in 16 bit.

Both are registered with transformers under a name. On a GPU `varlen` is tried first, then FlashAttention's own
package and FlexAttention, where they are there; everywhere `sdpa` follows, and last what transformers chose. None is
believed: a loaded model is probed with each (`tune.models.isolation`), and trains with the first that keeps packed
examples apart. Without one, it gets one example a row.
"""

from __future__ import annotations

import importlib.util
import inspect
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tune.data.hub import one_line
from tune.models.isolation import find_fault, find_fault_in_gradients

BLOCKS, VARLEN = "tune_sdpa", "tune_varlen"
"""The names that transformers knows ours by."""

NAMES = {BLOCKS: "sdpa", VARLEN: "varlen"}
"""What the start-up table calls them; others go by transformers' name."""


class Blocks:
    """The mask of a packed row: each token sees some of its own example, and nothing else."""

    def __init__(self, mask_function: Callable[..., Tensor], tokens: int, device: torch.device | str) -> None:
        """Find where the examples start.

        Args:
            mask_function: transformers': (row, head, query, key) -> whether the query sees the key.
            tokens: in the row.
            device: the model's.
        """
        self._mask_function, self._device = mask_function, device
        at = torch.arange(1, tokens, device=device)
        zero = torch.zeros(1, dtype=torch.long, device=device)
        # Within an example every token sees the one before it.
        starts = (~mask_function(zero, zero, at, at - 1)).nonzero().view(-1) + 1
        self.starts: list[int] = [0, *starts.tolist()]
        self.lengths = [end - start for start, end in zip(self.starts, [*self.starts[1:], tokens], strict=True)]

    @cached_property
    def masks(self) -> list[Tensor | None]:
        """Of each example, a bool [1, 1, length, length]; None where every token sees all before it."""
        masks, causal = [], []
        for start, length in zip(self.starts, self.lengths, strict=True):
            mask = sdpa_mask(
                batch_size=1,
                q_length=length,
                kv_length=length,
                q_offset=start,
                kv_offset=start,
                mask_function=self._mask_function,
                allow_is_causal_skip=False,
                device=self._device,
            )
            masks.append(mask)
            causal.append((mask == torch.ones_like(mask).tril()).all())
        # One transfer for all: each would stop a GPU.
        whole = torch.stack(causal).tolist()
        return [None if all_before else mask for mask, all_before in zip(masks, whole, strict=True)]

    @cached_property
    def boundaries(self) -> Tensor:
        """int32 [examples + 1]: where each example starts, and the end."""
        return torch.tensor([*self.starts, self.starts[-1] + self.lengths[-1]], dtype=torch.int32, device=self._device)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: Any = "cpu",
    **given: Any,
) -> Blocks | Tensor | None:
    """Return the blocks of a row that transformers found to be packed, or else the mask that it makes for sdpa."""
    alone = attention_mask is None and batch_size == 1 and q_length == kv_length > 1
    # With a packed row transformers says that causality alone is no mask for it. A function that is not made of
    # indices (use_vmap) cannot be asked about single pairs.
    if alone and not allow_is_causal_skip and not use_vmap:
        return Blocks(mask_function, q_length, device)
    mask: Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        use_vmap=use_vmap,
        device=device,
        **given,
    )
    return mask


def block_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **given: Any
) -> tuple[Tensor, None]:
    """Attention by torch's scaled_dot_product_attention, one example after the other where a row is packed.

    Args:
        module: transformers' attention layer.
        query: [1, heads, T, head size].
        key: [1, key heads, T, head size].
        value: as key.
        attention_mask: `Blocks`, or what sdpa takes.
        given: what transformers gives every implementation.

    Returns:
        [1, T, heads, head size], and no weights.
    """
    if not isinstance(attention_mask, Blocks):
        result: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **given)
        return result
    _refuse(given, "position_bias")
    parts = (torch.split(tensor, attention_mask.lengths, dim=2) for tensor in (query, key, value))
    outputs = [
        sdpa_attention_forward(module, *part, mask, **given)[0]
        for *part, mask in zip(*parts, attention_mask.masks, strict=True)
    ]
    return torch.cat(outputs, dim=1), None


def varlen_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **given: Any,
) -> tuple[Tensor, None]:
    """Attention over all examples of a packed row in one call; sdpa for anything else.

    Args and result as `block_attention`; `sliding_window` counts the token itself.
    """
    if not isinstance(attention_mask, Blocks):
        given |= {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window}
        return block_attention(module, query, key, value, attention_mask, **given)
    from torch.nn.attention import varlen

    _refuse({**given, "dropout": dropout or None}, "softcap", "s_aux", "position_bias", "dropout")
    groups = query.shape[1] // key.shape[1]
    grouped: dict[str, Any] = {}
    if groups > 1 and "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters:  # torch 2.11 has it not
        grouped = {"enable_gqa": True}
    elif groups > 1:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    query_THD, key_TKD, value_TKD = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    longest = max(attention_mask.lengths)
    before = -1 if sliding_window is None else sliding_window - 1
    output_THD = varlen.varlen_attn(
        query_THD,
        key_TKD,
        value_TKD,
        attention_mask.boundaries,
        attention_mask.boundaries,
        longest,
        longest,
        scale=scaling,
        window_size=(before, 0),
        **grouped,
    )
    assert isinstance(output_THD, Tensor)
    return output_THD[None], None


def _refuse(given: dict[str, Any], *names: str) -> None:
    """Raise over what a model wants and an implementation would leave out without a word."""
    for name in names:
        if given.get(name) is not None:
            raise ValueError(f"it does not do {name}")


for _name, _function in ((BLOCKS, block_attention), (VARLEN, varlen_attention)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, _mask)


@dataclass(frozen=True, slots=True)
class Machine:
    """What a device and its software offer to attention."""

    kind: str
    """The device's type, such as `cpu` or `cuda`."""
    capability: tuple[int, int] = (0, 0)
    """Of a CUDA device: (8, 0) is Ampere."""
    varlen: bool = False
    """torch.nn.attention.varlen is there."""
    flash_attn: bool = False
    """The package flash-attn is installed."""
    compiles: bool = False
    """torch.compile has what it needs on this device."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a model asks of attention."""

    chosen: str
    """What transformers chose."""
    settable: bool
    """Whether its attention goes through transformers' interface, so that it can be exchanged."""
    sdpa: bool
    flash: bool
    flex: bool
    """Which implementations the family says it is right with."""
    half: bool
    """It computes in 16 bit."""
    head_size: int


def candidates(machine: Machine, needs: Needs) -> list[str]:
    """Return transformers' names of the implementations to try, best first; the last is what transformers chose.

    torch's own kernel comes before the package flash-attn: it is the same algorithm, and transformers finds the
    examples of a row anew in every layer for the package, which stops the GPU each time.
    """
    names = []
    if needs.settable:
        kernels = machine.kind == "cuda" and machine.capability >= (8, 0) and needs.half and needs.head_size <= 256
        if kernels and needs.flash and needs.head_size % 8 == 0:
            names += [VARLEN] if machine.varlen else []
            names += ["flash_attention_2"] if machine.flash_attn else []
        # Its blocks are powers of two.
        if kernels and needs.flex and machine.compiles and needs.head_size.bit_count() == 1:
            names.append("flex_attention")
        if needs.sdpa and needs.chosen == "sdpa":
            names.append(BLOCKS)
    return [*names, needs.chosen]


def machine_of(device: torch.device) -> Machine:
    """Look at what there is."""

    def there(module: str) -> bool:
        return importlib.util.find_spec(module) is not None

    if device.type != "cuda":
        return Machine(device.type)
    return Machine(
        "cuda",
        torch.cuda.get_device_capability(device),
        varlen=torch.version.cuda is not None and there("torch.nn.attention.varlen"),
        flash_attn=there("flash_attn"),
        compiles=there("triton") and any(shutil.which(compiler) for compiler in ("cc", "gcc", "clang")),
    )


def needs_of(model: Any) -> Needs:
    """Look at a loaded transformers model."""
    config = model.config
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Needs(
        chosen=str(config._attn_implementation),
        settable=model._can_set_attn_implementation(),
        sdpa=model._supports_sdpa,
        flash=model._supports_flash_attn,
        flex=model._supports_flex_attn,
        half=model.dtype in (torch.float16, torch.bfloat16),
        head_size=int(head_size),
    )


@dataclass(frozen=True, slots=True)
class Attention:
    """What a model was found to do with packed rows."""

    name: str
    """What runs, as the start-up table calls it."""
    packs: bool
    """Whether several examples in one row, told apart by position ids alone, do not see each other."""
    declined: tuple[str, ...] = ()
    """Faster ones that were tried and do not work here, each with the reason."""


def settle_attention(model: Any, device: torch.device) -> Attention:
    """Give a loaded model the best attention that keeps packed examples apart, or leave it the one it has."""
    needs, declined = needs_of(model), list[str]()
    for name in candidates(machine_of(device), needs):
        fault = _try(model, name, needs.chosen)
        if fault is None:
            return Attention(NAMES.get(name, name), True, tuple(declined))
        if name not in (needs.chosen, BLOCKS):
            declined.append(f"{NAMES.get(name, name)} {fault}")
    return Attention(needs.chosen, False, tuple(declined))


def _try(model: Any, name: str, chosen: str) -> str | None:
    """Set an implementation and return why it cannot be used, or None. The next one is set in its place."""
    try:
        if name != model.config._attn_implementation:
            model.set_attn_implementation(name)
        fault = find_fault(model)
        if fault is None and name not in (chosen, BLOCKS):
            fault = find_fault_in_gradients(model, name, chosen)
    except (torch.OutOfMemoryError, MemoryError):
        raise  # it says nothing of the kernel; and processes must not choose apart
    except Exception as error:
        # Kernels of others raise whatever they like; what transformers chose must work, or nothing does.
        if name == chosen:
            raise
        fault = f"does not run ({one_line(error)})"
    return fault
