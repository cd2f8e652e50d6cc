"""docs/ says what the command line and the schema say: every page is current, nothing is missing, no link is broken."""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import typer
from typer.testing import CliRunner

from tests.scripts.conftest import load_script  # noqa: F401  the fixture
from tune.cli.main import app
from tune.recipe import later
from tune.recipe.elsewhere import KEYS, VALUES
from tune.recipe.load import load_recipe
from tune.recipe.problems import schema_keys
from tune.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
VERBS = tuple(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
HEAVY = {"torch", "transformers", "numpy", "peft", "accelerate", "bitsandbytes", "datasets"}
CHAT = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI "
    "assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + m.role + '\n' + "
    "m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""What the model of the examples writes around a dialogue."""


@pytest.fixture
def docs(load_script: Callable[[str], ModuleType]) -> ModuleType:  # noqa: F811
    return load_script("docs")


@pytest.fixture
def written(docs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which every page was just written, in place of docs/."""
    folder = tmp_path / "docs"
    monkeypatch.setattr(docs, "DOCS", folder)
    assert docs.main([]) == 0
    return folder


def section(page: str, heading: str) -> str:
    """The text under `heading`, up to the next one of the same depth."""
    text = (DOCS / page).read_text(encoding="utf-8")
    _, found, after = f"\n{text}".partition(f"\n## {heading}\n")
    assert found, f"{page} has no part {heading}"
    return after.partition("\n## ")[0]


@pytest.mark.parametrize("seed", ["1", "2"])
def test_every_page_is_current_and_nothing_heavy_is_needed_to_know(seed: str) -> None:
    program = f"import sys; sys.path.insert(0, 'scripts'); import docs; code = docs.main(['--check'])\n\
assert not set({sorted(HEAVY)}) & set(sys.modules)\nsys.exit(code)"
    # The order of a set differs between processes, and must not reach a page.
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.stderr, done.returncode) == ("", 0)


def test_stale_missing_and_left_over_pages_are_named(
    docs: ModuleType, written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert docs.main(["--check"]) == 0
    capsys.readouterr()
    (written / "train.md").write_text((written / "train.md").read_text() + "more\n")
    (written / "recipe.md").unlink()
    (written / "gone.md").write_text(f"{docs.MARK}change nothing -->\n\n# tune gone\n")
    assert docs.main(["--check"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        f"docs/{name}: is stale. Run `python scripts/docs.py`." for name in ("gone.md", "recipe.md", "train.md")
    ]
    assert docs.main([]) == 0
    assert docs.main(["--check"]) == 0
    assert not (written / "gone.md").exists()


def test_pages_written_by_hand_are_kept_and_listed(docs: ModuleType, written: Path) -> None:
    text = "# What holds\n\nA run is\n[killed](#how), and goes on. More of it.\n"
    (written / "reliability.md").write_text(text)
    assert docs.stale(written) == ["README.md"]
    assert docs.write(written) == ["README.md"]
    assert (written / "reliability.md").read_text() == text
    assert "- [What holds](reliability.md): A run is killed, and goes on.\n" in (written / "README.md").read_text()


def test_the_index_lists_every_page_once() -> None:
    linked = re.findall(r"^- \[.+?\]\(([\w-]+\.md)\): \S", (DOCS / "README.md").read_text(encoding="utf-8"), re.M)
    assert sorted(linked) == sorted(path.name for path in DOCS.glob("*.md") if path.name != "README.md")
    assert {f"{verb}.md" for verb in VERBS} <= set(linked)


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_what_help_shows_is_on_the_page(verb: str) -> None:
    done = CliRunner().invoke(app, [*([verb] if verb else []), "--help"], env={"COLUMNS": "300", "TERM": "dumb"})
    shown = done.output.partition("Commands")[0]
    options = set(re.findall(r"(?<![\w-])(--?[a-z][\w-]*)", shown))
    arguments = set(re.findall(r"^\W*\*?\s+(\[?[A-Z][A-Z=_]*\]?(?:\.\.\.)?)\s", shown.partition("Options")[0], re.M))
    assert "--help" in options
    page = (DOCS / f"{verb or 'README'}.md").read_text(encoding="utf-8").replace("\\|", "|")
    named = re.findall(r"^\| (`.+?`) \|", page, re.M)
    assert options | arguments <= {name.strip("`") for names in named for name in names.split(", ")}
    for words in [p.help for p in docs_parameters(verb)]:
        assert " ".join(words.split()) in page


def docs_parameters(verb: str) -> list[typer.models.OptionInfo]:
    """The parameters of a verb that have words of their own."""
    if not verb:
        return []
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    return [parameter for parameter in command.params if getattr(parameter, "help", None)]


@pytest.mark.parametrize("key", sorted(schema_keys()))
def test_every_key_has_its_row(key: str) -> None:
    field = schema_keys()[key]
    if key in Recipe.model_fields and key != "output":
        assert str(field.description) in section("recipe.md", key)
        return
    around, _, name = key.rpartition(".")
    rows = section("recipe.md", {"data.train": "An item of data.train"}.get(around, around) or key).splitlines()
    (row,) = [row for row in rows if row.startswith(f"| `{name}` |")]
    assert " ".join(str(field.description).split()) in row
    assert ("| required |" in row) == field.is_required()


def test_what_is_refused_is_listed() -> None:
    wanted = [entry.words for entry in later._SINGLE]
    wanted += [f"`{name}`" for name in (*later.FORMATS_LATER, *later.TEMPLATES_LATER)]
    if wanted:
        listed = section("recipe.md", "Not in this version")
        assert [words for words in wanted if words not in listed] == []


def test_every_name_from_elsewhere_is_answered_with_ours() -> None:
    text = section("recipe.md", "Names from elsewhere")
    rows = [row.split(" | ") for row in text.splitlines() if row.startswith("| ")]
    for name, there in KEYS.items():
        assert any(
            f"`{name}`" in row[0]
            and row[1].partition("]")[0] == (f"[`{there.key}`" if there.key else "")
            and there.note in row[2]
            for row in rows
        ), name
    for key, answers in VALUES.items():
        for value, words in answers.items():
            assert any(f"[`{key}`]" in row[0] and f"`{value}`" in row[1] and words in row[2] for row in rows), value


def test_the_changes_shown_are_accepted(tmp_path: Path) -> None:
    (line,) = re.findall(r"^tune train recipe\.yaml (.+)$", section("recipe.md", "Changes on the command line"), re.M)
    (tmp_path / "recipe.yaml").write_text("model: {base: a}\ndata: {train: b}\ntrain: {max_steps: 5}\n")
    recipe = load_recipe(tmp_path / "recipe.yaml", shlex.split(line))
    assert recipe.train.max_steps is None
    assert recipe.data.train[0].limit == 100


def anchors(page: Path) -> set[str]:
    """The names by which the headings of a page are linked to."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_no_link_is_broken(page: str) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]*))?\)", (DOCS / page).read_text(encoding="utf-8"))
    for place, anchor in links:
        target = DOCS / place if place else DOCS / page
        assert target.exists(), place
        assert not anchor or anchor in anchors(target), anchor


class Terminal(io.StringIO):
    """Takes what is printed and says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the examples assume it, with a tiny model under the name of theirs."""
    from transformers import AutoTokenizer

    from tests.tiny import write_model

    folder = tmp_path_factory.mktemp("newcomer")
    base = folder / "models/smollm2-135m-instruct-mistral"
    write_model(base, "mistral", vocab_size=512)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", CHAT
    tokenizer.save_pretrained(base)
    (folder / "data").symlink_to(ROOT / "data")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    recipe = folder / "recipes/quickstart.yaml"
    # So small a vocabulary takes several tokens a word.
    recipe.write_text(recipe.read_text().replace("max_length: 256", "max_length: 2048"))
    return folder


def examples(*verbs: str) -> list[tuple[str, str]]:
    """Each command of the pages of `verbs`, with the output shown for it."""
    pages = ((DOCS / f"{verb}.md").read_text(encoding="utf-8") for verb in verbs)
    blocks = [
        block for page in pages for block in re.findall(r"^```console\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    ]
    return [
        (command, output)
        for block in blocks
        for command, output in re.findall(r"^\$ (.+)\n((?:(?!\$ ).*\n)*)", block, re.M)
    ]


def shape(output: str) -> list[str]:
    """The lines of an output without what depends on the model and on how this program is called."""
    output = re.sub(r"\x1b\[[\d;]*m", "", output)
    output = re.sub(r"\b[0-9a-f]{16}\b", "FINGERPRINT", output)
    output = re.sub(r"(Next: ).* (?=train )", r"\1tune ", output)
    output = re.sub(r"\d[\d,.]*\b", "0", output)
    return [" ".join(line.split()) for line in output.splitlines() if line.strip()]


@pytest.mark.parametrize(("command", "output"), examples("check", "preview", "recipes"))
def test_the_examples_print_what_is_shown(
    command: str, output: str, newcomer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tune.cli.main import _run

    monkeypatch.chdir(newcomer)
    monkeypatch.setenv("COLUMNS", "100")
    arguments, _, piped = command.partition(" | ")
    stream = io.StringIO() if piped else Terminal()
    told = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", told)
    program, *words = shlex.split(arguments)
    assert program == "tune"
    _run(words)
    expected = [re.escape(line).replace("…", ".*") for line in shape(output)]
    printed = shape(stream.getvalue() + told.getvalue())
    assert len(printed) == len(expected), printed
    assert [line for line, wanted in zip(printed, expected, strict=True) if not re.fullmatch(wanted, line)] == []


def test_the_verbs_with_examples_are_found() -> None:
    assert len(examples("check", "preview", "recipes")) >= 4
