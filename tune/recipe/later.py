"""What a recipe may ask for and does not get: what this version does not build yet, and secrets where none can be kept.

The schema is the whole contract from the start, so that a recipe written today stays valid. An entry below is deleted
when the thing it names is built; an empty list means that nothing is promised in vain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from tune.recipe.fields import FORMATS, TEMPLATES
from tune.recipe.schema import Recipe, Source
from tune.secrets import secret_in


class Later(NamedTuple):
    """`asks` tells whether a recipe needs the thing; `key` and `words` say where and what instead."""

    asks: Callable[[Recipe], bool]
    key: str
    words: str


FORMATS_LATER: tuple[str, ...] = ()
TEMPLATES_LATER: tuple[str, ...] = ()

_SINGLE: tuple[Later, ...] = ()


def _sources(recipe: Recipe) -> Iterator[tuple[str, Source]]:
    for key, sources in (("data.train", recipe.data.train), ("data.eval", recipe.data.eval)):
        if isinstance(sources, tuple):
            for index, source in enumerate(sources):
                yield f"{key}[{index}]", source


def _templates(recipe: Recipe) -> Iterator[tuple[str, str]]:
    yield "data.template", recipe.data.template
    for key, source in _sources(recipe):
        if source.template is not None:
            yield f"{key}.template", source.template


def _secrets(recipe: Recipe) -> Iterator[str]:
    """What holds a secret and cannot be hidden in what a run writes without breaking it.

    Elsewhere in a recipe a secret is written as `***`, and a run goes on and is used without it.
    """
    for key, value, why in (
        ("model.base", recipe.model.base, "The adapter names its base by it. Give the folder another name"),
        ("data.system", recipe.data.system, "It would be trained, and stand in the chat template. Leave it out"),
        ("data.template", recipe.data.template, "The run needs the file's name later. Give it another"),
        ("push.repo", recipe.push.repo, "Everybody would read it there. Give the repository another name"),
        ("output", recipe.output, "A folder's name cannot be hidden. Give it another"),
    ):
        if value is not None and (secret := secret_in(value)) is not None:
            chance = "; if the word is there by chance, unset the variable" if "variable" in secret else ""
            yield f"{key}: holds {secret}. {why}{chance}."


def refusals(recipe: Recipe) -> list[str]:
    """Return `key: words` for each thing that `recipe` asks for and cannot have.

    That is what this version does not build, and a secret in a place where none can be kept.
    """
    found = list(_secrets(recipe))
    found += [f"{later.key}: {later.words}" for later in _SINGLE if later.asks(recipe)]
    formats = [name for name in FORMATS if name not in FORMATS_LATER]
    for key, source in _sources(recipe):
        if source.format in FORMATS_LATER:
            words = f"the format {source.format} is not in this version. Write one of {', '.join(formats)}."
            found.append(f"{key}.format: {words}")
    templates = [name for name in TEMPLATES if name not in TEMPLATES_LATER]
    for key, name in _templates(recipe):
        if name in TEMPLATES_LATER:
            words = f"the template {name} is not in this version. Write one of {', '.join(templates)}."
            found.append(f"{key}: {words}")
    return found
