"""What a card and a publication say about a run, gathered from its folder, with nothing in it that is only ours.

Local paths name a machine and its user, so a published recipe has their last names only. Names that the Hub knows
stay as they are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tune.data.sources import EXTENSIONS
from tune.errors import RunError
from tune.export.licence import Licence, card_licence, find_licence
from tune.export.prompt import Prompt, read_prompt
from tune.files.foreign import objects_in, read_object
from tune.folder import RunFolder, records
from tune.recipe.load import load_recipe
from tune.recipe.schema import Recipe, Source
from tune.secrets import redact_all

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a run when its card is written; `recipe` is the published one, without local paths."""

    kind: str
    """`adapter` or `merged`."""
    recipe: Recipe
    base: str | None
    """The base's name on the Hub, or None."""
    local_base: Path | None = None
    """Where the base lies on this machine, if it does."""
    commit: str | None = None
    """The base's commit on the Hub."""
    licence: Licence = field(default_factory=Licence)
    data: tuple[str, ...] = ()
    """The data sets of the Hub, by name."""
    data_licences: dict[str, Licence] = field(default_factory=dict)
    step: int | None = None
    """The optimizer step that the adapter is of."""
    loss_before: float | None = None
    loss_after: float | None = None
    """Nats per trained token."""
    measured_on: str = "training data"
    evaluations: tuple[tuple[int, float], ...] = ()
    """(step, held-out loss)"""
    versions: dict[str, str] = field(default_factory=dict)
    base_fingerprint: str = ""
    data_fingerprint: str = ""
    prompt: Prompt | None = None
    proof: dict[str, Any] | None = None
    """The content of merge-proof.json."""
    repo: str | None = None
    """OWNER/NAME where it is published."""
    added: dict[str, int] = field(default_factory=dict)
    """Tokens that the base's tokenizer lacked, with their ids."""
    resize_to: int | None = None
    """How many embeddings the base must have before the adapter can be put on it, where it has fewer."""

    @property
    def base_words(self) -> str:
        """What to call the base where no link is wanted."""
        return self.base or (Path(self.recipe.model.base).name if self.recipe.model.base != "unknown" else "unknown")


def read_facts(
    run: RunFolder,
    adapter: Path,
    kind: str,
    *,
    repo: str | None = None,
    base_model: str | None = None,
    proof: dict[str, Any] | None = None,
    online: bool = False,
) -> Facts:
    """Gather what is known of a run.

    Args:
        run: the run.
        adapter: its adapter/, or one of its checkpoints.
        kind: `adapter` or `merged`.
        repo: where it will be published, if anywhere.
        base_model: the base's name on the Hub, where the recipe has a local folder.
        proof: what merge-proof.json holds or will hold.
        online: whether the Hub may be asked for licences.
    """
    recipe = load_recipe(run.recipe)
    provenance, state = read_provenance(run), _state(run, adapter)
    commit, folder = _where_base_is(recipe, provenance)
    base = _base_name(recipe, folder, base_model)
    hub_data = [source for source in _sources(recipe) if is_hub_name(source.path)]
    evaluations = _evaluations(run)
    machine = provenance.get("machine") or {"versions": state.get("versions")}
    return Facts(
        kind=kind,
        recipe=public_recipe(recipe, base),
        base=base,
        local_base=folder,
        commit=commit if base == recipe.model.base else None,
        licence=find_licence(folder, base, "model", commit if base == recipe.model.base else None, online),
        data=tuple(dict.fromkeys(source.path for source in hub_data)),
        data_licences=_data_licences(recipe, online),
        evaluations=evaluations,
        versions=dict(machine.get("versions") or {}),
        base_fingerprint=str(provenance.get("base", {}).get("fingerprint") or state.get("base_fingerprint") or ""),
        data_fingerprint=str(
            provenance.get("data", {}).get("fingerprint")
            or provenance.get("data_fingerprint")
            or state.get("data_fingerprint")
            or ""
        ),
        prompt=read_prompt(run.adapter, recipe.data.system),
        proof=proof,
        repo=repo,
        **added_facts(provenance.get("added_tokens")),
        **_losses(run, adapter, state, evaluations),
    )


def added_facts(noted: dict[str, Any] | None) -> dict[str, Any]:
    """What provenance.json holds of added tokens, as arguments of `Facts`; a run of an earlier version added none."""
    return {} if noted is None else {"added": dict(noted["ids"]), "resize_to": noted["resize_to"]}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is no file.

    Raises:
        RunError: there is one that cannot be read.
    """
    if not path.is_file():
        return {}
    try:
        return read_object(path, links=True)
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({error}). Remove it; --resume writes it again.") from error


def read_provenance(run: RunFolder) -> dict[str, Any]:
    """What a run was made of, or nothing where it does not say.

    Raises:
        RunError: it cannot be read.
    """
    return run.read_provenance() if run.provenance.is_file() else {}


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The state.json of a checkpoint, or an empty one where there is none.

    Raises:
        RunError: it cannot be read.
    """
    path = checkpoint / "state.json"
    if not path.is_file():
        return {}
    try:
        return records.read_state(path)
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({error}). Use another checkpoint.") from error


def is_hub_name(path: str) -> bool:
    """Whether a recipe's path names something on the Hub: it reads OWNER/NAME and nothing of that name is here."""
    is_file = Path(path).suffix.lower() in EXTENSIONS
    return bool(HUB_NAME.fullmatch(path)) and not is_file and not Path(path).exists()


def public_recipe(recipe: Recipe, base: str | None) -> Recipe:
    """The recipe with the base by its Hub name, local paths by their last names, and no secrets."""
    values = recipe.model_dump(mode="json")
    model, data = values["model"], values["data"]
    if base != model["base"]:
        model.update(base=base or "unknown", revision=None)
    for part in ("train", "eval"):
        if isinstance(data[part], list):
            data[part] = [{**source, **_public_source(source)} for source in data[part]]
    data["template"] = _last_name(data["template"])
    if values["adapter"]["start_from"] is not None:
        values["adapter"]["start_from"] = _last_name(values["adapter"]["start_from"])
    values["output"] = f"runs/{Path(values['output']).name}"
    return Recipe.model_validate(redact_all(values))


def _public_source(source: dict[str, Any]) -> dict[str, Any]:
    public = {"path": _last_name(source["path"])}
    if source.get("template") is not None:
        public["template"] = _last_name(source["template"])
    return public


def _last_name(path: str) -> str:
    return path if is_hub_name(path) or "/" not in path else Path(path).name


def _sources(recipe: Recipe) -> tuple[Source, ...]:
    held_out = recipe.data.eval if isinstance(recipe.data.eval, tuple) else ()
    return (*recipe.data.train, *held_out)


def _data_licences(recipe: Recipe, online: bool) -> dict[str, Licence]:
    """The licence of each data set of the Hub, and of local data that lies beside a card of its own."""
    found = {}
    for source in _sources(recipe):
        if is_hub_name(source.path):
            found[source.path] = find_licence(None, source.path, "dataset", source.revision, online)
            continue
        path = Path(source.path).expanduser()
        # A LICENSE file beside it may be a whole project's, and says nothing about data.
        licence = card_licence(path if path.is_dir() else path.parent)
        if licence.known:
            found[path.name] = licence
    return found


def _where_base_is(recipe: Recipe, provenance: dict[str, Any]) -> tuple[str | None, Path | None]:
    """The base's commit on the Hub, or None; its folder on this machine, or None."""
    folder = Path(recipe.model.base).expanduser()
    noted = provenance.get("base", {})
    # A folder has no commit; it may not be found from here, and its name may read like one of the Hub.
    if folder.is_dir() or ("commit" in noted and noted["commit"] is None):
        return None, folder
    return noted.get("commit") or recipe.model.revision, None


def _base_name(recipe: Recipe, folder: Path | None, given: str | None) -> str | None:
    """What the Hub calls the base: as given, or as the recipe names it, or as a local copy's config remembers it."""
    if given is not None:
        if not HUB_NAME.fullmatch(given):
            raise RunError(f"--base-model: must read OWNER/NAME as on the Hub ({given}).")
        if Path(given).expanduser().exists():
            raise RunError(f"--base-model: {given} is a place on this machine. Give the base's name on the Hub.")
        return given
    if folder is None and HUB_NAME.fullmatch(recipe.model.base):
        return recipe.model.base
    if folder is None:
        return None
    remembered = read_json(folder / "config.json").get("_name_or_path")
    return remembered if isinstance(remembered, str) and is_hub_name(remembered) else None


def _state(run: RunFolder, adapter: Path) -> dict[str, Any]:
    """state.json of the checkpoint that the adapter is, or else of the newest one."""
    steps = run.steps()
    found = {} if adapter == run.adapter else read_state(adapter)
    return found or (read_state(run.checkpoint(steps[-1])) if steps else {})


def _evaluations(run: RunFolder) -> tuple[tuple[int, float], ...]:
    found = []
    if run.metrics.is_file():
        for entry in objects_in(run.metrics):
            step, loss = entry.get("step"), entry.get("eval_loss")
            if type(step) is int and isinstance(loss, int | float):
                found.append((step, float(loss)))
    return tuple(found)


def _losses(
    run: RunFolder, adapter: Path, state: dict[str, Any], evaluations: tuple[tuple[int, float], ...]
) -> dict[str, Any]:
    """Step and losses of a finished run's adapter, or of a checkpoint."""
    if adapter == run.adapter:
        finished = run.read_finished() or {}
        return {
            "step": finished.get("adapter_step"),
            "loss_before": finished.get("loss_before"),
            "loss_after": finished.get("loss_after"),
            "measured_on": finished.get("measured_on", "training data"),
        }
    step = state.get("step")
    held_out = bool(state.get("first_eval_done"))
    return {
        "step": step,
        "loss_before": state.get("first_loss"),
        "loss_after": dict(evaluations).get(step or 0) if held_out else state.get("last_loss"),
        "measured_on": "held-out data" if held_out else "training data",
    }
