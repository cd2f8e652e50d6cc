"""How a user calls this program, for the lines that say what to type next."""

from __future__ import annotations

import os
import shlex
import shutil
import sys


def command(*words: str) -> str:
    """Return a line to type here: the program by its name if the shell finds it, else by its path, and the words."""
    script = os.path.join(os.path.dirname(sys.executable), "tune")
    if not os.path.exists(script):
        program = f"{os.path.basename(sys.executable)} -m tune"
    else:
        found = shutil.which("tune")
        ours = found is not None and os.path.realpath(found) == os.path.realpath(script)
        program = "tune" if ours else shlex.quote(os.path.relpath(script))
    return " ".join([program, *map(shlex.quote, words)])
