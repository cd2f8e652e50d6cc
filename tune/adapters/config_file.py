"""adapter_config.json, checked before anything acts on it.

PEFT takes what the file says: it imports the library that `megatron_core` names, loads the other adapters that an
XLORA lists, matches patterns for as long as they take, and makes room for any rank. So the file is read here first,
strictly, key by key. What PEFT is given afterwards (`peft_config`) is made of those values alone that say where a LoRA
is and how it is scaled; `base_model_name_or_path`, `revision` and `auto_mapping` are never followed, and how an
adapter was started is never repeated.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from tune.adapters.patterns import NAME, few_ways, ways
from tune.errors import ModelError
from tune.files.foreign import followed, read_object
from tune.recipe.read import shown

if TYPE_CHECKING:
    from peft import LoraConfig

LARGEST_RANK = 2**16
LARGEST_TOKEN = 2**24

_MOST_BYTES = 4 * 2**20
_MOST_NAMES = 20_000
_MOST_PATTERNS = 4096


def _name(text: str) -> str:
    if not NAME.fullmatch(text) or ".." in text:
        raise ValueError("must hold names of modules")
    return text


def _pattern(text: str) -> str:
    if not few_ways([text]):
        raise ValueError("must be a plain pattern of modules' names, without repeated groups")
    return text


def _patterns(found: dict[str, Any]) -> dict[str, Any]:
    wrong = next((pattern for pattern in found if ways(pattern) == float("inf")), None)
    if wrong is not None or not few_ways(found):
        raise ValueError(f"must hold plain patterns of modules' names ({shown(wrong or 'there are too many')})")
    return found


def _ids(found: list[int]) -> list[int]:
    if len(set(found)) < len(found):
        raise ValueError("must name each token once")
    return found


def _revision(text: str) -> str:
    if ".." in text or not re.fullmatch(r"[\w./+-]{0,200}", text):
        raise ValueError("must be a branch, a tag or a commit")
    return text


def _start(value: str) -> str:
    """Refuse what also changes the base: PEFT changes it again on loading, and the tensors fit that one alone."""
    if value.partition("_")[0] in ("pissa", "olora", "corda", "loftq"):
        raise ValueError(
            "is of an adapter that fits a base changed at its start; `save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)` of PEFT makes it one of the base itself"
        )
    return value


def _nothing(value: Any) -> Any:
    if value:
        raise ValueError("must be empty: this version does not use it")
    return value


_Words = Annotated[str, Field(max_length=4096, pattern=r"^[^\x00-\x1f\x7f]*$")]
_Name = Annotated[str, AfterValidator(_name)]
_Names = Annotated[list[_Name], Field(max_length=_MOST_NAMES)]
_Targets = _Names | Annotated[str, AfterValidator(_pattern)]
_Rank = Annotated[int, Field(ge=1, le=LARGEST_RANK)]
_Alpha = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
_Layer = Annotated[int, Field(ge=0, lt=10_000)]
_Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=LARGEST_TOKEN)]], Field(max_length=2**17), AfterValidator(_ids)]


class _AdapterConfig(BaseModel):
    """The keys that are known, with what each may hold; a key that is absent or null has PEFT's default."""

    model_config = ConfigDict(strict=True, extra="allow")

    peft_type: Literal["LORA"]
    lora_alpha: _Alpha
    r: _Rank = 8
    task_type: Annotated[str, Field(pattern=r"^[A-Z_]{1,40}$")] | None = None
    auto_mapping: Annotated[dict[str, _Words | None], Field(max_length=8)] | None = None
    peft_version: _Words | None = None
    base_model_name_or_path: _Words | None = None
    revision: Annotated[_Words, AfterValidator(_revision)] | None = None
    inference_mode: bool | None = None
    target_modules: _Targets | None = None
    exclude_modules: _Targets | None = None
    target_parameters: _Names | None = None
    modules_to_save: _Names | None = None
    lora_dropout: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    fan_in_fan_out: bool | None = None
    bias: Literal["none", "all", "lora_only"] | None = None
    use_rslora: bool | None = None
    init_lora_weights: bool | Annotated[str, Field(pattern=r"^\w{1,40}$"), AfterValidator(_start)] | None = None
    layers_to_transform: _Layer | Annotated[list[_Layer], Field(max_length=10_000)] | None = None
    layers_pattern: _Name | _Names | None = None
    rank_pattern: Annotated[dict[str, _Rank], Field(max_length=_MOST_PATTERNS), AfterValidator(_patterns)] | None = None
    alpha_pattern: Annotated[dict[str, _Alpha], Field(max_length=_MOST_PATTERNS), AfterValidator(_patterns)] | None = (
        None
    )
    trainable_token_indices: _Tokens | Annotated[dict[_Name, _Tokens], Field(max_length=16)] | None = None
    layer_replication: Annotated[list[Annotated[list[_Layer], Field(max_length=2)]], Field(max_length=1000)] | None = (
        None
    )
    megatron_config: Annotated[Any, AfterValidator(_nothing)] = None
    megatron_core: Literal["megatron.core"] | None = None
    runtime_config: Annotated[dict[str, Literal[False]], Field(max_length=4)] | None = None
    use_dora: bool | None = None
    use_qalora: bool | None = None
    qalora_group_size: Annotated[int, Field(ge=1, le=2**20)] | None = None
    lora_bias: bool | None = None
    ensure_weight_tying: bool | None = None


_KNOWN = frozenset(_AdapterConfig.model_fields)
_HOW_IT_WAS_MADE = frozenset(["loftq_config", "eva_config", "corda_config", "lora_ga_config"])
"""Keys that PEFT reads while it starts an adapter, and at no other time."""

_GIVEN_TO_PEFT = (
    *("task_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "lora_dropout"),
    *("target_modules", "exclude_modules", "target_parameters", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "trainable_token_indices", "fan_in_fan_out"),
)

_REMEDY = "Put the file back that was saved with the adapter."


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return the adapter_config.json of a PEFT folder, every known key of which holds what it may hold.

    Keys that are not known are returned as they are, for `unknown_keys`.

    Raises:
        ModelError: there is none, it cannot be read, it is no LoRA's, or a key holds something else.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise ModelError(f"{folder}: holds no adapter_config.json, so it is not a PEFT adapter. Give a folder that is.")
    try:
        config = read_object(followed(path), _MOST_BYTES)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder}: the adapter cannot be read (adapter_config.json: {error}). The copy may be incomplete."
        ) from error
    if config.get("peft_type") != "LORA" or "lora_alpha" not in config:
        what = "without lora_alpha" if config.get("peft_type") == "LORA" else "of another method than LoRA"
        raise ModelError(
            f"{path}: is an adapter {what} (peft_type {shown(config.get('peft_type'))}). This version trains and "
            "merges LoRA: give such an adapter."
        )
    try:
        _AdapterConfig.model_validate(config)
    except ValidationError as error:
        raise ModelError(_explained(path, config, error)) from None
    return config


def _explained(path: Path, config: dict[str, Any], error: ValidationError) -> str:
    """The first mistake, in words."""
    first = error.errors(include_url=False)[0]
    key = str(first["loc"][0])
    same = [entry for entry in error.errors(include_url=False) if entry["loc"][0] == key]
    words = dict.fromkeys(_words(entry["msg"]) for entry in same)
    return f"{path}: {key}: {' or '.join(list(words)[:3])} ({shown(config.get(key))}). {_REMEDY}"


def _words(message: str) -> str:
    words = message.removeprefix("Value error, ").replace("Input should be", "must be")
    return words[:1].lower() + words[1:]


def unknown_keys(config: dict[str, Any]) -> list[str]:
    """Return the keys that neither this version nor the installed PEFT knows, and that do not stand at nothing.

    Newer versions of PEFT add keys and write each with its default; what one is set to may change what a layer
    computes.
    """
    return [key for key, value in config.items() if value and key not in _KNOWN and key not in peft_defaults()]


def set_keys(config: dict[str, Any]) -> list[str]:
    """Return the keys beyond those known here that the installed PEFT knows, and that are not at its default."""
    defaults = peft_defaults()
    return [
        key
        for key, value in config.items()
        if value and key not in _KNOWN | _HOW_IT_WAS_MADE and key in defaults and value != defaults[key]
    ]


@functools.cache
def peft_defaults() -> dict[str, Any]:
    """What the installed PEFT has for every key of a LoRA."""
    from peft import LoraConfig  # which takes seconds, and pushing needs none of it

    return dict(LoraConfig().to_dict())


def peft_config(folder: Path, config: dict[str, Any]) -> LoraConfig:
    """Return PEFT's own configuration of an adapter for loading it.

    Args:
        folder: the adapter's, for messages.
        config: from `read_adapter_config`.

    Raises:
        ModelError: its keys contradict each other.
    """
    from peft import LoraConfig

    given = {key: config[key] for key in _GIVEN_TO_PEFT if config.get(key) is not None}
    try:
        return LoraConfig(**given, init_lora_weights=True, inference_mode=True)
    except (ValueError, TypeError) as error:
        words = shown(error, 200).rstrip(".")
        raise ModelError(f"{folder / 'adapter_config.json'}: PEFT refuses it ({words}). {_REMEDY}") from error
