"""Every kind of mistake in a recipe file: one message, at the right line, and all of them at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tune.errors import RecipeError
from tune.recipe.load import load_recipe

GOOD = "model: {base: some/model}\ndata: {train: a.jsonl}\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def problems_of(text: str | bytes, overrides: tuple[str, ...] = ()) -> list[str]:
    content = text if isinstance(text, bytes) else text.encode()
    Path("recipe.yaml").write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe("recipe.yaml", overrides)
    assert caught.value.exit_code == 2
    assert not any("\n" in problem for problem in caught.value.problems)
    return caught.value.problems


def test_all_at_once_in_the_order_of_the_file(here: Path) -> None:
    text = """# a comment
model:
  bse: mistralai/Mistral-7B-v0.1
  quantization: nf5
lora_r: 8
adapter:
  rank: 0
  alpha:
  targets: [attention, attention]
data:
  train:
    - a.jsonl
    - {path: b.jsonl, fromat: alpaca, weight: -1}
    - format: alpaca
      limit: 0
  eval: 1.5
train:
  learning_rate: fast
  rank: 8
router: 3
push: {merged: true}
epoch: 3
"""
    assert problems_of(text) == [
        "recipe.yaml:3: model.bse: is not a key of model. Did you mean 'base'?",
        "recipe.yaml:4: model.quantization: must be nf4 or none (nf5). Did you mean 'nf4'?",
        "recipe.yaml:5: lora_r: is not a key of a recipe. Here it is adapter.rank.",
        "recipe.yaml:7: adapter.rank: must be at least 1 (0). The default is 16.",
        "recipe.yaml:8: adapter.alpha: has no value. Scale of the adapter's output: it is multiplied by alpha / rank. "
        "Remove the key for the default (32).",
        "recipe.yaml:9: adapter.targets: names 'attention' twice. The default is [attention, mlp].",
        "recipe.yaml:13: data.train[1].fromat: is not a key of data.train[1]. Did you mean 'format'?",
        "recipe.yaml:13: data.train[1].weight: must be above 0 (-1). The default is 1.",
        "recipe.yaml:14: data.train[2].path: is missing. A file, a folder, a pattern of names, or a hub data set's id.",
        "recipe.yaml:15: data.train[2].limit: must be at least 1 (0). Only the first so many rows are read; "
        "none reads all.",
        "recipe.yaml:16: data.eval: must be below 1 (1.5). The default is 0.",
        "recipe.yaml:18: train.learning_rate: must be a number (fast). The default is 0.0002.",
        "recipe.yaml:19: train.rank: is not a key of train. It belongs elsewhere: adapter.rank.",
        "recipe.yaml:20: router: is a section, not a value (3). Put keys under it: balance_loss, train.",
        "recipe.yaml:21: push.merged: has nowhere to go. Set push.repo to OWNER/NAME.",
        "recipe.yaml:22: epoch: is not a key of a recipe. Did you mean 'train.epochs'?",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (GOOD + "model: {base: x}\n", "recipe.yaml:3: model: is set twice, first at recipe.yaml:1. Remove one."),
        (
            "data: {train: a}\nmodel:\n  base: x\n  base: y\n",
            "recipe.yaml:4: model.base: is set twice, first at recipe.yaml:3. Remove one.",
        ),
        (
            GOOD + "output: !!python/object/apply:os.system [ls]\n",
            "recipe.yaml:3: a YAML tag has no meaning in a recipe (!!python/object/apply:os.system). Remove it.",
        ),
        (GOOD + "output: !mine x\n", "recipe.yaml:3: a YAML tag has no meaning in a recipe (!mine). Remove it."),
        (GOOD + "<<: {output: x}\n", "recipe.yaml:3: a recipe has no merge keys (<<). Write the keys out."),
        (GOOD + "? [a]\n: b\n", "recipe.yaml:3: a key must be a plain word. Write `key: value`."),
        (GOOD + "train: &a {x: *a}\n", "recipe.yaml:3: is nested in itself or too deeply. A recipe has a few levels."),
        (
            GOOD + "train: [1]\n",
            "recipe.yaml:3: train: is a section, not a value (a list). Put keys under it: ",
        ),
        ("model:\n\tbase: x\n", "recipe.yaml:2: is not valid YAML (column 1: found character '\\t' that cannot start"),
        ("model: {base: x\n", "recipe.yaml:2: is not valid YAML (column 1: "),
        ("a: b: c\n", "recipe.yaml:1: is not valid YAML (column 5: mapping values are not allowed here)"),
        ("a: *b\n", "recipe.yaml:1: is not valid YAML (column 4: found undefined alias 'b')"),
        ("a: 1\n---\nb: 1\n", "recipe.yaml:2: is not valid YAML (column 1: expected a single document"),
        ("a: 1\nb: \x07\n", "recipe.yaml:2: holds a character that is not text (#x0007). Remove it."),
        ('a: "\\UFFFFFFFF"\n', "recipe.yaml: holds an escape that is no character."),
        (GOOD + '"x\\ud800": 1\n', "recipe.yaml:3: a key holds half a surrogate pair, which is no character (x)."),
        ("[" * 5000, "recipe.yaml: is nested too deeply. A recipe has a few levels."),
        ("", "recipe.yaml:1: is empty. A recipe needs model.base and data.train;"),
        ("# nothing yet\n", "recipe.yaml:1: is empty."),
        ("- a\n- b\n", "recipe.yaml:1: is a list, not a recipe. Write sections such as `model:` and `data:`."),
        ("\nhello\n", "recipe.yaml:2: is a single value, not a recipe."),
        (b"model:\n  base: \xff\xfe\n", "recipe.yaml:2: is not text in UTF-8. A recipe is a YAML file."),
        (b"#" * 300_000, "recipe.yaml: is larger than 256 KiB. Is this a recipe?"),
    ],
)
def test_what_is_wrong_with_the_writing(here: Path, text: str | bytes, problem: str) -> None:
    (found,) = problems_of(text)
    assert found.startswith(problem)


def test_a_short_file_cannot_become_a_large_recipe(here: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    (found,) = problems_of("\n".join(lines))
    assert found.startswith("recipe.yaml:1: holds more than 10000 values.")


def test_required_keys(here: Path) -> None:
    assert problems_of("adapter:\n  rank: 8\n") == [
        "recipe.yaml:1: model.base: is missing. The base model: a hub id such as mistralai/Mistral-7B-v0.1, or a local "
        "folder.",
        "recipe.yaml:1: data.train: is missing. Training data: a path, or a list of paths or of {path, format, ...}.",
    ]
    found = problems_of("data:\n  train: a\n\nmodel:\n  revision: main\n")
    assert found[0].startswith("recipe.yaml:4: model.base: is missing.")
    found = problems_of("data:\n  train:\nmodel:\n  base: ~\n")
    assert [problem.partition(". ")[0] for problem in found] == [
        "recipe.yaml:2: data.train: has no value",
        "recipe.yaml:4: model.base: has no value",
    ]


def test_a_misspelt_section_is_one_problem(here: Path) -> None:
    assert problems_of("modle:\n  base: x\ndata:\n  train: a\n") == [
        "recipe.yaml:1: modle: is not a key of a recipe. Did you mean 'model'?"
    ]


def test_a_section_with_nothing_in_it_means_the_defaults(here: Path) -> None:
    Path("recipe.yaml").write_text(GOOD + "adapter:\n  # rank: 8\ntrain:\n")
    assert load_recipe("recipe.yaml").adapter.rank == 16


def test_scalars_keep_their_text(here: Path) -> None:
    text = "model: {base: x, revision: 0123456}\ndata: {train: no, system: 1.10}\n"
    Path("recipe.yaml").write_text(text + "tracking: {to: [wandb], name: 2024-01-01}\n")
    recipe = load_recipe("recipe.yaml")
    assert recipe.model.revision == "0123456"
    assert recipe.data.system == "1.10"
    assert recipe.data.train[0].path == "no"
    assert recipe.tracking.name == "2024-01-01"


def test_json_is_yaml_and_a_byte_order_mark_is_no_text(here: Path) -> None:
    Path("recipe.yaml").write_bytes(b'\xef\xbb\xbf{"model": {"base": "x"}, "data": {"train": ["a"]}}')
    assert load_recipe("recipe.yaml").model.base == "x"


def test_output_is_named_after_the_recipe(here: Path) -> None:
    Path("first-try.yaml").write_text(GOOD)
    assert load_recipe("first-try.yaml").output == "runs/first-try"
    assert load_recipe(Path("first-try.yaml"), ["output=elsewhere"]).output == "elsewhere"
    assert load_recipe("first-try.yaml", ["output=none"]).output == "runs/first-try"


def test_a_token_is_never_repeated(here: Path) -> None:
    token = "hf_" + "a1B2" * 8
    text = GOOD + f"push: {{hub_token: {token}, repo: {token}}}\nadapter: {{init: {token}}}\n"
    found = "\n".join(problems_of(text, (f"push.token={token}", "tracking.api_key=12345678", f"train.seed={token}")))
    assert "A recipe holds no tokens" in found
    assert token not in found
    assert "12345678" not in found


def test_missing_files(here: Path) -> None:
    Path("mistral-small.yaml").write_text(GOOD)
    Path("folder").mkdir()
    Path("folder/a.yaml").write_text(GOOD)
    expected = {
        "mistral-smal.yaml": "mistral-smal.yaml: there is no such file. Did you mean 'mistral-small.yaml'?",
        "mistral-small": "mistral-small: there is no such file. Did you mean 'mistral-small.yaml'?",
        "quickstart": "quickstart: there is no such file. It ships with the program: `tune recipes quickstart --copy` "
        "puts it here.",
        "recipes/quickstart.yaml": "recipes/quickstart.yaml: there is no such file. It ships with the program: "
        "`tune recipes quickstart --copy` puts it here.",
        "zzzzzzzz.yaml": "zzzzzzzz.yaml: there is no such file. `tune recipes` lists the shipped recipes.",
        "nowhere/a.yaml": "nowhere/a.yaml: there is no folder nowhere. `tune recipes` lists the shipped recipes.",
        "folder": "folder: is a folder, not a recipe. Name a file in it, such as folder/a.yaml.",
    }
    for name, message in expected.items():
        with pytest.raises(RecipeError) as caught:
            load_recipe(name)
        assert caught.value.problems == [message]


def test_a_key_in_python_that_is_no_text_in_unicode() -> None:
    with pytest.raises(RecipeError, match=r"^recipe: a key holds half a surrogate pair"):
        load_recipe({"model": {"base": "x"}, "data": ["a"], "x\ud800": 1})
