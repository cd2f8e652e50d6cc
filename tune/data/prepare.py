"""From the rows of one source to its stored examples, a few thousand rows at a time.

What is wrong with rows is counted and the first of them remembered. Where the recipe refuses bad rows, nothing more is
tokenised once there is one: the rest is only read, so that all of them can be told at once.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from tune.data.cache import Cache, Kept
from tune.data.conversation import BadRowError
from tune.data.encode import Encoded, Encoder
from tune.data.examples import ROW, Stored, digests
from tune.data.facts import Facts
from tune.data.formats.text import WholeTexts
from tune.data.held_out import repeated
from tune.data.reading import Reader, Said
from tune.data.report import percentiles
from tune.data.sources import Opened, Place
from tune.data.store import Writer
from tune.data.templates.jinja_template import JinjaTemplate
from tune.data.templates.segment import Segment, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tune.recipe.schema import Data as DataSection
    from tune.recipe.schema import Source

Part = Literal["train", "eval"]
Progress = Callable[[int, int], None]
Prompts = tuple[list[Place], list[list[Segment]]]
"""Where each prompt is from, and the prompts."""


@dataclass(slots=True)
class SourceData:
    """One source on its way from a recipe to examples."""

    source: Source
    part: Part
    index: int
    opened: Opened
    template: Template
    key: str
    """Of its entry in the cache."""
    reader: Reader | None = None
    """At its first rows, until they are read."""
    facts: Facts | None = None
    stored: Stored | None = None
    """None where nothing was encoded, since rows are bad."""
    cached: bool = False

    @property
    def known(self) -> Facts:
        """The facts of a source that has been read."""
        assert self.facts is not None
        return self.facts

    def where(self, file: int, number: int) -> str:
        """How messages name a row."""
        return self.opened.where(Place(file, number))


class _NotEncodedError(Exception):
    """The source was read to its end, and has bad rows."""


class Preparer:
    """Reads and encodes sources, one after the other."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, wanted: DataSection, cache: Cache, on_progress: Progress | None
    ) -> None:
        self._tokenizer, self._wanted, self._cache = tokenizer, wanted, cache
        self._on_progress = on_progress
        self._encoder = Encoder(tokenizer)
        self._whole_texts: WholeTexts | None = None
        self._special = np.array([id for id, token in tokenizer.added_tokens_decoder.items() if token.special], "i4")
        self._refused = False
        self._done = 0

    def prepare(self, data: SourceData) -> None:
        """Fill in the facts of a source, and its examples unless rows are refused.

        Raises:
            DataError: the source cannot be read, or nothing in it.
        """
        try:
            if self._refused:
                self._read(data, None)
            else:
                self._keep(data, self._cache.fill(data.key, lambda writer: self._read(data, writer), data.where))
        except _NotEncodedError:
            self._refused = True
        self._done += data.known.rows

    def _keep(self, data: SourceData, kept: Kept) -> None:
        data.facts, data.stored = kept
        data.reader = None

    def _read(self, data: SourceData, writer: Writer | None) -> Facts:
        reader, data.reader = data.reader or Reader(data.opened, data.source, self._wanted), None
        data.facts = facts = reader.facts
        examples = _Examples(facts, writer, self._wanted, self._special) if writer is not None else None
        for said, prompts in self._ahead(reader.chunks(), data.template, facts):
            if self._wanted.on_bad == "error" and facts.bad.count:
                examples = None
            if examples is not None:
                examples.add(said, self._encoder.encode(prompts))
            if self._on_progress is not None:
                self._on_progress(self._done + facts.rows, 0)
        if examples is None or (self._wanted.on_bad == "error" and facts.bad.count):
            raise _NotEncodedError
        examples.finish()
        return facts

    def _ahead(self, chunks: Iterator[list[Said]], template: Template, facts: Facts) -> Iterator[Prompts]:
        """The prompts of each chunk. Where another process writes them, it does the next while these are encoded."""
        if not isinstance(template, JinjaTemplate):
            for chunk in chunks:
                yield self._written(chunk, template, facts)
            return
        ready: Prompts | None = None
        for chunk in chunks:
            begun = template.begin([said.conversation for said in chunk if said.conversation.text is None])
            if ready is not None:
                yield ready
            ready = self._written(chunk, template, facts, iter(begun()))
        if ready is not None:
            yield ready

    def _written(
        self,
        chunk: list[Said],
        template: Template,
        facts: Facts,
        made: Iterator[list[Segment] | BadRowError] | None = None,
    ) -> Prompts:
        """The prompts of the conversations that the template can write, or has `made`, and where each is from."""
        places, prompts = [], []
        for place, conversation in chunk:
            try:
                if conversation.text is not None:
                    self._whole_texts = self._whole_texts or WholeTexts(self._tokenizer)
                    prompt: list[Segment] | BadRowError = self._whole_texts.segments(conversation.text)
                else:
                    prompt = template.segments(conversation) if made is None else next(made)
                if isinstance(prompt, BadRowError):
                    raise prompt
            except BadRowError as error:
                facts.bad.add(place, str(error))
            else:
                prompts.append(prompt)
                places.append(place)
        return places, prompts


class _Examples:
    """Takes encoded prompts as examples, or counts why not, and writes them."""

    def __init__(self, facts: Facts, writer: Writer, wanted: DataSection, special: np.ndarray) -> None:
        self._facts, self._writer, self._wanted, self._special = facts, writer, wanted, special
        self._lengths = array("i")
        """Tokens in each prompt as written, before any cut."""
        self._digests: list[np.ndarray] = []

    def add(self, places: list[Place], results: list[Encoded | BadRowError]) -> None:
        """Take the encoded prompts of a chunk; what is kept of them is written."""
        facts, wanted = self._facts, self._wanted
        ids, masks, content = bytearray(), bytearray(), bytearray()
        rows: list[tuple[int, int, int, int, bool]] = []
        for place, encoded in zip(places, results, strict=True):
            if isinstance(encoded, BadRowError):
                facts.bad.add(place, str(encoded))
                continue
            tokens, mask = encoded
            length = len(tokens)
            self._lengths.append(length)
            if wanted.train_on == "all":
                mask = bytearray(b"\0" + b"\1" * (length - 1))
            cut = length > wanted.max_length
            if cut:
                if wanted.on_long != "truncate":
                    facts.long.add(place)
                    continue
                beyond = mask.count(1, wanted.max_length)
                tokens, mask = tokens[: wanted.max_length], mask[: wanted.max_length]
            trained = mask.count(1)
            if not trained:
                facts.untrained.add(place)
                facts.cut_away += bool(cut and beyond)
                continue
            raw = tokens.tobytes()
            for digest in digests(raw, mask):
                content += digest
            ids += raw
            masks += mask
            rows.append((len(tokens), trained, place.file, place.number, cut))
        if rows:
            self._write(np.frombuffer(ids, "i4"), np.frombuffer(masks, "?"), np.frombuffer(content, "<u8"), rows)

    def _write(
        self, ids: np.ndarray, masks: np.ndarray, content: np.ndarray, listed: list[tuple[int, int, int, int, bool]]
    ) -> None:
        facts = self._facts
        lengths, trained, files, numbers, cut = (np.array(column) for column in zip(*listed, strict=True))
        rows, ends = np.zeros(len(listed), dtype=ROW), np.cumsum(lengths)
        rows["end"] = facts.tokens + ends
        rows["digest"], rows["content"] = content.reshape(-1, 2, 2).swapaxes(0, 1)
        rows["trained"], rows["file"], rows["number"], rows["cut"] = trained, files, numbers, cut
        rows["ended"] = np.logical_or.reduceat(masks & np.isin(ids, self._special), ends - lengths)
        self._writer.add(ids, masks, rows)
        self._digests.append(np.ascontiguousarray(rows["digest"]))
        facts.examples += len(rows)
        facts.tokens += len(ids)
        facts.trained += int(trained.sum())
        facts.truncated += int(cut.sum())
        facts.largest_id = max(facts.largest_id, int(ids.max()))

    def finish(self) -> None:
        """Count what only the whole shows, and make the written examples whole."""
        facts = self._facts
        facts.length_p50, facts.length_p95, facts.length_max = percentiles(self._lengths)
        if self._digests:
            facts.duplicates = repeated(np.concatenate(self._digests))
        self._writer.finish(facts)
