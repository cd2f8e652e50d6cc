"""A merge of an adapter with added tokens: the vocabulary grows, and nothing else; a wrong row fails the proof."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.export.merges import (
    Made,
    change_json,
    change_tensors,
    file_of,
    header_of,
    made,
    tensors_of,
    weight_files,
)
from tests.training.jobs import tiny_recipe
from tune.adapters.convert import convert
from tune.errors import ModelError, UntrustworthyError
from tune.evaluation.generate import load_merged, load_run
from tune.export.card import merged_card
from tune.export.merge import merge
from tune.export.proof import prove
from tune.export.subject import Subject, find_subject
from tune.run import train

TOKENS, ADDED = 326, (326, 327)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS = "base_model.model.{}.token_adapter.trainable_tokens_delta"
CHATML = {"data__template": "chatml", "data__add_tokens": True}

KINDS: dict[str, dict[str, Any]] = {
    "untied, in shards": {"family": "mistral", "dtype": "bfloat16", "sharded": True, "model": {"vocab_size": TOKENS}},
    "untied in float32, one row to spare": {"family": "mistral", "model": {"vocab_size": TOKENS + 1}},
    "tied, rows to spare": {"family": "llama", "dtype": "float16", "model": {"tie_word_embeddings": True}},
    "tied, in shards": {
        "family": "llama",
        "dtype": "bfloat16",
        "sharded": True,
        "model": {"tie_word_embeddings": True, "vocab_size": TOKENS},
    },
    "experts": {"family": "mixtral", "dtype": "bfloat16", "sharded": True, "model": {"vocab_size": TOKENS}},
    "other names": {"family": "bloom", "model": {"vocab_size": TOKENS}},
    "not quantised": {"family": "mistral", "model": {"vocab_size": TOKENS}, "model__quantization": "none"},
}


def a_run(kind: str) -> Made:
    return made(**{**KINDS[kind], **CHATML})


@functools.cache
def merged_run(kind: str) -> tuple[Made, Path, Subject]:
    """A run, its proven merge, and both as a proof takes them; to be copied by a test that spoils it."""
    run = a_run(kind)
    return run, merge(run.run.root, run.root / "merged-once").folder, find_subject(run.run.root, "original")


def saved_rows(run: Made) -> dict[str, torch.Tensor]:
    """The trained rows, by the name of their matrix."""
    found = load_file(run.adapter_file)
    suffix = ".token_adapter.trainable_tokens_delta"
    rows = {
        name.removeprefix("base_model.model.").removesuffix(suffix): tensor
        for name, tensor in found.items()
        if name.endswith(suffix)
    }
    return {f"{name}.weight": tensor for name, tensor in rows.items()}


def stored(run: Made, name: str) -> str:
    """The name that the base's file has for a matrix."""
    return name if name in tensors_of(run.base) else name.removeprefix("transformer.")


@pytest.mark.parametrize("base", ["original", "quantized"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_vocabulary_grows_and_the_rest_stays(tmp_path: Path, kind: str, base: str) -> None:
    run = a_run(kind)
    if kind == "not quantised" and base == "quantized":
        pytest.skip("there is no quantised base")
    merged = merge(run.run.root, tmp_path / "out", base)  # type: ignore[arg-type]
    before, after = tensors_of(run.base), tensors_of(tmp_path / "out")
    rows = {stored(run, name): tensor for name, tensor in saved_rows(run).items()}
    wanted = max(328, len(next(before[name] for name in rows)))

    assert merged.proof.holds
    assert list(after) == list(before)
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype, name
        assert tensor.shape == ((wanted, 64) if name in rows else before[name].shape), name
        assert file_of(tmp_path / "out", name).name == file_of(run.base, name).name
    for name, values in rows.items():
        assert torch.equal(after[name][list(ADDED)], values.to(after[name].dtype)), name
        if base == "original":
            kept = [row for row in range(len(before[name])) if row not in ADDED]
            assert torch.equal(after[name][kept], before[name][kept]), name
    for one, two in zip(weight_files(run.base), weight_files(tmp_path / "out"), strict=True):
        old, new = (json.loads(header_of(path)[8:]) for path in (one, two))
        assert list(old) == list(new)
        assert old["__metadata__"] == new["__metadata__"]
        assert len(header_of(two)) % 8 == 0
        if wanted == 384:
            assert header_of(one) == header_of(two)
    if KINDS[kind].get("sharded"):
        index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
        assert index["weight_map"] == json.loads((run.base / "model.safetensors.index.json").read_text())["weight_map"]

    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config == {**json.loads((run.base / "config.json").read_text()), "vocab_size": wanted}
    figures = merged.proof.content["bounded"]["weights"]
    assert figures["adapted"] == len(find_subject(run.run.root, base).deltas)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["untied in float32, one row to spare", "tied, rows to spare", "other names"])
def test_stock_transformers_loads_it_and_peft_agrees(tmp_path: Path, kind: str) -> None:
    run = a_run(kind)
    merge(run.run.root, tmp_path / "out")
    alone, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    bare = AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.float32)
    if bare.config.vocab_size < 328:
        bare.resize_token_embeddings(328, mean_resizing=False)
    truth = PeftModel.from_pretrained(bare, str(run.run.adapter)).eval()
    ids = torch.cat([torch.arange(290, 328), torch.tensor([327, 5, 326])])[None]
    with torch.no_grad():
        wanted, found = truth(input_ids=ids).logits, alone(input_ids=ids).logits
    unit = 1e-5 if KINDS[kind].get("dtype") is None else 4e-3
    assert (found - wanted).abs().max() < unit * wanted.abs().max()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [*ADDED]


def test_it_stops_at_the_token_that_was_added(tmp_path: Path) -> None:
    """A model that has learned one short answer by heart says it, and ends."""
    run = a_run("untied, in shards").copy(tmp_path)
    shutil.rmtree(tmp_path / "run")
    rows = [{"messages": [{"role": "user", "content": "Say."}, {"role": "assistant", "content": "the sea"}]}]
    (tmp_path / "train.jsonl").write_text(json.dumps(rows[0]) + "\n")
    changes = {"train__max_steps": 60, "train__learning_rate": 0.01, "train__batch_size": 1, "train__save_every": 60}
    train(tiny_recipe(tmp_path, base=run.base, model__dtype="bfloat16", **CHATML, **changes))
    merge(tmp_path / "run", tmp_path / "out")
    assert load_run(tmp_path / "run").answer("Say.", max_new_tokens=40) == "the sea"
    assert load_merged(tmp_path / "out").answer("Say.", max_new_tokens=40) == "the sea"

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    asked = [{"role": "user", "content": "Say."}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=40, do_sample=False, pad_token_id=0)[0, ids["input_ids"].shape[1] :]
    assert out[-1] == ADDED[1], "generation_config.json of the merged folder ends answers there"
    assert tokenizer.decode(out, skip_special_tokens=True) == "the sea"


def test_a_run_that_is_not_finished_is_merged_with_its_tokens(tmp_path: Path) -> None:
    run = a_run("untied, in shards").copy(tmp_path)
    shutil.rmtree(run.run.adapter)
    (run.run.root / "finished.json").unlink()
    merged = merge(run.run.root, tmp_path / "out")
    assert len(tensors_of(merged.folder)[HEAD]) == 328
    assert AutoTokenizer.from_pretrained(merged.folder).convert_tokens_to_ids("<|im_end|>") == ADDED[1]


def test_routers_that_train_in_full_are_merged_beside_the_rows(tmp_path: Path) -> None:
    run = made("mixtral", "bfloat16", model={"vocab_size": TOKENS}, router__train="full", **CHATML)
    assert merge(run.run.root, tmp_path / "out").proof.holds


def test_a_tied_head_that_is_stored_a_second_time_grows_too(tmp_path: Path) -> None:
    run = made("llama", model={"tie_word_embeddings": True, "vocab_size": TOKENS}, spoil=_twice, **CHATML)
    assert {EMBEDDING, HEAD} <= tensors_of(run.base).keys()
    assert merge(run.run.root, tmp_path / "out").proof.holds
    after = tensors_of(tmp_path / "out")
    assert torch.equal(after[EMBEDDING], after[HEAD])
    assert len(after[HEAD]) == 328


def _twice(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[HEAD] = tensors[EMBEDDING].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def not_written(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor[: ADDED[0]], tensor[: ADDED[0]].float().mean(0).expand(2, -1).to(tensor.dtype)])


def swapped(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor[: ADDED[0]], tensor[[ADDED[1], ADDED[0]]]])


def a_bit_off(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[ADDED[1], 3] = torch.nextafter(tensor[ADDED[1], 3], torch.tensor(torch.inf, dtype=tensor.dtype))
    return tensor


def another_row_off(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[7, 3] = torch.nextafter(tensor[7, 3], torch.tensor(torch.inf, dtype=tensor.dtype))
    return tensor


def no_number(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[ADDED[0], 0] = torch.nan
    return tensor


FAULTS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "not written": (not_written, "rows 326, 327"),
    "swapped": (swapped, "rows 326, 327"),
    "a trained row one unit off": (a_bit_off, "rows 327"),
    "another row one unit off": (another_row_off, "rows 7"),
    "not a number": (no_number, "rows 326"),
}


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["untied, in shards", "untied in float32, one row to spare"])
def test_a_wrong_row_fails_the_proof(tmp_path: Path, kind: str, fault: str, name: str) -> None:
    _, folder, subject = merged_run(kind)
    shutil.copytree(folder, tmp_path / "out")
    spoil, words = FAULTS[fault]
    change_tensors(file_of(tmp_path / "out", name), lambda tensors: tensors.update({name: spoil(tensors[name])}))
    reasons = prove(subject, tmp_path / "out").reasons
    assert any(
        f"weights: 1 tensors are not the base with the trained rows: {name} ({words})" == reason for reason in reasons
    ), reasons
    if fault == "swapped":
        assert any(reason.startswith("logits: max_abs_difference") for reason in reasons)


def test_rows_that_are_missing_or_too_many_fail_the_proof(tmp_path: Path) -> None:
    _, folder, subject = merged_run("untied, in shards")
    shutil.copytree(folder, tmp_path / "out")
    path = file_of(tmp_path / "out", HEAD)
    whole = load_file(path)[HEAD]
    for wrong in (whole[:327], torch.cat([whole, whole[:1]])):
        change_tensors(path, lambda tensors, wrong=wrong: tensors.update({HEAD: wrong}))  # type: ignore[misc]
        (reason,) = prove(subject, tmp_path / "out").reasons
        assert reason == (f"weights: 1 tensors have another shape than vocabulary and added tokens need: {HEAD}")


def test_a_config_or_tokenizer_without_the_tokens_fails_the_proof(tmp_path: Path) -> None:
    run, folder, subject = merged_run("untied, in shards")
    shutil.copytree(folder, tmp_path / "out")
    path = tmp_path / "out/config.json"
    right = path.read_text()
    path.write_text(right.replace('"vocab_size": 328', f'"vocab_size": {TOKENS}'))
    reasons = prove(subject, tmp_path / "out").reasons
    assert reasons[0] == "config: config.json is not the base's in vocab_size"
    assert "model.embed_tokens.weight has shape [328, 64], not [326, 64]" in reasons[1]
    path.write_text(right)
    base = AutoTokenizer.from_pretrained(run.base)
    base.chat_template = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    base.save_pretrained(tmp_path / "out")
    assert "tokenizer: its vocabulary is not the one that trained" in prove(subject, tmp_path / "out").reasons


def test_a_merge_that_writes_the_rows_wrongly_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tune.export import merge as merging

    class Forgetful(merging.ReplacedRows):
        def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
            found = super().rows(name, start, stop)
            return found.flip(0) if stop == self.count(name) else found

    monkeypatch.setattr(merging, "ReplacedRows", Forgetful)
    with pytest.raises(UntrustworthyError, match="are not the base with the trained rows"):
        merge(a_run("untied, in shards").run.root, tmp_path / "out")


def test_an_adapter_whose_rows_do_not_fit_is_refused(tmp_path: Path) -> None:
    run = a_run("untied, in shards").copy(tmp_path)
    (run.run.root / "finished.json").unlink()  # a digest of the adapter stands there
    config = run.run.adapter / "adapter_config.json"
    held = json.loads(config.read_text())["trainable_token_indices"]
    for indices, words in (
        ({**held, "lm_head": [326]}, r"lm_head\.token_adapter.* does not fit the tokens that trainable_token_indices"),
        ({**held, "lm_head": [327, 330]}, r"its change of lm_head\.weight does not fit the matrix \[326, 64\]"),
        (None, r"does not fit the tokens .* names \(none\)"),
    ):
        change_json(config, trainable_token_indices=indices)
        with pytest.raises(ModelError, match=words):
            merge(run.run.root, tmp_path / "out")
    change_json(config, trainable_token_indices=held)
    whole = run.adapter_file.read_bytes()
    change_tensors(run.adapter_file, lambda tensors: tensors.pop(ROWS.format("lm_head")))
    with pytest.raises(ModelError, match=r"holds no rows for the 2 tokens .* names in lm_head\."):
        merge(run.run.root, tmp_path / "out")
    run.adapter_file.write_bytes(whole)
    rows = ROWS.format("lm_head")
    change_tensors(run.adapter_file, lambda tensors: tensors[rows].fill_(torch.nan))
    with pytest.raises(ModelError, match=r"lm_head\.token_adapter.*holds NaN or infinity"):
        merge(run.run.root, tmp_path / "out")


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
def test_both_layouts_of_experts_keep_the_rows(tmp_path: Path) -> None:
    run = a_run("experts").copy(tmp_path)
    apart = convert(run.run.root, "per-expert")
    kept = load_file(run.adapter_file)
    for name in ("lm_head", "model.embed_tokens"):
        assert torch.equal(apart.files.tensors[ROWS.format(name)], kept[ROWS.format(name)])
    bare = AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.float32)
    bare.resize_token_embeddings(328, mean_resizing=False)
    ids = torch.arange(300, 328)[None]
    with torch.no_grad():
        one = PeftModel.from_pretrained(bare, str(run.run.adapter)).eval()(input_ids=ids).logits
    bare = AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.float32)
    bare.resize_token_embeddings(328, mean_resizing=False)
    with torch.no_grad():
        two = PeftModel.from_pretrained(bare, str(apart.folder)).eval()(input_ids=ids).logits
    assert (one - two).abs().max() < 1e-5 * one.abs().max()
    back = convert(run.run.root, "stock")
    assert back.files.config["trainable_token_indices"] == {"embed_tokens": [*ADDED], "lm_head": [*ADDED]}
    for name, tensor in kept.items():
        assert torch.equal(back.files.tensors[name], tensor), name


def test_the_card_says_how_it_is_loaded_and_its_code_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run("not quantised").copy(tmp_path)
    card = (run.run.adapter / "README.md").read_text()
    assert "`<|im_start|>` (326), `<|im_end|>` (327)" in card
    assert "vllm serve" not in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "base.resize_token_embeddings(328, mean_resizing=False)" in code
    ours = load_run(run.run.root).answer("What is the capital of France?", max_new_tokens=100)
    code = code.replace("PATH/TO/THIS/FOLDER", str(run.run.adapter)).replace(f"PATH/TO/{run.base.name}", str(run.base))
    capsys.readouterr()
    exec(code, {})
    assert ours
    assert capsys.readouterr().out.strip().endswith(ours)
    merged = merge(run.run.root)
    card = merged_card(run.run, run.run.adapter, merged.proof.content)
    assert "`<|im_start|>` (326)" in card
    assert "vllm serve" in card

    card = (made("mistral", **CHATML).run.adapter / "README.md").read_text()
    assert "`<|im_start|>` (326)" in card
    assert "resize_token_embeddings" not in card, "the base has rows to spare"
