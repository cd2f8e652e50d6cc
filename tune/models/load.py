"""Load a base model, streamed and quantised, through transformers.

Each tensor is read from safetensors and packed before the next one is: the process never holds the model in
16 bit. After loading, two things are made certain that a library would leave open: that no 4-bit layer repacks
itself for inference (see `_keep_weights_packed`), and whether the model keeps packed examples apart, with which
attention (`tune.models.attention`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from tune.data.hub import explain, one_line
from tune.errors import ModelError
from tune.files.pickles import refuse_disguised
from tune.models.attention import settle_attention
from tune.models.catalog import FAMILIES, family_of, is_mixture
from tune.models.hub import fetch, local_folder, quiet_transformers, read_config
from tune.models.sharding import quant_state_of, within
from tune.models.shards import checkpoint_in
from tune.models.sizes import check_elements, check_experts
from tune.recipe import schema

_NOWHERE = "no-adapter"
"""A folder that no base has."""


@dataclass(frozen=True, slots=True)
class LoadedBase:
    """A frozen base model, in evaluation mode, with what was found out about it."""

    model: Any
    """The transformers causal language model."""
    config: Any
    packs: bool
    """Whether several examples in one row, told apart by position ids alone, do not see each other."""
    attention: str
    """The attention that runs, such as `sdpa`."""
    declined: tuple[str, ...] = ()
    """Faster kinds of attention that do not work here, each with the reason."""


def check_supported(section: schema.Model, config: Any) -> None:
    """Refuse, from the config alone, what this version does not build.

    Raises:
        ModelError: a mixture of experts whose experts would silently stay in 16 bit and unadapted.
    """
    family = family_of(config)
    if is_mixture(config) and (family is None or not family.experts):
        known = ", ".join(sorted(name for name, entry in FAMILIES.items() if entry.experts))
        raise ModelError(
            f"model.base: {section.base} is a mixture of experts of a kind ({config.model_type}) whose experts this "
            "version does not quantise or adapt, and it does not train with part of a model left out. "
            f"Use a base of one of the families {known}, or a dense one, such as mistralai/Mistral-7B-v0.1."
        )
    check_experts(section.base, config)
    activation = getattr(config, "hidden_act", "silu")
    if family is not None and family.experts and activation not in ("silu", "swish"):
        raise ModelError(
            f"model.base: the experts of {section.base} ({config.model_type}) have hidden_act {activation!r}, and "
            "this version computes experts with silu only. Compare its config.json with the original model's."
        )


def load_base(
    section: schema.Model, device: torch.device, storage: torch.dtype = torch.uint8, sharded: bool = False
) -> LoadedBase:
    """Load `section.base` onto `device`, in NF4 with double quantisation or as it is.

    Args:
        section: the recipe's `model`.
        device: where the weights go.
        storage: the dtype that packed bytes are kept in, where they are not sharded.
        sharded: split the base over all processes, which call this together.

    Raises:
        ModelError: the base cannot be found, read, permitted or used; nothing is left half loaded.
    """
    from transformers import AutoModelForCausalLM

    from tune.models.experts import IMPLEMENTATION
    from tune.models.nf4_quantizer import NF4Config

    config = read_config(section.base, section.revision, section.trust_remote_code)
    check_supported(section, config)
    _outlined(section, config)  # what is missing in the weights, the loader would allocate
    dtype = getattr(torch, section.dtype)
    quantization = None
    if section.quantization == "nf4":
        quantization = NF4Config(dtype, storage)
    # Dense experts run through our op: transformers' own do not work at every size on every device.
    experts = {"experts_implementation": IMPLEMENTATION} if is_mixture(config) else {}
    if sharded:
        return _checked(section, config, _load_sharded(section, config, device, experts), device)
    try:
        with quiet_transformers():
            model, info = AutoModelForCausalLM.from_pretrained(
                section.base,
                config=config,
                revision=section.revision,
                # transformers would follow an adapter beside the weights, whatever base that one names.
                adapter_kwargs={"subfolder": _NOWHERE} | ({"revision": section.revision} if section.revision else {}),
                trust_remote_code=section.trust_remote_code,
                dtype=dtype,
                quantization_config=quantization,
                device_map={"": device},
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **experts,
            )
    except torch.OutOfMemoryError as error:
        raise ModelError(f"model.base: {section.base} does not fit into the memory of {device}.") from error
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ModelError(_unreadable(section, error)) from error
    except ImportError as error:  # of code that came with the base
        raise ModelError(f"model.base: {section.base} needs a package that is not here ({one_line(error)}).") from error
    except _CONTRADICTIONS as error:
        raise ModelError(_unbuildable(section.base, error)) from error
    _check_complete(section.base, info, model)
    return _checked(section, config, model, device)


def _load_sharded(section: schema.Model, config: Any, device: torch.device, options: dict[str, Any]) -> Any:
    from tune.models.sharded_load import load_sharded

    try:
        return load_sharded(section, config, device, options)
    except _CONTRADICTIONS as error:
        raise ModelError(_unbuildable(section.base, error)) from error


def _checked(section: schema.Model, config: Any, model: Any, device: torch.device) -> LoadedBase:
    """Freeze a loaded model, make certain of what its loader leaves open, and find out what training goes by."""
    _check_experts(section.base, model)
    model.requires_grad_(False)
    model.eval()
    _keep_weights_packed(model)
    _switch_dropout_off(model)
    _check_head(section.base, model)
    attention = settle_attention(model, device)
    return LoadedBase(model, config, attention.packs, attention.name, attention.declined)


def outline_base(section: schema.Model) -> LoadedBase | None:
    """Return the base as its config describes it, on the meta device and without weights, for what needs its shape.

    None where the base's own code would have to build it: that may need real weights.

    Raises:
        ModelError: the base is not one that training takes, or its config contradicts itself.
    """
    config = read_config(section.base, section.revision, section.trust_remote_code)
    check_supported(section, config)
    model = _outlined(section, config)
    return None if model is None else LoadedBase(model, config, packs=True, attention="")


def _outlined(section: schema.Model, config: Any) -> Any | None:
    """The model on the meta device, not larger than its weights; as `outline_base`."""
    from transformers import AutoModelForCausalLM

    if section.trust_remote_code and getattr(config, "auto_map", None):
        return None
    try:
        with quiet_transformers(), torch.device("meta"):
            # Said even so: left open, transformers would ask on the terminal whether code may run.
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except _CONTRADICTIONS as error:
        raise ModelError(_unbuildable(section.base, error)) from error
    check_elements(section.base, local_folder(section.base), model)
    return model


# What building a model from a config that contradicts itself raises, wherever the contradiction shows.
_CONTRADICTIONS = (ValueError, RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError)


def _unbuildable(base: str, error: Exception) -> str:
    return (
        f"model.base: the model that the config.json of {base} describes cannot be built ({one_line(error)}). "
        "Compare it with the original model's."
    )


def _unreadable(section: schema.Model, error: Exception) -> str:
    base, folder = section.base, local_folder(section.base)
    config = fetch(base, "config.json", section.revision) if folder is None else None
    for path in sorted((config.parent if config is not None else folder or Path()).glob("*.safetensors")):
        refuse_disguised(path, "model.base")
    words = f"the weights of {base} cannot be read ({one_line(error)}). The download or copy may be incomplete."
    if folder is not None:
        try:
            checkpoint_in(folder)
        except ModelError as better:  # it names the file, and the tensor if there is one
            words = f"the weights of {base} cannot be read. {better}" if "incomplete" in str(better) else words
    access = None if folder is not None else explain(error, base, "model.base")
    return access or f"model.base: {words}"


def _check_complete(base: str, info: dict[str, Any], model: torch.nn.Module) -> None:
    missing = sorted(info.get("missing_keys", ()))
    noticed = {str(entry[0] if isinstance(entry, tuple) else entry) for entry in info.get("mismatched_keys", ())}
    mismatched = sorted(noticed | _misshapen(model))
    for words, names in (("lacks", missing), ("has the wrong shape for", mismatched)):
        if names:
            raise ModelError(
                f"model.base: the checkpoint of {base} {words} {len(names)} tensors of the model its config.json "
                f"describes, such as {names[0]}. It is incomplete, or belongs to another config."
            )


def _check_experts(base: str, model: Any) -> None:
    """Refuse experts of another layout, where the config did not tell that there are any."""
    from tune.models.experts import foreign_experts

    foreign = foreign_experts(model)
    if foreign:
        raise ModelError(
            f"model.base: {base} ({model.config.model_type}) has experts whose layout this version neither quantises "
            f"nor adapts ({foreign[0]}: {type(model.get_submodule(foreign[0])).__name__}). "
            "Use a base of another family, such as mistralai/Mixtral-8x7B-v0.1."
        )


def _misshapen(model: torch.nn.Module) -> set[str]:
    """Packed weights of another shape than their layer: packing makes them flat, so transformers does not notice."""
    import bitsandbytes as bnb

    from tune.models.experts import STACKS, NF4Experts

    found = set()
    for name, module in model.named_modules():
        if isinstance(module, NF4Experts):
            for stack in STACKS:
                state = module.state_of(stack)
                if state is None or tuple(state.shape) != module.shape_of(stack):
                    found.add(f"{name}.{stack}")
        if isinstance(module, bnb.nn.Linear4bit):
            state = quant_state_of(module)
            if state is not None and tuple(state.shape) != (module.out_features, module.in_features):
                found.add(f"{name}.weight")
    return found


def check_vocabulary(base: LoadedBase, base_name: str, largest_id: int) -> None:
    """Refuse token ids that the base has no embedding for: on a GPU they end in an assertion far from the cause.

    Args:
        base: the loaded model.
        base_name: the recipe's `model.base`, for the message.
        largest_id: the largest token id in the data.

    Raises:
        ModelError: the tokenizer is not this model's.
    """
    rows = base.model.get_input_embeddings().weight.shape[0]
    if largest_id >= rows:
        raise ModelError(
            f"model.base: the tokenizer of {base_name} gives token {largest_id}, and the model has {rows} embeddings. "
            "Tokenizer and weights belong to different models: copy both from one."
        )


def _keep_weights_packed(model: torch.nn.Module) -> None:
    """Switch off the inference repacking of 4-bit layers, which destroys gradients.

    On a CPU with AVX512-bf16 the first forward in evaluation mode without gradients rewrites a layer's weight into
    an inference layout; from then on its input gets a wrong gradient, in the adapter's disabled path too.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def recompute_activations(model: Any) -> None:
    """Let every decoder layer compute its activations again in the backward, without reentrance.

    What the experts of a layer return is kept: they would be most of what is computed again.
    """
    # transformers renamed it on the way from 5.17 to 5.23.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    options: dict[str, Any] = {"use_reentrant": False}
    if is_mixture(model.config):
        from tune.kernels.nf4_experts import EXPERTS_OP

        options["context_fn"] = partial(create_selective_checkpoint_contexts, [EXPERTS_OP])
    enable(options)
    model.enable_input_require_grads()


def _switch_dropout_off(model: torch.nn.Module) -> None:
    """The base is frozen: noise of its own would only make a step depend on how it is split into rows.

    A router's jitter, which scales its input at random, is such noise as well.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if name.endswith(("dropout", "jitter_noise")) and isinstance(value, float):
                setattr(module, name, 0.0)


def check_length(config: Any, base: str, longest: int) -> None:
    """Refuse examples longer than the positions that a base was made for, where they would change other examples.

    With dynamic or long RoPE scaling a long example changes the frequencies of every later one.

    Raises:
        ModelError: names the length that is safe.
    """
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type") or rope.get("type")
    made_for = rope.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", None)
    if kind in ("dynamic", "longrope") and made_for and longest > made_for:
        raise ModelError(
            f"model.base: {base} scales its positions by the longest example seen ({kind}), so examples of more than "
            f"{made_for} tokens would change the others (the longest has {longest}). Set data.max_length: {made_for}."
        )


@torch.no_grad()
def _check_head(base: str, model: Any) -> None:
    """Refuse a model that does more to its logits than the output head does.

    Training goes from the last hidden states through the head, chunk by chunk. A model that scales or caps its
    logits (Gemma 2, Granite, Cohere) would learn from a loss that is not its own.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    ids = torch.arange(min(8, embedding.shape[0]), device=embedding.device)[None]
    whole = model(input_ids=ids, use_cache=False).logits.float()
    plain = whole * 0
    if head is not None:
        plain = within(model, lambda: head(model.base_model(input_ids=ids, use_cache=False)[0])).float()
    if float((whole - plain).norm()) > 0.01 * float(whole.norm()):
        raise ModelError(
            f"model.base: {base} ({model.config.model_type}) scales or caps its logits, which this version does not "
            "train through. Use a base of another family, such as mistralai/Mistral-7B-v0.1."
        )
