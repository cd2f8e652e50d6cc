"""`tune check`: is the recipe right, and is the data what it should be? No weights are loaded.

All that training asks for is asked here, but for the right to publish: the recipe, the data, the tokenizer, the
base's configuration, the optimizer, the trackers and the adapter to start from. Nothing is written. What is on the Hub
and not yet in the cache is downloaded: data, tokenizer and configuration, not the weights.

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
| length p50/p95/max | tokens of an example before cutting: the median, the 95th percentile and the longest |

Then the whole: the length of an epoch with weights counted, the steps of the training, the held-out examples and a
fingerprint of the encoded data, which changes when the data, the tokenizer or the template does. The last line says
that recipe and data are usable.

Outside a terminal the sources stand below each other, one number a line.

## What can go wrong

A mistake ends it with exit code 2, and every mistake in the recipe is told at once:

```console
$ tune check recipes/quickstart.yaml train.epoch=2 lora_r=8
train.epoch=2 (command line): is not a key of train. Did you mean 'epochs'?
lora_r=8 (command line): is not a key of a recipe. Here it is adapter.rank.
```

A warning leaves the exit code 0. There is one for many cut examples, for few trained tokens, for dropped rows, for
repeated examples, for held-out examples that are in the training data too, for a `data.eval` too small to hold anything
out, and for answers that end without an end token.

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
length p50/p95/max                     85/96/105                       84/91/96
train        200 examples, 17,084 tokens, 50.5% trained on
epoch        200 examples, weights counted, in 25 steps
steps        25 of 8 examples
held out     20 examples, 1,686 tokens, 0 of them in train too
fingerprint  aead9f9dfdeeca83
recipe and data are usable
```
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING

from tune.errors import RecipeError
from tune.recipe.later import refusals
from tune.recipe.load import load_recipe

if TYPE_CHECKING:
    from tune.data.load import Data
    from tune.data.report import Report, SourceReport
    from tune.recipe.schema import Recipe


def check(recipe_path: str, overrides: list[str], quiet: bool) -> None:
    """Print what the data comes to, source by source, and what looks wrong with it."""
    recipe = load_recipe(recipe_path, overrides)
    if refused := refusals(recipe):
        raise RecipeError(refused)  # before transformers is imported, which takes a second

    from rich.console import Console

    from tune.adapters.lora import resolve_targets  # first, since it keeps bitsandbytes quiet
    from tune.data.load import load_data
    from tune.data.tokenizer import load_tokenizer
    from tune.models.load import check_vocabulary, outline_base

    terminal = sys.stdout.isatty()
    waiting = Console(stderr=True).status("reading the data") if terminal and not quiet else nullcontext()
    with waiting:
        model = recipe.model
        _check_surroundings(recipe)
        outline = outline_base(recipe.model)
        if outline is not None:
            resolve_targets(recipe.adapter, outline, model.base, recipe.router)
        tokenizer = load_tokenizer(model.base, revision=model.revision, trust_remote_code=model.trust_remote_code)
        data = load_data(recipe, tokenizer)
        if outline is not None:
            parts = [part for part in (data.train, data.eval) if part is not None]
            check_vocabulary(outline, model.base, max(int(part.ids.max()) for part in parts))
    if terminal:
        _print_table(data.report)
    else:
        for source in data.report.sources:
            _print_lines(source)
    _print_totals(data, recipe)


def _check_surroundings(recipe: Recipe) -> None:
    """What training asks for besides base and data: the optimizer, the trackers and the adapter to start from."""
    import torch

    from tune.adapters.start import find_start
    from tune.training.metrics import check_trackers
    from tune.training.optimizer import check_optimizer

    check_optimizer(recipe.train, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    check_trackers(recipe.tracking.to)
    if recipe.adapter.start_from is not None:
        find_start(recipe.adapter.start_from)


def _cells(source: SourceReport) -> dict[str, str]:
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
        "length p50/p95/max": f"{source.length_p50}/{source.length_p95}/{source.length_max}",
    }


def _print_table(report: Report) -> None:
    """One column a source: there are more numbers than sources."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=True, header_style="bold")
    table.add_column("")
    for source in report.sources:
        table.add_column(f"{source.path}\n{source.part}", justify="right", overflow="fold")
    columns = [_cells(source) for source in report.sources]
    for name in columns[0]:
        table.add_row(name, *(cells[name] for cells in columns))
    Console(highlight=False).print(table)


def _print_lines(source: SourceReport) -> None:
    print(f"{source.part} {source.path}")
    for name, value in _cells(source).items():
        print(f"  {name:<18} {value}")


def _print_totals(data: Data, recipe: Recipe) -> None:
    from tune.data.batches import Order

    report, train = data.report, recipe.train
    share = report.train_trained / report.train_tokens
    print(f"train        {report.train_examples:,} examples, {report.train_tokens:,} tokens, {share:.1%} trained on")
    order = Order(data.train.source, tuple(source.weight for source in recipe.data.train), train.batch_size, train.seed)
    print(f"epoch        {order.epoch_length:,} examples, weights counted, in {order.steps_per_epoch:,} steps")
    print(f"steps        {order.steps(train.epochs, train.max_steps):,} of {train.batch_size:,} examples")
    if data.eval is not None:
        shared = f"{report.shared} of them in train too"
        print(f"held out     {report.eval_examples:,} examples, {report.eval_tokens:,} tokens, {shared}")
    print(f"fingerprint  {data.fingerprint[:16]}")
    if recipe.push.repo is not None:
        print(f"push         {recipe.push.repo}: not asked here; training asks the Hub before it loads anything")
    warnings = report.warnings()
    for warning in warnings:
        print(f"warning: {warning}")
    counted = "1 warning" if len(warnings) == 1 else f"{len(warnings)} warnings"
    print(f"recipe and data are usable, with {counted}" if warnings else "recipe and data are usable")
