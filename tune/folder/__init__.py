"""A run's folder: its paths, its lock, its finished mark, and which checkpoint to go on from.

Everything that appears under its final name is whole: files are written beside their place, flushed to the disk
and renamed; folders likewise. Texts are written without secrets; bytes, such as weights, as they are. The lock is an
flock on an open file, so that it dies with its process.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tune.errors import RunError, did_you_mean
from tune.files.foreign import open_plain
from tune.files.os_errors import explain_os_errors as explain_os_errors
from tune.files.pickles import refuse_foreign
from tune.folder.places import open_lock, refuse_foreign_file, refuse_foreign_folder
from tune.folder.records import read_finished, read_manifest, read_provenance
from tune.secrets import redact, redact_json

_STEP = re.compile(r"step-([0-9]{6}|[1-9][0-9]{6,14})")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""What PEFT reads of an adapter."""
PROOF = "merge-proof.json"
"""In every merged folder: what was proven."""
UNPROVEN = "UNPROVEN"
"""In a merged folder whose proof failed."""
MANIFEST = "manifest.json"
"""In every checkpoint: the SHA-256 of each of its files."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The paths of one run."""

    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def coverage(self) -> Path:
        return self.root / "coverage.json"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def finished(self) -> Path:
        return self.root / "finished.json"

    @property
    def provenance(self) -> Path:
        """What the run was made of: fingerprints, versions, and some examples to prove a merge on."""
        return self.root / "provenance.json"

    @property
    def merged(self) -> Path:
        return self.root / "merged"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """The steps that have a checkpoint folder, ascending."""
        if not self.checkpoints.is_dir() or self.checkpoints.is_symlink():
            return []
        # What a link leads to is not this run's, and is neither read nor removed.
        there = (path for path in self.checkpoints.iterdir() if path.is_dir() and not path.is_symlink())
        found = (_STEP.fullmatch(path.name) for path in there)
        return sorted(int(match[1]) for match in found if match)

    def refuse_links(self) -> None:
        """Refuse a run whose parts lie elsewhere: what a run reads, writes and removes is in its own folder.

        Raises:
            RunError: names the first part that is a link, or no file or folder where one belongs.
        """
        files = (self.recipe, self.coverage, self.metrics, self.finished, self.provenance)
        for path in (*files, self.root / ".lock", self.root / ".tracking-id"):
            refuse_foreign_file(path)
        refuse_foreign_folder(self.adapter)
        refuse_foreign_folder(self.checkpoints)
        for path in sorted(self.checkpoints.iterdir()) if self.checkpoints.is_dir() else ():
            refuse_foreign_folder(path)

    def check_there(self) -> None:
        """Refuse to write into a run whose folder has gone: a new one in its place would hold a piece of a run.

        Raises:
            RunError: it was removed, or its disk is no longer mounted there.
        """
        if not self.recipe.is_file():
            raise RunError(
                f"{self.root}: the run's folder has gone while it trained: it was removed, or its disk was unmounted. "
                "Bring it back, then go on with --resume from its last checkpoint."
            )

    def read_finished(self) -> dict[str, Any] | None:
        """The summary of a finished run, or None.

        Raises:
            RunError: there is one that cannot be read.
        """
        if not self.finished.is_file():
            return None
        try:
            return read_finished(self.finished)
        except (OSError, ValueError) as error:
            raise RunError(
                f"{self.finished}: cannot be read ({error}). Remove it; --resume writes it again."
            ) from error

    def read_provenance(self) -> dict[str, Any]:
        """What the run was made of.

        Raises:
            RunError: it is not there or cannot be read.
        """
        try:
            return read_provenance(self.provenance)
        except (OSError, ValueError) as error:
            raise RunError(
                f"{self.provenance}: cannot be read ({error}), so nothing says what this run was made of. "
                f"`tune train {self.recipe} --resume` writes it again."
            ) from error

    def check_start(self, resume: bool) -> None:
        """Refuse a folder that another run, or other files, already fill.

        Raises:
            RunError: there is a run and no `--resume`, or files that are no run.
        """
        if self.steps() and not self.recipe.is_file():
            raise RunError(
                f"{self.root}: holds checkpoints but no recipe.yaml, so nothing says what they are of. "
                "Put it back, or give this run another output."
            )
        if self.recipe.is_file():
            if not resume:
                raise RunError(
                    f"{self.root}: a run is already here. Go on with it with --resume, or give this one another output."
                )
            return
        other = (
            [path.name for path in self.root.iterdir() if not path.name.startswith(".")] if self.root.is_dir() else []
        )
        if other:
            raise RunError(
                f"{self.root}: holds files that are no run ({sorted(other)[0]}). Give this run another output."
            )

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process; the folder is made if needed.

        Raises:
            RunError: another process holds it, or the folder cannot be written.
        """
        with explain_os_errors(self.root):
            self.refuse_links()
            ours = [folder for folder in (self.root, *self.root.parents) if not folder.exists()]
            handle = self._take_lock()
        with handle:
            self._sweep()
            try:
                yield
            finally:
                self._leave_no_empty_folder(ours)

    def _take_lock(self) -> IO[str]:
        path = self.root / ".lock"
        while True:
            try:
                self.root.mkdir(parents=True, exist_ok=True)
            except FileNotFoundError:  # as /proc answers
                raise RunError(f"{self.root}: no folder can be made there. Change the recipe's output.") from None
            handle = open_lock(path)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                handle.close()
                raise RunError(
                    f"{self.root}: another process is training here. Wait for it, or give this run another output."
                ) from None
            # A process that was refused may have removed the file between our opening and our locking it.
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(handle.fileno()).st_ino:
                    return handle
            handle.close()

    def _leave_no_empty_folder(self, ours: list[Path]) -> None:
        """A run that was refused before it began leaves nothing behind. `ours` are the folders made for it."""
        with contextlib.suppress(OSError):
            if ours and [path.name for path in self.root.iterdir()] == [".lock"]:
                (self.root / ".lock").unlink()
                for folder in ours:
                    folder.rmdir()

    def _sweep(self) -> None:
        """Remove what a killed process left half written."""
        for folder in (self.root, self.checkpoints):
            for path in folder.glob(".unfinished-*"):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def folder_of(path: str | Path) -> tuple[RunFolder, Path]:
    """Return the run that `path` means (a run folder or one of its checkpoints), and the adapter folder in it.

    Raises:
        RunError: there is no run, nothing of it to use yet, a part of it is a link, or a pickle lies in it.
    """
    run, adapter = _folder_of(path)
    run.refuse_links()
    refuse_foreign(adapter)
    return run, adapter


def _folder_of(path: str | Path) -> tuple[RunFolder, Path]:
    given = Path(path).expanduser()
    # Unlike pathlib, os.path takes a prompt in the place of a folder, however long, for a name that is not there.
    if not os.path.exists(given):
        near = did_you_mean(given.name, os.listdir(given.parent)) if os.path.isdir(given.parent) else ""
        raise RunError(
            f"{path}: no such run. Give a run folder such as runs/quickstart, or one of its checkpoints.{near}"
        )
    if given.name == "adapter" and (given.parent / "recipe.yaml").is_file():
        given = given.parent
    if given.parent.name == "checkpoints" and _STEP.fullmatch(given.name):
        return RunFolder(given.parent.parent), given
    run = RunFolder(given)
    if not run.recipe.is_file():
        inside = f" Did you mean {str(given.parent)!r}?" if (given.parent / "recipe.yaml").is_file() else ""
        raise RunError(f"{path}: not a run folder (it holds no recipe.yaml). Give one that `tune train` made.{inside}")
    if run.adapter.is_dir():
        return run, run.adapter
    steps = run.steps()
    if not steps:
        raise RunError(f"{path}: this run has no adapter and no checkpoint yet. Finish it with --resume.")
    return run, run.checkpoint(steps[-1])


def flush(path: Path) -> None:
    """Put a folder's entries on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _bytes(name: str, content: bytes | str) -> bytes:
    """What is written of a content: of a text, secrets are hidden, and of a JSON text no number is taken for one."""
    if isinstance(content, bytes):
        return content
    if name.endswith(".yaml"):  # a recipe, whose secrets are hidden value by value
        return content.encode()
    return (redact_json(content) if name.endswith((".json", ".jsonl")) else redact(content)).encode()


def write_file(path: Path, content: bytes | str) -> None:
    """Write a whole file under its name, or nothing; a text without the secrets in it."""
    data = _bytes(path.name, content)
    descriptor, name = tempfile.mkstemp(prefix=".unfinished-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
        flush(path.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_folder(path: Path, files: Mapping[str, bytes | str], manifest: bool = False) -> None:
    """Write a whole folder under its name, or nothing; one already there is replaced. Texts lose the secrets in them.

    With `manifest`, a file of that name holds the SHA-256 of every other, for `whole`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=path.parent))
    try:
        os.chmod(new, 0o755)
        data = {name: _bytes(name, content) for name, content in files.items()}
        if manifest:
            digests = {name: hashlib.sha256(content).hexdigest() for name, content in data.items()}
            data[MANIFEST] = (json.dumps(digests, indent=1) + "\n").encode()
        for name, content in data.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            with open(new / name, "wb") as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
        flush(new)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=path.parent))
            os.replace(path, old / "old")
            os.replace(new, path)
            shutil.rmtree(old)
        else:
            os.replace(new, path)
        flush(path.parent)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def file_digest(path: Path, links: bool = False) -> str:
    """Return the SHA-256 of a file, in hex; `links` says whether its name may be a link.

    Raises:
        ValueError: it is a link, or no plain file.
        OSError: it cannot be read.
    """
    with open_plain(path, links) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_unchanged(run: RunFolder, adapter: Path) -> None:
    """Refuse an adapter that is not the one that training wrote.

    Args:
        run: the run.
        adapter: its adapter/, or one of its checkpoints.

    Raises:
        RunError: it was changed or damaged since.
    """
    if adapter != run.adapter:
        if not whole(adapter):
            raise RunError(f"{adapter}: is not as it was written: damaged, or changed by hand. Use another checkpoint.")
        return
    written = (run.read_finished() or {}).get("adapter_files", {})
    for name, digest in written.items():
        if not (adapter / name).is_file() or file_digest(adapter / name) != digest:
            raise RunError(
                f"{adapter / name}: is not the file that training wrote: damaged, or changed by hand. Remove "
                f"{run.finished}; `tune train {run.recipe} --resume` writes the adapter again from its checkpoint."
            )


def damage(path: Path) -> str | None:
    """Say what of a folder written with a manifest is no longer as it was written; None where all of it is."""
    try:
        digests = read_manifest(path / MANIFEST)
    except (OSError, ValueError):
        return f"its {MANIFEST} cannot be read"
    for name, digest in digests.items():
        try:
            if file_digest(path / name) != digest:
                return f"{name} is not as it was written"
        except (OSError, ValueError):
            return f"{name} is missing or cannot be read"
    return None


def whole(path: Path) -> bool:
    """Whether a folder written with a manifest is still as it was written."""
    return damage(path) is None
