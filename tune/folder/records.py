"""The records in a run's folder, checked before anything acts on them.

A run may have been made by somebody else, or have been changed. Each record below says what it may hold: types,
ranges, and names that are names and lead nowhere else. A key that is not known is let be, since another version may
have written it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from tune.files.foreign import read_object
from tune.recipe.read import dotted, shown


def _plain_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}", name):
        raise ValueError("must be the names of files in this folder")
    return name


def _commit(text: str) -> str:
    if not re.fullmatch(r"[0-9a-zA-Z][0-9a-zA-Z_-]{0,99}", text):
        raise ValueError("must be a commit")
    return text


_Whole = Annotated[int, Field(ge=0, le=10**15)]
_Text = Annotated[str, Field(max_length=4096)]
_Loss = Annotated[float, Field(allow_inf_nan=False)] | None
_Name = Annotated[str, AfterValidator(_plain_name)]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Token = Annotated[int, Field(ge=0, lt=2**31)]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _Versions(_Record):
    versions: dict[str, _Text | None] | None = None


class _Finished(_Record):
    output: _Text = ""
    steps: _Whole = 0
    adapter_step: _Whole = 0
    measured_on: Literal["held-out data", "training data"] = "training data"
    loss_before: _Loss = None
    loss_after: _Loss = None
    tokens_per_second: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    peak_memory_bytes: _Whole = 0
    adapter_files: dict[_Name, _Digest] = Field(default_factory=dict)


class _Base(_Record):
    name: _Text = ""
    commit: Annotated[str, AfterValidator(_commit)] | None = None
    fingerprint: _Text = ""


class _Data(_Record):
    fingerprint: _Text = ""
    part: Literal["held-out data", "training data"] = "training data"


class _Message(_Record):
    role: Literal["system", "user", "assistant", "tool"]
    content: _Text


class _Dialogue(_Record):
    messages: Annotated[list[_Message], Field(min_length=1, max_length=64)]
    ids: Annotated[list[_Token], Field(max_length=100_000)]


class _Words(_Record):
    vocabulary: _Text
    dialogues: Annotated[list[_Dialogue], Field(max_length=64)]


class _Added(_Record):
    ids: Annotated[dict[_Text, _Token], Field(max_length=10_000)]
    resize_to: _Token | None


class _Example(_Record):
    row: _Text = ""
    ids: list[_Token]
    trained: list[Annotated[int, Field(ge=0, le=1)]]


class _Provenance(_Record):
    base: _Base = Field(default_factory=_Base)
    data: _Data = Field(default_factory=_Data)
    data_fingerprint: _Text | None = None
    words: _Words | None = None
    added_tokens: _Added | None = None
    machine: _Versions | None = None
    examples: Annotated[list[_Example], Field(min_length=1, max_length=1000)] | None = None


class _Router(_Record):
    balance: Annotated[float, Field(allow_inf_nan=False)]


class _Unlogged(_Record):
    step: _Whole
    loss: _Loss
    learning_rate: _Loss
    grad_norm: _Loss
    tokens: _Whole
    tokens_per_second: _Loss
    memory_bytes: _Whole
    router: _Router | None = None


class _State(_Versions):
    step: _Whole
    bad_steps: _Whole = 0
    best_step: _Whole | None = None
    best_loss: _Loss = None
    evaluations_since_best: _Whole = 0
    first_loss: _Loss = None
    last_loss: _Loss = None
    first_eval_done: bool = False
    trained_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    trained_tokens: _Whole = 0
    total_steps: _Whole = 0
    data_fingerprint: _Text = ""
    base_fingerprint: _Text = ""
    row_tokens: _Whole = 0
    shortened_from: _Whole = 0
    recompute: Literal["none", "experts", "full"] | bool = "none"
    expert_counts: Annotated[list[list[_Whole]], Field(max_length=10_000)] | None = None
    unlogged: _Unlogged | None = None
    optimizer: dict[_Text, Annotated[float, Field(allow_inf_nan=False)]] = Field(default_factory=dict)


_Number = float | Literal["nan", "inf", "-inf"]


class _Figure(_Record):
    figure: _Number | None = None
    bound: _Number | None = None


class _Logits(_Record):
    max_abs_difference: _Figure = Field(default_factory=_Figure)
    mean_kl: _Figure = Field(default_factory=_Figure)
    top1_agreement: _Figure = Field(default_factory=_Figure)


class _Bounded(_Record):
    logits: _Logits = Field(default_factory=_Logits)


class _Between(_Record):
    max_abs_difference: _Number | None = None
    mean_kl: _Number | None = None
    top1_agreement: _Number | None = None


class _Reported(_Record):
    loss: Annotated[dict[str, float], Field(max_length=8)] | None = None
    trained_base: _Between | None = None


class _Prompts(_Record):
    part: Annotated[Literal["held-out data", "training data"], Field(alias="from")] = "training data"
    count: _Whole = 0


class _Fingerprints(_Record):
    adapter: _Digest | None = None
    files: Annotated[dict[_Name, _Digest], Field(max_length=10_000)] = Field(default_factory=dict)


class _Proof(_Record):
    verdict: Literal["proven", "failed"]
    reasons: list[str] = Field(default_factory=list)
    base: Literal["original", "quantized"] = "original"
    bounded: _Bounded = Field(default_factory=_Bounded)
    reported: _Reported = Field(default_factory=_Reported)
    prompts: _Prompts = Field(default_factory=_Prompts)
    fingerprints: _Fingerprints = Field(default_factory=_Fingerprints)


class _Manifest(_Record):
    files: Annotated[dict[_Name, _Digest], Field(min_length=1, max_length=1000)]


def read_finished(path: Path) -> dict[str, Any]:
    """Return a finished.json.

    Raises:
        ValueError: it holds something else; says what.
        OSError: it cannot be read.
    """
    return _checked(_Finished, read_object(path))


def read_provenance(path: Path) -> dict[str, Any]:
    """Return a provenance.json.

    Raises:
        ValueError: it holds something else; says what.
        OSError: it cannot be read.
    """
    found = _checked(_Provenance, read_object(path, 256 * 2**20))
    if any(len(example["ids"]) != len(example["trained"]) for example in found.get("examples") or ()):
        raise ValueError("examples: each must have as many ids as it says are trained or not")
    return found


def missing_of(provenance: dict[str, Any]) -> list[str]:
    """Return what a merge and its proof need and a provenance.json does not say, as an earlier version's may not."""
    needed = (
        *(("base", "fingerprint"), ("data", "fingerprint"), ("data", "part")),
        *(("words", "vocabulary"), ("words", "dialogues")),
    )
    missing = [".".join(keys) for keys in needed if (provenance.get(keys[0]) or {}).get(keys[1]) is None]
    return missing if provenance.get("examples") else [*missing, "examples"]


def read_state(path: Path) -> dict[str, Any]:
    """Return the state.json of a checkpoint, whose folder is named after its step.

    Raises:
        ValueError: it holds something else, or another step's; says what.
        OSError: it cannot be read.
    """
    found = _checked(_State, read_object(path, 64 * 2**20))
    if path.parent.name != f"step-{found['step']:06d}":
        raise ValueError(f"step: is {found['step']}, and the folder is {shown(path.parent.name)}")
    if found.get("total_steps", 0) and found["step"] > found["total_steps"]:
        raise ValueError(f"step: is {found['step']} of {found['total_steps']}")
    return found


def read_proof(path: Path) -> dict[str, Any]:
    """Return a merge-proof.json.

    Raises:
        ValueError: it holds something else, or names files that are not of its folder; says what.
        OSError: it cannot be read.
    """
    return _checked(_Proof, read_object(path))


def read_manifest(path: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a folder by its name, as its manifest.json says.

    Raises:
        ValueError: it holds something else, or a name that is not one of the folder's; says what.
        OSError: it cannot be read.
    """
    found: dict[str, str] = _checked(_Manifest, {"files": read_object(path)})["files"]
    return found


def _checked(record: type[_Record], content: dict[str, Any]) -> dict[str, Any]:
    try:
        record.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        words = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        # A file's name stands for itself; elsewhere the last part of a place may be pydantic's word for a type.
        raise ValueError(f"{dotted(first['loc'])}: {words[:1].lower()}{words[1:]} ({shown(first['input'])})") from None
    return content
