"""A split of a data set on the Hugging Face Hub, read through `datasets`, which keeps it on the disk."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune.data.hub import explain, one_line, refused_at_once
from tune.data.sources.kinds import FILE_ENDINGS
from tune.data.sources.rows import Place, Row
from tune.errors import DataError

if TYPE_CHECKING:
    from tune.recipe.schema import Source

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ROWS = 512
"""Rows made into Python objects at a time."""


def is_hub_id(path: str) -> bool:
    """Whether a path reads OWNER/NAME and does not end as a file does."""
    return bool(_HUB_ID.fullmatch(path)) and Path(path).suffix.lower() not in FILE_ENDINGS


_KINDS = ("json", "csv", "parquet", "arrow", "text", "cache")
"""The modules of `datasets` that read tables; the last one reads what another has prepared."""


class HubSplit:
    """One split of a data set, fetched when it is made.

    Raises:
        DataError: there is no such data set, revision, configuration or split, it is not permitted, or cannot be
            fetched.
    """

    by_line = False

    def __init__(self, source: Source) -> None:
        split = source.split or "train"
        self.shown = f"{source.path}[{split}]"
        self._source = source
        self._dataset = _load(source, split)
        if not hasattr(self._dataset, "select"):
            raise DataError(f"{source.path}: split {split!r} gives no table of rows. Name one split, such as 'train'.")

    def rows(self, index: int) -> Iterator[Row]:
        """The rows in order, numbered from 0; pictures and sounds are left as they are stored."""
        number = 0
        for batch in self._batches():
            names = list(batch)
            for values in zip(*batch.values(), strict=True):
                yield Row(dict(zip(names, values, strict=True)), Place(index, number))
                number += 1

    def feed(self, hasher: Any) -> None:
        """Update a hash with what `datasets` knows the data by."""
        known = [
            # Of the data set's name, configuration, version and commit, and of the split, percentages included.
            self._dataset._fingerprint,
            self._source.config,
            str(self._dataset.split),
            len(self._dataset),
            str(self._dataset.features),
        ]
        hasher.update(json.dumps(known, sort_keys=True, default=str).encode())

    def _batches(self) -> Iterator[dict[str, list[Any]]]:
        from datasets import Json

        dataset = self._dataset
        for name, feature in dataset.features.items():
            # An object kept as JSON is a row's own; decoding a picture needs libraries and gives nothing to train on.
            if hasattr(feature, "decode") and not isinstance(feature, Json):
                dataset = dataset.cast_column(name, dataclasses.replace(feature, decode=False))
        try:
            yield from dataset.iter(batch_size=_ROWS)
        # Its cache may be damaged or gone, and features of its own may fail; each ends as one clear message.
        except Exception as error:
            raise DataError(
                f"{self.shown}: cannot be read from the cache ({one_line(error)}). Remove its folder in "
                "HF_DATASETS_CACHE, and fetch it again."
            ) from error


def _load(source: Source, split: str) -> Any:
    import datasets
    from datasets.naming import camelcase_to_snakecase

    owner, name = source.path.split("/")
    prepared = Path(datasets.config.HF_DATASETS_CACHE) / f"{owner}___{camelcase_to_snakecase(name)}"
    refused = None if prepared.is_dir() else refused_at_once(source.path, "data", source.revision)
    if refused is not None:
        raise DataError(refused)
    try:
        builder = datasets.load_dataset_builder(source.path, name=source.config, revision=source.revision)
        _check_kind(source.path, builder)
        return datasets.load_dataset(source.path, name=source.config, split=split, revision=source.revision)
    except DataError:
        raise
    # Everything below `load_dataset`, from HTTP to Arrow, raises its own kinds; each ends as one clear message.
    except Exception as error:
        raise DataError(_problem(source, split, error)) from error


def _check_kind(name: str, builder: Any) -> None:
    """Refuse what `datasets` reads with code that goes beyond tables: it takes pickles out of archives, for one."""
    kind = type(builder).__module__.rpartition(".")[2]
    if kind not in _KINDS:
        raise DataError(
            f"data: {name} holds data of a kind that is not read here ({kind}). Read are {', '.join(_KINDS[:-1])}. "
            "Save its rows as .jsonl."
        )


def _problem(source: Source, split: str, error: Exception) -> str:
    """What went wrong on the hub, in words that say what to do about it."""
    name, said = source.path, one_line(error)
    if "scripts are no longer supported" in said:
        return f"data: {name} is made by a script, which is never run here. Save its rows as .jsonl."
    if "Config name is missing" in said or "BuilderConfig" in said:
        return f"data: config {source.config!r} of {name} does not fit ({said}). Set `config:` of the source."
    if "split" in said.lower():
        return f"data: split {split!r} of {name} does not fit ({said}). Set `split:` of the source."
    if access := explain(error, name, "data", kind="dataset", revision=source.revision):
        return access
    page = f"https://huggingface.co/datasets/{name}"
    return f"data: {name} cannot be loaded from the Hub ({said}). See {page}."
