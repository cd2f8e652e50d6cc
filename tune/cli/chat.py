"""`tune chat`."""

from __future__ import annotations

import sys

from tune.cli.generate import loading, write
from tune.data.conversation import Message
from tune.folder import folder_of


def chat(run: str, adapter: bool, system: str | None, max_new_tokens: int, temperature: float, quiet: bool) -> None:
    """Take turns until the input ends. `/new` forgets the conversation, `/base` and `/adapter` choose who answers."""
    folder_of(run)  # a wrong name is told before anything is loaded
    with loading(quiet):
        from tune.evaluation.generate import load_run

        loaded = load_run(run)
    if not quiet:
        print("Write a message and press Enter. /new starts over, /base and /adapter switch, /quit or Ctrl-D leaves.")
    turns: list[Message] = []
    while True:
        said = _ask("base> " if not adapter else "you> ")
        if said is None or said == "/quit":
            return
        if said in ("/base", "/adapter"):
            adapter = said == "/adapter"
        elif said == "/new":
            turns = []
        elif said.startswith("/"):
            print("There are /new, /base, /adapter and /quit.")
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
