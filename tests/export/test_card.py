"""The model card: what it says, what the Hub would have against it, and what must never stand in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from tests.hub import card_errors
from tune.export.card import adapter_card, card_warnings, write_card
from tune.export.facts import Facts, is_hub_name, public_recipe, read_facts
from tune.export.licence import Licence, find_licence, licence_warnings
from tune.export.prompt import Prompt, render
from tune.folder import RunFolder
from tune.recipe.load import load_recipe, recipe_to_yaml
from tune.recipe.schema import Recipe
from tune.secrets import holds_secret, redact

PROOF = {
    "verdict": "proven",
    "base": "quantized",
    "bounded": {"logits": {"max_abs_difference": {"figure": 0.00123, "bound": 0.004}, "positions": 7}},
    "reported": {"loss": {"trained": 1.5, "merged": 1.25}, "trained_base": {"mean_kl": 0.0048}},
    "prompts": {"from": "held-out data", "count": 3, "tokens": 70},
}


def a_recipe(**changes: Any) -> Recipe:
    values: dict[str, dict[str, Any]] = {
        "model": {"base": "owner/base"},
        "data": {"train": [{"path": "owner/lamps", "limit": 50}, "/home/me/secret-place/own.jsonl"]},
        "train": {"epochs": 2},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values.setdefault(section, {})[name] = value
    return load_recipe(values)


def facts(**changes: Any) -> Facts:
    recipe = changes.pop("recipe", a_recipe())
    known: dict[str, Any] = {
        "kind": "adapter",
        "recipe": public_recipe(recipe, changes.get("base", "owner/base")),
        "base": "owner/base",
        "licence": Licence("apache-2.0"),
        "data": ("owner/lamps",),
        "data_licences": {"owner/lamps": Licence("cc-by-nc-4.0")},
        "step": 7,
        "loss_before": 2.5,
        "loss_after": 1.25,
        "measured_on": "held-out data",
        "evaluations": ((3, 1.5), (7, 1.25)),
        "versions": {"tune": "0.1.0", "torch": "2.13.0"},
        "base_fingerprint": "b" * 64,
        "data_fingerprint": "d" * 64,
        "prompt": Prompt("<s>Q\n```\nA</s>", "<|end|>"),
        "repo": "me/lamps",
    }
    return Facts(**{**known, **changes})


@pytest.mark.parametrize("kind", ["adapter", "merged"])
@pytest.mark.parametrize("base", ["owner/base", None])
@pytest.mark.parametrize("licence", [Licence(), Licence("apache-2.0"), Licence("other", "own-terms", "https://x.org")])
def test_every_card_has_front_matter_that_the_hub_reads(kind: str, base: str | None, licence: Licence) -> None:
    text = write_card(facts(kind=kind, base=base, licence=licence, proof=PROOF if kind == "merged" else None))
    assert card_errors(text) == []
    data = ModelCard(text).data.to_dict()
    assert data["library_name"] == ("peft" if kind == "adapter" else "transformers")
    assert data["pipeline_tag"] == "text-generation"
    assert {"lora", "tune"} <= set(data["tags"])
    assert data["license"] == (licence.identifier or "unknown")
    assert data.get("license_name") == licence.name
    assert data["datasets"] == ["owner/lamps"], "a local file is no data set of the Hub"
    assert data.get("base_model") == base
    if base is not None:
        assert data["base_model_relation"] == ("adapter" if kind == "adapter" else "finetune")


def test_a_card_says_what_there_is_to_know() -> None:
    card = write_card(facts())
    for words in (
        "# lamps",
        "[owner/base](https://huggingface.co/owner/base)",
        "[owner/lamps](https://huggingface.co/datasets/owner/lamps), first 50 rows",
        "- own.jsonl",
        "| rank, alpha, dropout | 16, 32, 0 |",
        "2 epochs, 32 examples a step; this is the adapter after step 7",
        "| 4-bit base | 2.5000 | 12.18 |",
        "| 4-bit base with the adapter | 1.2500 | 3.49 |",
        "| 3 | 1.5000 |",
        "licence carries over: apache-2.0",
        "the data set owner/lamps is under cc-by-nc-4.0, which forbids commercial use",
        "tune 0.1.0, torch 2.13.0",
        "b" * 64,
        "d" * 64,
        "vllm serve owner/base --enable-lora --lora-modules lamps=me/lamps --max-lora-rank 16",
        "eos_token_id=tokenizer.convert_tokens_to_ids('<|end|>')",
        "tune train recipe.yaml",
    ):
        assert words in card, words
    assert "````text\n<s>Q\n```\nA</s>\n````" in card, "a fence within the prompt ended the example"
    assert "secret-place" not in card
    merged = write_card(facts(kind="merged", proof=PROOF))
    for words in (
        "Verdict: **proven**",
        "with the quantized base and the adapter on 3 examples of the held-out data",
        "| largest difference of a logit | 0.00123 | 0.004 |",
        "Loss on them: 1.5000 as trained, 1.2500 merged.",
        "mean KL divergence, nats 0.0048.",
        "vllm serve me/lamps\n",
        'subfolder="adapter"',
    ):
        assert words in merged, words


def test_the_rank_that_a_server_is_told_holds_every_layer() -> None:
    recipe = a_recipe(adapter__rank=12, adapter__ranks={"attention": 40})
    assert "--max-lora-rank 64" in write_card(facts(recipe=recipe))


def test_an_unknown_base_is_unknown_and_no_path() -> None:
    unknown = facts(recipe=a_recipe(model__base="/home/me/models/own-mistral"), base=None)
    card = write_card(unknown)
    assert "base: unknown" in card
    assert "own-mistral" not in card
    assert any("--base-model OWNER/NAME" in warning for warning in card_warnings(unknown))


def test_a_published_recipe_has_last_names_for_paths_and_can_be_read(tmp_path: Path) -> None:
    recipe = a_recipe(
        model__base=str(tmp_path),
        data__template="/home/me/own.jinja",
        adapter__start_from="../other/run",
        data__system="key sk-proj-abcdefghij1234567890",
    )
    recipe = recipe.model_copy(update={"output": "/data/me/runs/lamps"})
    text = recipe_to_yaml(public_recipe(recipe, "owner/base"))
    assert not any(words in text for words in ("/home", "/data", str(tmp_path), "sk-proj"))
    (tmp_path / "recipe.yaml").write_text(text)
    again = load_recipe(tmp_path / "recipe.yaml")
    assert (again.model.base, again.data.template, again.adapter.start_from) == ("owner/base", "own.jinja", "run")
    assert [source.path for source in again.data.train] == ["owner/lamps", "own.jsonl"]
    assert again.train == recipe.train


def test_what_reads_like_a_hub_name_but_is_here_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("models/base")
    assert not is_hub_name("data/rows.jsonl")
    (tmp_path / "models/base").mkdir(parents=True)
    assert not is_hub_name("models/base")


def write_run(folder: Path, **changes: Any) -> RunFolder:
    """A run's folder with what a card reads, and nothing trained."""
    run = RunFolder(folder / "run")
    run.adapter.mkdir(parents=True)
    run.recipe.write_text(recipe_to_yaml(a_recipe(**changes)))
    run.provenance.write_text(
        json.dumps({"base": {"fingerprint": "b", "commit": "c" * 40}, "data": {"fingerprint": "d"}})
    )
    run.metrics.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0, "eval_loss": 2.25}\n{"ste')
    run.finished.write_text(
        json.dumps({"adapter_step": 2, "loss_before": 3.5, "loss_after": 2.25, "measured_on": "held-out data"})
    )
    return run


def test_the_base_is_named_by_the_flag_the_recipe_or_a_copys_memory(tmp_path: Path) -> None:
    run = write_run(tmp_path / "hub")
    found = read_facts(run, run.adapter, "adapter")
    assert (found.base, found.commit, found.loss_after, found.evaluations) == (
        "owner/base",
        "c" * 40,
        2.25,
        ((2, 2.25),),
    )
    other = read_facts(run, run.adapter, "adapter", base_model="else/where")
    assert (other.base, other.commit, other.recipe.model.base) == ("else/where", None, "else/where")
    copy = tmp_path / "copy"
    copy.mkdir()
    run = write_run(tmp_path / "local", model__base=str(copy))
    assert read_facts(run, run.adapter, "adapter").base is None
    (copy / "config.json").write_text('{"_name_or_path": "/home/me/base"}')
    assert read_facts(run, run.adapter, "adapter").base is None
    (copy / "config.json").write_text('{"_name_or_path": "maker/base"}')
    assert read_facts(run, run.adapter, "adapter").base == "maker/base"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"README.md": "---\nlicense: MIT\n---\n# x"}, Licence("mit")),
        (
            {"README.md": "---\nlicense: other\nlicense_name: own\nlicense_link: https://x.org\n---\n"},
            Licence("other", "own", "https://x.org"),
        ),
        (
            {"README.md": "no front matter", "LICENSE": "\n   Apache License\n   Version 2.0, January"},
            Licence("apache-2.0"),
        ),
        ({"LICENSE.txt": "LLAMA 2 COMMUNITY LICENSE AGREEMENT"}, Licence("llama2")),
        ({"LICENSE": "words of their own"}, Licence("other", "LICENSE")),
        ({"README.md": "---\nlicense: [\n---\n"}, Licence()),
        ({}, Licence()),
    ],
)
def test_the_licence_is_what_card_or_file_say(tmp_path: Path, files: dict[str, str], expected: Licence) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert find_licence(tmp_path, None, "model", None, online=False) == expected


@pytest.mark.parametrize(
    ("base", "data", "words"),
    [
        (Licence(), {}, ["the licence of the base is not known"]),
        (Licence("cc-by-nc-4.0"), {}, ["forbids commercial use"]),
        (Licence("cc-by-nc-nd-4.0"), {}, ["forbids commercial use", "forbids to pass on"]),
        (Licence("llama2"), {}, ["a licence of its own, llama2"]),
        (Licence("other", "own-non-commercial"), {}, ["forbids commercial use", "licence of its own"]),
        (Licence("mit"), {"a/b": Licence("cc-by-nd-4.0")}, ["the data set a/b", "forbids to pass on"]),
        (Licence("mit"), {"a/b": Licence()}, ["the licence of the data set a/b is not known"]),
        (Licence("mit"), {"a/b": Licence("cc-by-sa-4.0")}, ["may ask for the same licence"]),
    ],
)
def test_what_a_licence_forbids_is_warned_of(base: Licence, data: dict[str, Licence], words: list[str]) -> None:
    warnings = " ".join(licence_warnings(base, "the base", data))
    assert all(part in warnings for part in words), warnings
    assert licence_warnings(Licence("apache-2.0"), "the base", {"a/b": Licence("cc-by-4.0")}) == []


@pytest.mark.parametrize(
    "secret",
    [
        "hf_" + "aB3" * 10,
        "sk-" + "proj-aB3" * 5,
        "ghp_" + "aB3" * 12,
        "github_pat_" + "aB3" * 12,
        "AKIA" + "ABCD1234" * 2,
        "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_a_text_shaped_like_a_secret_is_hidden(secret: str) -> None:
    assert redact(f"before {secret} after") == "before *** after"
    assert holds_secret(f"x {secret} y".encode())


def test_a_secret_of_this_environment_is_hidden_wherever_it_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_DB_PASSWORD", 'hor"se\\staple')
    monkeypatch.setenv("SHORT_KEY", "abc")
    monkeypatch.setenv("NOTHING_SPECIAL", "ordinary words")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN_PATH", raising=False)
    (tmp_path / "token").write_text("saved-token-of-mine\n")
    (tmp_path / "stored_tokens").write_text("[work]\nhf_token = another-of-mine\n")
    text = json.dumps(
        {"a": 'hor"se\\staple', "b": "saved-token-of-mine", "c": "another-of-mine", "d": "abc ordinary words"}
    )
    assert json.loads(redact(text)) == {"a": "***", "b": "***", "c": "***", "d": "abc ordinary words"}
    assert redact("https://me:pw@host/x?a=1&access_token=xyz&b=2") == "https://***@host/x?a=1&access_token=***&b=2"
    for plain in ("a task-force of-the-many-words-with-dashes", "mail me@host.org", "https://host/a@b", "hf_hub"):
        assert redact(plain) == plain


def test_the_example_of_a_prompt_is_made_up_and_written_by_the_template() -> None:
    jinja = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    assert render(jinja, {"bos_token": "<s>"}, "Be brief.") == (
        "<s>[system]Be brief.[user]What is the capital of France?[assistant]Paris."
    )
    assert render("{{ raise_exception('no') }}", {}) is None


def test_the_card_of_a_run_that_is_not_published_names_no_path(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    text = adapter_card(a_recipe(model__base=str(base)), 2.0, 1.0, "training data", 5)
    assert str(tmp_path) not in text
    assert "# LoRA adapter for base" in text
    assert "license: mit" in text
    assert "first step" in text, "nothing was held out, so the base itself was never measured"
