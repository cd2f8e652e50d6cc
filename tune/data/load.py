"""The one door to the data: from a recipe and a tokenizer to encoded examples and a report.

Rows are read and judged before anything is tokenised, so that a mistake in a file is said at once. All that
is wrong with rows is collected and said together, with the first examples of each kind.
"""

from __future__ import annotations

import gc
import hashlib
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from tune.data.conversation import BadRowError, Conversation
from tune.data.encode import Encoded, Encoder, Examples
from tune.data.formats import Format, columns_seen, detect_format, find_format
from tune.data.held_out import digests, hold_out
from tune.data.report import Report, SourceReport, lengths_of
from tune.data.sources import BadRow, Rows, read_rows
from tune.data.templates.resolve import resolve_template
from tune.data.templates.segment import Template
from tune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tune.recipe.schema import Data as DataSection
    from tune.recipe.schema import Recipe, Source

Part = Literal["train", "eval"]
Progress = Callable[[int, int], None]

_CHUNK = 2048


@dataclass(frozen=True, slots=True)
class Data:
    """Everything a run learns from and is measured on.

    `fingerprint` is the sha256, in hex, of the encoded examples of both parts.
    """

    train: Examples
    eval: Examples | None
    template: Template
    report: Report
    fingerprint: str


@dataclass(slots=True)
class _SourceData:
    """One source on its way from rows to examples, with what was left out."""

    source: Source
    part: Part
    index: int
    format: Format
    template: Template
    conversations: list[tuple[str, Conversation]]
    rows: int
    bad: list[BadRow]
    untrained: list[str] = field(default_factory=list)
    long: list[str] = field(default_factory=list)
    truncated: list[str] = field(default_factory=list)
    kept: list[tuple[str, Encoded]] = field(default_factory=list)


def load_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, on_progress: Progress | None = None) -> Data:
    """Read, render, encode and split the recipe's data.

    `on_progress` is called with the conversations encoded so far and their total.

    Raises:
        DataError: a source cannot be read, a template does not fit the tokenizer, or rows are bad and the
            recipe does not say to drop them.
    """
    with _no_garbage_collection():
        return _load(recipe, tokenizer, on_progress)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    # Millions of small objects are made here and none of them is part of a cycle; looking for cycles among
    # them takes a quarter of the time.
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _load(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, on_progress: Progress | None) -> Data:
    wanted = recipe.data
    template = resolve_template(wanted.template, tokenizer)
    held_out, fraction = (wanted.eval, 0.0) if isinstance(wanted.eval, tuple) else ((), wanted.eval)
    sources = [_read(s, "train", i, template, tokenizer, wanted) for i, s in enumerate(wanted.train)]
    sources += [_read(s, "eval", i, template, tokenizer, wanted) for i, s in enumerate(held_out)]
    if wanted.on_bad == "error":
        _refuse_bad(sources)
    _encode(sources, Encoder(tokenizer), wanted, on_progress)
    if wanted.on_bad == "error":
        _refuse_bad(sources)
        _refuse_untrained(sources, wanted.max_length)
    if wanted.on_long == "error":
        _refuse_long(sources, wanted.max_length)
    train = _examples([s for s in sources if s.part == "train"])
    evaluated = _examples([s for s in sources if s.part == "eval"]) if held_out else None
    for examples, name in ((train, "data.train"), (evaluated, "data.eval")):
        if examples is not None and not len(examples):
            raise DataError(f"{name}: no row is left, since all were dropped. See on_bad and on_long in the recipe.")
    if fraction:
        train, evaluated = hold_out(train, fraction, recipe.train.seed)
    report = _report(sources, train, evaluated, tokenizer, asked=bool(wanted.eval))
    return Data(train, evaluated, template, report, _fingerprint(train, evaluated))


def _read(
    source: Source,
    part: Part,
    index: int,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    wanted: DataSection,
) -> _SourceData:
    """A source's rows as conversations, the bad ones set aside."""
    rows = read_rows(source)
    own = resolve_template(source.template, tokenizer) if source.template else template
    fmt = _format(source, rows)
    conversations, bad = [], list(rows.bad)
    for row in rows.good:
        try:
            conversation = fmt.parse(row.value)
        except BadRowError as error:
            bad.append(BadRow(row.where, str(error)))
            continue
        if wanted.system:
            conversation = conversation.with_system(wanted.system)
        if wanted.train_on == "last_response":
            conversation = conversation.last_response_only()
        conversations.append((row.where, conversation))
    if not conversations:
        _refuse_format(source, rows, fmt, bad)
    return _SourceData(source, part, index, fmt, own, conversations, len(rows), bad)


def _format(source: Source, rows: Rows) -> Format:
    values = [row.value for row in rows.good]
    if source.format != "auto":
        fmt = find_format(source.format)
    elif (detected := detect_format(values)) is None:
        seen = ", ".join(columns_seen(values)) or "none"
        raise DataError(
            f"{source.path}: no format fits its rows (columns seen: {seen}). "
            "Set format: of the source, and columns: where its names differ, such as {output: response}."
        )
    else:
        fmt = detected
    if unknown := [name for name in source.columns if name not in fmt.columns]:
        raise DataError(
            f"{source.path}: columns: names {unknown[0]!r}, which format {fmt.name} does not have "
            f"({', '.join(fmt.columns)}). Ours is on the left, the data's on the right."
        )
    return fmt


def _refuse_format(source: Source, rows: Rows, fmt: Format, bad: list[BadRow]) -> None:
    """No row at all could be read: most likely the format is another one."""
    better = detect_format([row.value for row in rows.good])
    first = f"{bad[0]}" if bad else "there are no rows"
    if better is not None and better is not fmt:
        raise DataError(f"{source.path}: its rows are not {fmt.name} ({first}). They fit format: {better.name}.")
    raise DataError(f"{source.path}: none of its {len(rows)} rows can be read as {fmt.name}. {_sentence(first)}")


def _encode(sources: list[_SourceData], encoder: Encoder, wanted: DataSection, on_progress: Progress | None) -> None:
    total = sum(len(source.conversations) for source in sources)
    done = 0
    for source in sources:
        for start in range(0, len(source.conversations), _CHUNK):
            chunk = source.conversations[start : start + _CHUNK]
            _encode_chunk(source, chunk, encoder, wanted)
            done += len(chunk)
            if on_progress is not None:
                on_progress(done, total)
        source.conversations = []


def _encode_chunk(
    source: _SourceData, chunk: list[tuple[str, Conversation]], encoder: Encoder, wanted: DataSection
) -> None:
    wheres, prompts = [], []
    for where, conversation in chunk:
        try:
            prompts.append(source.template.segments(conversation))
            wheres.append(where)
        except BadRowError as error:
            source.bad.append(BadRow(where, str(error)))
    for where, encoded in zip(wheres, encoder.encode(prompts), strict=True):
        if isinstance(encoded, BadRowError):
            source.bad.append(BadRow(where, str(encoded)))
            continue
        ids, trained = encoded
        if wanted.train_on == "all":
            trained = bytearray(b"\0" + b"\1" * (len(ids) - 1))
        if len(ids) > wanted.max_length:
            if wanted.on_long != "truncate":
                source.long.append(where)
                continue
            source.truncated.append(where)
            ids, trained = ids[: wanted.max_length], trained[: wanted.max_length]
        if not any(trained):
            source.untrained.append(where)
            continue
        source.kept.append((where, Encoded(ids, trained)))


def _refuse_bad(sources: list[_SourceData]) -> None:
    bad = [row for source in sources for row in sorted(source.bad, key=lambda row: row.position)]
    if bad:
        rows = "1 row" if len(bad) == 1 else f"{len(bad)} rows"
        raise DataError([*map(str, bad[:3]), f"{rows} cannot be used. Mend the data, or set data.on_bad: drop."])


def _refuse_untrained(sources: list[_SourceData], max_length: int) -> None:
    untrained = [where for source in sources for where in source.untrained]
    if untrained:
        reason = f"nothing of it is trained on (is the prompt alone longer than data.max_length {max_length}?)"
        raise DataError(
            [
                *(f"{where}: {reason}" for where in untrained[:3]),
                f"rows with nothing to train on: {len(untrained)}. Raise data.max_length, or set data.on_bad: drop.",
            ]
        )


def _refuse_long(sources: list[_SourceData], max_length: int) -> None:
    long = [where for source in sources for where in source.long]
    if long:
        raise DataError(
            [
                *(f"{where}: is longer than data.max_length ({max_length} tokens)" for where in long[:3]),
                f"rows that are too long: {len(long)}. Raise data.max_length, or set data.on_long: truncate or drop.",
            ]
        )


def _examples(sources: list[_SourceData]) -> Examples:
    """The kept examples of several sources, end to end."""
    ids, trained = array("i"), bytearray()
    lengths, indices, where = [0], [], []
    for source in sources:
        for row, encoded in source.kept:
            ids.extend(encoded.ids)
            trained += encoded.trained
            lengths.append(len(encoded.ids))
            indices.append(source.index)
            where.append(row)
    return Examples(
        np.array(ids, dtype=np.int32),
        np.frombuffer(bytes(trained), dtype=np.bool_),
        np.cumsum(lengths, dtype=np.int64),
        np.array(indices, dtype=np.int32),
        where,
    )


def _report(
    sources: list[_SourceData],
    train: Examples,
    evaluated: Examples | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    asked: bool,
) -> Report:
    seen = set(digests(train))
    shared = 0
    if evaluated is not None:
        shared = len([digest for digest in digests(evaluated) if digest in seen])
    cut = {where for source in sources for where in source.truncated}
    return Report(
        sources=tuple(_source_report(source) for source in sources),
        train_examples=len(train),
        train_tokens=len(train.ids),
        train_trained=int(train.trained.sum()),
        eval_examples=len(evaluated) if evaluated is not None else 0,
        eval_tokens=len(evaluated.ids) if evaluated is not None else 0,
        eval_trained=int(evaluated.trained.sum()) if evaluated is not None else 0,
        duplicates=len(train) - len(seen),
        shared=shared,
        unended=_unended(train, cut, tokenizer),
        eval_asked=asked,
    )


def _source_report(source: _SourceData) -> SourceReport:
    examples = _examples([source])
    median, high, longest = lengths_of(examples)
    kept = set(examples.where)
    return SourceReport(
        path=source.source.path,
        part=source.part,
        format=source.format.name,
        template=source.template.name,
        rows=source.rows,
        examples=len(examples),
        tokens=len(examples.ids),
        trained=int(examples.trained.sum()),
        truncated=sum(where in kept for where in source.truncated),
        dropped_long=len(source.long),
        dropped_bad=len(source.bad),
        dropped_untrained=len(source.untrained),
        duplicates=len(examples) - len(set(digests(examples))),
        length_p50=median,
        length_p95=high,
        length_max=longest,
    )


def _unended(examples: Examples, cut: set[str], tokenizer: PreTrainedTokenizerBase) -> int:
    """Examples without a trained special token, cut ones aside, which have lost theirs."""
    special = [id for id, token in tokenizer.added_tokens_decoder.items() if token.special]
    ends = np.isin(examples.ids, special) & examples.trained
    ended = np.add.reduceat(ends, examples.offsets[:-1])
    return sum(not end and where not in cut for end, where in zip(ended, examples.where, strict=True))


def _fingerprint(train: Examples, evaluated: Examples | None) -> str:
    digest = hashlib.sha256()
    for examples in (train, evaluated):
        if examples is not None:
            digest.update(len(examples).to_bytes(8, "little"))
            for values in (examples.ids, examples.trained, examples.offsets, examples.source):
                digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
