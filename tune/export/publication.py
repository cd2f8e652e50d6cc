"""A publication: every file that a push sends, made whole before the first request.

Only files that are known to belong are taken, so that nothing left in a folder goes out by accident. Small texts
are written anew without local paths and secrets; what cannot be changed without breaking it (weights, tokenizer,
template) goes as it is, and is refused if it holds a secret.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from tune.adapters.config_file import read_adapter_config
from tune.errors import RunError
from tune.export.card import card_warnings, marker, write_card
from tune.export.facts import HUB_NAME, Facts, read_facts, read_json, read_provenance, read_state
from tune.folder import PROOF, UNPROVEN, RunFolder, check_unchanged, file_digest, folder_of
from tune.folder.places import refuse_foreign_folder
from tune.folder.records import read_proof
from tune.recipe.load import load_recipe, recipe_to_yaml
from tune.secrets import holds_secret, redact, redact_all, secret_in

MARKER = "tune-run.json"
"""In every repository that tune published: which run, and what of it."""

_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_MERGED = (
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", PROOF),
    *("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "*.py"),
)
_REWRITTEN = ("*config.json", PROOF, "special_tokens_map.json")
_NAMES_A_PLACE = {"name_or_path", "_name_or_path", "base_model_name_or_path"}
_ONLY_OURS = {"is_local", "local_files_only", "tokenizer_file", "vocab_file", "merges_file"}
"""Keys of a tokenizer's configuration that speak of this machine."""

_CADENCES = {
    *("epochs", "max_steps", "save_every", "eval_every", "log_every", "keep", "micro_batch_tokens", "recompute"),
}
"""Keys of `train` that may change while a run stays the same run."""


@dataclass(frozen=True, slots=True)
class Publication:
    """What goes where."""

    repo: str
    private: bool
    kind: str
    """`adapter` or `merged`."""
    run: str
    """The run's identity, as in tune-run.json."""
    files: dict[str, bytes | Path]
    """Path in the repository -> content, or the file that holds it."""
    card: str
    source: str
    """The folder on this machine, for messages."""
    warnings: list[str] = field(default_factory=list)

    def size(self, name: str) -> int:
        """Bytes of one file."""
        content = self.files[name]
        return len(content) if isinstance(content, bytes) else content.stat().st_size

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(self.size(name) for name in self.files)


def check_name(repo: str, key: str = "OWNER/NAME") -> None:
    """Refuse a name that cannot be a repository's.

    Raises:
        RunError: it does not read OWNER/NAME, or holds a secret.
    """
    if HUB_NAME.fullmatch(repo) and (secret := secret_in(repo)) is not None:
        raise RunError(f"{key}: {repo} holds {secret}. Give another name, or unset a variable that is no secret.")
    wrong = not HUB_NAME.fullmatch(repo) or len(repo) > 96 or re.search(r"--|\.\.|\.git$|[-.]$", repo)
    if wrong:
        raise RunError(
            f"{key}: {repo} cannot be a repository. Give OWNER/NAME, where OWNER is your account or "
            "organisation, in letters, digits, '-', '_' and '.'."
        )


@dataclass(frozen=True, slots=True)
class Source:
    """What on this machine is to be published, and fit for it."""

    path: str
    """As the user named it."""
    run: RunFolder
    adapter: Path
    kind: str
    """`adapter` or `merged`."""
    merged: Path
    """Where `tune merge` puts the merged model."""
    proof: dict[str, Any] | None
    """Of a merged model."""


def find_source(path: str | Path, merged: bool) -> Source:
    """Return what a run, or one of its checkpoints, has to publish.

    Raises:
        RunError: there is no adapter yet, or no merged model that is proven to be what was trained.
    """
    run, adapter = _adapter_of(path)
    folder = run.merged if adapter == run.adapter else run.root / f"merged-{adapter.name}"
    proof = check_merge(folder, adapter, f"tune merge {shlex.quote(str(path))}") if merged else None
    return Source(str(path), run, adapter, "merged" if merged else "adapter", folder, proof)


def build_publication(
    source: Source, repo: str, *, private: bool = False, base_model: str | None = None, online: bool = False
) -> Publication:
    """Gather everything that a push sends; nothing is sent.

    Args:
        source: from `find_source`.
        repo: OWNER/NAME.
        private: whether a new repository is private.
        base_model: the base's name on the Hub, where the recipe has a local folder.
        online: whether the Hub may be asked for licences; without, only what is cached is read.

    Raises:
        RunError: a file that cannot be changed holds a secret, or a name cannot be one on the Hub.
    """
    check_name(repo)
    run, adapter, kind, proof = source.run, source.adapter, source.kind, source.proof
    facts = read_facts(run, adapter, kind, repo=repo, base_model=base_model, proof=proof, online=online)
    files: dict[str, bytes | Path] = {}
    if kind == "merged":
        files |= _files(source.merged, (*_MERGED, *_TOKENIZER), facts)
        files |= {f"adapter/{name}": content for name, content in _adapter_files(adapter, facts).items()}
    else:
        files |= _adapter_files(adapter, facts) | _files(run.adapter, _TOKENIZER, facts)
    card = _without_places(write_card(facts), run)
    header = "# The recipe of this run, with every default. Local files stand in it by their last names.\n"
    files["README.md"] = card.encode()
    files["recipe.yaml"] = redact(header + recipe_to_yaml(facts.recipe)).encode()
    identity = run_identity(run)
    files[MARKER] = marker(facts, identity, [*files, MARKER]).encode()
    warnings = [*card_warnings(facts), *_template_warnings(files)]
    return Publication(repo, private, kind, identity, dict(sorted(files.items())), card, source.path, warnings)


def run_identity(run: RunFolder) -> str:
    """A SHA-256 by which a run is known again wherever its folder lies.

    It is taken over base, data and what the recipe says of model, adapter, data and training, without paths and
    without what may change on a resume.
    """
    values = load_recipe(run.recipe).model_dump(mode="json")
    provenance = read_provenance(run)
    base = provenance.get("base", {}).get("fingerprint")
    data = provenance.get("data", {}).get("fingerprint") or provenance.get("data_fingerprint")
    if base is None or data is None:
        steps = run.steps()
        state = read_state(run.checkpoint(steps[-1])) if steps else {}
        base, data = state.get("base_fingerprint"), state.get("data_fingerprint")
    for name in ("base", "revision"):
        values["model"].pop(name)
    for part in ("train", "eval"):
        if isinstance(values["data"][part], list):
            values["data"][part] = [
                {key: value for key, value in source.items() if key != "path"} for source in values["data"][part]
            ]
    for section, key in (("adapter", "start_from"), ("data", "template")):
        values[section][key] = Path(values[section][key] or "").name
    values["train"] = {key: value for key, value in values["train"].items() if key not in _CADENCES}
    parts = {key: values[key] for key in ("model", "adapter", "router", "data", "train")}
    return hashlib.sha256(json.dumps([base, data, parts], sort_keys=True).encode()).hexdigest()


def check_merge(folder: Path, adapter: Path, command: str) -> dict[str, Any]:
    """Return the content of merge-proof.json of a merged model.

    Args:
        folder: the merged model's.
        adapter: the adapter that was merged.
        command: what merges it again.

    Raises:
        RunError: there is no merged model, it is not whole, its proof failed, or it is another adapter's.
    """
    refuse_foreign_folder(folder)  # a link in it would publish what it leads to
    if not folder.is_dir():
        raise RunError(f"{folder}: there is no merged model yet. Type `{command}`, then push again.")
    again = f"Remove that folder and type `{command}`"
    try:
        proof = read_proof(folder / PROOF) if (folder / PROOF).is_file() else {}
    except (OSError, ValueError) as error:
        raise RunError(f"{folder / PROOF}: cannot be read ({error}). {again}.") from error
    if (folder / UNPROVEN).exists() or (proof and proof.get("verdict") != "proven"):
        reasons = proof.get("reasons") or ["its proof failed"]
        raise RunError(
            f"{folder}: is not the model that was trained ({redact('; '.join(map(str, reasons)))[:200]}), so it is not "
            f"published. {again}, or push the adapter without --merged."
        )
    if not proof:
        raise RunError(f"{folder}: has no merge-proof.json, so nothing says that it is what was trained. {again}.")
    if not list(folder.glob("*.safetensors")):
        raise RunError(f"{folder}: holds no weights. {again}.")
    prints = proof.get("fingerprints", {})
    if prints.get("adapter") not in (None, file_digest(_weights(adapter))):
        raise RunError(f"{folder}: was merged from another adapter than {adapter} holds now. {again}.")
    for name, digest in prints.get("files", {}).items():
        if not (folder / name).is_file() or file_digest(folder / name) != digest:
            raise RunError(f"{folder / name}: is not the file that was proven. {again}.")
    return proof


def _adapter_of(path: str | Path) -> tuple[RunFolder, Path]:
    """The run and the adapter folder that `path` means, with a tokenizer to publish beside it."""
    run, adapter = folder_of(path)
    given = Path(path).expanduser()
    asked_for_a_checkpoint = adapter != run.adapter and given.resolve() == adapter.resolve()
    if adapter != run.adapter and not asked_for_a_checkpoint:
        raise RunError(f"{path}: this run is not finished, so it has no adapter. Finish it with --resume.")
    if not (run.adapter / "tokenizer_config.json").is_file():
        raise RunError(
            f"{path}: {run.adapter} holds no tokenizer and template to publish beside the adapter. "
            f"Finish the run with `tune train {run.recipe} --resume`."
        )
    _weights(adapter)
    check_unchanged(run, adapter)
    read_adapter_config(adapter)  # others will load it as it is
    return run, adapter


def _weights(adapter: Path) -> Path:
    path = adapter / "adapter_model.safetensors"
    if not path.is_file():
        raise RunError(f"{adapter}: holds no adapter_model.safetensors. Remove finished.json and use --resume.")
    return path


def _adapter_files(adapter: Path, facts: Facts) -> dict[str, bytes | Path]:
    return {**_files(adapter, ("adapter_config.json",), facts), "adapter_model.safetensors": _weights(adapter)}


def _files(folder: Path, patterns: tuple[str, ...], facts: Facts) -> dict[str, bytes | Path]:
    """The files of a folder that match, texts rewritten."""
    found: dict[str, bytes | Path] = {}
    for path in sorted(folder.iterdir()):
        if path.is_symlink():  # it would publish what it leads to, which may be no part of this run
            raise RunError(f"{path}: is a link, and only files that lie in the run are published. Put the file there.")
        if not path.is_file() or not any(fnmatch(path.name, pattern) for pattern in patterns):
            continue
        if any(fnmatch(path.name, pattern) for pattern in _REWRITTEN):
            content = redact_all(_public(read_json(path), facts))
            found[path.name] = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
            continue
        if leak := _leak(path):
            raise RunError(
                f"{path}: holds what looks like a secret ({leak}), and cannot be changed without breaking it. "
                "Remove it there; if a word is there by chance, unset that variable while you push."
            )
        found[path.name] = path
    return found


def _leak(path: Path) -> str | None:
    """What of a file is a secret, in words that do not tell it."""
    if path.suffix != ".safetensors":
        return holds_secret(path.read_bytes())
    with open(path, "rb") as file:  # the weights themselves are numbers; the header is text
        return holds_secret(file.read(min(int.from_bytes(file.read(8), "little"), 2**26)))


def _public(value: Any, facts: Facts) -> Any:
    """A configuration without places on this machine: the base by its Hub name, other paths left out."""
    if isinstance(value, list):
        return [_public(inner, facts) for inner in value]
    if not isinstance(value, dict):
        return Path(value).name if isinstance(value, str) and _is_place(value) else value
    public = {}
    for key, inner in value.items():
        if key in _ONLY_OURS:
            continue
        if key in _NAMES_A_PLACE:
            if key != "name_or_path":
                public[key] = facts.base
            continue
        public[key] = _public(inner, facts)
    return public


def _is_place(text: str) -> bool:
    """Whether a text is a path of this machine, and nothing else."""
    if len(text) > 4096 or "\n" in text:
        return False
    own = tuple(f"{folder}/" for folder in (Path.home(), Path.cwd()) if len(folder.parts) > 1)
    return text.startswith(own) or (text.count("/") > 1 and _exists(text))


def _exists(text: str) -> bool:
    try:
        return Path(text).is_absolute() and Path(text).exists()
    except (OSError, ValueError):
        return False


def _without_places(text: str, run: RunFolder) -> str:
    """A text in which no folder of this machine stands, even where a library's words brought one."""
    for place in (run.root.resolve(), Path.cwd()):
        if len(place.parts) > 2:
            text = text.replace(str(place), place.name)
    return text


def _template_warnings(files: dict[str, bytes | Path]) -> Iterator[str]:
    if "chat_template.jinja" not in files:
        yield "there is no chat_template.jinja, so others have to write prompts by hand."
