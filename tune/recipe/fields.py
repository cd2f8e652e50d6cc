"""The types of a recipe's values: limits, and how text becomes a number, a name or a list.

YAML's own guesses are not used (see read.py), so what `2e-4`, `none` or `attention, mlp` means is decided here.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

FormatName = Literal["auto", "alpaca", "sharegpt", "messages", "prompt_completion", "question_answer", "text"]
FORMATS: tuple[str, ...] = get_args(FormatName)

TEMPLATES: tuple[str, ...] = (
    "auto",
    "alpaca",
    "vicuna",
    "koala",
    "mistral-v1",
    "mistral-v2",
    "mistral-v3",
    "llama-2",
    "codellama",
    "zephyr",
    "chatml",
    "falcon",
    "plain",
    "tokenizer",
)

Tracker = Literal["wandb", "tensorboard", "trackio"]


def _whole(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a whole number")
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE]\+?\d{1,2}", value):
        return float(value)
    return value


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _none_word(value: Any) -> Any:
    return None if isinstance(value, str) and value.lower() == "none" else value


def _names(value: Any) -> Any:
    """A single name, or several with commas between (as a command line has them), as a list."""
    if isinstance(value, str):
        return [name.strip() for name in value.split(",")]
    return value


def _trackers(value: Any) -> Any:
    return [] if value is None or _none_word(value) is None else _names(value)


def _template(value: str) -> str:
    if value in TEMPLATES or value.endswith(".jinja"):
        return value
    expected = ", ".join(f"'{name}'" for name in (*TEMPLATES, "a path to a .jinja file"))
    raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": expected})


def _hub_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", value):
        raise ValueError("must be OWNER/NAME on the Hugging Face Hub")
    return value


def _revision(value: str) -> str:
    # The Hub's client makes a path of it, which must not lead out of its cache.
    if not re.fullmatch(r"[\w.][\w./+@-]{0,199}", value) or ".." in value:
        raise ValueError("must be a branch, a tag or a commit")
    return value


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"names {name!r} twice")
    return names


def _no_wildcard(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if re.sub(r"[-_ ]", "", name.lower()) in ("alllinear", "all"):
            raise ValueError(f"has no word {name!r}: write [attention, mlp], which is every linear layer of a block")
    return names


def _fraction_or_steps(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError("must be a fraction below 1 or a whole number of steps")
    return value


# Limits stand before the coercions: only then do they reach the JSON Schema under their standard names.
_TO_WHOLE = BeforeValidator(_whole)
_TO_NUMBER = BeforeValidator(_number)
_TO_NONE = BeforeValidator(_none_word)
_TO_NAMES = BeforeValidator(_names, json_schema_input_type=str | list[str])
_TO_TRACKERS = BeforeValidator(_trackers, json_schema_input_type=Literal["none"] | Tracker | list[Tracker] | None)

Text = Annotated[str, Field(min_length=1)]
OptionalText = Annotated[Text | None, _TO_NONE]
OptionalRevision = Annotated[Annotated[Text, AfterValidator(_revision)] | None, _TO_NONE]
Whole = Annotated[int, Field(ge=0, le=2**32 - 1), _TO_WHOLE]
Count = Annotated[int, Field(ge=1, le=10**9), _TO_WHOLE]
Length = Annotated[int, Field(ge=8, le=10**9), _TO_WHOLE]
OptionalCount = Annotated[Count | None, _TO_NONE]
Number = Annotated[float, Field(ge=0, allow_inf_nan=False), _TO_NUMBER]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), _TO_NUMBER]
# Above these, an order of examples or a schedule could not be held in memory.
Weight = Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False), _TO_NUMBER]
Epochs = Annotated[float, Field(gt=0, le=10**6, allow_inf_nan=False), _TO_NUMBER]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False), _TO_NUMBER]
LearningRate = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False), _TO_NUMBER]
Warmup = Annotated[float, Field(ge=0, allow_inf_nan=False), _TO_NUMBER, AfterValidator(_fraction_or_steps)]
SomeNames = Annotated[tuple[Text, ...], _TO_NAMES, AfterValidator(_distinct)]
Targets = Annotated[
    tuple[Text, ...], Field(min_length=1), _TO_NAMES, AfterValidator(_distinct), AfterValidator(_no_wildcard)
]
Trackers = Annotated[tuple[Tracker, ...], _TO_TRACKERS, AfterValidator(_distinct)]
OptionalRepository = Annotated[Annotated[Text, AfterValidator(_hub_name)] | None, _TO_NONE]
TemplateName = Annotated[
    Text,
    AfterValidator(_template),
    WithJsonSchema({"anyOf": [{"enum": list(TEMPLATES)}, {"type": "string", "pattern": r"\.jinja$"}]}),
]
OptionalTemplate = Annotated[TemplateName | None, _TO_NONE]
