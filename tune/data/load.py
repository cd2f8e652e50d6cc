"""The one door to the data: from a recipe and a tokenizer to encoded examples and a report.

Rows are streamed: a few thousand at a time are read, rendered, encoded and appended to files, which are mapped into
memory when they are whole. So the memory taken does not grow with the tokens, and with the rows only by an index. The
files are the entries of a cache, one a source; a source that was encoded before, with the same tokenizer, template and
options, is not read again. The first rows of every source are looked at before anything is tokenised, so that a source
of the wrong kind is told at once. All that is wrong with rows is collected and said together, with the first examples
of each kind.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tune.data.cache import Cache, key_of, template_words, words_digest
from tune.data.examples import Examples
from tune.data.held_out import hold_out, repeated, shared
from tune.data.prepare import Part, Preparer, Progress, SourceData
from tune.data.reading import Reader
from tune.data.refusals import refuse_bad, refuse_empty, refuse_long, refuse_untrained, refuse_weightless
from tune.data.report import Report, SourceReport
from tune.data.sources import open_source
from tune.data.templates.resolve import resolve_template, warns_of_other_template
from tune.data.templates.segment import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tune.recipe.schema import Data as DataSection
    from tune.recipe.schema import Recipe, Source


@dataclass(frozen=True, slots=True)
class Data:
    """Everything a run learns from and is measured on.

    `fingerprint` is the sha256, in hex, of the digests of the encoded examples of both parts, masks included.
    """

    train: Examples
    eval: Examples | None
    template: Template
    report: Report
    fingerprint: str


def load_data(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, on_progress: Progress | None = None, *, cached: bool = True
) -> Data:
    """Read, render, encode and split the recipe's data, or find it in the cache.

    `on_progress` is called with the rows encoded so far and 0, since their total is not known before the end. With
    `cached` false nothing is looked up in the cache or left there.

    Raises:
        DataError: a source cannot be read, a template does not fit the tokenizer, or rows are bad and the
            recipe does not say to drop them.
    """
    with _no_garbage_collection():
        return _load(recipe, tokenizer, on_progress, Cache(keep=cached))


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


def _load(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, on_progress: Progress | None, cache: Cache) -> Data:
    wanted = recipe.data
    template = resolve_template(_main_template(wanted), tokenizer)
    held_out, fraction = (wanted.eval, 0.0) if isinstance(wanted.eval, tuple) else ((), wanted.eval)
    words = words_digest(tokenizer)
    own = [_opened(s, "train", i, tokenizer, words, wanted) for i, s in enumerate(wanted.train)]
    others = [_opened(s, "eval", i, tokenizer, words, wanted) for i, s in enumerate(held_out)]
    sources = [*own, *others]
    _prepare(sources, tokenizer, wanted, cache, on_progress)
    if wanted.on_bad == "error":
        refuse_bad(sources)
        refuse_untrained(sources, wanted.max_length)
    if wanted.on_long == "error":
        refuse_long(sources, wanted.max_length)
    refuse_empty("data.train", own, wanted.max_length)
    if others:
        refuse_empty("data.eval", others, wanted.max_length)
    train, evaluated = _examples(own), _examples(others) if others else None
    if fraction:
        train, evaluated = hold_out(train, fraction, recipe.train.seed)
    refuse_weightless("data.train", own, np.bincount(train.source, minlength=len(own)).tolist())
    notes = _template_notes(sources, template, tokenizer)
    report = _report(sources, train, evaluated, wanted, cache, notes)
    return Data(train, evaluated, template, report, _fingerprint(train, evaluated))


def _main_template(wanted: DataSection) -> str:
    """The template that is saved: the one that every training source uses, or else data.template."""
    used = {source.template or wanted.template for source in wanted.train}
    return used.pop() if len(used) == 1 else wanted.template


def _opened(
    source: Source,
    part: Part,
    index: int,
    tokenizer: PreTrainedTokenizerBase,
    words: str,
    wanted: DataSection,
) -> SourceData:
    """A source that is there, and the key of its entry in the cache: all that its examples depend on."""
    own = resolve_template(source.template or wanted.template, tokenizer)
    opened = open_source(source)
    key = key_of(
        {
            "contents": opened.digest(),
            "source": source.model_dump(include={"format", "columns", "limit"}),
            "options": wanted.model_dump(include={"system", "train_on", "max_length", "on_long", "on_bad"}),
            "template": template_words(own),
            "tokenizer": words,
        }
    )
    return SourceData(source, part, index, opened, own, key)


def _prepare(
    sources: list[SourceData],
    tokenizer: PreTrainedTokenizerBase,
    wanted: DataSection,
    cache: Cache,
    on_progress: Progress | None,
) -> None:
    """Find or encode the examples of every source."""
    for data in sources:
        if kept := cache.find(data.key, data.where):
            data.facts, data.stored = kept
            data.cached = True
    missing = [data for data in sources if not data.cached]
    for data in missing:
        data.reader = Reader(data.opened, data.source, wanted)
    if missing:
        preparer = Preparer(tokenizer, wanted, cache, on_progress)
        for data in missing:
            preparer.prepare(data)


def _examples(sources: list[SourceData]) -> Examples:
    """The examples of several sources, one after the other."""
    return Examples.over([data.stored for data in sources if data.stored is not None], range(len(sources)))


def _template_notes(sources: list[SourceData], saved: Template, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    used = {data.template.name: data.template for data in sources}
    notes = [note for each in used.values() if (note := warns_of_other_template(each, tokenizer)) is not None]
    trained = dict.fromkeys(data.template.name for data in sources if data.part == "train")
    if len(trained) > 1:
        unused = "" if saved.name in trained else ", by which no example of them is written"
        notes.append(
            f"the training sources are written by several templates ({', '.join(trained)}). One is saved with the "
            f"adapter, for whoever asks it: {saved.name}{unused}. data.template chooses it."
        )
    return tuple(notes)


def _report(
    sources: list[SourceData],
    train: Examples,
    evaluated: Examples | None,
    wanted: DataSection,
    cache: Cache,
    template_notes: tuple[str, ...],
) -> Report:
    return Report(
        sources=tuple(_source_report(source) for source in sources),
        train_examples=len(train),
        train_tokens=train.tokens,
        train_trained=int(train.trained_counts.sum()),
        eval_examples=len(evaluated) if evaluated is not None else 0,
        eval_tokens=evaluated.tokens if evaluated is not None else 0,
        eval_trained=int(evaluated.trained_counts.sum()) if evaluated is not None else 0,
        duplicates=repeated(train.digests),
        shared=shared(evaluated.digests, train.digests) if evaluated is not None else 0,
        # Cut ones aside, which have lost their end.
        unended=int((~train.column("ended") & ~train.cut).sum()),
        eval_asked=bool(wanted.eval),
        max_length=wanted.max_length,
        cached=sum(source.cached for source in sources),
        cache_problem=cache.problem,
        template_notes=template_notes,
    )


def _source_report(data: SourceData) -> SourceReport:
    facts = data.known
    return SourceReport(
        path=data.source.path,
        part=data.part,
        format=facts.format,
        template="none" if facts.format == "text" else data.template.name,  # a whole text is written as it is
        rows=facts.rows,
        examples=facts.examples,
        tokens=facts.tokens,
        trained=facts.trained,
        truncated=facts.truncated,
        dropped_long=facts.long.count,
        dropped_bad=facts.bad.count,
        dropped_untrained=facts.untrained.count,
        duplicates=facts.duplicates,
        length_p50=facts.length_p50,
        length_p95=facts.length_p95,
        length_max=facts.length_max,
        mended=tuple(facts.mended.items()),
        secrets=facts.secrets.count,
        first_secret=data.where(*facts.secrets.first[0][0]) if facts.secrets.count else "",
        dropped=tuple(_dropped(data)),
        barren=tuple(_barren(data)),
    )


def _barren(data: SourceData) -> Iterator[str]:
    files = data.opened.files
    if data.stored is None or len(files) == 1 or data.source.limit is not None:
        return
    fruitful = set(np.unique(data.stored.rows["file"]).tolist())
    yield from (name for number, name in enumerate(files) if number not in fruitful)


def _dropped(data: SourceData) -> Iterator[str]:
    facts = data.known
    tallies = {"": facts.bad, "nothing of it is trained on": facts.untrained, "is too long": facts.long}
    for words, tally in tallies.items():
        for place, reason in tally.first:
            yield f"{data.where(*place)}: {reason or words}"


def _fingerprint(train: Examples, evaluated: Examples | None) -> str:
    digest = hashlib.sha256()
    for examples in (train, evaluated):
        if examples is not None:
            digest.update(len(examples).to_bytes(8, "little"))
            for values in (examples.column("content"), examples.source):
                digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()
