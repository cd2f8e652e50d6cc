"""Control tokens that a recipe's templates write and the base's tokenizer lacks, added where the recipe asks for it.

Every verb that needs a base's tokenizer gets it here, so that all mean the same token by the same id. What is added
is decided by the recipe and the base's own tokenizer alone. A finished run's tokenizer, saved beside its adapter, has
the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tune.data.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tune.data.templates.segment import Template
    from tune.recipe.schema import Recipe


class AddedTokens(dict[str, int]):
    """Ids of added tokens by name. `unsaid` are the templates in jinja, which do not say what tokens they need."""

    def __init__(self, ids: Mapping[str, int], unsaid: tuple[str, ...] = ()) -> None:
        super().__init__(ids)
        self.unsaid = unsaid


@dataclass(frozen=True, slots=True)
class Prepared:
    """A base's tokenizer with what the recipe's templates need, if the recipe adds tokens."""

    tokenizer: PreTrainedTokenizerBase
    added: AddedTokens
    """Tokens that were no part of the vocabulary, by name, in the order of their ids. Each needs a row of its own."""

    @property
    def ids(self) -> tuple[int, ...]:
        """Of the added tokens, ascending."""
        return tuple(self.added.values())


def prepare_tokenizer(recipe: Recipe) -> Prepared:
    """Load the tokenizer of a recipe's base; with `data.add_tokens`, add what its templates need.

    Raises:
        ModelError: as `load_tokenizer`.
        DataError: as `load_tokenizer`.
    """
    model = recipe.model
    tokenizer = load_tokenizer(model.base, revision=model.revision, trust_remote_code=model.trust_remote_code)
    known, added, unsaid = set(tokenizer.get_vocab()), list[str](), list[str]()
    if recipe.data.add_tokens:
        from tune.data.templates import TEMPLATES

        for name in dict.fromkeys(_templates(recipe)):
            if name in TEMPLATES:
                added += add_missing(TEMPLATES[name], tokenizer)
            elif name != "auto" or tokenizer.chat_template:  # without one, auto is alpaca, of plain text
                unsaid.append(name)
    ids = {token: int(tokenizer.convert_tokens_to_ids(token)) for token in added if token not in known}
    return Prepared(tokenizer, AddedTokens(dict(sorted(ids.items(), key=lambda item: item[1])), tuple(unsaid)))


def add_missing(template: Template, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Add the control tokens of a template to a tokenizer that lacks them, as special tokens; return their names.

    A token that the vocabulary had as text keeps its id, and is read as one token from now on.
    """
    from tokenizers import AddedToken

    named = template.bind(tokenizer).control_tokens()
    missing = [token for token in dict.fromkeys(named) if token and token not in tokenizer.added_tokens_encoder]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in missing], special_tokens=True)
    return missing


def describe(added: dict[str, int]) -> str:
    """What a start says of added tokens."""
    unsaid = " and ".join(getattr(added, "unsaid", ()))
    if unsaid:
        unsaid = f"which control tokens template {unsaid} writes is not known, so none is added for it"
    if not added:
        return f"added tokens none: {unsaid or 'the tokenizer has all that the templates write'}"
    named = ", ".join(f"{token} {id}" for token, id in added.items())
    return f"added tokens {named}; {unsaid}" if unsaid else f"added tokens {named}"


def _templates(recipe: Recipe) -> Iterator[str]:
    yield recipe.data.template
    for sources in (recipe.data.train, recipe.data.eval):
        if isinstance(sources, tuple):
            yield from (source.template for source in sources if source.template is not None)
