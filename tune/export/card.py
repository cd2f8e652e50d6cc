"""The model card: what an adapter or a merged model is, how it was made, how good it is, and how to load it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import yaml

from tune.export.facts import Facts, added_facts, public_recipe, read_facts
from tune.export.licence import find_licence, licence_warnings
from tune.export.loading import adapter_loading, merged_loading
from tune.export.prompt import Prompt
from tune.folder import RunFolder
from tune.recipe.schema import Recipe, Source
from tune.secrets import redact

MOST_EVALUATIONS = 12
"""Rows of the table of evaluations; of more, some between are left out."""


def adapter_card(
    recipe: Recipe,
    loss_before: float,
    loss_after: float,
    measured_on: str,
    step: int,
    prompt: Prompt | None = None,
    added: dict[str, Any] | None = None,
) -> str:
    """Return adapter/README.md, for the adapter of `step`. A local base or data path appears by its last name only.

    Args:
        recipe: the run's.
        loss_before, loss_after: nats per trained token.
        measured_on: what the losses are measured on.
        step: the optimizer step.
        prompt: the template at work.
        added: the tokens that were added, as provenance.json holds them.
    """
    base = recipe.model.base
    hub_base = base if base.count("/") == 1 and not Path(base).expanduser().exists() else None
    folder = Path(base).expanduser() if hub_base is None else None
    facts = Facts(
        kind="adapter",
        recipe=public_recipe(recipe, hub_base or Path(base).name),
        base=hub_base,
        licence=find_licence(folder, hub_base, "model", recipe.model.revision, online=False),
        step=step,
        loss_before=loss_before,
        loss_after=loss_after,
        measured_on=measured_on,
        prompt=prompt,
        **added_facts(added),
    )
    return write_card(facts)


def merged_card(run: RunFolder, adapter: Path, proof: dict[str, Any], base_model: str | None = None) -> str:
    """Return merged/README.md.

    Args:
        run: the run that was merged.
        adapter: the adapter that was merged: the run's, or a checkpoint.
        proof: the content of merge-proof.json.
        base_model: the base's name on the Hub, where the recipe has a local folder.
    """
    return write_card(read_facts(run, adapter, "merged", base_model=base_model, proof=proof))


def write_card(facts: Facts) -> str:
    """Return the text of a README.md for these facts: YAML front matter that the Hub reads, then Markdown."""
    front = yaml.safe_dump(_front_matter(facts), sort_keys=True, allow_unicode=True)
    loading = merged_loading(facts) if facts.kind == "merged" else adapter_loading(facts)
    parts = [
        _title(facts),
        f"## How to load it\n\n{loading}",
        _prompt(facts),
        _results(facts),
        _proof(facts),
        _training(facts),
        _licence(facts),
        _reproduce(facts),
    ]
    return redact(f"---\n{front}---\n\n" + "\n\n".join(part for part in parts if part) + "\n")


def _front_matter(facts: Facts) -> dict[str, Any]:
    licence = facts.licence
    front: dict[str, Any] = {
        "library_name": "peft" if facts.kind == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "tune"],
    }
    if facts.base is not None:
        front["base_model"] = facts.base
        front["base_model_relation"] = "adapter" if facts.kind == "adapter" else "finetune"
    front["license"] = licence.identifier or "unknown"
    if licence.identifier == "other":
        front["license_name"] = licence.name or "see-the-base"
        front["license_link"] = licence.link if licence.link and "://" in licence.link else _page(facts.base)
        front = {key: value for key, value in front.items() if value is not None}
    if facts.data:
        front["datasets"] = list(facts.data)
    return front


def _page(name: str | None) -> str | None:
    return f"https://huggingface.co/{name}" if name else None


def _base(facts: Facts) -> str:
    return f"[{facts.base}]({_page(facts.base)})" if facts.base else facts.base_words


def _title(facts: Facts) -> str:
    recipe = facts.recipe
    name = facts.repo.partition("/")[2] if facts.repo else None
    version = facts.versions.get("tune")
    named = facts.base_words != "unknown"
    if facts.kind == "merged":
        title = name or f"{facts.base_words + ', fine-tuned' if named else 'A fine-tuned model'}"
        what = f"{_base(facts) if named else 'A base'} with a LoRA adapter merged into it. The adapter was"
    else:
        title = name or "LoRA adapter" + (f" for {facts.base_words}" if named else "")
        what = f"A LoRA adapter for {_base(facts)}," if named else "A LoRA adapter (base: unknown),"
    how = f"held in {recipe.model.quantization}" if recipe.model.quantization != "none" else "not quantised"
    return (
        f"# {title}\n\n{what} trained with tune{f' {version}' if version else ''} on {_data_words(facts)}, "
        f"over the base {how} with {recipe.model.dtype} compute."
    )


def _data_words(facts: Facts) -> str:
    return ", ".join(dict.fromkeys(source.path for source in facts.recipe.data.train))


def _prompt(facts: Facts) -> str:
    name = facts.recipe.data.template
    lines = [
        "## Prompt",
        "",
        f"{'The base’s own template' if name == 'tokenizer' else f'Template `{name}`'}, in `chat_template.jinja` and "
        "used by `tokenizer.apply_chat_template`.",
    ]
    if facts.prompt is not None:
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", facts.prompt.text)), default=0))
        lines += [
            "A question and its answer, made up to show it:",
            "",
            f"{fence}text",
            facts.prompt.text.rstrip("\n"),
            fence,
        ]
    if facts.prompt is not None and facts.prompt.stop:
        lines += ["", f"An answer ends with `{facts.prompt.stop}`."]
    if facts.added:
        tokens = ", ".join(f"`{token}` ({number})" for token, number in facts.added.items())
        lines += ["", f"Its tokenizer has tokens that the base's lacks: {tokens}. Their rows of the embedding and of "
                  "the output head were trained with the adapter, and no other row was."]  # fmt: skip
    return "\n".join(lines)


def _results(facts: Facts) -> str:
    if facts.loss_before is None and not facts.evaluations:
        return ""
    rows = []
    held_out = facts.measured_on == "held-out data"
    if facts.loss_before is not None and facts.loss_after is not None:
        base = "4-bit base" if facts.recipe.model.quantization == "nf4" else "base"
        start, end = (base, f"{base} with the adapter") if held_out else ("first step", "last step")
        rows += [(start, facts.loss_before), (end, facts.loss_after)]
    lines = [
        "## Results",
        "",
        f"Loss in nats per trained token on {facts.measured_on}"
        + (" of this run, which the adapter was not trained on." if held_out else ": nothing was held out."),
        "",
        "| | loss | perplexity |",
        "|---|---|---|",
        *(f"| {name} | {loss:.4f} | {_perplexity(loss)} |" for name, loss in rows),
    ]
    if len(facts.evaluations) > 1:
        lines += ["", "| step | held-out loss |", "|---|---|"]
        lines += [f"| {step} | {loss:.4f} |" for step, loss in _thinned(facts.evaluations)]
    return "\n".join(lines)


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.2f}" if loss < 20 else "very high"


def _thinned(evaluations: tuple[tuple[int, float], ...]) -> list[tuple[int, float]]:
    count = len(evaluations)
    if count <= MOST_EVALUATIONS:
        return list(evaluations)
    places = {round(place * (count - 1) / (MOST_EVALUATIONS - 1)) for place in range(MOST_EVALUATIONS)}
    return [evaluations[place] for place in sorted(places)]


_FIGURES = {
    "max_abs_difference": "largest difference of a logit",
    "mean_kl": "mean KL divergence, nats",
    "top1_agreement": "same likeliest token",
}


def _proof(facts: Facts) -> str:
    if facts.kind != "merged" or facts.proof is None:
        return ""
    proof = facts.proof
    logits, reported = proof.get("bounded", {}).get("logits", {}), proof.get("reported", {})
    rows = [
        f"| {words} | {_number(logits[key].get('figure'))} | {_number(logits[key].get('bound'))} |"
        for key, words in _FIGURES.items()
        if isinstance(logits.get(key), dict)
    ]
    prompts = proof.get("prompts", {})
    where = f" on {prompts['count']} examples of the {prompts['from']}" if {"count", "from"} <= prompts.keys() else ""
    lines = [
        "## Proof of the merge",
        "",
        f"Verdict: **{proof.get('verdict', 'unknown')}**. The merged model was compared with the "
        f"{proof.get('base', 'original')} base and the adapter{where}. All figures are in `merge-proof.json`.",
    ]
    if rows:
        lines += ["", "| | measured | bound |", "|---|---|---|", *rows]
    losses = reported.get("loss") or {}
    if {"trained", "merged"} <= losses.keys():
        lines += ["", f"Loss on them: {losses['trained']:.4f} as trained, {losses['merged']:.4f} merged."]
    between = reported.get("trained_base")
    if between:
        figures = ", ".join(f"{words} {_number(between[key])}" for key, words in _FIGURES.items() if key in between)
        lines += ["", f"Beside the 4-bit base that the adapter was trained over (not bounded): {figures}."]
    return "\n".join(lines)


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else str(value)


def _training(facts: Facts) -> str:
    adapter, train, data = facts.recipe.adapter, facts.recipe.train, facts.recipe.data
    length = f"{train.max_steps} steps" if train.max_steps else f"{train.epochs:g} epoch{'s' * (train.epochs != 1)}"
    ranks = "; ".join(f"{name} {rank}" for name, rank in adapter.ranks.items())
    rows = {
        "base": _base(facts) + (f" at commit `{facts.commit}`" if facts.commit else ""),
        "storage of the base, compute": f"{facts.recipe.model.quantization}, {facts.recipe.model.dtype}",
        "targets": ", ".join(adapter.targets) + (f" without {', '.join(adapter.exclude)}" if adapter.exclude else ""),
        "rank, alpha, dropout": f"{adapter.rank}{f' ({ranks})' if ranks else ''}, {adapter.alpha:g}, "
        f"{adapter.dropout:g}",
        "length": f"{length}, {train.batch_size} examples a step"
        + (f"; this is the adapter after step {facts.step}" if facts.step is not None else ""),
        "optimizer, learning rate": f"{train.optimizer}, {train.learning_rate:g} ({train.scheduler}, "
        f"warm-up {train.warmup:g}), weight decay {train.weight_decay:g}, gradient norm at most "
        f"{train.max_grad_norm:g}",
        "longest example, trained on": f"{data.max_length} tokens, {data.train_on}",
        "seed": str(train.seed),
    }
    if facts.recipe.model.trust_remote_code:
        rows["the base's own Python code"] = (
            "runs when the base has some (`trust_remote_code`): read it before you load it"
        )
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    return "\n".join(["## Training", "", *table, "", "Data:", "", *_sources(facts)])


def _sources(facts: Facts) -> list[str]:
    data = facts.recipe.data
    lines = [_source(facts, source) for source in data.train]
    if isinstance(data.eval, tuple):
        return [*lines, "", "Held out:", "", *(_source(facts, source) for source in data.eval)]
    return [*lines, "", f"Held out: {data.eval:.3g} of the examples."] if data.eval else lines


def _source(facts: Facts, source: Source) -> str:
    place = source.path
    if place in facts.data:
        place = f"[{place}](https://huggingface.co/datasets/{place})"
    words = [
        f"split {source.split}" if source.split else "",
        f"first {source.limit} rows" if source.limit else "",
        f"weight {source.weight:g}" if source.weight != 1 else "",
    ]
    return "- " + ", ".join([place, *(word for word in words if word)])


def _licence(facts: Facts) -> str:
    lines = ["## Licence", "", f"The base's licence carries over: {facts.licence.words}."]
    if not facts.licence.known:
        lines[-1] = f"The licence of the base ({facts.base_words}) is not known here; it carries over."
    lines += [f"Data {name}: {licence.words}." for name, licence in facts.data_licences.items()]
    warnings = _licence_warnings(facts)
    return "\n".join([*lines, *([""] if warnings else []), *(f"- **Note:** {warning}" for warning in warnings)])


def card_warnings(facts: Facts) -> list[str]:
    """What to tell a person before this is published."""
    found = []
    if facts.base is None:
        found.append(
            "the base's name on the Hub is not known, so the card says `unknown` and nobody can load the adapter "
            "over it. Say it with --base-model OWNER/NAME."
        )
    return found + _licence_warnings(facts)


def _licence_warnings(facts: Facts) -> list[str]:
    known = f"the base ({facts.base_words})" if facts.base_words != "unknown" else "the base"
    return [redact(text) for text in licence_warnings(facts.licence, known, facts.data_licences)]


def _reproduce(facts: Facts) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    lines = [
        "## How to reproduce it",
        "",
        "```bash",
        "tune train recipe.yaml",
        "```",
        "",
        "`recipe.yaml` beside this card is the whole recipe; local files stand in it by their last names."
        if facts.repo
        else "`recipe.yaml` in the run's folder is the whole recipe.",
    ]
    if versions:
        lines.append(f"Versions: {versions}.")
    prints = {"base": facts.base_fingerprint, "data": facts.data_fingerprint}
    known = [f"{name} `{value}`" for name, value in prints.items() if value]
    if known:
        lines.append(f"Fingerprints (SHA-256): {', '.join(known)}.")
    return "\n".join(lines)


def marker(facts: Facts, run_id: str, files: list[str]) -> str:
    """The text of tune-run.json, by which a later push knows its own repository."""
    content = {"run": run_id, "kind": facts.kind, "tune": facts.versions.get("tune"), "files": sorted(files)}
    return json.dumps(content, indent=1) + "\n"
