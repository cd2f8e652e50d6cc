"""One source of the recipe, from its rows to conversations: which format reads it, and which rows it cannot read."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from tune.data.conversation import BadRowError, Conversation
from tune.data.encode import Encoded
from tune.data.formats import Format, detect_format, find_format
from tune.data.sources import BadRow, Rows, read_rows
from tune.data.templates.resolve import resolve_template
from tune.data.templates.segment import Template
from tune.data.unread import advice, no_format_fits
from tune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tune.recipe.schema import Data as DataSection
    from tune.recipe.schema import Source

Part = Literal["train", "eval"]


class Kept(NamedTuple):
    """An example that is used: its row, its tokens, and whether it was cut at data.max_length."""

    where: str
    encoded: Encoded
    cut: bool


@dataclass(slots=True)
class SourceData:
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
    cut_away: int = 0
    """How many of `untrained` had something to train on beyond data.max_length."""
    long: list[str] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    lengths: array[int] = field(default_factory=lambda: array("q"))
    """Tokens in each prompt as written, before any cut."""


def read_source(
    source: Source,
    part: Part,
    index: int,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    wanted: DataSection,
) -> SourceData:
    """A source's rows as conversations, the bad ones set aside.

    Raises:
        DataError: the source cannot be read, or no format reads any of its rows.
    """
    rows = read_rows(source)
    if not rows.good:
        raise DataError(
            f"{source.path}: none of its rows ({len(rows)}) can be read. The first: {_ended(str(rows.bad[0]))}"
        )
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
    return SourceData(source, part, index, fmt, own, conversations, len(rows), bad)


def _format(source: Source, rows: Rows) -> Format:
    values = [row.value for row in rows.good]
    if source.format != "auto":
        fmt = find_format(source.format)
    elif (detected := detect_format(values)) is None:
        raise DataError(no_format_fits(source.path, values, source.columns))
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
    values = [row.value for row in rows.good]
    better = detect_format(values)
    first = min(bad, key=lambda row: row.position)
    if better is not None and better is not fmt:
        said = str(first).rstrip(".")
        raise DataError(f"{source.path}: its rows are not {fmt.name} ({said}). They fit format: {better.name}.")
    found = f"{source.path}: none of its rows ({len(rows)}) can be read as {fmt.name}"
    raise DataError(
        f"{found}, which needs {fmt.needs}. The first: {_ended(str(first))} {advice(values, source.columns)}"
    )


def _ended(sentence: str) -> str:
    return sentence if sentence.endswith((".", "?", "!")) else f"{sentence}."
