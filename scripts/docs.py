"""Write docs/ from the command line and from the recipe's schema, so that neither is described twice.

    python scripts/docs.py [--check]

A verb's page takes what it says from the verb's docstring in `tune/cli/main.py`, from its arguments and options, and
from the module docstring of `tune/cli/VERB.py`: what follows that docstring's first paragraph is Markdown, a part
under `## Exit codes` is a list `- CODE: words`, and a part under `## Example` ends the page. The recipe's page takes
types, ranges and words from `tune/recipe/schema.py`, what is refused from `tune.recipe.later`, and other programs'
names from `tune.recipe.elsewhere`.

A page written here begins with MARK. Every other page in docs/ is written by hand: it is left alone, and listed in
the index by its heading and its first sentence.

Exit codes: 0 done; 1 with --check, a page is stale (each is named).
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

# The script needs its neighbour and the package beside it, wherever it is started and whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import typer
from docs_recipe import recipe_page, table

from tune.cli.main import app

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
MARK = "<!-- written by scripts/docs.py: "
"""How a generated page begins; then come the files to change instead."""
EXIT_CODES = {
    "0": "Done.",
    "1": "A mistake in tune itself: please report the traceback.",
    "2": "Something to mend: one message on stderr says where, what is wrong and what to do.",
    "130": "Stopped by Ctrl-C.",
}
"""Of every verb; a verb's docstring adds its own, or says more of one of these."""
WORDS = {str: "text", int: "whole number", float: "number", Path: "path"}


class Parameter(NamedTuple):
    """One argument or option as a reader sees it; `value` and `default` are empty where there is none."""

    name: str
    value: str
    default: str
    help: str
    is_option: bool


class Verb(NamedTuple):
    """A registered command; `usage` is its line in `--help` without doubled brackets."""

    name: str
    usage: str
    summary: str
    parameters: tuple[Parameter, ...]
    module: Path


def limits(low: float | None, high: float | None) -> str:
    """` from 1`, ` from 0 to 1` or nothing."""
    return (f" from {low:g}" if low is not None else "") + (f" to {high:g}" if high is not None else "")


def value_words(annotation: Any, info: Any) -> str:
    """What may be written for a parameter of this type: `text`, `whole number from 1`, `` `a` or `b` ``."""
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{choice}`" for choice in kinds)
    if kinds:
        return value_words(kinds[0], info)
    if hasattr(annotation, "__members__"):
        return " or ".join(f"`{member.value}`" for member in annotation)
    return WORDS.get(annotation, "text") + limits(info.min, info.max)


def parameters(command: Any, context: Any) -> Iterator[Parameter]:
    """Each argument and option of a command that its `--help` shows."""
    hints = get_type_hints(inspect.unwrap(command.callback), include_extras=True)
    for parameter in command.get_params(context):
        if getattr(parameter, "hidden", False):
            continue
        words = " ".join((getattr(parameter, "help", None) or "").split())
        if parameter.param_type_name == "argument":
            needed = "required" if parameter.required else "none"
            yield Parameter(parameter.metavar or parameter.name.upper(), "", needed, words, False)
            continue
        if parameter.is_flag:
            both = [*parameter.opts[:1], *parameter.secondary_opts]
            default = f"`{both[0 if parameter.default else 1]}`" if len(both) > 1 else ""
            yield Parameter(option_names(parameter), "", default, words, True)
            continue
        annotation, info = get_args(hints[parameter.name])
        default = "required" if parameter.required else default_words(parameter.default)
        value = f"`{parameter.metavar}`" if parameter.metavar else value_words(annotation, info)
        yield Parameter(option_names(parameter), value, default, words, True)


def option_names(parameter: Any) -> str:
    """Every way to write an option, long ones first: Typer holds those of `--help` in no fixed order."""
    names = sorted((*parameter.opts, *parameter.secondary_opts), key=lambda name: not name.startswith("--"))
    return ", ".join(f"`{name}`" for name in names)


def default_words(value: Any) -> str:
    """A default as it would be typed."""
    if value is None:
        return "none"
    return f"`{value:g}`" if isinstance(value, float) else f"`{getattr(value, 'value', value)}`"


def tidy(usage: str) -> str:
    """`RECIPE [KEY=VALUE]...` for `{RECIPE} [[KEY=VALUE]...]...`: a newer Typer brackets what is bracketed already."""
    usage = re.sub(r"\{([^{}\s]+)\}", r"\1", usage)
    return re.sub(r"\[(\[[^\[\]]+\])(?:\.\.\.)?\]", r"\1", usage)


def root() -> tuple[Any, Any]:
    """Typer's own view of the program, and a context for it."""
    program = typer.main.get_command(app)
    return program, program.make_context("tune", [], resilient_parsing=True)


def verbs() -> list[Verb]:
    """Every command that is registered and not hidden, in the order of `tune --help`."""
    program, around = root()
    found = []
    for name, command in program.commands.items():
        if command.hidden:
            continue
        context = command.make_context(name, [], parent=around, resilient_parsing=True)
        usage = tidy(" ".join(command.get_usage(context).split()).removeprefix("Usage: "))
        summary = " ".join((command.help or "").split())
        module = ROOT / "tune" / "cli" / f"{inspect.unwrap(command.callback).__name__}.py"
        found.append(Verb(name, usage, summary, tuple(parameters(command, context)), module))
    return found


def prose(module: Path) -> dict[str, str]:
    """The parts of a module's docstring after its first paragraph, by heading; what comes before any is under ``""``.

    The module is parsed and not imported: a verb's file may need what is heavy.
    """
    text = (ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or "") if module.is_file() else ""
    pieces = re.split(r"^## (.+)\n", text.partition("\n\n")[2], flags=re.MULTILINE)
    return {"": pieces[0].strip()} | {
        heading: body.strip() for heading, body in zip(pieces[1::2], pieces[2::2], strict=True)
    }


def options_table(shown: tuple[Parameter, ...]) -> str:
    """Arguments, then options, with what may be written and what holds without them."""
    ordered = sorted(shown, key=lambda parameter: parameter.is_option)
    rows = [(p.name if p.is_option else f"`{p.name}`", p.value, p.default, p.help) for p in ordered]
    return table(("name", "value", "default", "meaning"), rows)


def verb_page(verb: Verb) -> str:
    """The page of one verb."""
    parts = prose(verb.module)
    codes = dict(EXIT_CODES)
    for line in re.findall(r"^- (.+(?:\n  .+)*)", parts.pop("Exit codes", ""), re.MULTILINE):
        code, _, words = " ".join(line.split()).partition(": ")
        codes[code] = words
    example = parts.pop("Example", "")
    sources = " and ".join(["tune/cli/main.py", verb.module.relative_to(ROOT).as_posix()])
    page = [
        f"{MARK}change {sources} -->",
        f"# tune {verb.name}",
        verb.summary,
        f"```\n{verb.usage}\n```",
        parts.pop(""),
        *(f"## {heading}\n\n{body}" for heading, body in parts.items()),
        "## Arguments and options",
        options_table(verb.parameters),
        "## Exit codes",
        table(("code", "means"), [(f"`{code}`", words) for code, words in sorted(codes.items(), key=by_number)]),
    ]
    page += [f"## Example\n\n{example}"] if example else []
    return "\n\n".join(part for part in page if part) + "\n"


def by_number(item: tuple[str, str]) -> int:
    return int(item[0].split()[0].strip(","))


def first_words(page: Path) -> tuple[str, str]:
    """The heading and the first sentence of a page written by hand."""
    text = re.sub(r"<!--.*?-->|^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    heading = re.search(r"^# (.+)$", text, re.MULTILINE)
    after = text[heading.end() :] if heading else text
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", after))
    paragraph = next((part for part in paragraphs if part and part[0] not in "#|!-<"), "")
    paragraph = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", paragraph)  # the index links to the page, not into it
    sentence = re.match(r".+?[.?!](?=\s|$)", paragraph)
    return heading[1].strip() if heading else page.stem, sentence[0] if sentence else paragraph


def is_generated(page: Path) -> bool:
    return page.read_text(encoding="utf-8").startswith(MARK)


def by_hand(docs: Path) -> list[Path]:
    """The pages of `docs` that nothing here writes, by name."""
    return [page for page in sorted(docs.glob("*.md")) if page.name != "README.md" and not is_generated(page)]


def index_page(found: list[Verb], recipe: str, docs: Path) -> str:
    """docs/README.md: every page with one line."""
    program, context = root()
    recipe_words = recipe.split("\n\n")[2].replace("\n", " ")
    page = [
        f"{MARK}change tune/cli/main.py, or the page in question -->",
        "# Documentation",
        "[The README](../README.md) shows how to begin. These pages hold the rest.",
        "## The recipe",
        f"- [The recipe](recipe.md): {recipe_words}",
        "## The verbs",
        "\n".join(f"- [tune {verb.name}]({verb.name}.md): {verb.summary}" for verb in found),
        "`tune` itself takes:",
        options_table(tuple(parameters_of_root(program, context))),
    ]
    written = [(path.name, *first_words(path)) for path in by_hand(docs)]
    if written:
        page += ["## More", "\n".join(f"- [{heading}]({name}): {words}" for name, heading, words in written)]
    return "\n\n".join(page) + "\n"


def parameters_of_root(program: Any, context: Any) -> Iterator[Parameter]:
    """The options that stand before a verb: flags all of them."""
    for parameter in program.get_params(context):
        if not getattr(parameter, "hidden", False):
            yield Parameter(option_names(parameter), "", "", " ".join((parameter.help or "").split()), True)


def pages(docs: Path) -> dict[str, str]:
    """Every generated page as it should be: its name in `docs`, and its text."""
    found = verbs()
    recipe = f"{MARK}change tune/recipe/schema.py, later.py or elsewhere.py -->\n\n{recipe_page()}"
    return {
        "README.md": index_page(found, recipe, docs),
        "recipe.md": recipe,
        **{f"{verb.name}.md": verb_page(verb) for verb in found},
    }


def stale(docs: Path) -> list[str]:
    """The pages that are not as they should be, or should not be there."""
    wanted = pages(docs)
    wrong = [name for name, text in wanted.items() if not same(docs / name, text)]
    orphans = [page.name for page in docs.glob("*.md") if page.name not in wanted and is_generated(page)]
    return sorted(wrong + orphans)


def same(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


def write(docs: Path) -> list[str]:
    """Write what is stale, remove generated pages of verbs that are gone, and return their names."""
    docs.mkdir(exist_ok=True)
    wanted, changed = pages(docs), stale(docs)
    for name in changed:
        if name in wanted:
            (docs / name).write_text(wanted[name], encoding="utf-8")
        else:
            (docs / name).unlink()
    return changed


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, do what it says and return the exit code."""
    parser = argparse.ArgumentParser(description="Write docs/ from the command line and the recipe's schema.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 and name each stale page")
    if parser.parse_args(arguments).check:
        for name in (wrong := stale(DOCS)):
            print(f"docs/{name}: is stale. Run `python scripts/docs.py`.", file=sys.stderr)
        return 1 if wrong else 0
    for name in write(DOCS):
        print(f"docs/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
