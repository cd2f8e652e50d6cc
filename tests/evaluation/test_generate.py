"""An answer is the likeliest text after the prompt that trained, and ends where the template ends a turn."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import write_model, write_tokenizer
from tests.training.jobs import tiny_recipe
from tune.data.conversation import Message
from tune.data.encode import encode_prompt
from tune.evaluation.generate import LoadedRun, load_run
from tune.run import train

OWN = "{% for message in messages %}OWN {{ message['content'] }}{{ eos_token }}{% endfor %}"
"""A chat template that the base's tokenizer brings, and that no run here trains with."""
PENALTIES = {
    "do_sample": True,
    "temperature": 5.0,
    "num_beams": 3,
    "repetition_penalty": 9.0,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 8,
    "suppress_tokens": list(range(60, 200)),
    "max_length": 3,
}
"""What a base's generation_config.json may ask for."""


def write_base(folder: Path) -> Path:
    """A model whose tokenizer knows ChatML's tokens and has a chat template of its own."""
    from transformers import AutoTokenizer

    write_model(folder, "mistral", vocab_size=386)
    write_tokenizer(folder, OWN)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(PENALTIES))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedRun]:
    """A run for each template, loaded; and one that has a checkpoint only, hence the base's own tokenizer."""
    folder = tmp_path_factory.mktemp("generate")
    base = write_base(folder / "base")
    loaded = {}
    for template in ("alpaca", "chatml"):
        changes = {"data__template": template, "train__max_steps": 4, "output": folder / template}
        train(tiny_recipe(folder, base=base, **changes))
        loaded[template] = load_run(folder / template)
    shutil.rmtree(folder / "alpaca/adapter")
    loaded["unfinished"] = load_run(folder / "alpaca")
    return loaded


def watch(run: LoadedRun, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that the prompts go into which the model's own `generate` is given."""
    prompts: list[str] = []
    plain = run.model.generate

    def generate(**given: Any) -> Any:
        prompts.append(run.tokenizer.decode(given["input_ids"][0]))
        return plain(**given)

    monkeypatch.setattr(run.model, "generate", generate)
    return prompts


PROMPTS = {
    "alpaca": "### Instruction:\nName a lamp.\n\n### Response:",
    "unfinished": "### Instruction:\nName a lamp.\n\n### Response:",
    "chatml": "<|im_start|>user\nName a lamp.<|im_end|>\n<|im_start|>assistant\n",
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_the_prompt_is_written_as_the_run_trained_it(
    runs: dict[str, LoadedRun], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    prompts = watch(runs[kind], monkeypatch)
    runs[kind].answer("Name a lamp.", max_new_tokens=1)
    (written,) = prompts
    assert written.endswith(PROMPTS[kind])
    assert "OWN" not in written


def likeliest(run: LoadedRun, count: int) -> list[int]:
    """The `count` tokens that the model itself finds likeliest after the prompt, one by one."""
    prompt = encode_prompt([Message("user", "Name a lamp.")], run.template, run.tokenizer)
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(run.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("adapter", [True, False])
def test_at_temperature_zero_the_answer_is_the_likeliest_token_each_time(
    runs: dict[str, LoadedRun], adapter: bool
) -> None:
    """Whatever the base's generation_config.json asks for."""
    run = runs["alpaca"]
    with nullcontext() if adapter else run.model.disable_adapter():
        tokens = likeliest(run, 12)
    assert len(set(tokens)) < len(tokens), "no token comes twice, so that no penalty would show"
    text = run.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert run.answer("Name a lamp.", max_new_tokens=12, adapter=adapter) == text
    assert run.answer("Name a lamp.", max_new_tokens=12, adapter=not adapter) != text


@pytest.mark.parametrize(("template", "end"), [("alpaca", "</s>"), ("chatml", "<|im_end|>"), ("chatml", "</s>")])
def test_an_answer_ends_where_the_template_ends_a_turn(runs: dict[str, LoadedRun], template: str, end: str) -> None:
    """The model is made to say `a`, `b`, the end and then `c` for ever."""
    run = runs[template]
    a, b, c = (run.tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "abc")
    script = [a, b, run.tokenizer.convert_tokens_to_ids(end)]
    said: list[int] = []

    def speak(module: Any, given: Any, logits: torch.Tensor) -> torch.Tensor:
        said.append(script[len(said)] if len(said) < len(script) else c)
        forced = torch.zeros_like(logits)
        forced[..., said[-1]] = 1e4
        return forced

    hook = run.model.get_output_embeddings().register_forward_hook(speak)
    try:
        assert run.answer("Name a lamp.", max_new_tokens=9) == "ab"
    finally:
        hook.remove()
    assert said == script, "nothing is generated after the end"
