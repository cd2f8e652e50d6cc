"""scripts/environment.py: when is something installed, and when not. pip and venv are replaced by recorders."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    (tmp_path / "constraints.txt").write_text("torch==1\n")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def environment(load_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, root: Path) -> ModuleType:
    module = load_script("environment")
    monkeypatch.setattr(module, "works", lambda python: True)
    return module


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that were started; each succeeds."""
    started: list[list[str]] = []

    def record(command: list[str], **_: object) -> SimpleNamespace:
        started.append(command)
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", record)
    return started


def test_second_time_nothing_is_installed(environment: ModuleType, root: Path, commands: list[list[str]]) -> None:
    environment.prepare(root, "base")
    assert len(commands) == 1
    assert commands[0][-5:] == ["-c", "constraints.txt", "-e", ".", "gguf"]
    environment.prepare(root, "base")
    assert len(commands) == 1


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_files_install_again(environment: ModuleType, root: Path, commands: list[list[str]], name: str) -> None:
    environment.prepare(root, "base")
    with (root / name).open("a") as file:
        file.write("# changed\n")
    environment.prepare(root, "base")
    assert [command[2] for command in commands] == ["pip", "pip"]


def test_test_kind_includes_base_but_not_the_reverse(
    environment: ModuleType, root: Path, commands: list[list[str]]
) -> None:
    environment.prepare(root, "base")
    environment.prepare(root, "test")
    assert commands[1][-2:] == ["-e", ".[test]"]
    environment.prepare(root, "base")
    environment.prepare(root, "test")
    assert len(commands) == 2


def test_failed_installation_leaves_no_stamp(
    environment: ModuleType, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment.write_stamp(root, "base")
    monkeypatch.setattr(subprocess, "run", lambda command, **_: SimpleNamespace(returncode=1))
    with pytest.raises(environment.Refused, match="exit code 1"):
        environment.prepare(root, "test")
    assert not environment.is_installed(root, "base")


def test_moved_clone_gets_a_new_environment(environment: ModuleType, root: Path, commands: list[list[str]]) -> None:
    environment.prepare(root, "base")
    moved = root.parent / f"{root.name}-moved"
    root.rename(moved)
    environment.prepare(moved, "base")
    assert commands[1][1:4] == ["-m", "venv", "--clear"]
    assert commands[2][2] == "pip"


def test_broken_python_gets_a_new_environment(
    environment: ModuleType, root: Path, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment.prepare(root, "base")
    monkeypatch.setattr(environment, "works", lambda python: False)
    (root / ".venv" / "installed.json").unlink()  # as `venv --clear` does
    environment.prepare(root, "base")
    assert [command[2] for command in commands] == ["pip", "venv", "pip"]


def test_missing_venv_module_is_named(environment: ModuleType, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = SimpleNamespace(returncode=1, stdout="", stderr="ensurepip is not\navailable")
    monkeypatch.setattr(subprocess, "run", lambda command, **_: failed)
    with pytest.raises(environment.Refused, match=r"ensurepip is not available.*-venv is needed"):
        environment.create(root)


def test_damaged_stamp_counts_as_none(environment: ModuleType, root: Path) -> None:
    (root / ".venv" / "installed.json").write_text("[half")
    assert environment.read_stamp(root) == {}
    assert not environment.is_installed(root, "base")


def test_works_asks_the_interpreter_itself(load_script: Callable[[str], ModuleType], root: Path) -> None:
    module = load_script("environment")
    python = root / ".venv" / "bin" / "python"
    assert not module.works(python)
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    assert not module.works(python)
    python.write_text("#!/bin/sh\nexit 0\n")
    assert module.works(python)


def test_unknown_kind_exits_2(environment: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert environment.main(["everything"]) == 2
    assert "everything" in capsys.readouterr().err
