"""`tune check`: is the recipe right, and is the data what it should be? No weights are loaded.

All that training asks for is asked here, but for the right to publish: the recipe, the data, the tokenizer, the
base's configuration, the optimizer, the trackers and the adapter to start from. Nothing is written but the encoded
data, in the cache where training finds it again. What is on the Hub and not yet in the cache is downloaded: data,
tokenizer and configuration, not the weights.

## What it prints

For each source of `data.train` and `data.eval`:

| line | says |
| --- | --- |
| format | how the rows were read; with `auto`, what was found |
| template | how the prompts are written |
| rows | rows read |
| examples | what came of them |
| tokens | of these examples, after cutting |
| trained | the share of the tokens that is trained on |
| truncated | examples cut at `data.max_length` |
| too long | rows dropped for their length, under `data.on_long: drop` |
| zero-target | rows dropped since nothing of them would be trained on |
| bad | rows dropped since they cannot be read, under `data.on_bad: drop` |
| duplicates | examples that repeat an earlier one of the same part, token for token |
| near duplicates | examples that repeat an earlier one of the same part but for a few words |
| length p50/p95/max | tokens of an example before cutting: the median, the 95th percentile and the longest |

Then the whole: the length of an epoch with weights counted, the steps of the training, the held-out examples, how many
of them are in the training data too (token for token, and nearly), and a fingerprint of the encoded data, which changes
when the data, the tokenizer or the template does. A `cached` line says how many sources an earlier start has encoded
already, with the same tokenizer, template and options (they are kept in `$TUNE_CACHE`, else `$XDG_CACHE_HOME/tune`,
else `~/.cache/tune`, until no start has used them for 30 days). A `dropped` line shows one of the first three rows of a
source that were dropped for a reason, with the place and the reason. The last line says that recipe and data are
usable.

Outside a terminal the sources stand below each other, one number a line.

## What can go wrong

A mistake ends it with exit code 2, and every mistake in the recipe is told at once:

```console
$ tune check recipes/quickstart.yaml train.epoch=2 lora_r=8
train.epoch=2 (command line): is not a key of train. Did you mean 'epochs'?
lora_r=8 (command line): is not a key of a recipe. Here it is adapter.rank.
```

A warning leaves the exit code 0. There is one for many cut examples, for few trained tokens, for dropped rows, for
examples that repeat others, for texts that are shaped like a token or key, for held-out examples that are in the
training data too, for a `data.eval` too small to hold anything out, and for answers that end without an end token. Of
near copies the first three are shown, each behind the example that it repeats.

## What is a near copy

Two examples are near copies when four fifths of their runs of five tokens are the same (common runs over all runs of
the two), and half of what they answer is. What a template or a system prompt writes around every text does not count,
and neither does what stands in the prompts of more than a twentieth of the examples. So the usual questions and answers
in one template are no copies of each other, and neither are several questions about one long text; a row in which a few
words of a text were changed is. Where so many examples resemble each other that not all could be compared, the number
begins with `at least`. Only `tune check` looks for near copies: they change nothing in the training.

## Example

With the model that `scripts/quickstart` makes, on a terminal:

```console
$ tune check recipes/quickstart.yaml
                    data/lighthouse-alpaca.jsonl  data/lighthouse-heldout.jsonl
                                           train                           eval
format                                    alpaca                         alpaca
template                               tokenizer                      tokenizer
rows                                         200                             20
examples                                     200                             20
tokens                                    17,084                          1,686
trained                                    50.5%                          50.2%
truncated                                      0                              0
too long                                       0                              0
zero-target                                    0                              0
bad                                            0                              0
duplicates                                     0                              0
near duplicates                                0                              0
length p50/p95/max                     85/96/105                       84/91/96
train        200 examples, 17,084 tokens, 50.5% trained on
epoch        200 examples, weights counted, in 25 steps
steps        25 of 8 examples
held out     20 examples, 1,686 tokens, 0 of them in train too, 0 nearly
fingerprint  3c408e9446978754
recipe and data are usable
```
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING

from tune.data.sources import check_places
from tune.errors import RecipeError, as_line
from tune.recipe.later import refusals
from tune.recipe.load import load_recipe
from tune.secrets import redact

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from tune.data.examples import Examples
    from tune.data.load import Data
    from tune.data.near_duplicates import NearCopies
    from tune.data.report import Report, SourceReport
    from tune.recipe.schema import Recipe


def check(recipe_path: str, overrides: list[str], quiet: bool) -> None:
    """Print what the data comes to, source by source, and what looks wrong with it."""
    recipe = load_recipe(recipe_path, overrides)
    if refused := refusals(recipe):
        raise RecipeError(refused)  # before transformers is imported, which takes a second
    check_places(recipe.data)

    from rich.console import Console

    from tune.adapters.lora import resolve_targets  # first, since it keeps bitsandbytes quiet
    from tune.adapters.start import check_start_tokens, find_start
    from tune.data.added_tokens import describe, prepare_tokenizer
    from tune.data.load import load_data
    from tune.models.load import check_vocabulary, outline_base
    from tune.models.own_code import allow, announce
    from tune.models.vocabulary import check_room

    terminal = sys.stdout.isatty()
    waiting = Console(stderr=True).status("reading the data") if terminal and not quiet else nullcontext()
    with waiting:
        model = recipe.model
        _check_surroundings(recipe)
        if model.trust_remote_code:
            announce(model, print)
        if problem := allow(model):
            print(f"warning: {problem}")
        outline = outline_base(recipe.model)
        if not model.trust_remote_code:
            announce(model, print)
        if outline is not None:
            resolve_targets(recipe.adapter, outline, model.base, recipe.router)
        words = prepare_tokenizer(recipe)
        if outline is not None and words.added:
            check_room(outline.model, model.base, words.ids)
        if recipe.adapter.start_from is not None:
            check_start_tokens(find_start(recipe.adapter.start_from), words.added)
        data = load_data(recipe, words.tokenizer)
        if outline is not None and not words.added:  # else the room for the largest id is made
            parts = [part for part in (data.train, data.eval) if part is not None]
            check_vocabulary(outline, model.base, max(part.largest_id for part in parts))
        copies = _near_copies(data, recipe, words.tokenizer)
    columns = [
        _cells(source, near) for source, near in zip(data.report.sources, _near_of_sources(data, copies), strict=True)
    ]
    if terminal:
        _print_table(data.report, columns)
    else:
        for source, cells in zip(data.report.sources, columns, strict=True):
            _print_lines(source, cells)
    if recipe.data.add_tokens:
        print(describe(words.added))
    _print_totals(data, recipe, copies)
    _print_warnings(data, copies)


def _check_surroundings(recipe: Recipe) -> None:
    """What training asks for besides base and data: the optimizer, the trackers and the adapter to start from."""
    import torch

    from tune.training.metrics import check_trackers
    from tune.training.optimizer import check_optimizer

    check_optimizer(recipe.train, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    check_trackers(recipe.tracking.to)


def _cells(source: SourceReport, near: str) -> dict[str, str]:
    """The numbers of one source, with their names, in the order in which they are shown."""
    return {
        "format": source.format,
        "template": source.template,
        "rows": f"{source.rows:,}",
        "examples": f"{source.examples:,}",
        "tokens": f"{source.tokens:,}",
        "trained": f"{source.trained_share:.1%}",
        "truncated": f"{source.truncated:,}",
        "too long": f"{source.dropped_long:,}",
        "zero-target": f"{source.dropped_untrained:,}",
        "bad": f"{source.dropped_bad:,}",
        "duplicates": f"{source.duplicates:,}",
        "near duplicates": near,
        "length p50/p95/max": f"{source.length_p50}/{source.length_p95}/{source.length_max}",
    }


def _near_copies(data: Data, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> NearCopies:
    """The near copies among the examples, whatever their templates write around them."""
    import numpy as np

    from tune.data.near_duplicates import find_near_copies
    from tune.data.shingles import template_shingles
    from tune.data.templates.resolve import resolve_template

    wanted = recipe.data
    sources = (*wanted.train, *(wanted.eval if isinstance(wanted.eval, tuple) else ()))
    templates = [resolve_template(name, tokenizer) for name in {s.template or wanted.template for s in sources}]
    around = [template_shingles(template, tokenizer, wanted.system) for template in templates]
    return find_near_copies(data.train, data.eval, np.concatenate(around))


def _near_of_sources(data: Data, copies: NearCopies) -> list[str]:
    """How many examples of each source nearly repeat an earlier one of the same part, as shown."""
    counts = []
    numbers = {"train": 0, "eval": 0}
    for source in data.report.sources:
        examples, found = (data.train, copies.train) if source.part == "train" else (data.eval, copies.eval)
        assert examples is not None
        counts.append(_at_least(int((found[examples.source == numbers[source.part]] >= 0).sum()), copies))
        numbers[source.part] += 1
    return counts


def _at_least(count: int, copies: NearCopies) -> str:
    return f"{count:,}" if copies.complete else f"at least {count:,}"


def _print_table(report: Report, columns: list[dict[str, str]]) -> None:
    """One column a source: there are more numbers than sources."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=True, header_style="bold")
    table.add_column("")
    for source in report.sources:
        # Before it is folded: a part of a secret is not known as one.
        table.add_column(f"{redact(source.path)}\n{source.part}", justify="right", overflow="fold")
    for name in columns[0]:
        table.add_row(name, *(cells[name] for cells in columns))
    Console(highlight=False).print(table)


def _print_lines(source: SourceReport, cells: dict[str, str]) -> None:
    print(f"{source.part} {source.path}")
    for name, value in cells.items():
        print(f"  {name:<18} {value}")


def _print_totals(data: Data, recipe: Recipe, copies: NearCopies) -> None:
    from tune.data.batches import Order

    report, train = data.report, recipe.train
    share = report.train_trained / report.train_tokens
    print(f"train        {report.train_examples:,} examples, {report.train_tokens:,} tokens, {share:.1%} trained on")
    order = Order(data.train.source, tuple(source.weight for source in recipe.data.train), train.batch_size, train.seed)
    print(f"epoch        {order.epoch_length:,} examples, weights counted, in {order.steps_per_epoch:,} steps")
    print(f"steps        {order.steps(train.epochs, train.max_steps):,} of {train.batch_size:,} examples")
    if data.eval is not None:
        nearly = _at_least(int((copies.shared >= 0).sum()), copies)
        shared = f"{report.shared:,} of them in train too, {nearly} nearly"
        print(f"held out     {report.eval_examples:,} examples, {report.eval_tokens:,} tokens, {shared}")
    print(f"fingerprint  {data.fingerprint[:16]}")
    if report.cached:
        print(f"cached       {report.cached} of {len(report.sources)} sources, encoded by an earlier start")
    if recipe.push.repo is not None:
        print(f"push         {recipe.push.repo}: not asked here; training asks the Hub before it loads anything")


def _print_warnings(data: Data, copies: NearCopies) -> None:
    for source in data.report.sources:
        for row in source.dropped:
            print(f"dropped      {as_line(row)}")
    warnings = data.report.warnings() + _near_warnings(data, copies)
    for warning in warnings:
        print(f"warning: {warning}")
    counted = "1 warning" if len(warnings) == 1 else f"{len(warnings)} warnings"
    print(f"recipe and data are usable, with {counted}" if warnings else "recipe and data are usable")


def _near_warnings(data: Data, copies: NearCopies) -> list[str]:
    """What near copies there are, and the first three."""
    found = []
    if count := int((copies.train >= 0).sum()):
        pairs = _pairs(data.train, data.train, copies.train)
        found.append(
            f"{_at_least(count, copies)} of {len(data.train):,} training examples nearly repeat an earlier one "
            f"({pairs}). Keep one of them, unless they are meant to weigh more."
        )
    if data.eval is not None and (count := int((copies.eval >= 0).sum())):
        pairs = _pairs(data.eval, data.eval, copies.eval)
        held_out = f"{_at_least(count, copies)} of {len(data.eval):,} held-out examples"
        found.append(f"{held_out} nearly repeat an earlier one ({pairs}).")
    if data.eval is not None and (count := int((copies.shared >= 0).sum())):
        pairs = _pairs(data.eval, data.train, copies.shared)
        found.append(
            f"{_at_least(count, copies)} of {len(data.eval):,} held-out examples nearly repeat a training example "
            f"({pairs}): the held-out loss will look better than it is. Take them out of one of the two."
        )
    return found


def _pairs(examples: Examples, others: Examples, found: np.ndarray) -> str:
    """The first three examples that are copies, each behind what it repeats."""
    first = [int(index) for index in (found >= 0).nonzero()[0][:3]]
    pairs = [f"{others.where(int(found[index]))} ~ {examples.where(index)}" for index in first]
    return ", ".join(pairs) + (", ..." if int((found >= 0).sum()) > len(first) else "")
