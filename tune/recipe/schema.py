"""Every key of a recipe: its type, unit, range and default.

The classes below are the whole contract between a person and the program. A value that YAML left as text is
coerced here (`2e-4` is text to PyYAML), so that the type is decided by the key and never guessed from the value.
The docstring under a field reaches error messages and the JSON Schema.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from tune.recipe.conflicts import find_conflicts
from tune.recipe.fields import (
    Count,
    Epochs,
    FormatName,
    Fraction,
    LearningRate,
    Length,
    Number,
    OptionalCount,
    OptionalRepository,
    OptionalRevision,
    OptionalTemplate,
    OptionalText,
    Positive,
    SomeNames,
    Targets,
    TemplateName,
    Text,
    Trackers,
    Warmup,
    Weight,
    Whole,
)


def _sources(value: Any) -> Any:
    """A path, a source or a list of either, as a list of sources."""
    items = value if isinstance(value, list | tuple) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]


def _held_out(value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(r"\s*\d+([.,]\d*)?\s*%|\s*\d+,\d+\s*", value):
        raise ValueError("must be a fraction written as a number, or a list of data sets")
    return 0 if isinstance(value, str) and value.lower() == "none" else value


def _is_number(value: Any) -> bool:
    if value is None or isinstance(value, bool | int | float):
        return True
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return True
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _eval_kind(value: Any) -> str:
    return "fraction" if _is_number(value) else "sources"


def _rows_kind(value: Any) -> str:
    return "word" if value == "auto" else "tokens"


def _section(value: Any) -> Any:
    # A section whose keys are all commented out is empty YAML: it means the defaults, not nothing.
    return {} if value is None else value


class Section(BaseModel):
    """A part of the recipe: it cannot change once read, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, coerce_numbers_to_str=True)


class Model(Section):
    """What is fine-tuned, and how its weights are held."""

    base: Text
    """The base model: a hub id such as mistralai/Mistral-7B-v0.1, or a local folder."""
    revision: OptionalRevision = None
    """Branch, tag or commit of a base from the hub; none means its default branch."""
    quantization: Literal["nf4", "none"] = "nf4"
    """Storage of the frozen weights: nf4 is 4 bits a weight with double quantisation; none keeps `dtype`."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """The type of activations and of weights that are not quantised."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the base may run on this machine."""


class Adapter(Section):
    """The small trained part."""

    method: Literal["lora"] = "lora"
    """The kind of adapter."""
    rank: Count = 16
    """Inner width of each adapter, in dimensions."""
    alpha: Count = 32
    """Scale of the adapter's output: it is multiplied by alpha / rank."""
    rslora: bool = False
    """Whether outputs are multiplied by alpha / sqrt(rank) instead, so that high ranks learn as fast as low ones."""
    dropout: Fraction = 0.0
    """Share of an adapter's inputs zeroed while training, from 0 to below 1."""
    targets: Targets = ("attention", "mlp")
    """What is adapted: attention, mlp, experts, router, or module names. mlp is the experts on a mixture of experts."""
    init: Literal["default", "gaussian"] = "default"
    """How the adapter's A matrices start; B starts at zero, so the start is the base model either way."""
    ranks: dict[Text, Count] = Field(default_factory=dict)
    """Ranks of single targets where they differ from `rank`, such as {experts: 8}."""
    exclude: SomeNames = ()
    """Module names, or kinds of target, that are left unadapted."""
    start_from: OptionalText = None
    """An adapter to continue from: a run, an adapter's folder or a hub id; none starts a new one."""


class Router(Section):
    """The router of a mixture of experts; a dense model has none."""

    balance_loss: Number = 0.02
    """Weight of the loss that spreads tokens over experts; 0 turns it off."""
    train: Literal["frozen", "full"] = "frozen"
    """Whether the router's own weights train. A LoRA on the router is `adapter.targets: [router]`."""


class Source(Section):
    """One data set: where it is and how its rows are read."""

    path: Text
    """A file, a folder, a pattern of names, or a hub data set's id."""
    format: FormatName = "auto"
    """How rows are read; auto looks at the first rows."""
    split: OptionalText = None
    """Which split of a data set is read; none means train."""
    revision: OptionalRevision = None
    """Branch, tag or commit of a data set from the hub; none means its default branch."""
    config: OptionalText = None
    """Which configuration of a data set from the hub is read."""
    columns: dict[Text, Text] = Field(default_factory=dict)
    """The format's column names, each with the name this data set has for it, such as {output: response}."""
    weight: Weight = 1.0
    """How many times the rows are seen in an epoch: 2 is twice, 0.5 another half each epoch."""
    template: OptionalTemplate = None
    """How these prompts are written; none means data.template. One that all training sources use is the one saved."""
    limit: OptionalCount = None
    """Only the first so many rows are read; none reads all."""


Sources = Annotated[
    tuple[Source, ...],
    Field(min_length=1),
    BeforeValidator(_sources, json_schema_input_type=str | Source | list[str | Source]),
]


class Data(Section):
    """What it learns from."""

    train: Sources
    """Training data: a path, or a list of paths or of {path, format, ...}."""
    eval: Annotated[
        Annotated[Fraction, Tag("fraction")] | Annotated[Sources, Tag("sources")],
        Discriminator(_eval_kind),
        BeforeValidator(_held_out),
    ] = 0.0
    """Held-out data: a fraction of the training examples from 0 to below 1, or a list like train."""
    template: TemplateName = "auto"
    """How prompts are written: a name, or a path to a .jinja file. auto is the tokenizer's own, else alpaca."""
    system: OptionalText = None
    """The system prompt of examples that have none."""
    max_length: Length = 2048
    """Longest example, in tokens."""
    train_on: Literal["responses", "all", "last_response"] = "responses"
    """Which tokens are trained on."""
    on_long: Literal["truncate", "drop", "error"] = "truncate"
    """What happens to an example longer than max_length."""
    on_bad: Literal["error", "drop"] = "error"
    """What happens to a row that cannot be read."""
    add_tokens: bool = False
    """Whether a template's control tokens that the tokenizer lacks are added. Their rows of the embedding and the head
    train with the adapter, and lie in it; a merged model's vocabulary is larger by them."""


class Train(Section):
    """How it learns."""

    epochs: Epochs = 3.0
    """Passes over the training data, in epochs; a fraction ends within one. max_steps overrides it."""
    max_steps: OptionalCount = None
    """Length of the training, in optimizer steps; none follows epochs."""
    batch_size: Count = 32
    """Examples per optimizer step, over all devices."""
    micro_batch_tokens: Annotated[
        Annotated[Literal["auto"], Tag("word")] | Annotated[Count, Tag("tokens")], Discriminator(_rows_kind)
    ] = "auto"
    """Most tokens in one packed row on a device; auto takes what fits. It changes speed, never the step."""
    learning_rate: LearningRate = 2e-4
    """Highest learning rate of the schedule, per optimizer step."""
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup: Warmup = 0.03
    """Length of the warm-up: below 1 a fraction of all steps, else steps."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """The optimizer, by the width of its state; paged_adamw_8bit needs a GPU."""
    weight_decay: Number = 0.0
    """Decoupled weight decay of AdamW, per step and unit of learning rate."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to at most this L2 norm."""
    recompute: Literal["auto", "none", "experts", "full"] = "auto"
    """Which activations are computed again in the backward pass to save memory; auto keeps what fits."""
    save_every: Count = 100
    """Steps between checkpoints."""
    eval_every: Count = 100
    """Steps between evaluations on the held-out data."""
    log_every: Count = 10
    """Steps between printed lines."""
    keep: Count = 3
    """How many of the latest checkpoints stay on disk."""
    keep_best: bool = True
    """With held-out data, whether the adapter of lowest eval loss is the result, and not the last."""
    patience: OptionalCount = None
    """Stop after so many evaluations without a better eval loss; none never does."""
    max_bad_steps: Count = 3
    """Stop after so many steps in a row whose loss or gradient is not finite."""
    seed: Whole = 0
    """Seed of everything that is drawn: initial adapters, order, held-out rows, dropout."""


class Tracking(Section):
    """Where metrics are sent besides the run folder."""

    to: Trackers = ()
    """Trackers: none, or a list of wandb, tensorboard, trackio."""
    project: OptionalText = None
    """The project's name at the trackers; none means tune."""
    name: OptionalText = None
    """The run's name at the trackers; none means the output folder's name."""


class Push(Section):
    """Publishing on the Hugging Face Hub when training has ended."""

    repo: OptionalRepository = None
    """The repository, OWNER/NAME; none publishes nothing."""
    private: bool = True
    """Whether a new repository is private."""
    merged: bool = False
    """Whether the merged model is published too, and not the adapter alone."""


class Recipe(Section):
    """A whole fine-tuning, from base model to published adapter."""

    model: Annotated[Model, BeforeValidator(_section)]
    """What is fine-tuned, and how its weights are held."""
    adapter: Annotated[Adapter, BeforeValidator(_section)] = Field(default_factory=Adapter)
    """The small trained part."""
    router: Annotated[Router, BeforeValidator(_section)] = Field(default_factory=Router)
    """The router of a mixture of experts; a dense model has none."""
    data: Annotated[Data, BeforeValidator(_section)]
    """What it learns from."""
    train: Annotated[Train, BeforeValidator(_section)] = Field(default_factory=Train)
    """How it learns."""
    tracking: Annotated[Tracking, BeforeValidator(_section)] = Field(default_factory=Tracking)
    """Where metrics are sent besides the run folder."""
    push: Annotated[Push, BeforeValidator(_section)] = Field(default_factory=Push)
    """Publishing on the Hugging Face Hub when training has ended."""
    output: OptionalText = None
    """The run folder; `load_recipe` fills in runs/RECIPE-NAME where it is absent."""

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Recipe:
        found = find_conflicts(self)
        if found:
            text = "; ".join(f"{conflict.key}: {conflict.words}" for conflict in found)
            raise PydanticCustomError("conflicts", "{text}", {"text": text, "conflicts": found})
        return self
