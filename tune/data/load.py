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
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tune.data.conversation import BadRowError, Conversation
from tune.data.encode import Encoded, Encoder, Examples
from tune.data.held_out import digests, hold_out
from tune.data.reading import Kept, SourceData, read_source
from tune.data.refusals import refuse_bad, refuse_empty, refuse_long, refuse_untrained, refuse_weightless
from tune.data.report import Report, SourceReport, percentiles
from tune.data.sources import BadRow
from tune.data.templates.resolve import resolve_template
from tune.data.templates.segment import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tune.recipe.schema import Data as DataSection
    from tune.recipe.schema import Recipe

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
    sources = [read_source(s, "train", i, template, tokenizer, wanted) for i, s in enumerate(wanted.train)]
    sources += [read_source(s, "eval", i, template, tokenizer, wanted) for i, s in enumerate(held_out)]
    if wanted.on_bad == "error":
        refuse_bad(sources)
    _encode(sources, Encoder(tokenizer), wanted, on_progress)
    if wanted.on_bad == "error":
        refuse_bad(sources)
        refuse_untrained(sources, wanted.max_length)
    if wanted.on_long == "error":
        refuse_long(sources, wanted.max_length)
    own, others = [s for s in sources if s.part == "train"], [s for s in sources if s.part == "eval"]
    refuse_empty("data.train", own, wanted.max_length)
    if others:
        refuse_empty("data.eval", others, wanted.max_length)
    train, evaluated = _examples(own), _examples(others) if others else None
    if fraction:
        train, evaluated = hold_out(train, fraction, recipe.train.seed)
    refuse_weightless("data.train", own, np.bincount(train.source, minlength=len(own)).tolist())
    report = _report(sources, train, evaluated, tokenizer, wanted)
    return Data(train, evaluated, template, report, _fingerprint(train, evaluated))


def _encode(sources: list[SourceData], encoder: Encoder, wanted: DataSection, on_progress: Progress | None) -> None:
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
    source: SourceData, chunk: list[tuple[str, Conversation]], encoder: Encoder, wanted: DataSection
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
        source.lengths.append(len(ids))
        if wanted.train_on == "all":
            trained = bytearray(b"\0" + b"\1" * (len(ids) - 1))
        cut = len(ids) > wanted.max_length
        if cut and wanted.on_long != "truncate":
            source.long.append(where)
            continue
        if not any(trained[: wanted.max_length]):
            source.untrained.append(where)
            source.cut_away += any(trained)
            continue
        source.kept.append(Kept(where, Encoded(ids[: wanted.max_length], trained[: wanted.max_length]), cut))


def _examples(sources: list[SourceData]) -> Examples:
    """The kept examples of several sources, end to end."""
    ids, trained = array("i"), bytearray()
    lengths, indices, where, cut = [0], [], [], []
    for source in sources:
        for row, encoded, shortened in source.kept:
            ids.extend(encoded.ids)
            trained += encoded.trained
            lengths.append(len(encoded.ids))
            indices.append(source.index)
            where.append(row)
            cut.append(shortened)
    return Examples(
        np.array(ids, dtype=np.int32),
        np.frombuffer(bytes(trained), dtype=np.bool_),
        np.cumsum(lengths, dtype=np.int64),
        np.array(indices, dtype=np.int32),
        where,
        np.array(cut, dtype=np.bool_),
    )


def _report(
    sources: list[SourceData],
    train: Examples,
    evaluated: Examples | None,
    tokenizer: PreTrainedTokenizerBase,
    wanted: DataSection,
) -> Report:
    seen = set(digests(train))
    shared = 0
    if evaluated is not None:
        shared = len([digest for digest in digests(evaluated) if digest in seen])
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
        unended=_unended(train, tokenizer),
        eval_asked=bool(wanted.eval),
        max_length=wanted.max_length,
    )


def _source_report(source: SourceData) -> SourceReport:
    examples = _examples([source])
    median, high, longest = percentiles(source.lengths)
    return SourceReport(
        path=source.source.path,
        part=source.part,
        format=source.format.name,
        template=source.template.name,
        rows=source.rows,
        examples=len(examples),
        tokens=len(examples.ids),
        trained=int(examples.trained.sum()),
        truncated=sum(kept.cut for kept in source.kept),
        dropped_long=len(source.long),
        dropped_bad=len(source.bad),
        dropped_untrained=len(source.untrained),
        duplicates=len(examples) - len(set(digests(examples))),
        length_p50=median,
        length_p95=high,
        length_max=longest,
    )


def _unended(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> int:
    """Examples without a trained special token, cut ones aside, which have lost theirs."""
    special = [id for id, token in tokenizer.added_tokens_decoder.items() if token.special]
    ends = np.isin(examples.ids, special) & examples.trained
    ended = np.add.reduceat(ends, examples.offsets[:-1]) > 0
    assert examples.cut is not None
    return int((~ended & ~examples.cut).sum())


def _fingerprint(train: Examples, evaluated: Examples | None) -> str:
    digest = hashlib.sha256()
    for examples in (train, evaluated):
        if examples is not None:
            digest.update(len(examples).to_bytes(8, "little"))
            for values in (examples.ids, examples.trained, examples.offsets, examples.source):
                digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()
