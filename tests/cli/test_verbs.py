"""What the verbs print and write when all is well, word for word where the words are promised."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import HELD_OUT, ROWS, write_recipe
from tests.training.jobs import write_rows
from tune.cli.main import _run
from tune.recipe.load import load_recipe, recipe_to_yaml, shipped_recipes

STEPS = 4
SECRETS = {"HF_TOKEN": "hf_" + "s3cr3t" * 6, "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567"}
METRICS = {"step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "memory_bytes"}


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A folder in which one run was trained, with secrets in the environment; and what it printed."""
    folder = tmp_path_factory.mktemp("verbs")
    shutil.copytree(base, folder / "base")
    write_rows(folder / "train.jsonl", ROWS)
    write_rows(folder / "eval.jsonl", HELD_OUT, start=100)
    changes = {"data__eval": ["eval.jsonl"], "train__log_every": 2, "train__eval_every": 2, "train__save_every": 2}
    write_recipe(folder, train__max_steps=STEPS, data__train=[{"path": "train.jsonl", "weight": 0.5}], **changes)
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        # The next command to type is told by the name by which the shell finds this program.
        program = folder / "bin/tune"
        program.parent.mkdir()
        program.touch(0o755)
        patch.setenv("PATH", str(program.parent))
        patch.setattr(sys, "argv", [str(program)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            assert _run(["train", "recipe.yaml"]) == 0, err.getvalue()
    return folder, out.getvalue(), err.getvalue()


@pytest.fixture
def here(trained: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the trained run, as the working directory."""
    monkeypatch.chdir(trained[0])
    return trained[0]


def test_the_start_is_told_in_literal_lines(trained: tuple[Path, str, str]) -> None:
    _, out, err = trained
    lines = out.splitlines()
    assert err == ""
    wanted = [
        "devices 1",
        "linears 14/14 nf4",
        "adapted 14/14",
        "attention sdpa, packed",
        f"steps {STEPS}, 8 examples each",
    ]
    places = [lines.index(line) for line in wanted]
    assert places == sorted(places)
    assert re.search(r"^q_proj +2 +2 +2 +\S+ kB +1,024$", out, re.MULTILINE), (
        "2 layers, 4-bit, adapted, 2 x 4 x (64 + 64)"
    )
    logged = re.findall(r"^step (\d+)/4  loss \d+\.\d{4}  lr \d\.\d{2}e-\d\d  grad \d+\.\d{3}  ", out, re.MULTILINE)
    assert logged == ["2", "4"], "every log_every steps"
    assert re.findall(r"^step (\d+): held-out loss \d+\.\d{4}", out, re.MULTILINE) == ["0", "2", "4"]


def test_the_end_says_where_what_and_what_next(trained: tuple[Path, str, str]) -> None:
    folder, out, _ = trained
    summary = json.loads((folder / "run/finished.json").read_text())
    adapter, loss, speed, memory, following = out.splitlines()[-5:]
    assert adapter.split()[:2] == ["adapter", "run/adapter"]
    before, after = summary["loss_before"], summary["loss_after"]
    assert after < before
    assert loss.startswith(f"loss         {before:.4f} before, {after:.4f} after, on held-out data (perplexity ")
    assert re.fullmatch(r"speed        [\d,]+ tokens/s", speed)
    assert re.fullmatch(r"peak memory  [\d.]+ [MG]B", memory)
    assert re.fullmatch(r'next         \S.* generate run "your prompt"', following)


def test_the_folder_is_as_it_is_drawn(here: Path) -> None:
    assert {path.name for path in Path("run").iterdir()} == {
        "recipe.yaml", "coverage.json", "adapter", "checkpoints", "metrics.jsonl", "finished.json", "provenance.json",
        ".lock",
    }  # fmt: skip
    held = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"}
    assert held <= {path.name for path in Path("run/adapter").iterdir()}
    assert [path.name for path in sorted(Path("run/checkpoints").iterdir())] == ["step-000002", "step-000004"]


def test_every_step_has_its_metrics(here: Path) -> None:
    entries = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4], "whatever log_every"
    for entry in entries:
        assert set(entry) == METRICS | ({"eval_loss"} if entry["step"] % 2 == 0 else set())
        assert all(isinstance(value, int | float) and value > 0 for value in entry.values() if value != 0)
    rates = [entry["learning_rate"] for entry in entries]
    assert rates == sorted(rates, reverse=True), "cosine"


def test_the_saved_recipe_is_the_one_that_trained(here: Path) -> None:
    text = Path("run/recipe.yaml").read_text()
    assert load_recipe("run/recipe.yaml") == load_recipe("recipe.yaml")
    assert re.search(r"^# versions: .*torch \d", text, re.MULTILINE)
    assert re.search(r"^# data: sha256 [0-9a-f]{64}$", text, re.MULTILINE)
    assert yaml.safe_load(text) == yaml.safe_load(recipe_to_yaml(load_recipe("recipe.yaml")))


def test_coverage_is_the_table(here: Path) -> None:
    coverage = json.loads(Path("run/coverage.json").read_text())
    assert coverage["lines"] == ["linears 14/14 nf4", "adapted 14/14"]
    assert coverage["claimed"] == 14
    assert {kind["name"] for kind in coverage["kinds"]} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert all(kind["layers"] == kind["quantized"] == kind["adapted"] == 2 for kind in coverage["kinds"])
    assert coverage["adapter_parameters"] == sum(kind["adapter_parameters"] for kind in coverage["kinds"])


def test_no_secret_is_written_or_printed(trained: tuple[Path, str, str]) -> None:
    folder, out, err = trained
    written = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert len(written) > 20
    for secret in SECRETS.values():
        assert secret not in out + err
        assert not [path for path, content in written.items() if secret.encode() in content]


def test_a_tracker_writes_no_secret(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from tests.training.processes import fork, wait

    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    write_recipe(work, tracking__to=["wandb"])
    # A process of its own: wandb leaves a service behind that ends with it.
    child = fork(lambda: _run(["train", "recipe.yaml"]), work / "log")
    assert wait(child) == 0, (work / "log").read_text()
    assert list(work.glob("run/wandb/offline-run-*/run-*.wandb")), "WANDB_MODE is offline for every test"
    written = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    for secret in SECRETS.values():
        assert not [path for path, content in written.items() if secret.encode() in content]


def test_quiet_prints_nothing(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert _run(["train", "recipe.yaml", "--quiet"]) == 0
    assert capfd.readouterr() == ("", "")
    assert (work / "run/adapter").is_dir()


def test_a_finished_run_says_so(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert _run(["train", "recipe.yaml", "--resume"]) == 0
    out, err = capfd.readouterr()
    assert out.splitlines()[-1] == f"already finished: {STEPS} steps, the adapter is in run/adapter"
    assert err == ""


def test_generate_answers_with_the_adapter_and_without(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def answer(*options: str) -> str:
        assert _run(["generate", "run", "Say 3 things.", "--max-new-tokens", "12", *options]) == 0
        out, err = capfd.readouterr()
        assert err == ""
        return out

    adapted, plain = answer(), answer("--without-adapter")
    assert adapted.strip()
    assert plain.strip()
    assert adapted != plain
    assert adapted == answer(), "greedy"
    assert answer("--system", "Be brief.") != adapted
    assert _run(["generate", "run/checkpoints/step-000002", "Say 3 things.", "--max-new-tokens", "12"]) == 0
    assert capfd.readouterr().out != plain


def test_chat_takes_turns(here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    said = [
        "Say 3 things.",
        "",
        "/base",
        "/new",
        "Say 3 things.",
        "/adapter",
        "/new",
        "Say 3 things.",
        "/quit",
        "unheard",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in said)))
    assert _run(["chat", "run", "--quiet", "--max-new-tokens", "12"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    adapted, plain, again = answers_of(out)
    assert adapted == again
    assert adapted != plain
    assert sys.stdin.read() == "unheard\n", "/quit left at once"


def answers_of(out: str) -> list[str]:
    """The answers of three equal questions, however many lines each has."""
    lines = out.splitlines()
    assert len(lines) >= 3
    assert len(lines) == 3, "an answer with a line break: ask something else"
    return lines


def test_chat_ends_with_its_input(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Say 3 things.\nSay 4 things.\n"))
    assert _run(["chat", "run", "--max-new-tokens", "8", "--without-adapter"]) == 0
    out, _ = capfd.readouterr()
    assert out.startswith("Write a message")


def test_recipes_lists_prints_and_copies(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert _run(["recipes"]) == 0
    listed = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(shipped_recipes())
    assert all(len(line.split()) > 3 for line in listed), "each has a description"
    assert _run(["recipes", "quickstart"]) == 0
    printed = capfd.readouterr().out
    assert yaml.safe_load(printed)["model"]["base"]
    assert _run(["recipes", "quickstart", "--copy"]) == 0
    assert Path("quickstart.yaml").read_text() == printed
    assert "tune train quickstart.yaml" in capfd.readouterr().out
    assert _run(["recipes", "--schema"]) == 0
    assert json.loads(capfd.readouterr().out)["$defs"]["Adapter"]["properties"]["rank"]["default"] == 16


def test_python_trains_without_a_word(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from tune import load_recipe, train

    result = train(load_recipe("recipe.yaml", ["output=by-hand"]))
    assert capfd.readouterr() == ("", "")
    assert result.steps == 2
    assert result.adapter == Path("by-hand/adapter")
    assert (result.adapter / "adapter_model.safetensors").is_file()
    assert result.loss_after < result.loss_before
    assert not result.already


def test_no_arguments_show_the_help(capfd: pytest.CaptureFixture[str]) -> None:
    _run([])
    out, err = capfd.readouterr()
    assert "Usage: tune" in out + err
    assert _run(["--version"]) == 0
    assert re.fullmatch(r"tune \d+\.\d+\.\d+\n", capfd.readouterr().out)


def test_a_reader_that_leaves_ends_it_quietly(here: Path) -> None:
    from tests.training.processes import fork, wait

    reading, writing = os.pipe()
    os.close(reading)

    def work() -> int:
        os.dup2(writing, 1)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  the child's own
        return _run(["preview", "recipe.yaml", "-n", "3"])

    log = here / "log"
    log.unlink(missing_ok=True)
    child = fork(lambda: work(), log)
    os.close(writing)
    assert wait(child) == 0, log.read_text()
    assert "Traceback" not in log.read_text()
