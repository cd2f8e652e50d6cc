"""Print what the base model and the adapter of a run answer to the same prompts, side by side.

    python scripts/compare_answers.py RUN PROMPTS [--max-new-tokens 48]

PROMPTS is a text file, one prompt a line. The model is loaded once; the base's answers are the same model's with the
adapter switched off. Answers are greedy, so that running this twice shows the same.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

TITLES = ("the base model", "with the adapter")
BETWEEN = " | "


def wrapped(text: str, width: int) -> list[str]:
    """`text` in lines of at most `width` characters: its own line breaks kept, control characters made visible."""
    lines: list[str] = []
    for line in text.strip().splitlines():
        visible = "".join(char if char.isprintable() else " " if char == "\t" else "?" for char in line)
        lines += textwrap.wrap(visible, width) or [""]
    return lines or ["(nothing)"]


def side_by_side(left: str, right: str, width: int) -> list[str]:
    """Lines of at most `width` characters with `left` and `right` in two equal columns under TITLES."""
    column = (width - len(BETWEEN)) // 2
    columns = [[title, "-" * column, *wrapped(text, column)] for title, text in zip(TITLES, (left, right), strict=True)]
    height = max(map(len, columns))
    padded = [lines + [""] * (height - len(lines)) for lines in columns]
    return [f"{one:<{column}}{BETWEEN}{other}".rstrip() for one, other in zip(*padded, strict=True)]


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, one a line; empty lines do not count."""
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def answers(run: Path, prompts: list[str], max_new_tokens: int) -> Iterator[tuple[str, str, str]]:
    """Yield `(prompt, the base's answer, the adapter's answer)` as soon as both are there."""
    from tune.evaluation.generate import load_run

    loaded = load_run(run)
    for prompt in prompts:
        base, adapted = (
            loaded.answer(prompt, adapter=adapter, max_new_tokens=max_new_tokens) for adapter in (False, True)
        )
        yield prompt, base, adapted


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, print the columns and return the exit code."""
    parser = argparse.ArgumentParser(description="Show a run's answers beside its base model's.")
    parser.add_argument("run", type=Path, help="a run folder, or one of its checkpoints")
    parser.add_argument("prompts", type=Path, help="a text file, one prompt a line")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="length of an answer (default: %(default)s)")
    options = parser.parse_args(arguments)
    # Wider columns are harder to read, narrower ones break every word.
    width = min(max(shutil.get_terminal_size((80, 24)).columns, 60), 100)

    from tune.errors import TuneError

    warnings.simplefilter("ignore")  # libraries warn each other's developers, as in tune's own command line
    try:
        prompts = read_prompts(options.prompts)
        if not prompts:
            print(f"{options.prompts}: holds no prompt. Write one a line.", file=sys.stderr)
            return 2
        for prompt, base, adapted in answers(options.run, prompts, options.max_new_tokens):
            print(
                "", *textwrap.wrap(f"> {prompt}", width), "", *side_by_side(base, adapted, width), sep="\n", flush=True
            )
        print(f"\n(each answer ends after {options.max_new_tokens} tokens at the latest)")
    except TuneError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except (OSError, UnicodeDecodeError) as error:
        print(f"{options.prompts}: cannot be read ({error}). Give a text file, one prompt a line.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
