"""Loading a base model's tokenizer, and making sure that it reads text as the model was trained to.

transformers rebuilds some tokenizers from their vocabulary and merges and gets white space wrong on the way: a
bare `tokenizer.model` loses runs of spaces, a `LlamaTokenizer` a leading pair. So what was loaded is
compared with the files themselves on texts chosen for that: with SentencePiece where there is a
`tokenizer.model`, else with the plain `tokenizer.json`. What differs is loaded again straight from
`tokenizer.json`, or converted here from `tokenizer.model`, and refused if it still differs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tune.errors import DataError, ModelError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encode = Callable[[str], list[int]]

_PROBES = (
    "Hello",
    "Hi  Hello",
    "  two spaces lead, two trail  ",
    " one\n  two\n\n   three\n\n\n",
    "\n\tstart",
    "def f(x):\n    if x:\n\treturn  x  # twice\n",
    "a    b        c                d",
    "naïve Ærøskøbing, Привет мир, 你好世界, こんにちは, שלום, 🙂👩‍👩‍👧 ☺️",
    "12345 3.14159 1,000,000 0x1F",
    'https://example.org/a_b?c=d&e=%20 {"k": [1, 2]} <b>x</b> [x] \\n ``` |||',
    "ſ ﬁ Ⅷ ｆｕｌｌ e\u0301 \u00a0 \u3000 \u200b x",
)


def load_tokenizer(
    base: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub model or a local folder, checked against its own files.

    Raises:
        ModelError: the base or its tokenizer is not found, not permitted, or not a fast one.
        DataError: no way of loading it reads text as its own files do.
    """
    folder = Path(base).expanduser()
    _check_place(base, folder)
    place = str(folder) if folder.is_dir() else base
    files = {name: _file(place, name, revision) for name in ("tokenizer.json", "tokenizer.model")}
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    if folder.is_dir() and not any(files.values()) and not list(folder.glob("*vocab*")):
        raise ModelError(
            f"{base}: has no tokenizer (neither tokenizer.json nor tokenizer.model). "
            "Copy the tokenizer's files of the original model into it."
        )
    truth = _truth(files)
    for candidate in _candidates(place, base, files, options):
        if not getattr(candidate, "is_fast", False):
            raise ModelError(f"{base}: its tokenizer is not a fast one, so tokens cannot be traced to the text.")
        if truth is None or not _differs(candidate, truth):
            return candidate
        last = candidate
    assert truth is not None
    text = _differs(last, truth)
    raise DataError(
        f"{base}: its tokenizer reads {text!r} differently from its own {_truth_name(files)}, "
        "so training would see other tokens than the model knows. Use a tokenizer.json that matches."
    )


def _check_place(base: str, folder: Path) -> None:
    if folder.is_dir():
        return
    if folder.exists():
        raise ModelError(f"{base}: is a file. Give the folder that holds the model, or a hub id.")
    if base.startswith((".", "/", "~")) or base.count("/") > 1:
        names = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise ModelError(f"{base}: there is no such folder.{did_you_mean(folder.name, names)}")


def _file(place: str, name: str, revision: str | None) -> Path | None:
    """The path of one of the model's files, fetched where needed, or None where the model has no such file."""
    if Path(place).is_dir():
        path = Path(place) / name
        return path if path.is_file() else None
    from transformers.utils import cached_file

    try:
        found = cached_file(place, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise ModelError(hub_problem(place, revision, error)) from error
    return Path(found) if found else None


def _candidates(
    place: str, base: str, files: dict[str, Path | None], options: dict[str, Any]
) -> Iterator[PreTrainedTokenizerBase]:
    """The ways of loading a tokenizer, the usual one first."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        usual = AutoTokenizer.from_pretrained(place, use_fast=True, **options)
    except ImportError as error:
        raise ModelError(f"{base}: its tokenizer needs a package that is not installed ({error}).") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(hub_problem(base, options["revision"], error)) from error
    yield cast("PreTrainedTokenizerBase", usual)
    if files["tokenizer.json"] is not None:
        yield cast("PreTrainedTokenizerBase", PreTrainedTokenizerFast.from_pretrained(place, **options))
    elif files["tokenizer.model"] is not None:
        yield _convert(files["tokenizer.model"], usual)


def hub_problem(base: str, revision: str | None, error: Exception) -> str:
    """Why a base model's files could not be had, in words that say what to do about it."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    kinds = {type(e).__name__ for e in chain}
    said = " ".join(" ".join(str(e).split()) for e in chain)
    status = {getattr(getattr(e, "response", None), "status_code", None) for e in chain}
    page = f"https://huggingface.co/{base}"
    if Path(base).expanduser().is_dir():
        return f"{base}: its tokenizer cannot be loaded ({' '.join(str(error).split())[:200]})."
    if "GatedRepoError" in kinds or "gated repo" in said or 403 in status:
        return f"{base}: is a gated model. Accept its terms at {page}, then log in: `hf auth login`, or set HF_TOKEN."
    if "RevisionNotFoundError" in kinds:
        return f"{base}: there is no revision {revision!r} of this model. See {page}/commits/main."
    if "RepositoryNotFoundError" in kinds or status & {401, 404} or "not a valid model identifier" in said:
        return (
            f"{base}: there is neither such a local folder nor such a model on the hub. Check the name at {page}; "
            "for a private one log in: `hf auth login`, or set HF_TOKEN."
        )
    if "trust_remote_code" in said:
        return f"{base}: its tokenizer is Python code of its own. Read it, then set model.trust_remote_code: true."
    if kinds & {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectError", "ConnectTimeout"}:
        return (
            f"{base}: there is no such local folder, it is not in the cache, and the hub cannot be reached "
            "(or HF_HUB_OFFLINE is set). Check the name, or go online once to fetch it."
        )
    if "HFValidationError" in kinds:
        return f"{base}: is neither a local folder nor a hub id, which reads OWNER/NAME."
    return f"{base}: its tokenizer cannot be loaded ({' '.join(str(error).split())[:200]}). See {page}."


def _truth_name(files: dict[str, Path | None]) -> str:
    return "tokenizer.model" if files["tokenizer.model"] is not None else "tokenizer.json"


def _truth(files: dict[str, Path | None]) -> Encode | None:
    """How the model's own files read a text; None where there are none to ask."""
    try:
        if files["tokenizer.model"] is not None:
            from sentencepiece import SentencePieceProcessor

            return cast(Encode, SentencePieceProcessor(model_file=str(files["tokenizer.model"])).encode)
        if files["tokenizer.json"] is not None:
            from tokenizers import Tokenizer

            backend = Tokenizer.from_file(str(files["tokenizer.json"]))
            return lambda text: backend.encode(text, add_special_tokens=False).ids
    # Both libraries raise a bare Exception or RuntimeError for a file that they cannot parse.
    except Exception as error:
        broken = files["tokenizer.model"] or files["tokenizer.json"]
        raise ModelError(f"{broken}: is no tokenizer that can be read ({error}). Fetch it again.") from error
    return None


def _differs(tokenizer: PreTrainedTokenizerBase, truth: Encode) -> str | None:
    """The first probe that the tokenizer reads otherwise than the truth, or None."""
    return next((t for t in _PROBES if tokenizer.encode(t, add_special_tokens=False) != truth(t)), None)


def _convert(path: Path, usual: Any) -> PreTrainedTokenizerBase:
    """A fast tokenizer from a SentencePiece BPE model with byte fallback, as Llama and Mistral have.

    SentencePiece merges the pair whose result has the best score, so the merges are every way of splitting a
    piece into two pieces, in the order of the pieces' scores. Whether that was right is for the probes to say.
    """
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    model = SentencePieceProcessor(model_file=str(path))
    pieces = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    ordinary = {p: i for p, i in pieces.items() if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))}
    ranked = sorted(ordinary, key=lambda piece: -model.get_score(ordinary[piece]))
    merges = [
        (piece[:cut], piece[cut:])
        for piece in ranked
        for cut in range(1, len(piece))
        if piece[:cut] in ordinary and piece[cut:] in ordinary
    ]
    unknown = model.id_to_piece(model.unk_id())
    backend = Tokenizer(models.BPE(vocab=pieces, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [i for i in pieces.values() if model.is_control(i) or model.is_unknown(i)]
    backend.add_special_tokens([AddedToken(model.id_to_piece(i), normalized=False, special=True) for i in special])
    bos = model.id_to_piece(model.bos_id())
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, model.bos_id())]
    )
    config = path.with_name("tokenizer_config.json")
    kept = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    return cast(
        "PreTrainedTokenizerBase",
        PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token=bos,
            eos_token=model.id_to_piece(model.eos_id()),
            unk_token=unknown,
            model_max_length=kept.get("model_max_length", usual.model_max_length),
            chat_template=usual.chat_template,
            clean_up_tokenization_spaces=False,
        ),
    )
