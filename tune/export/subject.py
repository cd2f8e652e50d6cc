"""What is merged: a run's adapter, the base that it was trained on, and the files of both."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tune.data.added_tokens import prepare_tokenizer
from tune.data.templates.default_system import with_system
from tune.data.templates.resolve import resolve_template
from tune.data.tokenizer import load_tokenizer
from tune.errors import ModelError, RunError
from tune.export.deltas import Change, Pair, Replacement, StackDelta, read_pairs
from tune.folder import RunFolder, folder_of
from tune.folder.records import missing_of
from tune.models.hub import fingerprint_base, local_folder, read_config
from tune.models.load import check_supported
from tune.models.own_code import is_same_code, refuse_unknown_code
from tune.models.replaced_rows import RowValues
from tune.models.shards import DTYPES, Checkpoint, Stack, base_checkpoint
from tune.models.streamed import StreamedModel, TrainedWeights, Weights
from tune.recipe.load import load_recipe
from tune.recipe.schema import Recipe

Base = Literal["original", "quantized"]
"""Which weights the adapter is added to: the base's own, or those that a 4-bit run was trained on."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A run, read as far as a merge and its proof need it."""

    run: RunFolder
    adapter: Path
    """The PEFT folder: adapter/, or a checkpoint."""
    recipe: Recipe
    provenance: dict[str, Any]
    base: Base
    config: Any
    checkpoint: Checkpoint
    """The original base's files."""
    model: StreamedModel
    """Without the adapter."""
    parameters: frozenset[str]
    """Stored names of all that the model has a place for; a file may hold more."""
    deltas: dict[str, Change]
    """By the stored name of the matrix that each is added to."""
    tokenizer: Any
    template: Any

    @property
    def chat_template(self) -> str:
        """The jinja form of the template that trained, with the system prompt that trained."""
        return with_system(self.template.jinja, self.recipe.data.system)

    def trained_weights(self) -> TrainedWeights:
        """The base's parameters as training saw them."""
        section = self.recipe.model
        packed = self.model.packable(self.checkpoint) if section.quantization == "nf4" else set()
        return TrainedWeights(self.checkpoint, packed, getattr(torch, section.dtype))

    def weights(self) -> Weights:
        """The parameters that are merged into."""
        return Weights(self.checkpoint) if self.base == "original" else self.trained_weights()

    def trusts(self, folder: Path) -> bool:
        """Whether Python code in a merged folder may run: the base's own code may, and this is the same."""
        section = self.recipe.model
        base = local_folder(section.base) or self.checkpoint.files[0].parent
        return section.trust_remote_code and is_same_code(folder, base)

    def is_rewritten(self, name: str) -> bool:
        """Whether the merge may give a stored tensor other values."""
        return name in self.deltas or (self.base == "quantized" and name in self.parameters)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of a stored tensor in the merged model: added tokens make embedding and output head taller."""
        shape, change = self.checkpoint.places[name].shape, self.deltas.get(name)
        return (change.height(shape[0]), *shape[1:]) if isinstance(change, RowValues) else shape

    @property
    def vocabulary(self) -> int:
        """How many tokens the merged model has an embedding for."""
        changes = [change for change in self.deltas.values() if isinstance(change, RowValues)]
        return max(change.height(self.model.vocabulary) for change in changes) if changes else self.model.vocabulary

    def key(self) -> str:
        """A SHA-256 over all that decides the bytes of the merge."""
        digest = hashlib.sha256((self.adapter / "adapter_model.safetensors").read_bytes())
        for part in (
            (self.adapter / "adapter_config.json").read_text(encoding="utf-8"),
            self.provenance["base"]["fingerprint"],
            self.base,
            self.recipe.model.dtype,
        ):
            digest.update(b"\0" + str(part).encode())
        return digest.hexdigest()


def find_subject(path: str | Path, base: Base) -> Subject:
    """Read a run and its base, without weights.

    Raises:
        RunError: there is no run, nothing of it to merge, or its base's own code would run and may not.
        ModelError: the base is gone, broken or another one than was trained on, or the adapter does not fit it.
    """
    run, adapter = folder_of(path)
    recipe = load_recipe(run.recipe)
    section = recipe.model
    refuse_unknown_code(run, section)
    if base == "quantized" and section.quantization == "none":
        raise RunError(
            f"{path}: was trained on a base that was not quantised, so there is no quantised one to merge into. "
            "Leave out --base."
        )
    provenance = run.read_provenance()
    if missing := missing_of(provenance):
        raise RunError(
            f"{run.provenance}: lacks {', '.join(missing)}, so a merge could not be proven. Remove it; "
            f"`tune train {run.recipe} --resume` writes it again."
        )
    config = read_config(section.base, section.revision, section.trust_remote_code)
    check_supported(section, config)
    now = fingerprint_base(section.base, section.revision)
    if now != provenance["base"]["fingerprint"]:
        raise ModelError(
            f"model.base: {section.base} is not the base that {run.root} was trained on (fingerprint was "
            f"{provenance['base']['fingerprint'][:12]}, is {now[:12]}). Put the old files back, or train anew."
        )
    checkpoint = base_checkpoint(section)
    model = StreamedModel(config, section.base, section.trust_remote_code)
    parameters = model.check(checkpoint)
    # Those saved with the adapter are those that trained; the base's, and a template's file, may have changed since.
    saved = (run.adapter / "tokenizer_config.json").is_file()
    from_file = saved and recipe.data.template.endswith(".jinja")
    if saved:
        tokenizer: Any = load_tokenizer(str(run.adapter), saved=True)
    else:
        tokenizer = prepare_tokenizer(recipe).tokenizer
    subject = Subject(
        run=run,
        adapter=adapter,
        recipe=recipe,
        provenance=provenance,
        base=base,
        config=config,
        checkpoint=checkpoint,
        model=model,
        parameters=parameters,
        deltas=_stored(read_pairs(adapter), model, checkpoint, adapter),
        tokenizer=tokenizer,
        template=resolve_template("tokenizer" if from_file else recipe.data.template, tokenizer),
    )
    largest = max((token for example in provenance["examples"] for token in example["ids"]), default=0)
    if largest >= subject.vocabulary:
        raise RunError(
            f"{run.provenance}: its examples have a token {largest}, and base and adapter have embeddings for "
            f"{subject.vocabulary}. Remove it; `tune train {run.recipe} --resume` writes it again."
        )
    if len(tokenizer) > subject.vocabulary:
        raise ModelError(
            f"{adapter}: its tokenizer has {len(tokenizer)} tokens, and base and adapter have embeddings for "
            f"{subject.vocabulary}. Tokenizer and weights belong to different models: copy both from one."
        )
    return subject


def _stored(
    pairs: dict[str, Pair | Replacement | RowValues], model: StreamedModel, checkpoint: Checkpoint, adapter: Path
) -> dict[str, Change]:
    """What is done to each stored tensor, by its name; each checked against its matrix."""
    found: dict[str, Change] = {}
    for parameter, pair in pairs.items():
        module, _, last = parameter.rpartition(".")
        owner = model.modules.get(module)
        known = owner is not None and last in dict(owner.named_parameters(recurse=False))
        if not known or (owner in (model.embedding, model.head)) != isinstance(pair, RowValues):
            raise ModelError(
                f"{adapter}: adapts {parameter}, which is no matrix of {model.name} "
                "that can be adapted. It belongs to another base."
            )
        stored = model.stored(checkpoint, module, last)
        shape = checkpoint.shape_of(stored)
        delta = pair.delta(shape)
        if delta is None:
            raise ModelError(
                f"{adapter}: its change of {parameter} does not fit the matrix {list(shape)} of {model.name}. "
                "It belongs to another base."
            )
        found |= {stored: delta} if isinstance(stored, str) else _by_matrix(stored, delta, checkpoint)
        if isinstance(delta, RowValues) and model.tied:  # some checkpoints hold the tied head a second time
            head = model.stored(checkpoint, next(name for name, other in model.modules.items() if other is model.head))
            assert isinstance(head, str)
            found[head] = delta
    for name in found:
        place = checkpoint.places[name]
        if place.dtype not in DTYPES:
            raise ModelError(
                f"{place.file}: {name} is of type {place.dtype}, which a delta cannot be added to. "
                "Train on a base in float32, bfloat16 or float16."
            )
    return found


def _by_matrix(stack: Stack, delta: Change, checkpoint: Checkpoint) -> dict[str, Change]:
    """The part of a change of all experts that falls on each of their matrices, by its stored name."""
    assert isinstance(delta, StackDelta)
    found: dict[str, Change] = {}
    for expert, names in enumerate(stack.experts):
        start = 0
        for name in names:
            stop = start + checkpoint.places[name].shape[0]
            found[name] = delta.expert(expert, start, stop)
            start = stop
    return found
