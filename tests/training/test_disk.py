"""Disks that are full, read-only or gone while a run trains: one message, exit 2, and the last checkpoint as it was."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.training.jobs import tiny_recipe
from tests.training.processes import fork, wait
from tune.cli.main import _run
from tune.folder import RunFolder, whole
from tune.run import train
from tune.training import trainer

SLOW = pytest.mark.slow
STEPS = {"train__max_steps": 6, "train__save_every": 2, "adapter__rank": 16}


def adapter(run: RunFolder) -> bytes:
    return (run.adapter / "adapter_model.safetensors").read_bytes()


def arguments(folder: Path, *more: str) -> list[str]:
    return ["train", str(folder / "recipe.yaml"), "--quiet", *more]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("sound")
    train(tiny_recipe(folder, **STEPS))
    return folder


@pytest.fixture
def job(sound: Path, tmp_path: Path) -> Callable[..., RunFolder]:
    """Write the recipe of the same run, with another output."""

    def write(output: Path, **changes: Any) -> RunFolder:
        data = {"data__train": str(sound / "train.jsonl"), "base": sound / "base"}
        tiny_recipe(tmp_path, output=output, **{**STEPS, **data, **changes})
        return RunFolder(output)

    return write


def mount(*arguments: str) -> None:
    """Mount a file system, or skip the test where that is not permitted."""
    if not shutil.which("mount"):
        pytest.skip("there is no mount command")
    made = subprocess.run(["mount", *arguments], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("this process may not mount a file system")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder to mount on; what is mounted there goes with the test."""
    folder = tmp_path / "disk"
    folder.mkdir()
    yield folder
    # os.path.ismount does not see a folder that is mounted elsewhere on the same disk.
    while str(folder) in Path("/proc/mounts").read_text():
        subprocess.run(["umount", "-l", str(folder)], check=True)


def one_line(said: str) -> str:
    """The only line that was printed."""
    assert said.count("\n") == 1, said
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize(
    ("number", "words"),
    [
        pytest.param(errno.ENOSPC, "no space left on the device", marks=SLOW),
        pytest.param(errno.EDQUOT, "the disk quota is used up", marks=SLOW),
        pytest.param(errno.EROFS, "the file system is read-only", marks=SLOW),
        pytest.param(errno.EACCES, "no permission to write", marks=SLOW),
        (errno.EIO, "the device reports an input/output error"),
        (errno.ESTALE, "the network file system has gone"),
        pytest.param(errno.ENOTCONN, "the file system has gone", marks=SLOW),
        pytest.param(errno.ENODEV, "the device has gone", marks=SLOW),
    ],
)
def test_an_error_of_the_disk_at_a_checkpoint(
    job: Callable[..., RunFolder], sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any,
    number: int, words: str,
) -> None:  # fmt: skip
    run, flush = job(tmp_path / "run"), os.fsync

    def failing(descriptor: int) -> None:
        if run.steps() == [2, 4] and list(run.checkpoints.glob(".unfinished-*")):
            raise OSError(number, os.strerror(number))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    assert _run(arguments(tmp_path)) == 2
    said = one_line(capfd.readouterr().err)
    assert words in said
    assert f"go on with --resume (the last whole checkpoint is {run.checkpoint(4)})." in said
    assert run.steps() == [2, 4]
    assert whole(run.checkpoint(4))
    assert not list(run.root.rglob(".unfinished-*"))
    monkeypatch.undo()
    assert _run(arguments(tmp_path, "--resume")) == 0
    assert adapter(run) == adapter(RunFolder(sound / "run"))


@pytest.mark.parametrize("kilobytes", [120, 560, *(pytest.param(size, marks=SLOW) for size in (8, 32, 280, 420, 660))])
def test_a_disk_that_is_full_sooner_or_later(
    job: Callable[..., RunFolder], sound: Path, tmp_path: Path, place: Path, capfd: Any, kilobytes: int
) -> None:
    """Each size ends it elsewhere: at the recipe, a checkpoint, the adapter. With space again it ends the same."""
    mount("-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place))
    run = job(place / "run")
    assert _run(arguments(tmp_path)) == 2
    said = one_line(capfd.readouterr().err)
    assert "no space left on the device. Free some" in said
    assert all(whole(run.checkpoint(step)) for step in run.steps())
    assert not run.finished.exists()
    assert not list(place.rglob(".unfinished-*"))
    subprocess.run(["mount", "-o", "remount,size=20m", str(place)], check=True)
    assert _run(arguments(tmp_path, "--resume")) == 0
    assert adapter(run) == adapter(RunFolder(sound / "run"))


def test_metrics_that_cannot_be_written(
    job: Callable[..., RunFolder], sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """The disk is full at a line of metrics.jsonl, between two checkpoints."""
    run, plain, steps = job(tmp_path / "run"), trainer.train_step, 0

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 4:  # the log's own descriptor now leads to a device that is always full
            (number,) = [n for n in os.listdir("/proc/self/fd") if links_to(n, run.metrics)]
            full = os.open("/dev/full", os.O_WRONLY)
            os.dup2(full, int(number))
            os.close(full)
        return plain(*args, **kwargs)

    monkeypatch.setattr(trainer, "train_step", step)
    assert _run(arguments(tmp_path)) == 2
    said = one_line(capfd.readouterr().err)
    assert said == f"{run.metrics}: no space left on the device. Free some, then go on with --resume.\n"
    assert run.steps() == [2]
    monkeypatch.undo()
    assert _run(arguments(tmp_path, "--resume")) == 0
    assert adapter(run) == adapter(RunFolder(sound / "run"))
    assert len(run.metrics.read_text().splitlines()) == 6


def links_to(number: str, file: Path) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{number}") == str(file.resolve())
    except OSError:  # that of the listing itself
        return False


def test_a_limit_on_the_size_of_files(job: Callable[..., RunFolder], sound: Path, tmp_path: Path) -> None:
    run = job(tmp_path / "run")

    def limited() -> int:
        plain = trainer.save_checkpoint

        def save(*args: Any) -> None:
            if run.steps():
                resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
            plain(*args)

        trainer.save_checkpoint = save  # type: ignore[attr-defined]
        return _run(arguments(tmp_path))

    assert wait(fork(limited, tmp_path / "log")) == 2
    said = one_line((tmp_path / "log").read_text())
    assert "no file here may be that large. Raise the limit (`ulimit -f`), then go on with --resume" in said
    assert run.steps() == [2]
    assert _run(arguments(tmp_path, "--resume")) == 0
    assert adapter(run) == adapter(RunFolder(sound / "run"))


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, work: Callable[[], object]) -> None:
    """Do `work` before step `number`, counted from 1."""
    plain, steps = trainer.train_step, 0

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == number:
            work()
        return plain(*args, **kwargs)

    monkeypatch.setattr(trainer, "train_step", step)


@pytest.mark.parametrize("number", [4, pytest.param(6, marks=SLOW)], ids=["before a checkpoint", "before the last"])
def test_a_disk_that_is_no_longer_mounted(
    job: Callable[..., RunFolder], sound: Path, tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: Any, number: int,
) -> None:  # fmt: skip
    """Nothing is written into the empty folder that it was mounted on; mounted again, the run goes on."""
    (tmp_path / "store").mkdir()
    mount("--bind", str(tmp_path / "store"), str(place))
    run = job(place / "run")
    at_step(monkeypatch, number, lambda: subprocess.run(["umount", "-l", str(place)], check=True))
    assert _run(arguments(tmp_path)) == 2
    said = one_line(capfd.readouterr().err)
    assert f"{run.root}: the run's folder has gone while it trained" in said
    assert "its disk was unmounted" in said
    assert list(place.iterdir()) == []
    monkeypatch.undo()
    mount("--bind", str(tmp_path / "store"), str(place))
    assert run.steps() == ([2] if number == 4 else [2, 4])
    assert _run(arguments(tmp_path, "--resume")) == 0
    assert adapter(run) == adapter(RunFolder(sound / "run"))


def test_a_folder_that_was_removed_is_not_made_again(
    job: Callable[..., RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    run = job(tmp_path / "run")
    at_step(monkeypatch, 4, lambda: shutil.rmtree(run.root))
    assert _run(arguments(tmp_path)) == 2
    assert "it was removed" in one_line(capfd.readouterr().err)
    assert not run.root.exists()


def test_an_output_on_a_read_only_disk_is_refused_before_anything_is_read(
    job: Callable[..., RunFolder], tmp_path: Path, place: Path, capfd: Any
) -> None:
    mount("-t", "tmpfs", "-o", "size=1m,ro", "tmpfs", str(place))
    job(place / "run")
    assert _run(arguments(tmp_path)) == 2
    assert "the file system is read-only. Change the recipe's output" in one_line(capfd.readouterr().err)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("both", [False, True], ids=["stdout", "stdout and stderr"])
def test_a_log_on_a_full_disk(job: Callable[..., RunFolder], sound: Path, tmp_path: Path, both: bool) -> None:
    """The run's own lines cannot be written, its folder can: exit 2, and what is said is of the log."""
    run = job(tmp_path / "run", train__log_every=1)
    line = [sys.executable, "-m", "tune", "train", str(tmp_path / "recipe.yaml")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(line, stdout=full, stderr=full if both else subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    if not both:
        assert done.stderr == "standard output: no space left on the device. Free some, then go on with --resume.\n"
    assert not run.finished.exists()
    assert _run(arguments(tmp_path, "--resume")) == 0
    assert adapter(run) == adapter(RunFolder(sound / "run"))
