"""`tune check`: is the recipe right, and is the data what it should be? No weights are loaded."""

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
            resolve_targets(recipe.adapter, outline, model.base)
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
    warnings = report.warnings()
    for warning in warnings:
        print(f"warning: {warning}")
    counted = "1 warning" if len(warnings) == 1 else f"{len(warnings)} warnings"
    print(f"recipe and data are usable, with {counted}" if warnings else "recipe and data are usable")
