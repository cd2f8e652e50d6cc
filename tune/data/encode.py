"""From segments to token ids, with a mask of the tokens that are trained on.

Special tokens are encoded to their ids and nothing else ever is: the text between two of them is one run,
tokenised as one string with special tokens switched off, so that merges across segments come out as they do
when the prompt is written for generation, and no text can become a control token. The mask comes from
character offsets: a token is trained when it starts inside a trained segment, so one that begins in the
prompt and reaches into the answer is not. Runs go through the Rust tokenizer many conversations at a time,
and offsets are asked for only where a run holds both kinds of segment.

The result is what the tokenizer itself makes of the whole prompt, special tokens written out. A tokenizer that
puts a space before the first text only (`Metaspace` with `prepend_scheme: first`) therefore encodes later
runs with a copy that never does.
"""

from __future__ import annotations

import copy
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from tune.data.conversation import BadRowError, Conversation, Message
from tune.data.templates.segment import Segment, Template
from tune.data.tokenizer_files import failures_told

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Encoded(NamedTuple):
    """One encoded prompt: its ids, and a byte a token, 1 where it is trained."""

    ids: array[int]
    trained: bytearray


class _Run(NamedTuple):
    """Text between two special tokens, and where in it training starts and stops."""

    text: str
    continues: bool
    spans: list[tuple[int, bool]]


class _Control(NamedTuple):
    id: int
    trained: bool


class Encoder:
    """A tokenizer prepared for runs of text; the tokenizer itself is left as it is."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._first = _for_runs(copy.deepcopy(tokenizer.backend_tokenizer))
        self._later = _never_prepending(self._first) or self._first
        self._added = {token.content: (id, token) for id, token in tokenizer.added_tokens_decoder.items()}
        self._found_in_text = {id for id, token in self._added.values() if not token.special}

    def encode(self, prompts: Sequence[list[Segment]]) -> list[Encoded | BadRowError]:
        """Each prompt's ids and mask, or why it cannot be encoded.

        Raises:
            ModelError: the tokenizer itself fails, as one does whose pattern gives up on some text.
        """
        parts = [list(self._parts(segments)) for segments in prompts]
        with failures_told("model.base: on the text of a row, the tokenizer"):
            tokens = self._tokenise([part for prompt in parts for part in prompt if isinstance(part, _Run)])
        return [self._assemble(prompt, tokens) for prompt in parts]

    def _parts(self, segments: list[Segment]) -> Iterator[_Run | _Control]:
        text: list[Segment] = []
        continues = eats_space = False
        for segment in segments:
            if not segment.control:
                text.append(segment)
                continue
            id, token = self._added[segment.text]
            if run := _run(text, continues, strip_start=eats_space, strip_end=token.lstrip):
                yield run
            yield _Control(id, segment.trained)
            text, continues, eats_space = [], True, token.rstrip
        if run := _run(text, continues, strip_start=eats_space, strip_end=False):
            yield run

    def _tokenise(self, runs: list[_Run]) -> Iterator[tuple[list[int], bytes]]:
        """The ids and mask of each run, in order."""
        results: list[tuple[list[int], bytes]] = [([], b"")] * len(runs)
        for continues, mixed in ((False, False), (False, True), (True, False), (True, True)):
            chosen = [i for i, run in enumerate(runs) if run.continues == continues and (len(run.spans) > 1) == mixed]
            if not chosen:
                continue
            backend = self._later if continues else self._first
            encode = backend.encode_batch if mixed else backend.encode_batch_fast
            encodings = encode([runs[i].text for i in chosen], add_special_tokens=False)
            for i, encoding in zip(chosen, encodings, strict=True):
                ids = encoding.ids
                spans = runs[i].spans
                mask = _mask(encoding, len(ids), spans) if mixed else (b"\1" if spans[0][1] else b"\0") * len(ids)
                results[i] = (ids, mask)
        return iter(results)

    def _assemble(
        self, parts: list[_Run | _Control], tokens: Iterator[tuple[list[int], bytes]]
    ) -> Encoded | BadRowError:
        ids, trained = array("i"), bytearray()
        # A token that is added but not special is found in text all the same; as a control token it must not be.
        forbidden = {part.id for part in parts if isinstance(part, _Control)} & self._found_in_text
        found: set[int] = set()
        for part in parts:
            if isinstance(part, _Control):
                ids.append(part.id)
                trained.append(part.trained)
                continue
            run_ids, run_mask = next(tokens)
            if forbidden:
                found |= forbidden.intersection(run_ids)
            ids.extend(run_ids)
            trained += run_mask
        if found:
            spelled = ", ".join(repr(text) for text, (id, _) in self._added.items() if id in found)
            return BadRowError(f"a message spells {spelled}, which this tokenizer always reads as a control token")
        if trained:
            trained[0] = 0
        return Encoded(ids, trained)


def _for_runs(backend: Any) -> Any:
    backend.no_truncation()
    backend.no_padding()
    # Without it, a byte-level post-processor trims spaces off the offsets that the mask is read from.
    backend.post_processor = None
    backend.encode_special_tokens = True
    return backend


def _never_prepending(backend: Any) -> Any | None:
    """A copy that puts no space before a text, for tokenizers that do so before the first text only."""
    state = backend.to_str()
    if '"prepend_scheme":"first"' not in state:
        return None
    return _for_runs(type(backend).from_str(state.replace('"prepend_scheme":"first"', '"prepend_scheme":"never"')))


def _run(segments: list[Segment], continues: bool, *, strip_start: bool, strip_end: bool) -> _Run | None:
    """One run of joined segments, less the white space that the special tokens around it swallow."""
    text = "".join(segment.text for segment in segments)
    kept = text.rstrip() if strip_end else text
    cut = len(kept) - len(kept.lstrip()) if strip_start else 0
    if len(kept) == cut:
        return None
    spans: list[tuple[int, bool]] = []
    position = -cut
    for segment in segments:
        end = position + len(segment.text)
        if segment.text and end > 0 and (not spans or spans[-1][1] != segment.trained):
            spans.append((max(position, 0), segment.trained))
        position = end
    return _Run(kept[cut:], continues, spans)


def _mask(encoding: Any, tokens: int, spans: list[tuple[int, bool]]) -> bytes:
    """A byte a token: 1 where the token starts inside a trained span."""
    edges = [0, *(_first_from(encoding, tokens, start) for start, _ in spans[1:]), tokens]
    return b"".join((b"\1" if trained else b"\0") * (edges[i + 1] - edges[i]) for i, (_, trained) in enumerate(spans))


def _first_from(encoding: Any, tokens: int, start: int) -> int:
    """The first token that starts at the character `start` or after it."""
    # Asking for one character is ten times as fast as a list of all offsets.
    token = encoding.char_to_token(start)
    if token is None:  # a character of which the tokenizer kept nothing
        return bisect_left(encoding.offsets, (start, -1))
    # Several tokens may stand for one character, and a token without any before them.
    while token < tokens and encoding.token_to_chars(token)[0] < start:
        token += 1
    while token and encoding.token_to_chars(token - 1)[0] >= start:
        token -= 1
    return int(token)


def encode_prompt(messages: Sequence[Message], template: Template, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a prompt up to where the next answer starts, as in training.

    Raises:
        BadRowError: the template cannot express these messages.
    """
    segments = template.segments(Conversation(tuple(messages)), generation_prompt=True)
    encoded = _encoder(tokenizer, len(tokenizer)).encode([segments])[0]
    if isinstance(encoded, BadRowError):
        raise encoded
    return encoded.ids.tolist()


@lru_cache(maxsize=2)
def _encoder(tokenizer: PreTrainedTokenizerBase, size: int) -> Encoder:
    # `size` is only part of the key: a tokenizer that has been given more tokens is another one.
    return Encoder(tokenizer)
