"""Answers of a trained adapter and of the base under it, with the template that trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tune.adapters.lora import attach, read_adapter
from tune.data.conversation import Conversation, Message
from tune.data.encode import encode_prompt
from tune.data.templates.resolve import resolve_template
from tune.data.tokenizer import load_tokenizer
from tune.folder import folder_of
from tune.models.hub import read_config
from tune.models.load import load_base
from tune.recipe.load import load_recipe
from tune.recipe.schema import Recipe


@dataclass(frozen=True, slots=True)
class LoadedRun:
    """A run in memory: base, adapter, tokenizer and the template that trained."""

    recipe: Recipe
    model: Any
    tokenizer: Any
    template: Any

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
            system: the system prompt; the recipe's `data.system` when none is given.
            max_new_tokens: at most this many tokens are generated.
            temperature: 0 takes the likeliest token each time.
            on_text: called with each piece of text as it comes.
        """
        messages = [Message("user", prompt)] if isinstance(prompt, str) else list(prompt)
        system = system if system is not None else self.recipe.data.system
        if system and messages[0].role != "system":
            messages.insert(0, Message("system", system))
        ids = torch.tensor([encode_prompt(messages, self.template, self.tokenizer)], device=self.model.device)
        stops = self._stops()
        streamer = None
        if on_text is not None:
            streamer = _stream(self.tokenizer, on_text)
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        with torch.inference_mode(), nullcontext() if adapter else self.model.disable_adapter():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                eos_token_id=stops or None,
                pad_token_id=stops[0] if stops else 0,
                streamer=streamer,
                **sampling,
            )
        return str(self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()

    def _stops(self) -> list[int]:
        """The tokens that end an answer: what the template puts after one, and the tokenizer's own end."""
        turns = Conversation((Message("user", "a"), Message("assistant", "b")))
        ends = [s.text for s in self.template.segments(turns) if s.control and s.trained]
        stops = [self.tokenizer.convert_tokens_to_ids(text) for text in ends] + [self.tokenizer.eos_token_id]
        return list(dict.fromkeys(stop for stop in stops if stop is not None))


def _stream(tokenizer: Any, on_text: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            on_text(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def load_run(path: str | Path, device: torch.device | None = None) -> LoadedRun:
    """Load a run folder, or one of its checkpoints, ready to answer.

    Raises:
        RunError: there is no run, or nothing of it to load yet.
        ModelError: its base or adapter cannot be read.
    """
    from transformers import GenerationConfig

    run, adapter = folder_of(path)
    recipe = load_recipe(run.recipe)
    read_config(recipe.model.base, recipe.model.revision, recipe.model.trust_remote_code)
    # The tokenizer and template saved with the adapter are those that trained; the base's may have changed since.
    saved = (run.adapter / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(
        str(run.adapter) if saved else recipe.model.base,
        revision=None if saved else recipe.model.revision,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    template = resolve_template(recipe.data.template, tokenizer)
    where = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = load_base(recipe.model, where)
    base.model.generation_config = GenerationConfig()  # the base's own may penalise, sample or search
    model = attach(base, recipe.adapter, recipe.model.base, recipe.train.seed)
    read_adapter(adapter, model)
    model.eval()
    return LoadedRun(recipe, model, tokenizer, template)
