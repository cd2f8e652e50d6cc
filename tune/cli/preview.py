"""`tune preview`: examples as the model sees them, and which of their tokens it learns.

The tokens are those of the training, decoded again: template, system prompt, control tokens and the cut at
`data.max_length` included. Examples come in the order of the data, from the first rows of each source, held-out ones
among them. No weights are loaded, and nothing is written.

## What it prints

For each example a line with the file, the row, and how many tokens there are and are trained on; then the text. On a
terminal the trained tokens have a green ground. Elsewhere they stand between ⟦ and ⟧, or between [[ and ]] where the
encoding has no such brackets. `--quiet` leaves the text alone.

`--json` prints one object a line with three lists of equal length: `ids`, `tokens` as the tokenizer names them, and
`trained`, true or false for each.

On a terminal it also says if the examples shown leave out whole sources. `data.train.0.limit=1` makes room for the
second one.

## What can go wrong

Recipe and data are read as `tune check` reads them, and refused in the same words. If answers are not marked, look at
`data.train_on` and at the format: the roles or columns are not what it expects.

## Example

With the model that `scripts/quickstart` makes; the answer is shortened here:

```console
$ tune preview recipes/quickstart.yaml -n 1 | cat
--- data/lighthouse-alpaca.jsonl:1: 87 tokens, 48 trained on
<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
<|im_start|>user
How often should I water a cactus?<|im_end|>
<|im_start|>assistant
⟦Ahoy, friend! About every two to three weeks in summer, … Fair winds, Wren of Gull Rock.<|im_end|>⟧
```
"""

from __future__ import annotations

import json
import sys
from itertools import groupby
from typing import TYPE_CHECKING

from tune.cli.output import as_it_is
from tune.data.sources import check_places
from tune.recipe.later import refusals
from tune.recipe.load import load_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tune.data.examples import Examples
    from tune.recipe.schema import Recipe

TRAINED_STYLE = "black on green"
MARKS = ("⟦", "⟧")
PLAIN_MARKS = ("[[", "]]")
"""For an output whose encoding has no ⟦."""


def preview(recipe_path: str, overrides: list[str], n: int, as_json: bool, quiet: bool) -> None:
    """Show the first `n` examples in the order of the data, held-out ones included.

    Trained tokens are coloured on a terminal and stand between ⟦ and ⟧ elsewhere. With `as_json`, one object a
    line: `ids`, `tokens` as the tokenizer names them, and `trained`.
    """
    from tune.errors import RecipeError

    recipe = load_recipe(recipe_path, overrides)
    if refused := refusals(recipe):
        raise RecipeError(refused)  # before transformers is imported, which takes a second
    check_places(recipe.data)

    from tune.data.added_tokens import prepare_tokenizer

    if recipe.model.trust_remote_code:
        _tell_own_code(recipe)
    tokenizer = prepare_tokenizer(recipe).tokenizer
    examples = _first_examples(recipe, tokenizer, n)
    if not quiet and sys.stderr.isatty():
        _tell_what_is_not_shown(recipe, examples, n)
    for index in range(min(n, len(examples))):
        ids, trained = (values.tolist() for values in examples.example(index))
        if as_json:
            shown = {"ids": ids, "tokens": tokenizer.convert_ids_to_tokens(ids), "trained": trained}
            print(json.dumps(shown), file=as_it_is())
            continue
        if not quiet:
            end = f", cut at data.max_length ({recipe.data.max_length})" if examples.cut[index] else ""
            print(f"--- {examples.where(index)}: {len(ids)} tokens, {sum(trained)} trained on{end}")
        _show(_pieces(tokenizer, ids, trained))


def _tell_own_code(recipe: Recipe) -> None:
    from tune.models.own_code import allow, announce

    announce(recipe.model, lambda line: print(line, file=sys.stderr))
    if problem := allow(recipe.model):
        print(f"warning: {problem}", file=sys.stderr)


def _first_examples(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, n: int) -> Examples:
    """At least `n` examples if there are so many, from as few rows as that takes."""
    from tune.data.load import load_data

    enough = 4 * n + 100
    while True:
        # A weight is of the whole source, and may leave nothing of its first rows.
        sources = tuple(
            s.model_copy(update={"limit": min(s.limit or enough, enough), "weight": 1.0}) for s in recipe.data.train
        )
        data = recipe.data.model_copy(update={"train": sources, "eval": 0.0})
        # So few rows are encoded in no time, and would fill the cache with beginnings of sources.
        loaded = load_data(recipe.model_copy(update={"data": data}), tokenizer, cached=False)
        whole = all(s.rows < enough for s in loaded.report.sources)
        if len(loaded.train) >= n or whole:
            return loaded.train
        enough *= 8


def _tell_what_is_not_shown(recipe: Recipe, examples: Examples, n: int) -> None:
    sources = recipe.data.train
    shown = int(examples.source[: min(n, len(examples))].max()) + 1
    if shown == len(sources):
        return
    what = f"only the first source, {sources[0].path}," if shown == 1 else f"only the first {shown} sources"
    remedy = f"data.train.{shown - 1}.limit=1 leaves room for the next"
    print(f"{what} of {len(sources)} {'is' if shown == 1 else 'are'} shown: {remedy}", file=sys.stderr)


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int], trained: list[bool]) -> list[tuple[str, bool]]:
    """The text of each stretch of trained or untrained tokens.

    Decoding a stretch by itself would lose the space before its first word, so each is what it adds to the
    text before it.
    """
    pieces, before, position = [], "", 0
    for learned, group in groupby(trained):
        position += len(list(group))
        text = str(tokenizer.decode(ids[:position], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        pieces.append((text[len(before) :], learned))
        before = text
    return pieces


def _marks() -> tuple[str, str]:
    try:
        "".join(MARKS).encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return PLAIN_MARKS
    return MARKS


def _show(pieces: list[tuple[str, bool]]) -> None:
    if not sys.stdout.isatty():
        print("".join(text.join(_marks()) if learned else text for text, learned in pieces), file=as_it_is())
        return
    from rich.console import Console
    from rich.text import Text

    shown = Text()
    for text, learned in pieces:
        shown.append(text, style=TRAINED_STYLE if learned else "dim")
    Console(file=as_it_is(), highlight=False, soft_wrap=True).print(shown)
