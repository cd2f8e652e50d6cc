"""The verbs and their options. Nothing heavy is imported until a verb needs it."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from typing import Annotated, Any

import typer

from tune import __version__
from tune.cli.output import hide_secrets, hiding_secrets
from tune.errors import ElsewhereError, StoppedError, TuneError
from tune.secrets import redact

app = typer.Typer(
    name="tune",
    help="Fine-tune Mistral and its relatives in 4-bit from one recipe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe, such as train.learning_rate=1e-4."),
]
RunPath = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or one of its checkpoints.")]
Speaking = Annotated[
    str, typer.Argument(metavar="RUN", help="A run folder, one of its checkpoints, or a merged model's folder.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only what was asked for, warnings and errors.")]
System = Annotated[str | None, typer.Option("--system", help="The system prompt.")]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token each time.")]
WithoutAdapter = Annotated[bool, typer.Option("--without-adapter", help="Let the base answer, for comparison.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"tune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Fine-tune Mistral and its relatives in 4-bit from one recipe."""


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    quiet: Quiet = False,
) -> None:
    """Train the adapter that a recipe describes."""
    from tune.cli.train import train

    train(recipe, overrides or [], resume, quiet)


@app.command()
def check(recipe: RecipePath, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Check recipe and data without loading weights: rows, tokens, what is trained on, what is wrong."""
    from tune.cli.check import check

    check(recipe, overrides or [], quiet)


@app.command()
def preview(
    recipe: RecipePath,
    overrides: Overrides = None,
    examples: Annotated[int, typer.Option("-n", min=1, help="How many examples.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="One object a line: ids, tokens, trained.")] = False,
    quiet: Quiet = False,
) -> None:
    """Show examples as the model sees them, with the tokens that are trained on marked."""
    from tune.cli.preview import preview

    preview(recipe, overrides or [], examples, as_json, quiet)


@app.command()
def generate(
    run: Speaking,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to answer.")],
    without_adapter: WithoutAdapter = False,
    system: System = None,
    max_new_tokens: NewTokens = 256,
    temperature: Temperature = 0.0,
    quiet: Quiet = False,
) -> None:
    """Answer one prompt with a trained adapter, or with the base under it."""
    from tune.cli.generate import generate

    generate(run, prompt, not without_adapter, system, max_new_tokens, temperature, quiet)


@app.command()
def chat(
    run: Speaking,
    without_adapter: WithoutAdapter = False,
    system: System = None,
    max_new_tokens: NewTokens = 512,
    temperature: Temperature = 0.0,
    quiet: Quiet = False,
) -> None:
    """Talk to a trained adapter, or to the base under it."""
    from tune.cli.chat import chat

    chat(run, not without_adapter, system, max_new_tokens, temperature, quiet)


@app.command()
def merge(
    run: RunPath,
    output: Annotated[str | None, typer.Option("--output", help="The new folder; RUN/merged if not given.")] = None,
    base: Annotated[
        str,
        typer.Option("--base", help="original: the base's own weights; quantized: their 4-bit form, as trained."),
    ] = "original",
    prove: Annotated[bool, typer.Option("--prove", help="Only prove the merge that is there, once more.")] = False,
    quiet: Quiet = False,
) -> None:
    """Merge the adapter into its base, streamed, and prove that the result is the trained model."""
    from tune.cli.merge import merge

    merge(run, output, base, prove, quiet)


@app.command()
def convert(
    run: RunPath,
    to: Annotated[
        str,
        typer.Option(
            "--to", metavar="LAYOUT", help="per-expert: w1, w2, w3 of each expert, for servers; stock: back again."
        ),
    ],
    quiet: Quiet = False,
) -> None:
    """Write the adapter in the layout that a server or another library reads."""
    from tune.cli.convert import convert

    convert(run, to, quiet)


@app.command()
def push(
    run: RunPath,
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository on the Hub.")],
    merged: Annotated[bool, typer.Option("--merged", help="The merged model, with the adapter in adapter/.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show all that would be sent, and send nothing.")] = False,
    base_model: Annotated[
        str | None, typer.Option("--base-model", metavar="OWNER/NAME", help="The base's name on the Hub.")
    ] = None,
    update: Annotated[bool, typer.Option("--update", help="Commit over what the repository holds.")] = False,
    quiet: Quiet = False,
) -> None:
    """Publish the adapter or the merged model on the Hugging Face Hub, with a model card."""
    from tune.cli.push import push

    push(run, repo, merged, private, dry_run, base_model, update, quiet)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A shipped recipe.")] = None,
    copy: Annotated[bool, typer.Option("--copy", help="Copy it into this folder.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of a recipe.")] = False,
    quiet: Quiet = False,
) -> None:
    """List the shipped recipes, print one, or copy it here."""
    from tune.cli.recipes import recipes

    recipes(name, copy, schema)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and end the process with its exit code: 0, 1, 2, 3, 130 or 143."""
    hide_secrets()  # to the very end: a bug's traceback is printed when all else is done
    given = sys.argv[1:] if arguments is None else arguments
    sys.argv[1:] = [redact(word) for word in sys.argv[1:]]  # trackers note the command line
    code = _run(given)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # a log on a full disk: what it does not take is lost, and the exit code says the rest
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


# Typer carries its own copy of click in newer releases; its public names lead to the base of every usage error.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def _usage(error: Any) -> str:
    """A mistake on the command line in one line, as every other mistake is told."""
    verb = error.ctx.command_path if error.ctx is not None else "tune"
    words = " ".join(error.format_message().split()) or "a verb is missing."
    option = getattr(error, "option_name", None)
    if option and verb.endswith((" train", " check", " preview")):
        name = option.lstrip("-").replace("-", "_")
        words += f" A key of the recipe is written without dashes, such as train.{name}=VALUE."
    return f"{verb}: {words}{'' if words.endswith(('.', '?')) else '.'} See `{verb} --help`."


def _says(error: TuneError) -> bool:
    """Whether this process is the one to print an error: of those that a launcher started one does."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    if isinstance(error, ElsewhereError) or (isinstance(error, StoppedError) and int(os.environ.get("RANK", "0"))):
        return False
    if "torch" not in sys.modules:  # the processes have not met yet
        return os.environ.get("LOCAL_RANK", "0") == "0"
    from tune.training.together import first_to_say

    return first_to_say(str(error))


def _run(arguments: list[str] | None) -> int:
    with hiding_secrets():
        return _run_hiding(arguments)


def _run_hiding(arguments: list[str] | None) -> int:
    if not sys.warnoptions:
        # Libraries warn each other's developers; what a user should know is said by tune itself.
        warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every retry
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8 shows what it can
    try:
        code = app(args=arguments, prog_name="tune", standalone_mode=False)
        sys.stdout.flush()
        if code == 130:  # how Typer returns a Ctrl-C
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except TuneError as error:
        if _says(error) and not (isinstance(error, StoppedError) and int(os.environ.get("RANK", "0"))):
            with contextlib.suppress(OSError):  # the log may be on the disk that is full
                print(error, file=sys.stderr)
        return error.exit_code
    except _UsageError as error:
        print(_usage(error), file=sys.stderr)
        return 2
    except (typer.Abort, KeyboardInterrupt):
        print("stopped by Ctrl-C. A run that had begun goes on with --resume.", file=sys.stderr)
        return 130
    except (BrokenPipeError, SystemExit):  # Typer answers a broken pipe with an exit of its own
        # Whoever read our output has gone (`tune preview | head`); Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
