"""`tune push`.

Publishes a run's adapter as a repository that stock PEFT, transformers and vLLM load by its name, with the tokenizer,
the chat template that trained, the recipe without local paths, and a model card: base, licence, data, prompt,
hyperparameters, losses, evaluations, how to load it, how to reproduce it. With `--merged` the merged model is
published, with its proof in the card and the adapter in `adapter/`; one whose proof failed never is.

`--dry-run` shows all of it, the card word for word, and asks nothing of the Hub. Look at it first.

The base is called by its name on the Hub: `--base-model`, else the recipe's, else the name that a local copy's config
remembers. Its licence is carried over from its card or LICENSE file. A warning says where it is not known, and where
base or data forbid commercial use or passing on what is made of them.

Everything goes up in one commit, large files first: others see all of it or nothing, and a push that was cut off goes
on with the same command. A repository that this run filled before is updated. One that something else filled is
refused, unless `--update` says to write over it; its history stays. `--private` is for a new repository; a public one
that exists already is then refused.

The token is that of `hf auth login` or `HF_TOKEN`, and needs the right to write. Secrets are written as `***` in every
text that is published or printed: saved tokens, the values of environment variables whose names end in TOKEN, SECRET,
PASSWORD, API_KEY and the like, passwords in addresses, and whatever is shaped like a token or key. A file that cannot
be changed, such as the weights or the tokenizer, is refused if it holds one. In a recipe, `push:` does the same when
training has ended:

```yaml
push:
  repo: OWNER/NAME
  private: true       # the default there
  merged: false
```
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING

from tune.errors import StoppedError

if TYPE_CHECKING:
    from tune.export.publication import Publication


def push(
    run: str,
    repo: str,
    merged: bool,
    private: bool,
    dry_run: bool,
    base_model: str | None,
    update: bool,
    quiet: bool,
) -> None:
    """Publish, and end with the address; with `dry_run`, show all of it and send nothing."""
    from tune.export.publication import build_publication, find_source

    if dry_run:
        publication = build_publication(find_source(run, merged), repo, private=private, base_model=base_model)
        _show(publication)
        return

    from tune.export import push as hub

    bars = sys.stderr.isatty() and not quiet
    try:
        with nullcontext() if bars else hub.quiet_uploads():
            pushed = hub.push(
                run,
                repo,
                merged=merged,
                private=private,
                base_model=base_model,
                update=update,
                say=_silent if quiet else _say,
                warn=_warn,
            )
    except KeyboardInterrupt:
        raise StoppedError(f"{repo}: stopped by Ctrl-C; nothing of it shows. The same command goes on.", 130) from None
    if quiet:
        return
    for name in pushed.removed:
        _say(f"removed {name}, which an earlier content left")
    _say(f"{'published' if pushed.changed else 'nothing to change: already published'}  {pushed.url}")


def _show(publication: Publication) -> None:
    """Print everything that a push would send."""
    from tune.progress import size

    kind = "the merged model and its adapter" if publication.kind == "merged" else "the adapter"
    _say(f"would publish {kind} of {publication.source} as {publication.repo}")
    _say("a new repository would be " + ("private" if publication.private else "public; --private keeps it private"))
    width = max(len(name) for name in publication.files)
    for name in publication.files:
        _say(f"  {name:<{width}}  {size(publication.size(name)):>8}")
    _say(f"  {'all':<{width}}  {size(publication.total):>8}")
    _say("\nREADME.md:\n")
    _say(publication.card)
    for warning in publication.warnings:
        _warn(warning)
    _say("nothing was sent")


def _say(line: str) -> None:
    print(line)


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)


def _silent(line: str) -> None:
    """Under --quiet."""
