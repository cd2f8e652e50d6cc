"""A merge killed at any moment and run again ends in the same bytes, and never looks finished before it is."""

from __future__ import annotations

import errno
import functools
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.export.merges import Made, change_json, change_tensors, files, made, weight_files
from tests.training.processes import fork, wait
from tune.errors import RunError, UntrustworthyError
from tune.export import merge as merging
from tune.export.merge import merge
from tune.progress import Progress

KILLS = 10


class Events(Progress):
    """What a merge does, one event after the other, and what happens at one of them."""

    def __init__(self, at: int | str | None = None, then: Callable[[], None] | None = None) -> None:
        self.names: list[str] = []
        self.at, self.then = at, then

    def event(self, name: str) -> None:
        self.names.append(name)
        if self.then is not None and self.at in (len(self.names) - 1, name):
            self.then()

    @contextmanager
    def phase(self, name: str) -> Iterator[Callable[[int, int], None]]:
        self.event(f"begin {name}")
        yield lambda done, total: self.event(name)
        self.event(f"end {name}")

    def listen(self) -> None:
        """Hear each file that gets its name, before and after, from now on in this process."""
        right = os.replace

        def replace(old: Any, new: Any) -> None:
            self.event(f"before {Path(new).name}")
            right(old, new)
            self.event(f"after {Path(new).name}")

        os.replace = replace  # type: ignore[assignment]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def merging_child(
    run: Made, out: Path, at: int | str, then: Callable[[], None] = die, base: str = "original", setup: Any = None
) -> int:
    """Merge in a child in which something happens at an event."""

    def work() -> None:
        events = Events(at, then)
        events.listen()
        if setup is not None:
            setup()
        merge(run.run.root, out, base, events)  # type: ignore[arg-type]

    return fork(work, run.root / "log")


def kill(run: Made, out: Path, at: int | str, **more: Any) -> None:
    """Merge until an event, and die there."""
    code = wait(merging_child(run, out, at, **more))
    assert code == -signal.SIGKILL, (run.root / "log").read_text()


@functools.cache
def whole() -> tuple[Made, dict[str, bytes], list[str]]:
    """A run on a base of several shards, its undisturbed merge, and what happened meanwhile."""
    run = made("llama", "bfloat16", True)
    out, log = run.root / "whole", run.root / "events.json"

    def work() -> None:
        events = Events()
        events.listen()
        merge(run.run.root, out, "original", events)
        log.write_text(json.dumps(events.names))

    assert wait(fork(work, run.root / "log")) == 0, (run.root / "log").read_text()
    return run, files(out), json.loads(log.read_text())


def event(name: str, which: int = 0) -> int:
    """The number of an event, by its name."""
    return [number for number, other in enumerate(whole()[2]) if other == name][which]


MOMENTS: list[tuple[str, int]] = [
    ("after journal.json", 0),
    ("merging", 1),
    ("before model-00001-of-", 0),
    ("after model-00002-of-", 0),
    ("merging", -4),
    ("before config.json", 0),
    ("after generation_config.json", 0),
    ("proving the weights", 7),
    ("proving the logits", 2),
    ("after merge-proof.json", 0),
]


def moment(prefix: str, which: int) -> int:
    return [number for number, name in enumerate(whole()[2]) if name.startswith(prefix)][which]


@pytest.mark.parametrize(("prefix", "which"), MOMENTS)
def test_a_merge_killed_at_a_moment_and_run_again_ends_in_the_same_bytes(
    tmp_path: Path, prefix: str, which: int
) -> None:
    run, expected, _ = whole()
    out = tmp_path / "out"
    kill(run, out, moment(prefix, which))
    assert {path.name for path in tmp_path.iterdir()} == {".merging-out"}, "nothing may look like a model"
    done = {path.name: path.stat().st_ino for path in weight_files(tmp_path / ".merging-out/model")}
    done = {name: node for name, node in done.items() if not name.startswith(".")}
    assert merge(run.run.root, out).proof.holds
    found = files(out)
    assert found == expected, [name for name in expected if found.get(name) != expected[name]]
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert {name: (out / name).stat().st_ino for name in done} == done, "a whole shard is not written again"


def test_the_moments_are_spread_over_the_merge() -> None:
    """Ten different ones, from the first file to the last; in some of them no shard, one, some and all are whole."""
    names = whole()[2]
    chosen = [moment(*pair) for pair in MOMENTS]
    assert len(set(chosen)) == KILLS
    shards = [sum(name.startswith("after model-0") for name in names[: number + 1]) for number in sorted(chosen)]
    total = len(weight_files(whole()[0].base))
    assert total >= 3
    assert {0, total} < set(shards)
    assert any(1 <= count < total for count in shards)


@pytest.mark.slow
def test_killed_again_and_again(tmp_path: Path) -> None:
    """At random times, each attempt going on after the last."""
    run, expected, _ = whole()
    out, moments = tmp_path / "out", random.Random(5)
    begun = time.monotonic()
    assert wait(merging_child(run, tmp_path / "clock", -1)) == 0
    window = time.monotonic() - begun
    kills = 0
    for _ in range(10 * KILLS):
        child = merging_child(run, out, -1)
        if kills < KILLS:
            time.sleep(moments.uniform(0, window))
            os.kill(child, signal.SIGKILL)
        code = wait(child)
        assert code in (0, -signal.SIGKILL), (run.root / "log").read_text()
        if kills >= KILLS:
            break
        kills += code != 0
        if out.exists():  # it came to its end before the kill did: begin again
            assert files(out) == expected
            shutil.rmtree(out)
    assert kills == KILLS
    assert files(out) == expected
    assert {path.name for path in tmp_path.iterdir()} == {"out", "clock"}


def test_a_kill_after_the_last_rename_leaves_a_whole_model(tmp_path: Path) -> None:
    run, expected, _ = whole()
    kill(run, tmp_path / "out", event("after whole"))
    assert files(tmp_path / "out") == expected
    with pytest.raises(RunError, match="holds a proven merge already"):
        merge(run.run.root, tmp_path / "out")


def test_another_adapter_after_a_kill_starts_afresh(tmp_path: Path) -> None:
    run = whole()[0].copy(tmp_path / "made")
    kill(run, tmp_path / "out", event("proving the logits"))
    change_tensors(run.adapter_file, lambda tensors: [tensor.mul_(0.5) for tensor in tensors.values()])
    change_json(run.run.finished, adapter_files=None)
    merge(run.run.root, tmp_path / "out")
    assert files(tmp_path / "out") == files(merge(run.run.root, tmp_path / "afresh").folder)


def test_another_scale_after_a_kill_starts_afresh(tmp_path: Path) -> None:
    run = whole()[0].copy(tmp_path / "made")
    kill(run, tmp_path / "out", event("proving the logits"))
    config = run.run.adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 5}))
    change_json(run.run.finished, adapter_files=None)
    merge(run.run.root, tmp_path / "out")
    assert files(tmp_path / "out") == files(merge(run.run.root, tmp_path / "afresh").folder)


@pytest.mark.parametrize(("first", "second"), [("original", "quantized"), ("quantized", "original")])
def test_another_base_after_a_kill_starts_afresh(tmp_path: Path, first: str, second: str) -> None:
    run = whole()[0]
    kill(run, tmp_path / "out", event("proving the logits"), base=first)
    merge(run.run.root, tmp_path / "out", second)  # type: ignore[arg-type]
    assert files(tmp_path / "out") == files(merge(run.run.root, tmp_path / "afresh", second).folder)  # type: ignore[arg-type]


def test_a_whole_shard_that_the_disk_spoiled_meanwhile_fails_the_proof(tmp_path: Path) -> None:
    run, expected, _ = whole()
    kill(run, tmp_path / "out", event("proving the logits"))
    path = weight_files(tmp_path / ".merging-out/model")[1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 64
    path.write_bytes(content)
    with pytest.raises(UntrustworthyError):
        merge(run.run.root, tmp_path / "out")
    assert (tmp_path / "out/UNPROVEN").is_file()
    with pytest.raises(RunError, match="whose proof failed"):
        merge(run.run.root, tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    merge(run.run.root, tmp_path / "out")
    assert files(tmp_path / "out") == expected


def wrong_words() -> None:
    right = merging.write_words

    def write(folder: Path, subject: Any) -> None:
        right(folder, subject)
        (folder / "chat_template.jinja").write_text("nothing")
        (folder / "stray.json").write_text("{}")

    merging.write_words = write


def test_a_verdict_does_not_outlive_its_proof(tmp_path: Path) -> None:
    """A merge that failed by something passing and was killed before its last step leaves no UNPROVEN to the next."""
    run, expected, _ = whole()
    kill(run, tmp_path / "out", "after UNPROVEN", setup=wrong_words)
    assert (tmp_path / ".merging-out/model/UNPROVEN").is_file(), "the case does not show what it should"
    merge(run.run.root, tmp_path / "out")
    assert files(tmp_path / "out") == expected


def test_two_merges_at_once_the_second_is_refused(tmp_path: Path) -> None:
    run, expected, _ = whole()
    child = merging_child(run, tmp_path / "out", event("merging", 5), stop)
    try:
        assert os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1])
        before = files(tmp_path)
        with pytest.raises(RunError, match="another process is merging there"):
            merge(run.run.root, tmp_path / "out")
        assert files(tmp_path) == before
        merge(run.run.root, tmp_path / "elsewhere")
    finally:
        os.kill(child, signal.SIGCONT)
    assert wait(child) == 0, (run.root / "log").read_text()
    assert files(tmp_path / "out") == files(tmp_path / "elsewhere") == expected


def test_too_little_room_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, expected, _ = whole()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000_000))
    with pytest.raises(RunError, match=r"needs 0\.1 GB there and 0\.0 GB are free\. Free some") as refused:
        merge(run.run.root, tmp_path / "out")
    assert str(tmp_path) in str(refused.value)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    merge(run.run.root, tmp_path / "out")
    assert files(tmp_path / "out") == expected
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_disk_that_fills_up_on_the_way_is_explained_and_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, expected, _ = whole()
    right, count = os.fsync, iter(range(10_000))

    def full(descriptor: int) -> None:
        if next(count) == 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        right(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"no space left on the device.*run the same command again"):
        merge(run.run.root, tmp_path / "out")
    monkeypatch.undo()
    assert {path.name for path in tmp_path.iterdir()} == {".merging-out"}
    assert weight_files(tmp_path / ".merging-out/model")
    merge(run.run.root, tmp_path / "out")
    assert files(tmp_path / "out") == expected
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize("place", ["/proc/tune/out", "/sys/tune-merge/out"])
def test_a_place_where_nothing_can_be_written_is_told(place: str) -> None:
    with pytest.raises(RunError) as refused:
        merge(whole()[0].run.root, place)
    assert "/".join(place.split("/")[:3]) in str(refused.value)
    assert len(refused.value.problems) == 1


def test_an_output_inside_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="a file"):
        merge(whole()[0].run.root, tmp_path / "file" / "out")
    assert files(tmp_path) == {"file": b"mine"}


def test_an_interrupt_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    class Impatient(Progress):
        @contextmanager
        def phase(self, name: str) -> Iterator[Callable[[int, int], None]]:
            if name == "proving the logits":
                raise KeyboardInterrupt
            yield lambda done, total: None

    run, expected, _ = whole()
    with pytest.raises(KeyboardInterrupt):
        merge(run.run.root, tmp_path / "out", progress=Impatient())
    assert {path.name for path in tmp_path.iterdir()} == {".merging-out"}
    merge(run.run.root, tmp_path / "out")
    assert files(tmp_path / "out") == expected


def test_the_base_is_never_written_to(tmp_path: Path) -> None:
    run = whole()[0].copy(tmp_path / "made")
    before = files(run.base)
    merge(run.run.root)
    assert files(run.base) == before
    assert torch.get_num_threads() == 1, "forking needs it"
