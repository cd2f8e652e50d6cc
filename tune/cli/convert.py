"""`tune convert`.

Writes a run's adapter on experts in the layout that a server or another library reads.

Training saves stock PEFT's layout: one A and one B for all experts of a layer. transformers 5 and PEFT load it as it
is. Servers that keep every expert apart (`w1`, `w2`, `w3` of a Mixtral) may drop it without a word; for them,
`--to per-expert` writes an A and a B for each expert, under the names that they know, into `RUN/adapter-per-expert`.
Nothing is lost: the two give the same model, and `--to stock` makes of the second one the first again, byte for byte,
in `RUN/adapter-stock`. `adapter.start_from` takes either.

An adapter without experts has one layout only, which servers read as it is.

## Example

```
$ tune convert runs/mixtral --to per-expert
converted    runs/mixtral/adapter, 32 layers of 8 experts, to 1,792 tensors
written      runs/mixtral/adapter-per-expert
```
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

from tune.cli.own_code import tell_own_code
from tune.errors import RunError, did_you_mean
from tune.folder import folder_of

if TYPE_CHECKING:
    from tune.adapters.files import Layout

LAYOUTS = ("per-expert", "stock")


def convert(run: str, to: str, quiet: bool) -> None:
    """Convert, and end with where the adapter is."""
    if to not in LAYOUTS:
        raise RunError(f"--to: there is no {to!r}. Write per-expert or stock.{did_you_mean(to, LAYOUTS)}")
    tell_own_code(folder_of(run)[0])  # a wrong name is told before anything is loaded

    from tune.adapters.convert import convert as run_convert

    converted = run_convert(run, cast("Layout", to))
    if quiet:
        return
    tensors = converted.files.tensors
    print(f"converted    {converted.source}, {_experts(tensors)}to {len(tensors):,} tensors")
    print(f"written      {converted.folder}")


def _experts(tensors: Iterable[str]) -> str:
    """How many layers of how many experts there are, where the names tell."""
    found = {match.groups() for name in tensors if (match := re.match(r"(.*)\.experts\.(\d+)\.", name))}
    layers = {layer for layer, _ in found}
    return f"{len(layers)} layers of {len(found) // len(layers)} experts, " if layers else ""
