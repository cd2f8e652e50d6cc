"""`tune chat`: a conversation on the terminal, one line a message.

RUN is what `tune generate` takes: a run, one of its checkpoints, or the folder of a whole model, such as a merged
one. Answers are printed as they come; each sees all turns before it, until `/new` forgets them. `/base` lets the base
under the adapter go on with the conversation and `/adapter` the adapter; a whole model has none, and says so. `/quit`,
Ctrl-D or the end of the input leaves.

With `--quiet` only answers go to the standard output, so that messages can come from a file, one a line. A message
that the template cannot express, such as one that spells a control token to which it gives a meaning, ends the
conversation with exit code 2.
"""

from __future__ import annotations

import sys

from tune.cli.generate import load, write
from tune.data.conversation import Message
from tune.evaluation.whole_model import is_whole_model, no_adapter


def chat(run: str, adapter: bool, system: str | None, max_new_tokens: int, temperature: float, quiet: bool) -> None:
    """Take turns until the input ends. `/new` forgets the conversation, `/base` and `/adapter` choose who answers."""
    loaded = load(run, adapter, quiet)
    whole = is_whole_model(run)
    if not quiet:
        switch = "" if whole else "/base and /adapter switch, "
        print(f"Write a message and press Enter. /new starts over, {switch}/quit or Ctrl-D leaves.")
    turns: list[Message] = []
    while True:
        said = _ask("base> " if not adapter else "you> ")
        if said is None or said == "/quit":
            return
        if said in ("/base", "/adapter"):
            if whole:
                print(no_adapter(run), file=sys.stderr)
            else:
                adapter = said == "/adapter"
        elif said == "/new":
            turns = []
        elif said.startswith("/"):
            known = "/new and /quit" if whole else "/new, /base, /adapter and /quit"
            print(f"There are {known}.", file=sys.stderr)
        elif said:
            turns.append(Message("user", said))
            answer = loaded.answer(
                turns,
                adapter=adapter,
                system=system,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                on_text=write,
            )
            print(flush=True)
            turns.append(Message("assistant", answer))


def _ask(prompt: str) -> str | None:
    try:
        return input(prompt if sys.stdin.isatty() else "").strip()
    except EOFError:
        if sys.stdin.isatty():
            print()
        return None
