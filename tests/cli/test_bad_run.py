"""Run folders, disks, machines and launchers that do not allow it: nothing that was trained is lost."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import write_recipe
from tests.cli.mistakes import TRAIN, Mistake, assert_refused, change_json, cut_in_half, files, mistake, remove, write
from tune.cli.main import _run
from tune.folder import RunFolder, whole

RESUME = (*TRAIN, "--resume")
GENERATE = ("generate", "run", "hi")

PLACES = [
    mistake("a file in the way", "run: a file is in the way", prepare=write("run", "mine")),
    mistake("under a file", "train.jsonl/run", "is a file, not a folder", output="train.jsonl/run"),
    mistake(
        "other files there", "run: holds files that are no run (notes.txt)", prepare=write("run/notes.txt", "mine")
    ),
    mistake("no folder possible", "/proc/no-run", "output", output="/proc/no-run"),
    mistake("name too long", "the name is too long", output="r" * 300),
    mistake(
        "tracker not installed",
        "tracking.to: trackio is not installed",
        "`pip install trackio`",
        tracking__to=["trackio"],
    ),
    mistake("optimizer of a GPU", "paged_adamw_8bit", "adamw_8bit", train__optimizer="paged_adamw_8bit"),
    mistake("no run", "runs/nothing: no such run", arguments=("generate", "runs/nothing", "hi")),
    mistake("not a run", "base: not a run folder", "recipe.yaml", arguments=("generate", "base", "hi")),
    mistake("empty prompt", "PROMPT is empty", arguments=("generate", "run", "  ")),
    mistake("nobody to talk to", "runs/nothing: no such run", arguments=("chat", "runs/nothing")),
    mistake("talk to a base", "base: not a run folder", arguments=("chat", "base")),
]

RUNS = [
    mistake("there already", "run: a run is already here", "--resume"),
    mistake(
        "resumed with another recipe",
        "learning_rate cannot change",
        "(was 0.01, is 0.02)",
        arguments=RESUME,
        train__learning_rate=0.02,
    ),
    mistake(
        "resumed and shortened", "train.max_steps may only grow", "(was 2, is 1)", arguments=RESUME, train__max_steps=1
    ),
    mistake(
        "resumed with a broken finished.json",
        "run/finished.json: cannot be read",
        "Remove it",
        arguments=RESUME,
        prepare=write("run/finished.json", "{"),
    ),
    mistake(
        "resumed with a foreign finished.json",
        "run/finished.json",
        "Remove it",
        arguments=RESUME,
        prepare=write("run/finished.json", "{}"),
    ),
    mistake(
        "resumed with a broken recipe", "run/recipe.yaml:1", arguments=RESUME, prepare=write("run/recipe.yaml", "{")
    ),
    mistake("name misspelt", "rnu: no such run", "Did you mean 'run'?", arguments=("generate", "rnu", "hi")),
    mistake(
        "checkpoint misspelt",
        "step-000009",
        "Did you mean 'step-000002'?",
        arguments=("generate", "run/checkpoints/step-000009", "hi"),
    ),
    mistake(
        "without an adapter yet",
        "run: this run has no adapter",
        "--resume",
        arguments=GENERATE,
        prepare=lambda work: [shutil.rmtree(work / "run" / name) for name in ("adapter", "checkpoints")],
    ),
    mistake(
        "adapter cut",
        "run/adapter: the adapter cannot be read",
        arguments=GENERATE,
        prepare=cut_in_half("run/adapter/adapter_model.safetensors"),
    ),
    mistake(
        "adapter without config",
        "run/adapter: holds no adapter_config.json",
        arguments=GENERATE,
        prepare=remove("run/adapter/adapter_config.json"),
    ),
    mistake(
        "adapter of another rank",
        "its r is 5",
        arguments=("chat", "run", "--quiet"),
        prepare=change_json("run/adapter/adapter_config.json", r=5),
    ),
    mistake(
        "base gone",
        "model.base: base does not exist",
        arguments=GENERATE,
        prepare=lambda work: shutil.rmtree(work / "base"),
    ),
]


@pytest.mark.parametrize("wrong", PLACES)
def test_refused(wrong: Mistake, work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert_refused(wrong, work, capfd)


@pytest.mark.parametrize("wrong", RUNS)
def test_an_existing_run_keeps_every_byte(
    wrong: Mistake, work: Path, finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished / "run", work / "run")
    assert_refused(wrong, work, capfd)


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "asks for DeepSpeed"),
        ("WORLD_SIZE", "2", "WORLD_SIZE=2, accelerate counts 1"),
        ("WORLD_SIZE", "two", "WORLD_SIZE=two"),
    ],
)
def test_a_launcher_that_asks_for_something_else(
    variable: str,
    value: str,
    words: str,
    work: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(variable, value)
    assert_refused(mistake("launcher", words, "--multi_gpu").values[0], work, capfd)
    assert not (work / "run").exists()


def test_a_tracker_that_does_not_let_in(
    work: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking = pytest.importorskip("accelerate.tracking")
    pytest.importorskip("wandb")

    def start(tracker: object) -> None:
        raise ConnectionError("no API key configured.\nSee the manual.")

    monkeypatch.setattr(tracking.WandBTracker, "start", start)
    write_recipe(work, tracking__to=["wandb"])
    assert _run([*TRAIN, "--quiet"]) == 2
    assert capfd.readouterr() == (
        "",
        "tracking.to: wandb does not start (no API key configured. See the manual). "
        "Log in to it or remove it, then go on with --resume.\n",
    )
    assert _run([*RESUME, "tracking.to=none", "--quiet"]) == 0
    assert (work / "run/adapter").is_dir()


def test_a_base_of_nan_ends_without_an_adapter(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    weights = work / "base/model.safetensors"
    tensors = {name: tensor * float("nan") for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    for steps, words in ((2, "no step had a finite one"), (5, "3 steps in a row")):
        write_recipe(work, train__max_steps=steps, output=f"run-{steps}")
        assert _run([*TRAIN, "--quiet"]) == 3
        out, err = capfd.readouterr()
        assert out == ""
        assert "the loss diverged" in err
        assert words in err
        assert not (work / f"run-{steps}/adapter").exists()
        assert not (work / f"run-{steps}/finished.json").exists()


def interrupted_by_a_full_disk(run: RunFolder, err: str) -> None:
    """What must be true after the disk was full at the second checkpoint."""
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    assert "no space left" in err
    assert f"the last whole checkpoint is {run.checkpoint(1)}" in err
    assert "--resume" in err
    assert run.steps() == [1]
    assert whole(run.checkpoint(1))
    assert not run.adapter.exists()
    assert not run.finished.exists()


def test_no_space_at_the_second_checkpoint(
    work: Path, finished: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recipe(work, train__save_every=1)
    run, flush = RunFolder(Path("run")), os.fsync

    def full(descriptor: int) -> None:
        if run.steps() and list(run.checkpoints.glob(".unfinished-*")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert _run([*TRAIN, "--quiet"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    interrupted_by_a_full_disk(run, err)
    assert _run([*RESUME, "--quiet"]) == 0
    adapters = [folder / "run/adapter/adapter_model.safetensors" for folder in (work, finished)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes(), "it did not end where it would have ended"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that holds one checkpoint and not two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not shutil.which("mount"):
        pytest.skip("there is no mount command")
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("this process may not mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_small_disk(work: Path, small_disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(small_disk / "run")
    write_recipe(work, train__save_every=1, adapter__rank=16, output=str(run.root))
    assert _run([*TRAIN, "--quiet"]) == 2
    interrupted_by_a_full_disk(run, capfd.readouterr().err)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_of_somebody_else(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (work / "runs").mkdir(mode=0o555)
    assert_refused(mistake("no permission", "no permission to write", output="runs/run").values[0], work, capfd)


def test_a_read_only_disk(work: Path, small_disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    wrong = mistake("read-only", str(small_disk), "the file system is read-only", output=str(small_disk / "run"))
    assert_refused(wrong.values[0], work, capfd)
    assert files(small_disk) == {}
