"""A model folder answers as the run that it was merged from, in its own type, and ends where the run ends."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.evaluation.test_generate import OWN, PENALTIES, write_base
from tests.tiny import write_model, write_tokenizer
from tests.training.jobs import tiny_recipe
from tune.data.conversation import Message
from tune.data.templates.default_system import with_system
from tune.errors import DataError, ModelError, RunError
from tune.evaluation.generate import LoadedRun, Speaker, WholeModel, load_merged, load_run
from tune.run import train

SYSTEM = "You're the keeper of {{ a }} lamp."
PROMPTS = ("Name a lamp.", "Say 7 things.", "calm sea", "Write a response.")


def merge(run: Path, base: Path, folder: Path) -> Path:
    """What `tune merge` writes, made by stock PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    PeftModel.from_pretrained(model, run / "adapter").merge_and_unload().save_pretrained(folder)
    AutoTokenizer.from_pretrained(run / "adapter").save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(PENALTIES))
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[LoadedRun, WholeModel]]:
    """For some templates, a run with a system prompt and the model that it was merged into."""
    folder = tmp_path_factory.mktemp("merged")
    base = write_base(folder / "base")
    loaded = {}
    for template in ("alpaca", "chatml", "tokenizer"):
        changes = {"data__template": template, "data__system": SYSTEM, "model__quantization": "none"}
        run = folder / template
        train(tiny_recipe(folder, base=base, train__max_steps=4, output=run, **changes))
        loaded[template] = load_run(run), load_merged(merge(run, base, run / "merged"))
    return loaded


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model with a chat template, which no run was ever part of."""
    folder = write_model(tmp_path_factory.mktemp("plain") / "model", "llama")
    write_tokenizer(folder, with_system(OWN, SYSTEM))
    return folder


@pytest.fixture
def model(plain: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return shutil.copytree(plain, tmp_path / "model")


@contextlib.contextmanager
def watched(speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The prompts that the model's own `generate` is given."""
    prompts: list[str] = []
    generate = speaker.model.generate

    def listen(**given: Any) -> Any:
        prompts.append(speaker.tokenizer.decode(given["input_ids"][0]))
        return generate(**given)

    with monkeypatch.context() as patch:
        patch.setattr(speaker.model, "generate", listen)
        yield prompts


@pytest.mark.parametrize("template", ["alpaca", "chatml", "tokenizer"])
def test_it_answers_as_its_run_does(
    pairs: dict[str, tuple[LoadedRun, WholeModel]], monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    run, merged = pairs[template]
    assert run.ends == merged.ends
    assert merged.system == run.system == SYSTEM
    for prompt in PROMPTS:
        assert merged.answer(prompt, max_new_tokens=12) == run.answer(prompt, max_new_tokens=12)
    assert any(run.answer(p, max_new_tokens=12) != run.answer(p, max_new_tokens=12, adapter=False) for p in PROMPTS)
    for system in (None, "", "Another."):
        written = []
        for speaker in (run, merged):
            with watched(speaker, monkeypatch) as prompts:
                speaker.answer([Message("user", "hi")], max_new_tokens=1, system=system)
            written += prompts
        assert written[0] == written[1]
        assert ("lamp" in written[0], "Another" in written[0]) == (system is None, system == "Another.")


def test_what_it_is_sent_is_what_its_tokenizer_writes_for_anybody(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged = load_merged(plain)
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "?"},
    ]
    with watched(merged, monkeypatch) as prompts:
        merged.answer([Message(turn["role"], turn["content"]) for turn in turns], max_new_tokens=1)  # type: ignore[arg-type]
    assert prompts == [merged.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)]
    assert SYSTEM in prompts[0]


def test_there_is_no_adapter_to_leave_out(plain: Path) -> None:
    with pytest.raises(RunError, match="no adapter to leave out"):
        load_merged(plain).answer("hi", adapter=False)


@pytest.mark.parametrize(
    ("named", "held"),
    [("bfloat16", "bfloat16"), ("float32", "float32"), ("float16", "float32"), (None, "float32")],
)
def test_weights_keep_their_type(tmp_path: Path, named: str | None, held: str) -> None:
    """And float16 loses nothing."""
    from safetensors.torch import load_file

    folder = write_model(tmp_path / "model", "llama", dtype=getattr(torch, named or "float32"))
    write_tokenizer(folder, OWN)
    if named is None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "dtype" not in k}))
    merged = load_merged(folder, torch.device("cpu"))
    stored, loaded = load_file(folder / "model.safetensors"), merged.model.state_dict()
    assert {tensor.dtype for tensor in loaded.values()} == {getattr(torch, held)}
    assert all(torch.equal(loaded[name], tensor.to(loaded[name].dtype)) for name, tensor in stored.items())
    assert merged.answer("hi", max_new_tokens=3) is not None


@pytest.mark.parametrize("eos", [5, [5, 7]])
def test_an_answer_ends_where_the_generation_config_says_too(model: Path, eos: int | list[int]) -> None:
    (model / "generation_config.json").write_text(json.dumps({**PENALTIES, "eos_token_id": eos}))
    merged = load_merged(model)
    assert set(merged.ends) == {merged.tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])}
    a = merged.tokenizer.encode("a", add_special_tokens=False)[0]
    script, said = [a, a, merged.ends[-1]], []

    def speak(module: Any, given: Any, logits: torch.Tensor) -> torch.Tensor:
        said.append(script[len(said)] if len(said) < len(script) else a)
        forced = torch.zeros_like(logits)
        forced[..., said[-1]] = 1e4
        return forced

    merged.model.get_output_embeddings().register_forward_hook(speak)
    merged.answer("hi", max_new_tokens=9)
    assert said == script


@pytest.mark.parametrize("content", [None, "{"])
def test_a_missing_or_broken_generation_config_leaves_the_configs_end(model: Path, content: str | None) -> None:
    if content is None:
        (model / "generation_config.json").unlink()
    else:
        (model / "generation_config.json").write_text(content)
    assert 1 in load_merged(model).ends


def test_a_template_whose_answers_cannot_be_found_can_still_be_answered(model: Path) -> None:
    """As of models that take earlier thoughts out of a conversation: training needs the spans, answering does not."""
    forgetful = "{% for m in messages %}{{ m['content'] if loop.last else '-' }}{% endfor %}"
    write_tokenizer(model, forgetful)
    assert load_merged(model).answer("hi", max_new_tokens=3) is not None


def test_a_tokenizer_of_another_model(model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"<|filler {number}|>" for number in range(384 - len(tokenizer))])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|mine|>"]})
    tokenizer.chat_template = "<|mine|>" + OWN
    tokenizer.save_pretrained(model)
    with pytest.raises(ModelError, match=r"gives token 384, and the model has 384 embeddings"):
        load_merged(model).answer("hi")


def test_errors_name_the_folder_and_no_key_of_a_recipe(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ModelError) as raised:
        load_merged(model)
    assert str(model) in str(raised.value)
    assert "model.base" not in str(raised.value)
    write_tokenizer(model, "{% for %}")
    with pytest.raises(DataError, match="template tokenizer:1: is not valid jinja"):
        load_merged(model)
    write_tokenizer(model, None)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(RunError, match="no chat template"):
        load_merged(model)
