"""What a secret is known by, what is none, and that no message quotes one."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.conftest import write_recipe
from tests.security.planted import ADDRESS, ALL, KEY, KNOWN, PASSWORD, SECRETS, SHAPE, leaks, plant_recipe, spellings
from tests.security.planted import at_home as at_home
from tests.security.planted import base as base
from tests.security.planted import desk as desk
from tests.training.jobs import write_rows
from tune.cli.main import _run
from tune.cli.output import Hiding, hiding_secrets
from tune.data.hub import one_line
from tune.data.templates.resolve import _read
from tune.errors import DataError, RecipeError, RunError, UntrustworthyError, as_line
from tune.export.access import _said
from tune.export.publication import check_merge, check_name
from tune.recipe.load import load_recipe, recipe_to_yaml
from tune.recipe.read import shown
from tune.secrets import HIDDEN, holds_secret, redact, redact_all, redact_json, same_but_hidden, secret_in

ROOT = Path(__file__).resolve().parents[2]


def test_the_search_finds_a_secret_in_every_spelling(tmp_path: Path) -> None:
    for name, value in SECRETS.items():
        for number, spelling in enumerate(spellings(value)):
            (tmp_path / "file").write_bytes(b"some\0bytes" + spelling + b"and more")
            assert leaks(tmp_path), f"{name}, spelling {number}"
        assert [found for found in leaks(f"printed {value}") if not found.startswith(f"{name},")] == []
    (tmp_path / "file").write_bytes(b"nothing")
    assert leaks(tmp_path, "nothing") == []
    (tmp_path / f"named {SHAPE}").touch()
    assert leaks(tmp_path)
    assert leaks(tmp_path, planted_in=[tmp_path]) == []


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_hidden_in_every_spelling_that_is_whole(name: str, at_home: Path) -> None:
    value = SECRETS[name]
    where = {"a password in an address": "https://user:{}@host", "a token in an address": "https://host/x?token={}"}
    around = where.get(name, "before {} after")
    # Whose password it is, is known only where the two stand together.
    login = b"" if "user" in os.environ.get(name, "") else base64.b64encode(f"user:{value}".encode())
    whole = [text for text in spellings(value) if text.decode() not in (value[:12], value[-12:]) and text != login]
    texts = whole if name in KNOWN else [value.encode()]
    for text in [around.format(word.decode()) for word in texts] + [json.dumps(around.format(value))]:
        assert leaks(redact(text)) == []
        assert leaks(redact(redact(text))) == []
        assert secret_in(text) is not None
        assert leaks(str(secret_in(text)), as_line(text), str(DataError(text)), str(UntrustworthyError(text))) == []
    if "address" not in name:
        assert holds_secret(f"x {value} y".encode())
    told = redact_all({"key": [around.format(value)], around.format(value): 1, "count": 12, "rate": 0.5})
    assert leaks(json.dumps(told)) == []
    assert (told["count"], told["rate"]) == (12, 0.5)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MY_TOKEN", "plain-words-only"),
        ("PGPASSWORD", "hunter22"),
        ("HF_TOKEN_WRITE", "Xy12" * 8),
        ("API_KEY_2", "not random"),
        ("apikey", "some thing"),
        ("SMTP_PASS", "mail-password"),
        ("MYSQL_PWD", "lowercase"),
        ("SESSION_KEY", "0f8fad5b-d9cb-469f-a165-70867728950e"),
        ("SIGNING_KEY", "-----words-----"),
        ("SERVICE_AUTH", "user:longpassword"),
    ],
)
def test_a_variable_is_known_by_its_name(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert redact(f"it is {value}.") == f"it is {value}."
    monkeypatch.setenv(variable, value)
    assert redact(f"it is {value}.") == f"it is {HIDDEN}."
    assert secret_in(value) == f"a secret of the environment variable {variable}"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("FOO_KEY", "mistral12"),
        ("SORT_KEY", "learning_rate"),
        ("MODEL_KEY", "mistralai/Mistral-7B-v0.1"),
        ("CACHE_KEY", "deps-v1-linux"),
        ("MONKEY", "mistralai"),
        ("TOKEN_LIMIT", "1000000000"),
        ("TOKENIZERS_PARALLELISM", "experimental1234567"),
        ("MY_TOKEN", "short"),
        ("GIT_AUTHOR_NAME", "Ada Lovelace"),
        ("SSH_AUTH_SOCK", "/tmp/ssh-Ab12Cd34Ef56Gh78/agent.1"),
        ("DEPLOY_PASSWORD", "/etc/passwd"),
        ("HOME_PASSWORD", "~/.."),
        ("MY_SECRET", os.uname().nodename),
        ("HOMEPAGE", "https://github.com/me"),
        ("GIT_REMOTE", "ssh://git@github.com/me/project"),
    ],
)
def test_ordinary_values_are_left_alone(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    assert redact(f"it is {value}.") == f"it is {value}."
    assert secret_in(value) is None


@pytest.mark.parametrize(
    "text",
    [
        "hf_hub_download_with_progress of huggingface_hub",
        "data/sk-2024-cleaned-examples-of-tasks.jsonl",
        "a task-force of-the-many-words-with-dashes",
        "fingerprint " + "0123456789abcdef" * 4,
        "commit 0123456789abcdef0123456789abcdef01234567",
        "mail me@host.org, see https://host:8080/a@b and https://host/@me",
        "authorization: required by law; basic instructions; bearer of news",
        "https://host/page?page=2&tokens=512&keyword=sea#section-3",
        "step 2/2  loss 5.4442  lr 5.00e-03  grad 2.734  32,155 tokens/s  501 MB",
    ],
)
def test_ordinary_texts_are_left_alone(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("https://me:p@ss@host/x?a=1&key=abc&b=2#f", "https://***@host/x?a=1&key=***&b=2#f"),
        ("https://0123456789abcdef0123@host/x", "https://***@host/x"),
        ("s3://b/o?X-Amz-Credential=AK&X-Amz-Signature=ab12", "s3://b/o?X-Amz-Credential=***&X-Amz-Signature=***"),
        ("{'Authorization': 'Bearer abcdefgh'}", "{'Authorization': 'Bearer ***'}"),
        ("sent Basic dXNlcjpwYXNz0123=", "sent Basic ***"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.SflKxwRJSMeKKF2QT4", "***"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----\nb3Bl\n-----END OPENSSH PRIVATE KEY----- x", "*** x"),
        ("cut off -----BEGIN PRIVATE KEY-----\\nb3Bl", "cut off ***"),
    ],
)
def test_a_secret_is_known_by_its_place(text: str, hidden: str) -> None:
    assert redact(text) == hidden


def test_a_short_value_is_hidden_as_a_word_and_not_within_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", "training")
    assert redact("pretraining on runs/training and my_training") == f"pretraining on runs/{HIDDEN} and my_{HIDDEN}"
    monkeypatch.setenv("DB_PASSWORD", "training-on-the-sea")
    assert redact("pretraining-on-the-seaside") == f"pre{HIDDEN}side"


def test_no_number_is_taken_for_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIN_TOKEN", "12345678")
    monkeypatch.setenv("ODD_SECRET", "grad_norm")
    text = '{"memory_bytes": 12345678, "grad_norm": 0.12345678, "ids": [12345678], "at": "a \\"12345678\\" b\\u00e4"}\n'
    assert json.loads(redact_json(text)) == {**json.loads(text), "at": f'a "{HIDDEN}" bä'}
    assert redact_json(text * 2) == redact_json(text) * 2
    assert redact_json('{ "a" :  [1.50, "x"] }') == '{ "a" :  [1.50, "x"] }'
    metrics = {"step": 12345678, "grad_norm": 12345678.0, "examples": ["rows-12345678.jsonl:1"], "none": None}
    assert redact_all(metrics) == {**metrics, "examples": [f"rows-{HIDDEN}.jsonl:1"]}


def test_what_was_hidden_is_no_difference() -> None:
    assert same_but_hidden({"a": ["x/***/y", 1]}, {"a": ["x/any thing/y", 1]})
    assert same_but_hidden({"***": 1, "b": 2}, {"k": 1, "b": 2})
    for before, now in (("x/***/y", "x/z"), ("plain", "other"), (["***"], []), ({"a": "***"}, {"b": "z"}), ("1", 1)):
        assert not same_but_hidden(before, now)


def test_what_libraries_print_is_hidden_and_wrappers_of_the_stream_see_no_secret(at_home: Path) -> None:
    below, kept = io.StringIO(), []
    stream: Any = Hiding(below)
    inner = stream.write

    def keep(text: str) -> None:  # as wandb does
        inner(text)
        kept.append(text)

    stream.write = keep
    print("it is", SHAPE, PASSWORD, file=stream)
    stream.writelines([ADDRESS, "\n"])
    assert below.getvalue() == "".join(kept)
    assert below.getvalue().count(HIDDEN) == 4
    assert leaks(below.getvalue()) == []
    before = sys.stdout, sys.stderr
    with hiding_secrets(), hiding_secrets():
        assert isinstance(sys.stdout, Hiding)
        assert not isinstance(sys.stdout.stream, Hiding)
        assert sys.stdout.fileno() == before[0].fileno()
    assert (sys.stdout, sys.stderr) == before


def test_a_bug_is_told_without_secrets(at_home: Path) -> None:
    program = f"""
import sys, tune.cli.recipes
def broken(*arguments):
    import warnings, logging
    warnings.warn({ALL!r})
    logging.getLogger("a library").warning({ALL!r})
    assert not any({SHAPE!r} in word for word in sys.argv), "trackers note the command line"
    raise ValueError({ALL!r})
tune.cli.recipes.recipes = broken
from tune.cli.main import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-Wdefault", "-c", program, "recipes", SHAPE],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    # The line of a program that is given with -c is not shown in its traceback.
    assert done.returncode == 1
    assert "ValueError: *** *** " in done.stderr
    assert done.stderr.count("***") > 3 * len(KNOWN)
    assert leaks(done.stdout, done.stderr) == []


VALUE = f"x {PASSWORD!s} y"
LONG = "w" * 40 + f" {PASSWORD} {SHAPE}"
"""What a message cuts, in the middle of a secret."""

RECIPES: dict[str, str] = {
    "unknown key": f"wandb_api_key: {SECRETS['WANDB_API_KEY']}",
    "unknown key in a section": f"model: {{base: base, token: {SHAPE}}}",
    "unknown key with a mapping": f"tracking: {{auth: {{{SHAPE}: {KEY}}}}}",
    "secret as a key": f"{SHAPE}: true",
    "value for a section": f"adapter: {SHAPE}",
    "no number": f"train: {{epochs: {SECRETS['GITLAB_PAT']}}}",
    "no choice": f"train: {{optimizer: {json.dumps(PASSWORD)}}}",
    "long value": f"train: {{optimizer: {json.dumps(LONG)}}}",
    "twice in a list": f"adapter: {{targets: [{KEY}, {KEY}]}}",
    "address as a repository": f"push: {{repo: {json.dumps(ADDRESS)}}}",
    "tracker": f"tracking: {{to: {json.dumps(ADDRESS)}}}",
    "open quotes": f'seed: "{PASSWORD}',
    "undefined alias": f"seed: *{SHAPE}",
    "undefined alias of no shape": "seed: *" + "addr3ssPassw0rd",
    "tag": f"seed: !{SHAPE} x",
    "tag of no shape": "seed: !" + "addr3ssPassw0rd x",
    "stray character": f"seed: @{SHAPE}",
    "two colons": f"seed: x: {SHAPE}",
    "tab": f"train:\n\tseed: {SHAPE}",
    "set twice": f"{SHAPE}: 1\n{SHAPE}: 2",
    "base at an address": f"model: {{base: {json.dumps(ADDRESS)}}}",
    "secret as a base": f"model: {{base: models/{SHAPE}}}",
    "secret as a system prompt": f"data: {{train: train.jsonl, system: {json.dumps(VALUE)}}}",
    "secret as an output": f"output: runs/{SHAPE}",
    "secret as a repository": f"push: {{repo: owner/{SHAPE}}}",
    "secret as a template": f"data: {{train: train.jsonl, template: {KEY}.jinja}}",
    "data at an address": f"data: {{train: {json.dumps(ADDRESS)}}}",
    "data missing": f"data: {{train: '{SHAPE}/train.jsonl'}}",
    "data near a secret": f"data: {{train: 'rows-{SHAPE}.jsnl'}}",
    "template with a secret": "data: {train: train.jsonl, template: key.jinja}",
    "template missing": "data: {train: train.jsonl, template: " + SECRETS["a token in an address"] + ".jinja}",
    "adapter missing": f"adapter: {{start_from: adapters/{KEY}}}",
    "adapter at an address": f"adapter: {{start_from: {json.dumps(ADDRESS)}}}",
    "unknown role": f"data: {{train: role-{KEY}.jsonl, format: messages}}",
    "broken row": f"data: {{train: broken-{KEY}.jsonl}}",
    "first line of a table": f"data: {{train: table-{KEY}.csv}}",
    "row that is a text": f"data: {{train: text-{KEY}.jsonl}}",
    "column of that name": f"data: {{train: {{path: train.jsonl, columns: {{instruction: {SHAPE}}}}}}}",
    "split": f"data: {{train: {{path: train.jsonl, split: {SHAPE}}}}}",
}


@pytest.mark.parametrize("name", RECIPES)
def test_no_mistake_in_a_recipe_is_answered_with_the_secret(
    name: str, desk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_rows(desk / "train.jsonl", 4)
    (desk / f"rows-{SHAPE}.jsonl").touch()
    (desk / f"role-{KEY}.jsonl").write_text(json.dumps({"messages": [{"role": LONG, "content": ALL}]}) + "\n")
    cut = f"{'w' * 15} {SECRETS['GITLAB_PAT']} and so on"  # as messages cut it, within the secret
    (desk / f"table-{KEY}.csv").write_text(f"{cut}.,{SHAPE}.\n1,2\n")
    (desk / f"text-{KEY}.jsonl").write_text(json.dumps(cut) + "\n")
    (desk / f"broken-{KEY}.jsonl").write_text(f'{{"instruction": "{SHAPE}\n')
    (desk / "key.jinja").write_text("{% generation %}" + KEY + "{% endgeneration %}")
    settings = {"model": {"base": "base"}, "data": {"train": "train.jsonl"}, "output": "run"}
    wrong = RECIPES[name]
    rest = {key: value for key, value in settings.items() if f"{key}:" not in wrong.splitlines()[0].split(" ")[:1]}
    (desk / "recipe.yaml").write_text(yaml.safe_dump(rest) + wrong + "\n")
    assert _run(["train", "recipe.yaml"]) == 2
    out, err = capfd.readouterr()
    # What has no shape and is nowhere known is no secret in a plain place: such a name is shown.
    plain = {"template missing": ["a token in an address"]}.get(name, [])
    assert [found for found in leaks(out, err) if found.partition(",")[0] not in plain] == []
    assert "Traceback" not in err
    assert not (desk / "run").exists()


def test_what_is_cut_or_cannot_be_hidden(at_home: Path, tmp_path: Path) -> None:
    for end, cut in ((300, one_line), (300, _said), (60, shown), (1500, as_line)):
        long = "x" * (end - 20) + f" {PASSWORD} {'y' * 1000}"
        assert leaks(cut(ValueError(long)) if end == 300 else cut(long)) == [], cut.__name__
    with pytest.raises(RunError, match="OWNER/NAME: owner/\\*\\*\\* holds a text shaped like a token or key"):
        check_name(f"owner/{SHAPE}")
    (tmp_path / "key.jinja").write_text("{% generation %}" + KEY + "{% endgeneration %}")
    with pytest.raises(DataError, match="holds a text shaped like a token or key, and would be saved"):
        _read(str(tmp_path / "key.jinja"))
    reasons = ["x" * 180 + f" {PASSWORD}"]
    (tmp_path / "merge-proof.json").write_text(json.dumps({"verdict": "failed", "reasons": reasons}))
    with pytest.raises(RunError) as caught:
        check_merge(tmp_path, tmp_path, "tune merge run")
    assert "is not the model that was trained (xxx" in str(caught.value)
    assert leaks(str(caught.value)) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "recipe.yaml", f"model.token={SECRETS['a token in an address']}"),
        ("train", "recipe.yaml", f"wandb_key={SECRETS['a token in an address']}"),
        ("train", "recipe.yaml", f"model.base={ADDRESS}"),
        ("train", "recipe.yaml", f"train.epochs={SHAPE}"),
        ("train", "recipe.yaml", f"train.epochs: {SHAPE}"),
        ("train", "recipe.yaml", f"train.epochs=[{SHAPE}"),
        ("train", "recipe.yaml", f"--token={SHAPE}"),
        ("train", f"{SHAPE}.yaml"),
        ("train", ADDRESS),
        ("generate", f"runs/{SHAPE}", "hi"),
        ("generate", "runs/none", "hi", PASSWORD),
        ("merge", "runs/none", f"--base={SHAPE}"),
        ("convert", f"runs/{PASSWORD}", "--to", SHAPE),
        ("push", "run", ADDRESS),
        ("push", f"runs/{KEY}", "owner/name"),
        ("push", "run", f"owner/{SHAPE}", "--dry-run"),
        (SHAPE,),
        ("recipes", PASSWORD),
    ],
    ids=lambda arguments: "-".join(arguments[:1]) + str(len(" ".join(arguments))),
)
def test_no_mistake_on_the_command_line_is_answered_with_the_secret(
    arguments: tuple[str, ...], desk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert _run(list(arguments)) == 2
    assert leaks(*capfd.readouterr()) == []


@pytest.mark.parametrize(
    ("change", "key", "words"),
    [
        ({"output": f"runs/{SHAPE}"}, "output", "a text shaped like a token or key"),
        ({"output": "runs/" + PASSWORD}, "output", "variable MY_SERVICE_PASSWORD"),
        ({"data__system": f"You know {PASSWORD}."}, "data.system", "unset the variable"),
        ({"model__base": f"models/{KEY}"}, "model.base", "Give the folder another name"),
        ({"push__repo": f"owner/{SHAPE}"}, "push.repo", "Everybody would read it there"),
        ({"data__template": f"{SHAPE}.jinja"}, "data.template", "The run needs the file's name later"),
    ],
)
def test_a_secret_that_could_not_be_hidden_is_refused(
    change: dict[str, str], key: str, words: str, desk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plant_recipe(desk, **change)
    for verb in ("train", "check", "preview"):
        assert _run([verb, "recipe.yaml"]) == 2
        out, err = capfd.readouterr()
        assert out == ""
        assert err.startswith(f"{key}: holds ")
        assert words in err
        assert err.count("\n") == 1
        assert leaks(err) == []


def test_a_recipe_is_written_without_secrets_and_reads_back(desk: Path) -> None:
    write_recipe(desk, data__train=[{"path": ADDRESS, "columns": {"instruction": PASSWORD}}], tracking__to=["wandb"])
    recipe = load_recipe("recipe.yaml", [f"tracking.name='{SHAPE}'", "data.system='ask https://name@host'"])
    text = recipe_to_yaml(recipe)
    assert leaks(text) == []
    back = load_recipe(yaml.safe_load(text))
    assert back.data.train[0].path == "https://***@host/rows?v=1&access_token=***"
    assert back.tracking.name == HIDDEN
    assert back.data.system == "ask https://name@host", "what trains is never changed"
    with pytest.raises(RecipeError) as caught:
        load_recipe({"model": {"base": "base", "dtype": SHAPE}, "data": {"train": "rows"}})
    assert leaks(str(caught.value), *caught.value.problems) == []
