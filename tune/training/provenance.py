"""provenance.json: what a run was made of, and some of its examples, so that a merge can be proven without the data."""

from __future__ import annotations

import json
from typing import Any

from tune.data.added_tokens import Prepared
from tune.data.conversation import BadRowError, Conversation, Role
from tune.data.encode import Encoder
from tune.data.load import Data
from tune.data.tokenizer import vocabulary_digest
from tune.folder import RunFolder, write_file
from tune.models.hub import commit_of, read_config
from tune.models.vocabulary import rows_needed
from tune.recipe.schema import Recipe
from tune.training.checkpoint import machine

EXAMPLES = 16
"""How many examples a run remembers, spread over its held-out data, or else over its training data."""


DIALOGUES: tuple[tuple[tuple[Role, str], ...], ...] = (
    (("user", "What do the tides follow?"), ("assistant", "The moon, mostly.")),
    (("user", "  Two spaces,\n\n\ttabs and 12345 numbers "), ("assistant", "Naïve café, Привет, 你好, 🙂.\n")),
    (("user", "One."), ("assistant", "Two."), ("user", "Three?"), ("assistant", "Four.")),
    (("system", "Answer in one word."), ("user", "Which star is nearest?"), ("assistant", "Sol")),
)
"""Conversations whose tokens are remembered, so that a published tokenizer and template can be held against them."""


def words(recipe: Recipe, data: Data, tokenizer: Any) -> dict[str, Any]:
    """What tokenizer and template make of text, as training saw it: the vocabulary, and some dialogues' token ids."""
    encoder, dialogues = Encoder(tokenizer), []
    for turns in DIALOGUES:
        messages = [{"role": role, "content": content} for role, content in turns]
        conversation = Conversation.of(*turns)
        if recipe.data.system:
            conversation = conversation.with_system(recipe.data.system)
        try:
            encoded = encoder.encode([data.template.segments(conversation)])[0]
        except BadRowError:  # a template without a system role, for one
            continue
        if not isinstance(encoded, BadRowError):
            dialogues.append({"messages": messages, "ids": list(encoded.ids)})
    return {"vocabulary": vocabulary_digest(tokenizer), "dialogues": dialogues}


def _added_tokens(recipe: Recipe, prepared: Prepared) -> dict[str, Any]:
    """The tokens that the base's tokenizer lacked, and the rows that its embedding is resized to for them, if it is."""
    model = recipe.model
    config = read_config(model.base, model.revision, model.trust_remote_code)
    rows = int(config.get_text_config().vocab_size)
    needed = rows_needed(rows, prepared.ids)
    return {"ids": prepared.added, "resize_to": needed if needed > rows else None}


def remember(
    run: RunFolder, recipe: Recipe, data: Data, prepared: Prepared, base_fingerprint: str, again: bool = True
) -> None:
    """Write the run's provenance.json; with `again` false, only if there is none."""
    if not again and run.provenance.is_file():
        return
    held_out = data.eval is not None
    part = data.eval if data.eval is not None else data.train
    chosen = sorted({index * len(part) // EXAMPLES for index in range(EXAMPLES)})
    examples = []
    for index in chosen:
        ids, trained = part.example(index)
        examples.append({"row": part.where(index), "ids": ids.tolist(), "trained": trained.astype(int).tolist()})
    base = recipe.model.base
    content = {
        "base": {
            "name": base,
            "commit": commit_of(base, recipe.model.revision),
            "fingerprint": base_fingerprint,
        },
        "data": {"fingerprint": data.fingerprint, "part": "held-out data" if held_out else "training data"},
        "words": words(recipe, data, prepared.tokenizer),
        "added_tokens": _added_tokens(recipe, prepared),
        "machine": machine(),
        "examples": examples,
    }
    write_file(run.provenance, json.dumps(content) + "\n")
