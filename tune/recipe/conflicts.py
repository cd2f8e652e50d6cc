"""Combinations of keys that cannot be meant, as far as the recipe alone decides them.

What depends on the model, the data or the machine (is there a router? does the tokenizer know this control token?)
is asked where that is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from tune.recipe.read import shown

if TYPE_CHECKING:
    from tune.recipe.schema import Recipe

TARGET_KINDS: tuple[str, ...] = ("attention", "mlp", "experts", "router")


class Conflict(NamedTuple):
    """`key` is where the complaint is shown; `involves` the other keys that it rests on; both are dotted."""

    key: str
    words: str
    involves: tuple[str, ...]


def find_conflicts(recipe: Recipe) -> list[Conflict]:
    """Return every contradiction of a recipe whose single values are all right."""
    return [conflict for rule in _RULES for conflict in rule(recipe)]


def _covers(target: str, kind: str) -> bool:
    # Which of mlp and experts exists is the model's matter: either name reaches both.
    return target == kind or {target, kind} == {"mlp", "experts"}


def _targets(recipe: Recipe) -> Iterator[Conflict]:
    adapter = recipe.adapter
    # With a module name among the targets, only the model can say what kind that module is.
    if any(target not in TARGET_KINDS for target in adapter.targets):
        return
    for name in adapter.ranks:
        if name in TARGET_KINDS and not any(_covers(target, name) for target in adapter.targets):
            words = f"gives {name} a rank, but adapter.targets does not adapt it ({', '.join(adapter.targets)}). "
            yield Conflict(
                "adapter.ranks", words + f"Add {name} to the targets, or remove it here.", ("adapter.targets",)
            )
    if all(any(_covers(name, target) for name in adapter.exclude) for target in adapter.targets):
        words = f"leaves nothing to adapt: it takes away every target ({', '.join(adapter.targets)}). Remove one."
        yield Conflict("adapter.exclude", words, ("adapter.targets",))


def _router(recipe: Recipe) -> Iterator[Conflict]:
    if recipe.router.train == "full" and "router" in recipe.adapter.targets:
        words = "trains the router's own weights, and adapter.targets puts a LoRA on it as well. Choose one."
        yield Conflict("router.train", words, ("adapter.targets",))


def _start(recipe: Recipe) -> Iterator[Conflict]:
    if recipe.adapter.start_from is not None and recipe.adapter.init != "default":
        words = f"has no effect ({recipe.adapter.init}): adapter.start_from continues an adapter. Remove one of them."
        yield Conflict("adapter.init", words, ("adapter.start_from",))


def _evaluation(recipe: Recipe) -> Iterator[Conflict]:
    held_out = recipe.data.eval
    if recipe.train.patience is not None and held_out == 0:
        words = (
            f"counts evaluations ({recipe.train.patience}), and there is no held-out data. Set data.eval, such as 0.02."
        )
        yield Conflict("train.patience", words, ("data.eval",))
    if isinstance(held_out, tuple):
        for index, source in enumerate(held_out):
            if source.weight != 1:
                words = f"repeats rows for training ({source.weight:g}); held-out rows are read once. Remove it."
                yield Conflict(f"data.eval.{index}.weight", words, ())


def _columns(recipe: Recipe) -> Iterator[Conflict]:
    for part, sources in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        for index, source in enumerate(sources if isinstance(sources, tuple) else ()):
            ours = {theirs: name for name, theirs in source.columns.items()}
            for name, theirs in source.columns.items():
                if ours[theirs] != name:
                    words = f"reads {shown(theirs)!r} as both {shown(name)} and {shown(ours[theirs])}. Remove one."
                    yield Conflict(f"data.{part}.{index}.columns", words, ())


def _length(recipe: Recipe) -> Iterator[Conflict]:
    train = recipe.train
    if train.max_steps is not None and train.warmup >= 1 and train.warmup >= train.max_steps:
        words = (
            f"is not shorter than the whole training ({train.warmup:g} steps, train.max_steps is {train.max_steps}). "
        )
        remedy = "Make it shorter, or a fraction such as 0.03."
        yield Conflict("train.warmup", words + remedy, ("train.max_steps",))


def _publishing(recipe: Recipe) -> Iterator[Conflict]:
    if recipe.push.merged and recipe.push.repo is None:
        yield Conflict("push.merged", "has nowhere to go. Set push.repo to OWNER/NAME.", ("push.repo",))


def _tracking(recipe: Recipe) -> Iterator[Conflict]:
    if recipe.tracking.to:
        return
    for key, value in (("project", recipe.tracking.project), ("name", recipe.tracking.name)):
        if value is not None:
            words = f"has no tracker to be shown at ({shown(value)}). Set tracking.to, such as [wandb]."
            yield Conflict(f"tracking.{key}", words, ("tracking.to",))


_RULES: tuple[Callable[[Recipe], Iterator[Conflict]], ...] = (
    _targets,
    _router,
    _start,
    _evaluation,
    _columns,
    _length,
    _publishing,
    _tracking,
)
