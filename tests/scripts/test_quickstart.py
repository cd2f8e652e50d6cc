"""scripts/quickstart, with a recorder in place of .venv's Python: what it starts, with which arguments and where."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
RECORDER = """#!/bin/sh
[ "$1" = -c ] && exit 0
echo "$* | offline=${HF_HUB_OFFLINE:-} home=$HOME venv=${VIRTUAL_ENV:-} path=${PYTHONPATH:-}" >> calls.txt
case "$*" in *"tune train"*) exit "${TRAIN_EXIT:-0}" ;; esac
"""


class Clone:
    """A copy of the scripts whose .venv is already stamped and whose Python only writes down how it is called."""

    def __init__(self, root: Path, environment: ModuleType) -> None:
        self.root = root
        self.variables = {"PATH": os.environ["PATH"], "HOME": str(root), "PYTHON": sys.executable}
        (root / "scripts").mkdir()
        for name in ("quickstart", "environment.sh", "environment.py"):
            shutil.copy(SCRIPTS / name, root / "scripts" / name)
        for name in ("pyproject.toml", "constraints.txt"):
            (root / name).write_text("")
        python = root / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(RECORDER)
        python.chmod(0o755)
        environment.write_stamp(root, "base")

    def quickstart(
        self, *arguments: str, cwd: Path | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.root / "scripts" / "quickstart"), *arguments],
            env=self.variables | variables, cwd=cwd or self.root, capture_output=True, text=True, timeout=30,
        )  # fmt: skip

    @property
    def calls(self) -> list[str]:
        path = self.root / "calls.txt"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def clone(tmp_path: Path, load_script: Callable[[str], ModuleType]) -> Clone:
    root = tmp_path / "a clone"
    root.mkdir()
    return Clone(root, load_script("environment"))


def test_help_needs_nothing_and_names_the_option(clone: Clone) -> None:
    done = clone.quickstart("--help")
    assert done.returncode == 0
    assert "--base MODEL" in done.stdout
    assert clone.calls == []


@pytest.mark.parametrize("arguments", [("--bas",), ("--base",), ("--base=",), ("--base", "no such thing")])
def test_wrong_arguments_exit_2_before_anything_starts(clone: Clone, arguments: tuple[str, ...]) -> None:
    done = clone.quickstart(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("quickstart: ")
    assert clone.calls == []


def test_makes_the_model_trains_compares_and_merges_offline(clone: Clone) -> None:
    done = clone.quickstart(VIRTUAL_ENV="/elsewhere", PYTHONPATH="/elsewhere")
    assert done.returncode == 0, done.stderr
    assert [call.split(" | ")[0] for call in clone.calls] == [
        "scripts/smollm2.py",
        "-m tune train recipes/quickstart.yaml",
        "scripts/compare_answers.py runs/quickstart data/quickstart-prompts.txt",
        "-m tune merge runs/quickstart",
    ]
    assert all(call.endswith(f"offline=1 home={clone.root} venv= path=") for call in clone.calls)
    assert ".venv/bin/tune chat runs/quickstart" in done.stdout
    assert "runs/quickstart/adapter" in done.stdout
    assert "runs/quickstart/merged" in done.stdout


def test_second_run_resumes(clone: Clone) -> None:
    (clone.root / "runs" / "quickstart").mkdir(parents=True)
    done = clone.quickstart()
    assert clone.calls[1].startswith("-m tune train recipes/quickstart.yaml --resume ")
    assert "going on with it" in done.stdout


@pytest.mark.parametrize("unproven", [False, True])
def test_a_proven_merge_is_kept_and_an_unproven_one_is_not_passed_over(clone: Clone, unproven: bool) -> None:
    merged = clone.root / "runs" / "quickstart" / "merged"
    merged.mkdir(parents=True)
    (merged / "merge-proof.json").write_text("{}")
    if unproven:
        (merged / "UNPROVEN").write_text("")
    done = clone.quickstart()
    assert any("tune merge" in call for call in clone.calls) == unproven
    assert ("is there already, with its proof" in done.stdout) != unproven


def test_failed_training_ends_with_its_exit_code_and_no_answers(clone: Clone) -> None:
    done = clone.quickstart(TRAIN_EXIT="3")
    assert done.returncode == 3
    assert "-m tune train" in clone.calls[-1]
    assert "Done in" not in done.stdout


def test_hub_base_is_allowed_the_network_and_gets_its_own_run(clone: Clone) -> None:
    done = clone.quickstart("--base=someone/Some-Model-1.0")
    assert done.returncode == 0, done.stderr
    assert clone.calls[0].startswith(
        "-m tune train recipes/quickstart.yaml model.base=someone/Some-Model-1.0 "
        "output=runs/quickstart-Some-Model-1.0 data.template=auto | offline= "
    )
    assert "scripts/compare_answers.py runs/quickstart-Some-Model-1.0" in clone.calls[1]


def test_folder_base_is_meant_from_where_the_caller_stands(clone: Clone, tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "model").mkdir(parents=True)
    clone.quickstart("--base", "model", cwd=tmp_path / "elsewhere")
    assert (
        f"model.base={tmp_path / 'elsewhere' / 'model'} output=runs/quickstart-model data.template=auto | offline=1"
        in clone.calls[0]
    )


@pytest.mark.parametrize("home", ["", "/nonexistent/home"])
def test_without_a_home_caches_stay_in_the_environment(clone: Clone, home: str) -> None:
    done = clone.quickstart(HOME=home)
    assert done.returncode == 0, done.stderr
    assert f"home={clone.root / '.venv' / 'home'}" in clone.calls[0]
    assert (clone.root / ".venv" / "home").is_dir()


def test_an_old_python_is_said_with_the_remedy(clone: Clone) -> None:
    old = clone.root / "python-old"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && { echo Python 3.9.2; exit 0; }\nexit 1\n')
    old.chmod(0o755)
    done = clone.quickstart(PYTHON=str(old))
    assert done.returncode == 2
    assert "3.11 or newer is needed (found: Python 3.9.2)" in done.stderr
    assert clone.calls == []
