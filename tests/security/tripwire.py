"""Real pickles that act when they are read, and commands run where every such reading is seen.

A bomb's reading makes a folder. A command runs in a forked child, under an audit hook that notes which of the planted
files are opened and which names any unpickler looks up. (torch's restricted unpickler looks names up unseen; that it
has opened the file is seen.)
"""

from __future__ import annotations

import importlib
import io
import os
import pickle
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hub import StandIn
from tests.training.processes import fork, wait
from tune.cli.main import _run

NAMES = (
    *("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "adapter_model.bin", "training_args.bin"),
    *("optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "consolidated.00.pth"),
    *("last.ckpt", "tokenizer.pkl", "vocab.pickle", "state.joblib", "extra.dill", ".metadata"),
)
"""Files of other programs that hold pickles."""


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.marker,)


def raw(marker: Path) -> bytes:
    """A plain pickle."""
    return pickle.dumps({"weight": Bomb(marker)})


def text(marker: Path) -> bytes:
    """A pickle of the oldest protocol, which begins with the name of what is called."""
    return pickle.dumps(Bomb(marker), protocol=0)


def archive(marker: Path) -> bytes:
    """What torch.save writes: a zip archive with a pickle in it."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as packed:
        packed.writestr("archive/data.pkl", pickle.dumps({"weight": Bomb(marker)}, protocol=2))
        packed.writestr("archive/byteorder", "little")
        packed.writestr("archive/version", "3\n")
    return content.getvalue()


FORMS = {"raw": raw, "text": text, "archive": archive}


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    said: str
    """stdout and stderr."""
    opened: tuple[str, ...]
    """The planted files that were opened, by name, and whatever an unpickler looked up of a bomb."""


def slow(*rows: object) -> list[object]:
    """Parameters of a test that are only among the slow ones."""
    return [pytest.param(row, marks=pytest.mark.slow) for row in rows]


def plant(folder: Path, names: Iterable[str] = NAMES, form: str = "archive") -> None:
    """Put bombs under these names into a folder."""
    for name in names:
        (folder / name).write_bytes(FORMS[form](marker_of(folder)))


def marker_of(folder: Path) -> Path:
    """What a bomb planted in `folder` makes."""
    return folder / "a-pickle-was-read"


def run(work: Path, *arguments: str, watched: Iterable[str] = NAMES, hub: StandIn | None = None) -> Outcome:
    """Type a command in `work`; files of the `watched` names count as planted. `hub` is the one to meet, else none."""
    log, trace = work.with_suffix(".log"), work.with_suffix(".trace")
    for path in (log, trace):
        path.unlink(missing_ok=True)
    names = frozenset(watched)

    def watch() -> int:
        os.chdir(work)
        descriptor = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def note(event: str, given: tuple[object, ...]) -> None:
            if event == "open" and isinstance(given[0], str | bytes | os.PathLike):
                name = os.path.basename(os.fsdecode(given[0]))
                if name in names:
                    os.write(descriptor, f"{name}\n".encode())
            elif event == "pickle.find_class" and given[1] == "mkdir":
                os.write(descriptor, b"unpickled\n")

        if hub is not None:
            from huggingface_hub import constants

            home = work.with_suffix(".home")
            os.environ |= {**hub.environment(home), "HF_HOME": str(home)}
            importlib.reload(constants)  # read at import, and read from there by all who use them
        sys.addaudithook(note)
        return _run(list(arguments))

    code = wait(fork(watch, log))
    opened = tuple(dict.fromkeys(trace.read_text().split())) if trace.exists() else ()
    return Outcome(code, log.read_text() if log.exists() else "", opened)


def assert_harmless(work: Path, outcome: Outcome, code: int, *words: str) -> None:
    """Nothing planted was read, the command ended with `code`, and what it said holds `words`."""
    assert not list(work.rglob(marker_of(work).name)), "a pickle was read, and acted"
    assert outcome.opened == (), outcome
    assert outcome.code == code, outcome.said
    for word in words:
        assert word in outcome.said, outcome.said
    assert "Traceback" not in outcome.said, outcome.said
    if code == 2:
        assert len(outcome.said.strip().splitlines()[-1]) > 20, outcome.said
