"""The proof of a merge: that the files on the disk are the model that was trained.

Everything is read back from the disk, and the truth beside it is computed by others than those who merged: ΔW comes
from stock PEFT's own layers, the adapter in the logits is stock PEFT's forward, the words are what training saw.

Bounded, and the proof fails beyond:

- **weights**: names, types, shapes and files are the base's; embedding and output head are taller by what added
  tokens need. What no adapter changes is equal to the last bit, every row of an embedding too that is no added
  token's; an added token's row is the trained one, rounded. What else an adapter changes is W + ΔW rounded once:
  nearer than half a unit in the last place. This finds an error of scale far below what any logit shows.
- **logits**: of the base that was merged into with the adapter beside it, against those of the merged model, both in
  float32 on the run's prompts. Rounding to 16 bits moves logits, more in one model than in another, so the bound is
  no guess: a control model, whose adapted matrices are stock PEFT's W + ΔW rounded as they are stored, says what
  rounding does to this one, and one and a half times that is allowed.
- **tokenizer**: vocabulary, and token ids of some dialogues through the saved chat template, are those of training.
- **config**: config.json and generation_config.json hold what the base's do, and end answers where training did.

Reported beside it, without a bound: the base that was trained on (in 4 bits) with the adapter, against the merged
model, and the losses of both. A base in 16 bits differs from its 4-bit form by itself.

Each model runs from its files, one matrix in memory at a time (`tune.models.streamed`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tune.errors import ModelError
from tune.export.proof.config import check_configs
from tune.export.proof.logits import check_logits
from tune.export.proof.prompts import choose_prompts
from tune.export.proof.stock import with_stock_adapter
from tune.export.proof.tokenizer import check_tokenizer
from tune.export.proof.weights import check_weights, expected_shape, open_merged
from tune.export.subject import Subject
from tune.files.pickles import pickles_among
from tune.folder import PROOF, UNPROVEN, file_digest
from tune.models.shards import Checkpoint, Place
from tune.models.streamed import compute_device
from tune.progress import Progress
from tune.versions import versions


@dataclass(frozen=True, slots=True)
class Proof:
    """What was found out about a merged folder."""

    content: dict[str, Any]
    """As merge-proof.json holds it."""

    @property
    def reasons(self) -> list[str]:
        """Why the proof fails; empty when it holds."""
        return list(self.content["reasons"])

    @property
    def holds(self) -> bool:
        """Whether the merged model is the trained model."""
        return not self.reasons

    def to_text(self) -> str:
        """The text of merge-proof.json."""
        return json.dumps(_writable(self.content), indent=1, allow_nan=False) + "\n"


def prove(subject: Subject, folder: Path, progress: Progress | None = None) -> Proof:
    """Prove that `folder` holds the merge of `subject`; a failure is a verdict, not an exception.

    Raises:
        ModelError: the base or the adapter, the truth of the proof, cannot be read.
    """
    heard = progress or Progress()
    prompts = choose_prompts(subject.provenance["examples"])
    bounded: dict[str, Any] = {}
    reported: dict[str, Any] = {}
    reasons: list[str] = []
    merged: Checkpoint | None = None
    stock = with_stock_adapter(subject, compute_device())
    try:
        merged = open_merged(folder)
    except ModelError as error:
        reasons.append(f"weights: {error}")
    with heard.phase("proving the tokenizer"):
        bounded["tokenizer"] = check_tokenizer(subject, folder, reasons)
        check_configs(subject, folder, reasons)
    if merged is not None:
        with heard.phase("proving the weights") as advance:
            bounded["weights"] = check_weights(subject, stock, merged, reasons, advance)
        if _same_names(subject.checkpoint, merged, partial(expected_shape, stock)):
            try:
                with heard.phase("proving the logits") as advance:
                    figures = check_logits(subject, stock, folder, merged, prompts, reasons, advance)
                bounded["logits"], reported = figures
            except ModelError as error:
                reasons.append(f"logits: {error}")
    content = {
        "verdict": "failed" if reasons else "proven",
        "reasons": reasons,
        "base": subject.base,
        "bounded": bounded,
        "reported": reported,
        "prompts": {
            "from": subject.provenance["data"]["part"],
            "count": len(prompts),
            "tokens": sum(len(prompt.ids) for prompt in prompts),
            "fingerprints": [prompt.fingerprint for prompt in prompts],
        },
        "fingerprints": {
            "base": subject.provenance["base"]["fingerprint"],
            "data": subject.provenance["data"]["fingerprint"],
            "adapter": file_digest(subject.adapter / "adapter_model.safetensors"),
            "files": {path.name: file_digest(path, True) for path in sorted(folder.iterdir()) if _is_proven(path)},
        },
        "versions": versions(),
    }
    return Proof(content)


def _writable(value: Any) -> Any:
    """The same with NaN and infinity, which a failed proof may have found, in words: JSON has no numbers for them."""
    if isinstance(value, dict):
        return {key: _writable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_writable(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _same_names(base: Checkpoint, merged: Checkpoint, shape_of: Callable[[str, Place], tuple[int, ...]]) -> bool:
    """Whether the merged files can stand in the base's place: else no logits can be computed, and it was said why."""
    return {name: shape_of(name, place) for name, place in base.places.items()} == {
        name: place.shape for name, place in merged.places.items()
    }


def _is_proven(path: Path) -> bool:
    """Whether a file is a part of the model, and neither what is said of it nor a pickle, which nothing here opens."""
    if pickles_among([path.name]):
        return False
    return path.is_file() and not path.name.startswith(".") and path.name not in (PROOF, UNPROVEN, "README.md")
