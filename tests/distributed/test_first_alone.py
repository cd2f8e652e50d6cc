"""What one process does for all: any of them tokenises, and the first prints and writes."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import FSDP, launch, logs, start_work
from tests.training.jobs import tiny_recipe
from tests.training.processes import wait
from tune.cli.main import _run
from tune.data.cache import Cache, Fill
from tune.errors import DataError
from tune.evaluation.loss import rows_of
from tune.training import trainer

SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def note(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line + "\n")


def encoding(monkeypatch: pytest.MonkeyPatch, then: Callable[[], None]) -> None:
    """Call `then` wherever a process is about to encode a source."""
    plain = Cache.fill

    def fill(self: Cache, key: str, work: Fill, where: Any) -> Any:
        def noted(writer: Any) -> Any:
            then()
            return work(writer)

        return plain(self, key, noted, where)

    monkeypatch.setattr(Cache, "fill", fill)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=SLOW)])
def test_one_process_tokenises_and_the_others_wait(
    count: int, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has the same rows after that, whoever encoded them."""

    def slowly() -> None:
        note(tmp_path / "encoded", os.environ["RANK"])
        time.sleep(1)

    encoding(monkeypatch, slowly)
    plain = trainer.Trainer.__init__

    def init(self: trainer.Trainer, job: trainer.Job, *rest: Any) -> None:
        read = hashlib.sha256()
        for part in (job.train, job.held_out):
            assert part is not None
            for row in rows_of(part, range(len(part)), 1, False, job.devices.device):
                read.update(row.ids_1T.numpy().tobytes() + row.predict_at_N.numpy().tobytes())
        note(tmp_path / "read", f"{job.data_fingerprint} {read.hexdigest()}")
        plain(self, job, *rest)

    monkeypatch.setattr(trainer.Trainer, "__init__", init)
    tiny_recipe(tmp_path, data__eval=[str(tmp_path / "eval.jsonl")], train__max_steps=1)
    log = tmp_path / "log"
    assert launch(["train", str(tmp_path / "recipe.yaml")], count, log) == [0] * count, logs(log, count)
    assert len((tmp_path / "encoded").read_text().splitlines()) == 2, "each of two sources once"
    read = (tmp_path / "read").read_text().splitlines()
    assert len(read) == count
    assert len(set(read)) == 1
    assert not list((cache / "data").glob("*.lock"))
    assert not list((cache / "data").glob(".writing-*"))


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=SLOW)])
def test_a_bad_row_ends_all_with_one_message(count: int, tmp_path: Path) -> None:
    tiny_recipe(tmp_path)
    rows = (tmp_path / "train.jsonl").read_text().splitlines()
    rows[6] = json.dumps({"instruction": "Say it.", "input": "", "output": 7})
    (tmp_path / "train.jsonl").write_text("\n".join(rows) + "\n")
    log = tmp_path / "log"
    assert launch(["train", str(tmp_path / "recipe.yaml"), "--quiet"], count, log) == [2] * count, logs(log, count)
    said = logs(log, count)
    assert said.count("train.jsonl:7") == 1, said
    assert "Traceback" not in said


def test_a_process_whose_encoder_fails_ends_all_with_its_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next to have its turn encodes in its place, and is told at the next meeting."""

    def fails() -> None:
        note(tmp_path / "encoded", os.environ["RANK"])
        if len((tmp_path / "encoded").read_text().splitlines()) == 1:
            raise DataError("train.jsonl: the disk it lies on is gone. Mend it.")

    encoding(monkeypatch, fails)
    tiny_recipe(tmp_path)
    log = tmp_path / "log"
    assert launch(["train", str(tmp_path / "recipe.yaml"), "--quiet"], 3, log) == [2, 2, 2], logs(log, 3)
    assert [line for line in logs(log, 3).splitlines() if line] == [
        "train.jsonl: the disk it lies on is gone. Mend it."
    ]
    assert len((tmp_path / "encoded").read_text().splitlines()) == 2


WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree")


def told_of_writes(told: int) -> None:
    """From here on, write down every path that this process creates, opens to write to, renames or removes."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            if not isinstance(path, int) and (
                flags & WRITES if isinstance(flags, int) else mode and set(mode) & set("wax+")
            ):
                os.write(told, f"{os.fsdecode(path)}\n".encode())
        elif event in CHANGES and isinstance(arguments[0], str | bytes | os.PathLike):
            os.write(told, f"{os.fsdecode(arguments[0])}\n".encode())

    sys.addaudithook(hook)


@pytest.mark.parametrize("environment", [{}, pytest.param(FSDP, marks=SLOW)], ids=["whole", "sharded"])
def test_only_the_first_process_prints_and_writes(environment: dict[str, str], cache: Path, tmp_path: Path) -> None:
    """With checkpoints, evaluations, a best adapter, and a second start that resumes."""
    changes: dict[str, Any] = {"train__eval_every": 2, "train__save_every": 2, "train__max_steps": 4}
    tiny_recipe(tmp_path, data__eval=[str(tmp_path / "eval.jsonl")], **changes)

    def work(rank: int) -> int:
        told_of_writes(os.open(tmp_path / f"told.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND))
        return _run(["train", str(tmp_path / "recipe.yaml")]) or _run(
            ["train", str(tmp_path / "recipe.yaml"), "train.max_steps=6", "--resume"]
        )

    children = start_work(work, 2, tmp_path / "log", environment)
    assert [wait(child) for child in children] == [0, 0], logs(tmp_path / "log", 2)
    assert "step" in (tmp_path / "log.0").read_text()
    assert (tmp_path / "log.1").read_text() == ""
    first, second = (set((tmp_path / f"told.{rank}").read_text().splitlines()) for rank in range(2))
    assert any(path.startswith(str(tmp_path / "run" / "checkpoints")) for path in first), "the hook hears nothing"
    elsewhere = [path for path in second if not path.startswith(str(cache)) and path != os.devnull]
    assert elsewhere == []
