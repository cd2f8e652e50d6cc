"""Loading a base model's tokenizer, and making sure that it reads text as the model was trained to.

transformers rebuilds some tokenizers from their vocabulary and merges and gets white space wrong on the way: a
bare `tokenizer.model` loses runs of spaces, a `LlamaTokenizer` a leading pair. So what was loaded is
compared with the files themselves on texts chosen for that: with SentencePiece where there is a
`tokenizer.model`, else with the plain `tokenizer.json`. What differs is loaded again straight from
`tokenizer.json`, or converted here from `tokenizer.model`, and refused if it still differs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tune.data.auto_map import files_of_code
from tune.data.hub import explain, one_line
from tune.data.tokenizer_files import CONFIG, check_class, check_contents, check_files, failures_told
from tune.errors import DataError, ModelError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encode = Callable[[str], list[int]]

_FILES = ("tokenizer.json", "tokenizer.model")

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
    base: str, *, revision: str | None = None, trust_remote_code: bool = False, saved: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub model or a local folder, checked against its own files.

    Args:
        base: the model.
        revision: of a hub model.
        trust_remote_code: whether a tokenizer that is Python code of the model's own may run.
        saved: the folder is a run's adapter. Whatever lies there, no code of it runs: a tokenizer that was code is read
            from the tokenizer.json that was saved of it.

    Raises:
        ModelError: the base or its tokenizer is not found, not permitted, or not a fast one.
        DataError: no way of loading it reads text as its own files do.
    """
    with failures_told(f"model.base: the tokenizer of {base}"):
        return _loaded(base, revision, trust_remote_code, saved)


def _loaded(base: str, revision: str | None, trust_remote_code: bool, saved: bool) -> PreTrainedTokenizerBase:
    folder = Path(os.path.expanduser(base))
    _check_place(base, folder)
    place = str(folder) if folder.is_dir() else base
    files = _local_files(folder) if folder.is_dir() else _hub_files(base, revision)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    if folder.is_dir() and not any(files.values()) and not list(folder.glob("*vocab*")):
        raise ModelError(
            f"{base}: has no tokenizer (neither tokenizer.json nor tokenizer.model). "
            "Copy the tokenizer's files of the original model into it."
        )
    _check_files(base, folder, revision, files["tokenizer.json"], trust_remote_code)
    truth, name = _truth(base, files)
    misread = None
    for candidate in _candidates(place, base, files, options, saved):
        if not getattr(candidate, "is_fast", False):
            continue
        misread = _differs(candidate, truth) if truth is not None else None
        if misread is None:
            return candidate
    if misread is None:
        raise ModelError(f"{base}: its tokenizer is not a fast one, so tokens cannot be traced to the text.")
    raise DataError(
        f"{base}: its tokenizer reads {misread!r} differently from its own {name}, "
        "so training would see other tokens than the model knows. Use a tokenizer.json that matches."
    )


def _check_files(base: str, folder: Path, revision: str | None, state: Path | None, trust_remote_code: bool) -> None:
    """Refuse files that ask for what no tokenizer needs. Raises ModelError."""
    if folder.is_dir():
        check_files(base, folder)
        found = {name: folder / name if (folder / name).is_file() else None for name in (CONFIG, "config.json")}
    else:
        found = {name: _hub_file(base, name, revision) for name in (CONFIG, "config.json")}
    check_contents(base, state, found[CONFIG])
    for path in found.values():
        content = json.loads(path.read_text(encoding="utf-8")) if path is not None else None
        if not (trust_remote_code and files_of_code(content)):
            check_class(base, content)


def _hub_file(base: str, name: str, revision: str | None) -> Path | None:
    from transformers.utils import cached_file

    quiet = ("gated_repo", "missing_entries", "connection_errors")
    try:
        path = cached_file(base, name, revision=revision, **{f"_raise_exceptions_for_{what}": False for what in quiet})
    except (OSError, ValueError):  # whoever loads the tokenizer meets it again, and says so
        return None
    return Path(path) if path else None


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a SHA-256 over every token and its id, and over which are special."""
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    digest = hashlib.sha256()
    for token, id in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{id} {token!r} {id in special}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _check_place(base: str, folder: Path) -> None:
    if folder.is_dir():
        return
    if folder.exists():
        raise ModelError(f"{base}: is a file. Give the folder that holds the model, or a hub id.")
    if base.startswith((".", "/", "~")) or base.count("/") > 1:
        names = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise ModelError(f"{base}: there is no such folder.{did_you_mean(folder.name, names)}")


def _local_files(folder: Path) -> dict[str, Path | None]:
    return {name: folder / name if (folder / name).is_file() else None for name in _FILES}


def _hub_files(base: str, revision: str | None) -> dict[str, Path | None]:
    """The tokenizer's files in the cache, fetched where they are not, with None for what the model does not have.

    Asking the hub for the model comes first: it fails at once, where fetching a file tries again for a minute.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from transformers.utils import cached_file

    found = {name: try_to_load_from_cache(base, name, revision=revision) for name in _FILES}
    cached = {name: Path(path) if isinstance(path, str) else None for name, path in found.items()}
    if any(cached.values()):
        return cached
    try:
        listed = {file.rfilename for file in HfApi().model_info(base, revision=revision, timeout=10).siblings or []}
        paths = {name: cached_file(base, name, revision=revision) for name in _FILES if name in listed}
    # From name resolution to a refused token, every layer raises its own kind; each ends as one clear message.
    except Exception as error:
        raise ModelError(_problem(base, revision, error)) from error
    return {name: Path(paths[name]) if paths.get(name) else None for name in _FILES}


def _candidates(
    place: str, base: str, files: dict[str, Path | None], options: dict[str, Any], saved: bool
) -> Iterator[PreTrainedTokenizerBase]:
    """The ways of loading a tokenizer, the usual one first."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    trusted = bool(options["trust_remote_code"])  # never left open: transformers would ask on the terminal
    code = saved and files_of_code(_config_of(place, None))
    if not code or files["tokenizer.json"] is None:
        try:
            usual = AutoTokenizer.from_pretrained(place, revision=options["revision"], trust_remote_code=trusted)
        except ImportError as error:
            raise ModelError(f"{base}: its tokenizer needs a package that is not installed ({error}).") from error
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ModelError(_problem(base, options["revision"], error)) from error
        yield cast("PreTrainedTokenizerBase", usual)
    if files["tokenizer.json"] is not None:
        yield cast("PreTrainedTokenizerBase", PreTrainedTokenizerFast.from_pretrained(place, **options))
    elif files["tokenizer.model"] is not None:
        yield _convert(files["tokenizer.model"], usual)


def _config_of(base: str, revision: str | None) -> Any:
    """What tokenizer_config.json holds; nothing where there is none that can be read."""
    from huggingface_hub import try_to_load_from_cache

    path = Path(base).expanduser() / "tokenizer_config.json"
    if not path.parent.is_dir():
        cached = try_to_load_from_cache(base, path.name, revision=revision)
        path = Path(cached) if isinstance(cached, str) else path
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # whoever needs the file says what is wrong with it
        return None


def _problem(base: str, revision: str | None, error: Exception) -> str:
    """Why a tokenizer could not be had."""
    if not Path(base).expanduser().is_dir() and (said := explain(error, base, "model.base", revision=revision)):
        return said
    if "trust_remote_code" in str(error):
        code = files_of_code(_config_of(base, revision))
        named = f" ({', '.join(code)})" if code else ""
        return (
            f"model.base: the tokenizer of {base} is Python code of its own{named}, and nobody has said that it may "
            "run. Read it, and set model.trust_remote_code: true only if you trust it."
        )
    return f"model.base: the tokenizer of {base} cannot be loaded ({one_line(error)}). Copy it again from the original."


def _truth(base: str, files: dict[str, Path | None]) -> tuple[Encode | None, str]:
    """How the model's own file reads a text, and that file's name; no way to tell where there is no file."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer

    problem: Exception | None = None
    # Both libraries raise a bare Exception or RuntimeError for a file that they cannot parse. A tokenizer.model
    # need not be SentencePiece's: then tokenizer.json is the truth.
    if (path := files["tokenizer.model"]) is not None:
        try:
            return cast(Encode, SentencePieceProcessor(model_file=str(path)).encode), path.name
        except Exception as error:
            problem = error
    if (path := files["tokenizer.json"]) is not None:
        try:
            backend = Tokenizer.from_file(str(path))
            backend.no_padding()
            backend.no_truncation()
            return lambda text: backend.encode(text, add_special_tokens=False).ids, path.name
        except Exception as error:
            problem = error
    if problem is not None:
        raise ModelError(f"{base}: its tokenizer cannot be read ({problem}). Fetch its files again.") from problem
    return None, ""


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
