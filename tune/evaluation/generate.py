"""Answers of a trained adapter, of the base under it, or of a whole model, with the template that trained.

A whole model is a folder that stands by itself: what `tune merge` writes, or any other causal language model with a
chat template. Whoever answers, its own generation_config.json decides nothing but where an answer ends: it may
penalise, sample or search, and the run that it is compared with does not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tune.adapters.files import read_config_of
from tune.adapters.fitting import check_claimed
from tune.adapters.lora import attach, linears, read_adapter, resolve_targets
from tune.adapters.token_rows import trained_tokens, vocabulary_rows
from tune.data.added_tokens import prepare_tokenizer
from tune.data.conversation import Message
from tune.data.encode import encode_prompt
from tune.data.templates.default_system import split_system
from tune.data.templates.jinja_template import JinjaTemplate
from tune.data.templates.resolve import resolve_template
from tune.data.templates.segment import Template
from tune.data.tokenizer import load_tokenizer
from tune.errors import DataError, ModelError, RunError
from tune.evaluation.whole_model import no_adapter
from tune.folder import folder_of
from tune.models.hub import read_config
from tune.models.load import load_base
from tune.models.own_code import refuse_unknown_code
from tune.models.vocabulary import grow_vocabulary
from tune.recipe import schema
from tune.recipe.load import load_recipe


@dataclass(frozen=True, slots=True)
class Speaker(ABC):
    """A model in memory that answers: with its tokenizer, its template, and what it does unless told otherwise."""

    name: str
    """What the user called it."""
    model: Any
    tokenizer: Any
    template: Template
    system: str | None
    """The system prompt of a conversation that brings none."""
    ends: tuple[int, ...]
    """The tokens that end an answer."""

    @abstractmethod
    def without_adapter(self) -> AbstractContextManager[Any]:
        """A context in which the base answers.

        Raises:
            RunError: there is no adapter to leave out.
        """

    def answer(
        self,
        prompt: str | Sequence[Message],
        *,
        adapter: bool = True,
        system: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        on_text: Callable[[str], None] | None = None,
    ) -> str:
        """Return the answer to a prompt, or to the last turn of a conversation.

        Args:
            prompt: one user turn, or a whole conversation that ends with one.
            adapter: whether the adapter takes part; without it, the base answers.
            system: the system prompt; `self.system` when none is given, and an empty one for no system message at all.
            max_new_tokens: at most this many tokens are generated.
            temperature: 0 takes the likeliest token each time.
            on_text: called with each piece of text as it comes.

        Raises:
            DataError: the template cannot express these messages.
            ModelError: the tokenizer is not this model's.
            RunError: there is no adapter to leave out.
        """
        messages = [Message("user", prompt)] if isinstance(prompt, str) else list(prompt)
        system = system if system is not None else self.system
        if system and messages[0].role != "system":
            messages.insert(0, Message("system", system))
        ids = torch.tensor([self._encode(messages)], device=self.model.device)
        streamer = None
        if on_text is not None:
            streamer = _stream(self.tokenizer, on_text)
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        with torch.inference_mode(), nullcontext() if adapter else self.without_adapter():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                eos_token_id=list(self.ends) or None,
                pad_token_id=self.ends[0] if self.ends else 0,
                streamer=streamer,
                logits_processor=[self._finite],
                **sampling,
            )
        return str(self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()

    def _finite(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Refuse to go on with logits that are no numbers: greedy search would take token 0, and say nothing."""
        if not bool(scores.isfinite().any()) or bool(scores.isnan().any()):
            raise ModelError(
                f"{self.name}: its logits are not finite, so its weights are damaged or were never right. "
                "`tune merge RUN --prove` finds what is wrong with a merge; copy a model again."
            )
        return scores

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        ids = encode_prompt(messages, self.template, self.tokenizer)
        rows = vocabulary_rows(self.model)
        if max(ids) >= rows:  # on a GPU it would end in an assertion far from the cause
            raise ModelError(
                f"{self.name}: its tokenizer gives token {max(ids)}, and the model has {rows} embeddings. "
                "Tokenizer and weights belong to different models: copy both from one."
            )
        return ids


@dataclass(frozen=True, slots=True)
class LoadedRun(Speaker):
    """A run in memory: base, adapter, and the tokenizer and template that trained."""

    recipe: schema.Recipe

    def without_adapter(self) -> AbstractContextManager[Any]:
        """A context in which the base answers."""
        context: AbstractContextManager[Any] = self.model.disable_adapter()
        return context


@dataclass(frozen=True, slots=True)
class WholeModel(Speaker):
    """A model folder in memory, in which an adapter may have gone into the weights."""

    def without_adapter(self) -> AbstractContextManager[Any]:
        """There is no such context. Raises RunError, which says what to do."""
        raise RunError(no_adapter(self.name))


def _stream(tokenizer: Any, on_text: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            on_text(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def load_run(path: str | Path, device: torch.device | None = None) -> LoadedRun:
    """Load a run folder, or one of its checkpoints, ready to answer.

    Raises:
        RunError: there is no run, nothing of it to load yet, or its base's own code would run and may not.
        ModelError: its base or adapter cannot be read.
    """
    run, adapter = folder_of(path)
    recipe = load_recipe(run.recipe)
    refuse_unknown_code(run, recipe.model)
    read_config(recipe.model.base, recipe.model.revision, recipe.model.trust_remote_code)
    # The tokenizer and template saved with the adapter are those that trained; the base's may have changed since.
    if (run.adapter / "tokenizer_config.json").is_file():
        tokenizer = load_tokenizer(str(run.adapter), saved=True)
        name = "tokenizer" if recipe.data.template.endswith(".jinja") else recipe.data.template
    else:
        tokenizer, name = prepare_tokenizer(recipe).tokenizer, recipe.data.template
    template, system = _template(name, tokenizer)
    base = load_base(recipe.model, device or _device())
    added = trained_tokens(read_config_of(adapter).get("trainable_token_indices"))
    claimed = resolve_targets(recipe.adapter, base, recipe.model.base, recipe.router)
    check_claimed(adapter, claimed, claimed.keys() & linears(base.model).keys())
    grow_vocabulary(base, recipe.model.base, added)
    ends = _ends(base.model, template, tokenizer)
    model = attach(base, recipe.adapter, recipe.model.base, recipe.train.seed, recipe.router, added)
    read_adapter(adapter, model)
    model.eval()
    return LoadedRun(str(path), model, tokenizer, template, recipe.data.system or system, ends, recipe)


def load_merged(path: str | Path, device: torch.device | None = None) -> WholeModel:
    """Load a model folder that `tune merge` wrote, or any causal language model with a chat template, as it is.

    Its weights keep the type that its config names. float16 becomes float32, which holds each of its values: bfloat16
    has three bits fewer, and would round the model into another one. So does what a config does not name.

    Raises:
        RunError: it has no chat template, or needs code of its own.
        ModelError: its config, weights or tokenizer cannot be read or used.
        DataError: its chat template or its tokenizer's files contradict themselves.
    """
    folder = Path(path).expanduser()
    try:
        config = read_config(str(folder))
        tokenizer = load_tokenizer(str(folder))
        if not tokenizer.chat_template:
            raise RunError(
                f"{path}: not a run folder (it holds no recipe.yaml), and as a model it has no chat template, so "
                "nothing says how a prompt is written for it. Give a run, or a model that has a chat_template.jinja."
            )
        template, system = _template("tokenizer", tokenizer)
        dtype = "bfloat16" if config.dtype == torch.bfloat16 else "float32"
        section = schema.Model(base=str(folder), quantization="none", dtype=dtype)
        base = load_base(section, device or _device())
    except (ModelError, DataError) as error:
        raise type(error)(_without_recipe(str(path), error)) from error
    return WholeModel(str(path), base.model, tokenizer, template, system, _ends(base.model, template, tokenizer))


def _without_recipe(path: str, error: ModelError | DataError) -> str:
    """An error about a base in words for a folder that was given without a recipe."""
    if "trust_remote_code" in str(error):
        return (
            f"{path}: needs Python code of its own to run, and here no code of a model is run. "
            "If it was merged from a run, give the run."
        )
    return str(error).removeprefix("model.base: ")


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _template(name: str, tokenizer: Any) -> tuple[Template, str | None]:
    """The template of this name, and the system prompt that it writes for messages without one.

    The prompt is taken out of the template, so that whoever asks can leave it out.
    """
    template = resolve_template(name, tokenizer)
    if not isinstance(template, JinjaTemplate):
        return template, None
    system, jinja = split_system(template.jinja)
    return JinjaTemplate(template.name, jinja).bind(tokenizer), system


def _ends(model: Any, template: Template, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end an answer: what the template puts after one, the tokenizer's own end, and the model's.

    What else the model's generation config asks for is dropped.
    """
    from transformers import GenerationConfig

    own = model.generation_config.eos_token_id
    model.generation_config = GenerationConfig()
    written = template.end_of_turn
    ends = [] if written is None else [tokenizer.convert_tokens_to_ids(written)]
    ends += [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return tuple(dict.fromkeys(end for end in ends if isinstance(end, int)))
