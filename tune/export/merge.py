"""`tune merge`: the base's own files with the adapter added, streamed, resumable and proven.

A merged shard is the base's shard with some tensors replaced by others of the same dtype and shape, so names, order,
header and size stay as they are, and writing one is copying a file: what is not adapted is copied in pieces, what
is adapted is read, added to in float32, rounded once to the base's dtype, and written. One matrix is in memory at a
time, however large the model. Tokens that were added make embedding and output head taller, and nothing else.

    OUTPUT/../.merging-NAME/
      .lock          an flock, so that it dies with its process
      journal.json   what is being merged; another base, adapter or mode starts afresh
      model/         becomes OUTPUT, by a rename, when the proof has been written

A shard appears under its name when it is whole and on the disk; a merge that was killed goes on after the last of
them. The proof then reads everything back (`tune.export.proof`). If it fails, OUTPUT holds a file named UNPROVEN.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from tune.errors import ModelError, RunError, UntrustworthyError
from tune.export.card import merged_card
from tune.export.deltas import Replacement
from tune.export.place import beside, check_free, find_output
from tune.export.proof import Proof, prove
from tune.export.proof.stock import with_stock_adapter
from tune.export.subject import Base, Subject, find_subject
from tune.export.words import write_words
from tune.files.foreign import read_object
from tune.folder import PROOF, UNPROVEN, check_unchanged, explain_os_errors, flush, write_file
from tune.folder.places import open_lock, refuse_foreign_folder
from tune.folder.records import read_proof
from tune.models.replaced_rows import ReplacedRows, RowValues
from tune.models.shards import DTYPES, copying, read_header, reshaped_header
from tune.models.streamed import Weights
from tune.progress import Progress

_JOURNAL = "journal.json"
_M_MMAP_THRESHOLD = -3
"""Of mallopt, in glibc's malloc.h."""

_ROWS = 256
"""Rows of a matrix that are added and written at a time."""

_SPARE = 64 * 2**20
"""Bytes of room for what is not weights."""


@dataclass(frozen=True, slots=True)
class Merged:
    """A merged model on the disk, and its proof."""

    folder: Path
    proof: Proof


def merge(
    run: str | Path, output: str | Path | None = None, base: Base = "original", progress: Progress | None = None
) -> Merged:
    """Merge the adapter of a run into its base, and prove the result.

    Args:
        run: a run folder, or one of its checkpoints.
        output: the new folder; none means `merged` in the run folder.
        base: `original` adds to the base's own weights; `quantized` to the weights that a 4-bit run was trained on.
        progress: hears what happens.

    Raises:
        UserError: something in the run, the base or the output is the user's to mend; nothing was lost.
        UntrustworthyError: the proof failed; the folder holds the model, merge-proof.json and UNPROVEN.
    """
    heard = progress or Progress()
    _return_freed_memory()
    folder = Path(output).expanduser() if output is not None else find_output(run)
    check_free(folder)  # before the base is looked at, which may be far away
    subject = find_subject(run, base)
    with_stock_adapter(subject, torch.device("cpu"))  # an adapter that it refuses could not be proven
    check_unchanged(subject.run, subject.adapter)
    files = subject.checkpoint.files
    heard.line(f"base {base}, {len(files)} {'file' if len(files) == 1 else 'files'}, "
               f"{len(subject.checkpoint.places)} tensors")  # fmt: skip
    again = "run the same command again: it goes on where it stopped"
    with explain_os_errors(folder, again, "--output"), _work(folder) as work:
        model = _begin(work, subject)
        there = sum((model / file.name).exists() for file in files)
        if there:
            heard.line(f"going on with the merge that was stopped: {there} of {len(files)} files are there")
        with heard.phase("merging") as advance:
            _write_shards(model, subject, advance)
        types = sorted({subject.checkpoint.places[name].dtype for name in subject.deltas})
        heard.line(f"merged {len(subject.deltas)} matrices in float32, rounded once to {', '.join(types)}")
        if subject.vocabulary != subject.model.vocabulary:
            heard.line(f"vocabulary {subject.vocabulary:,} tokens, was {subject.model.vocabulary:,}")
        write_words(model, subject)
        proof = _prove(subject, model, heard)
        os.replace(model, folder)
        flush(folder.parent)
    return _trusted(folder, proof)


def prove_again(run: str | Path, output: str | Path | None = None, progress: Progress | None = None) -> Merged:
    """Prove a merge that is there, after it was copied or kept for long; only the proof and the card are written.

    Args:
        run: the run that it was merged from, or the checkpoint.
        output: the merged model's folder; none means `merged` in the run folder.
        progress: hears what happens.

    Raises:
        UserError: there is no merge, or its run or base cannot be read.
        UntrustworthyError: the proof fails; a file UNPROVEN stands beside the weights from now on.
    """
    _return_freed_memory()
    folder = Path(output).expanduser() if output is not None else find_output(run)
    refuse_foreign_folder(folder)  # the verdict is written into it
    try:
        base = read_proof(folder / PROOF)["base"]
    except (OSError, ValueError, KeyError):
        base = None
    if base not in get_args(Base):
        raise RunError(f"{folder}: holds no {PROOF} of a merge, so there is nothing to prove again. Merge first.")
    with explain_os_errors(folder, place="--output"):
        return _trusted(folder, _prove(find_subject(run, base), folder, progress or Progress()))


def _prove(subject: Subject, folder: Path, progress: Progress) -> Proof:
    """Prove, and write the verdict into the folder."""
    proof = prove(subject, folder, progress)
    unproven = folder / UNPROVEN
    if not proof.holds:
        write_file(unproven, "\n".join(proof.reasons) + "\n")
    write_file(folder / PROOF, proof.to_text())
    write_file(folder / "README.md", merged_card(subject.run, subject.adapter, proof.content))
    if proof.holds:
        unproven.unlink(missing_ok=True)
    return proof


def _trusted(folder: Path, proof: Proof) -> Merged:
    if not proof.holds:
        raise UntrustworthyError(
            f"{folder}: the proof failed, and nobody should use these weights (see {PROOF} there).\n"
            + "\n".join(proof.reasons)
        )
    return Merged(folder, proof)


def _return_freed_memory() -> None:
    """Let the system have back what matrices took when they are gone.

    glibc maps large blocks one by one, and gives them back; but after some were freed it takes the next ones, up to
    32 MB each, from a heap that it keeps. Said once, 4 MB stay 4 MB. Elsewhere there is no such function, nor need.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 4 * 2**20)


@contextmanager
def _work(folder: Path) -> Iterator[Path]:
    """The hidden folder beside `folder` where the merge is made, held for this process.

    Raises:
        RunError: another process merges there.
    """
    work = beside(folder)
    try:
        refuse_foreign_folder(work)
        work.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError:  # as /proc answers
        raise RunError(f"{folder.parent}: no folder can be made there. Give another --output.") from None
    with open_lock(work / ".lock") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{folder}: another process is merging there. Wait for it.") from None
        try:
            check_free(folder)  # the process that held the lock until now may have just finished
            yield work
        finally:
            if not any((work / "model").glob("*.safetensors")):  # nothing to go on from
                shutil.rmtree(work, ignore_errors=True)


def _begin(work: Path, subject: Subject) -> Path:
    """Return the folder to write into: as a killed merge of the same left it, or empty.

    Raises:
        RunError: there is not enough room.
    """
    journal, model, key = work / _JOURNAL, work / "model", subject.key()
    if not _is_of(journal, key):
        shutil.rmtree(model, ignore_errors=True)
        write_file(journal, json.dumps({"key": key}))
    model.mkdir(exist_ok=True)
    sizes = {file.name: file.stat().st_size for file in subject.checkpoint.files}
    # All but whole shards is quickly made again, and an old verdict must not outlive its proof.
    for path in model.iterdir():
        if path.name not in sizes or path.is_symlink():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    needed = sum(size for name, size in sizes.items() if not (model / name).exists()) + _SPARE
    free = shutil.disk_usage(work).free
    if needed > free:
        raise RunError(
            f"{work.parent}: the merge needs {needed / 1e9:.1f} GB there and {free / 1e9:.1f} GB are free. "
            "Free some, or give an --output on another disk."
        )
    return model


def _is_of(journal: Path, key: str) -> bool:
    """Whether what was begun is the merge of this key."""
    try:
        return read_object(journal) == {"key": key}
    except (OSError, ValueError):
        return False


def _write_shards(model: Path, subject: Subject, advance: Callable[[int, int], None]) -> None:
    """Write the files that are not there yet. One that is there is whole, and the proof reads it anyway."""
    total = sum(file.stat().st_size for file in subject.checkpoint.files)
    done = 0
    weights = subject.weights()

    def rewritten(name: str) -> Iterator[Tensor] | None:
        return _merged_rows(name, subject, weights) if subject.is_rewritten(name) else None

    for file in subject.checkpoint.files:
        target = model / file.name
        if not target.exists():
            write_shard(file, target, rewritten, subject.shape_of, partial(_further, advance, done, total))
        done += file.stat().st_size
        advance(done, total)
    if subject.checkpoint.index is not None:
        write_file(model / subject.checkpoint.index.name, _index(subject.checkpoint.index, subject))


def _index(index: Path, subject: Subject) -> bytes:
    """The base's index, in which added tokens may have changed the number of bytes."""
    content = index.read_bytes()
    written = json.loads(content)
    metadata = written.get("metadata") or {}
    taller = {name: place for name, place in subject.checkpoint.places.items() if subject.shape_of(name) != place.shape}
    for name, place in taller.items():
        more = math.prod(subject.shape_of(name)) - math.prod(place.shape)
        for key, size in (("total_parameters", 1), ("total_size", DTYPES[place.dtype].itemsize)):
            if isinstance(metadata.get(key), int):
                metadata[key] += more * size
    return (json.dumps(written, indent=2) + "\n").encode() if taller else content


def _merged_rows(name: str, subject: Subject, weights: Weights) -> Iterator[Tensor]:
    """The merged tensor, some rows at a time: W + ΔW in float32, rounded once to the stored type."""
    place, delta = subject.checkpoint.places[name], subject.deltas.get(name)
    dtype = DTYPES[place.dtype]
    if len(place.shape) < 2:
        yield weights.tensor(name).to(dtype)
        return
    if isinstance(delta, RowValues):
        taller = ReplacedRows(weights, {name: delta})
        for start in range(0, taller.count(name), _ROWS):
            yield taller.rows(name, start, min(start + _ROWS, taller.count(name))).to(dtype)
        return
    step = _ROWS if len(place.shape) == 2 else 1  # of a stack, one expert
    whole = None if subject.base == "original" else weights.tensor(name)
    for start in range(0, place.shape[0], step):
        stop = min(start + step, place.shape[0])
        rows = weights.rows(name, start, stop) if whole is None else whole[start:stop].clone()
        if isinstance(delta, Replacement):
            rows = delta.value[start:stop]
        elif delta is not None:
            rows += delta.rows(start, stop)
        yield rows.to(dtype)


def _further(advance: Callable[[int, int], None], before: int, total: int, written: int) -> None:
    advance(before + written, total)


def write_shard(
    source: Path,
    target: Path,
    rewritten: Callable[[str], Iterator[Tensor] | None],
    shape_of: Callable[[str], tuple[int, ...]],
    advance: Callable[[int], None] = lambda written: None,
) -> None:
    """Copy a safetensors file with some tensors replaced; `target` appears when it is whole and on the disk.

    The header stays as it is, to the byte, where no shape changes.

    Args:
        source: the base's file.
        target: the new one.
        rewritten: called with each tensor's name; the new tensor in the stored type, some rows at a time, or None to
            copy the old one.
        shape_of: the shape of each tensor in the new file.
        advance: called with the bytes written so far.

    Raises:
        ModelError: the base's file changed meanwhile.
    """
    _, places = read_header(source)
    header, ends = reshaped_header(source, shape_of)
    unfinished = target.with_name(f".unfinished-{target.name}")
    try:
        unfinished.unlink(missing_ok=True)
        with open(source, "rb") as old, open(unfinished, "xb") as new:  # never through a link that lies there
            new.write(header)
            for name, place in places.items():
                pieces = rewritten(name)
                new.writelines(copying(old.fileno(), place.start, place.end) if pieces is None else map(_bytes, pieces))
                assert new.tell() == ends[name]
                advance(place.end)
            new.flush()
            os.fsync(new.fileno())
    except EOFError as error:
        raise ModelError(
            f"{source}: became shorter while it was read. Merge again when nothing writes there."
        ) from error
    os.replace(unfinished, target)
    flush(target.parent)


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
