"""`tune train`: from a recipe to an adapter.

The recipe is checked first, then the base's configuration and tokenizer, then the data; the weights come last, so that
a mistake costs seconds. The base's linear layers are held in 4 bits, or as they are under `model.quantization: none`,
and every layer that the recipe names gets an adapter. Training begins only if both counts are what the recipe asks for.

## What it prints

First a table of the layers: how many of a kind there are, how many of them are in 4 bits, how many are adapted, the
bytes of the frozen weights and the number of trained parameters. Then the facts of the run, a line each, the same on a
terminal and in a file, so that a script can read them. Where `model.trust_remote_code` lets Python code of the base
run, the first line names its files, before any of it does, and the end names them again.

While it trains, a line every `train.log_every` steps: the loss in nats per trained token, the learning rate, the norm
of the gradient before it is limited, tokens per second and the most memory used so far. Another line follows each
evaluation. The end says where the adapter is, the loss before and after, and what to type next. `--quiet` leaves
warnings and errors.

## What it writes

The run folder is the recipe's `output`:

| path | holds |
| --- | --- |
| `recipe.yaml` | the recipe with every default, the versions used and the data's fingerprint |
| `coverage.json` | the table of layers |
| `provenance.json` | which base, which data and which machine, and a few examples to test a merge with |
| `metrics.jsonl` | one object a step, whatever `train.log_every` is |
| `checkpoints/step-000100/` | all that a resumed run needs; also a PEFT folder to try with `tune generate` |
| `adapter/` | the result: a PEFT folder with tokenizer, chat template and model card |
| `finished.json` | the summary of the end; it is there only when the run is done |

With held-out data the result is the adapter of the best evaluation, not the last, unless `train.keep_best` is false.

## A mixture of experts

The facts of the run say `experts 120/120 nf4` (30 layers of 4) beside the linear layers: all that the experts hold is
in 4 bits, or training does not begin. The lines of steps end in the balance of the routers: as much as a token has
experts when all experts get the same share, and as much as a layer has experts when all tokens go to the same few. The
loss that is printed is that of the text alone; `router.balance_loss` times the balance is added to what is trained on.

The objects of `metrics.jsonl` have a `router` of:

| key | holds |
| --- | --- |
| `balance` | the balance, averaged over layers |
| `largest_load` | for each layer, the tokens of the busiest expert over those of a mean one; 1 is even |
| `entropy` | for each layer, how evenly tokens are spread, in nats; the logarithm of the number of experts is even |
| `dead_experts` | for each layer, the experts that got no token in the step |

## Stopping and going on

Ctrl-C and SIGTERM let the step end and write a checkpoint; a second one leaves at once. An evaluation is cut short, and
comes after the resume. Before the first step the first one leaves at once. The same command with `--resume` goes on
from the newest whole checkpoint, which is also what a kill, a full disk or a power cut leaves. On
the same kind of machine, with the same versions, it ends bit for bit where it would have ended without the stop. Where
there is no run yet `--resume` starts one, and of a finished run it says so. Without it an existing run is left alone
and refused.

Between the two commands some keys may change: `output` if the folder was moved, `tracking`, `push`,
`train.save_every`, `train.eval_every`, `train.log_every`, `train.keep`, `train.micro_batch_tokens` and
`train.recompute`. `train.epochs` and `train.max_steps` may grow. Any other change is refused with the old and the new
value, and so is a base or data that is not what it was.

## What can go wrong

- The run folder exists, or another process trains in it: choose another `output`, or `--resume`.
- The loss is not finite. Such a step is not applied. After `train.max_bad_steps` of them in a row the run ends with
  exit code 3; lower `train.learning_rate`, or look at the rows that the message names. `metrics.jsonl` has all rows of
  such a step, under `examples`.
- Memory runs out. The step, or the evaluation, is done again in shorter rows, and where they are as short as the
  longest example, with activations that are computed again if `train.recompute` is `auto`. A warning says so once, and
  a resumed run keeps the smaller size. If the longest example does not fit even so, the run ends with what the memory
  is needed for and the keys that change it. Where a launcher splits the base over devices, it ends at once.
- The disk is full, read-only or gone. The run ends, and the last whole checkpoint is as it was. A checkpoint that was
  damaged on the disk is named and passed over. [Reliability](reliability.md) says how all of this is tested.
- The adapter is worse than the base on held-out data. The run ends well, with a warning.
- Data that looks wrong is warned about before the first step; `tune check` says the same without loading the base.

## Exit codes

- 3: The loss diverged, and no adapter was written.
- 130: Stopped by Ctrl-C, after a checkpoint if training had begun.
- 143: Stopped by SIGTERM, after a checkpoint if training had begun.

## Example

On two CPU cores, with the model that `scripts/quickstart` makes. Five kinds of layer and most steps are left out here:

```console
$ tune train recipes/quickstart.yaml
loading the base: 3.1 s
layers                   count  nf4  adapted   frozen    trained
q_proj                      30   30       30  5.13 MB    552,960
down_proj                   30   30       30  13.7 MB  1,013,760
embeddings, norms, head                        113 MB          -
all                                            168 MB  4,884,480
data 200 examples, 17,084 tokens, 51% trained on; 20 held out
devices 1
linears 210/210 nf4
adapted 210/210
attention sdpa, packed
rows of 512 tokens
steps 25, 8 examples each
step 0: held-out loss 4.6742
step 1/25  loss 4.9049  lr 1.00e-03  grad 1.693  142 tokens/s  1.85 GB
step 10: held-out loss 2.2654 (best)
step 25: held-out loss 2.1159 (best)
step 25/25  loss 2.4800  lr 3.94e-06  grad 0.684  153 tokens/s  1.89 GB

adapter      runs/quickstart/adapter  (the last step)
loss         4.6742 before, 2.1159 after, on held-out data (perplexity 107.15 to 8.30)
speed        153 tokens/s
peak memory  1.89 GB
next         tune generate runs/quickstart "your prompt"
```
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tune.cli.program import command
from tune.cli.stopping import stopping_at_once
from tune.data.sources import check_places
from tune.folder import RunFolder, explain_os_errors
from tune.recipe.later import refusals
from tune.recipe.load import load_recipe

if TYPE_CHECKING:
    from tune.recipe.schema import Recipe
    from tune.run import FinishedRun


def train(recipe_path: str, overrides: list[str], resume: bool, quiet: bool) -> None:
    """Train, and end with where the adapter is, what changed and what to type next."""
    from tune.errors import RecipeError

    recipe = load_recipe(recipe_path, overrides)
    refused = refusals(recipe)
    if refused:
        raise RecipeError(refused)  # before torch is imported, which takes seconds
    if os.environ.get("WORLD_SIZE", "1") == "1":
        run = RunFolder(Path(os.path.expanduser(str(recipe.output))))
        with explain_os_errors(run.root):
            run.check_start(resume)
        check_places(recipe.data)
    if quiet:
        os.environ.setdefault("WANDB_SILENT", "true")
    with stopping_at_once(str(recipe.output)):
        result = _run(recipe, resume, quiet)
    if not quiet and not int(os.environ.get("RANK", "0")):
        _summarise(result)


def _run(recipe: Recipe, resume: bool, quiet: bool) -> FinishedRun:
    from tune.cli.progress import ConsoleProgress, QuietProgress
    from tune.run import train

    progress = QuietProgress() if quiet else ConsoleProgress()
    try:
        return train(recipe, resume, progress)
    finally:
        progress.close()


def _summarise(result: FinishedRun) -> None:
    from tune.progress import size

    if result.already:
        print(f"already finished: {result.steps} steps, the adapter is in {result.adapter}")
        return
    last = result.adapter_step == result.steps
    which = "the last step" if last else f"step {result.adapter_step} of {result.steps}, the best"
    held_out = result.measured_on == "held-out data"
    start, end = ("before", "after") if held_out else ("in the first step", "in the last")
    perplexities = f"perplexity {_perplexity(result.loss_before)} to {_perplexity(result.loss_after)}"
    print(f"\nadapter      {result.adapter}  ({which})")
    print(
        f"loss         {result.loss_before:.4f} {start}, {result.loss_after:.4f} {end}, on {result.measured_on}"
        f" ({perplexities})"
    )
    print(f"speed        {result.tokens_per_second:,.0f} tokens/s")
    print(f"peak memory  {size(result.peak_memory_bytes)}")
    if result.own_code:
        print(f"base's code  ran, as model.trust_remote_code lets it: {result.own_code}")
    print(f'next         {command("generate", result.output)} "your prompt"')
    if held_out and result.loss_after >= result.loss_before:
        print(
            "warning: the adapter is worse than the base on held-out data. Lower train.learning_rate, "
            "or look at the data with `tune preview`.",
            file=sys.stderr,
        )


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.2f}" if loss < 20 else "very high"
