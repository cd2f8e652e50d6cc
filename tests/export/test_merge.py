"""`tune merge`: the base's own files plus the adapter, as stock transformers and stock PEFT understand both."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.export.merges import (
    DTYPES,
    FAMILIES,
    Made,
    change_json,
    change_tensors,
    files,
    header_of,
    made,
    relative,
    tensors_of,
    weight_files,
)
from tests.hub import COMMIT, standing_in
from tests.tiny import VOCABULARY, dequantized_twin
from tests.training.jobs import tiny_recipe
from tests.training.processes import fork, wait
from tune.errors import ModelError, RunError
from tune.export.merge import merge
from tune.models.load import load_base
from tune.recipe.load import load_recipe
from tune.run import train

IDS = torch.randint(VOCABULARY, (2, 29), generator=torch.Generator().manual_seed(7))


def stock(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def with_peft(model: Any, run: Made) -> Any:
    return PeftModel.from_pretrained(model, str(run.run.adapter)).eval()


def trained_twin(run: Made) -> Any:
    """The 4-bit base as it was trained, in a stock float32 model: unpacked linears, the rest in the recipe's dtype."""
    section = load_recipe(run.run.recipe).model
    base = load_base(section, torch.device("cpu")).model
    twin = dequantized_twin(base, run.base)
    ours = dict(base.named_parameters())
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if ours[name].shape == parameter.shape:  # a packed one is flat
                parameter.copy_(ours[name])
    return twin


def expected_model(run: Made, base: str) -> Any:
    return stock(run.base) if base == "original" else trained_twin(run)


@pytest.mark.parametrize("base", ["original", "quantized"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_folder_is_the_adapted_base_for_stock_libraries(
    tmp_path: Path, family: str, dtype: str, base: str
) -> None:
    sharded = (FAMILIES.index(family) + DTYPES.index(dtype)) % 2 == 0
    run = made(family, dtype, sharded)
    merged = merge(run.run.root, tmp_path / "out", base)  # type: ignore[arg-type]
    assert merged.proof.holds
    assert merged.proof.content["bounded"]["weights"]["adapted"] == len(load_file(run.adapter_file)) // 2

    # Files, order, names, types and shapes are the base's, to the byte of the header.
    assert [path.name for path in weight_files(tmp_path / "out")] == [path.name for path in weight_files(run.base)]
    assert len(weight_files(run.base)) > 1 if sharded else len(weight_files(run.base)) == 1
    for path in weight_files(run.base):
        assert header_of(tmp_path / "out" / path.name) == header_of(path)
        assert (tmp_path / "out" / path.name).stat().st_size == path.stat().st_size
    assert (tmp_path / "out/model.safetensors.index.json").exists() == sharded

    truth = with_peft(expected_model(run, base), run)
    with truth.disable_adapter():
        plain = logits(truth)
    wanted, found = logits(truth), logits(stock(tmp_path / "out"))
    change = relative(wanted, plain)
    assert change > 0.05, "the adapter does too little for this test to see it"
    if dtype == "float32":
        assert relative(found, wanted) < 1e-5
        dense = truth.merge_and_unload()
        ours = stock(tmp_path / "out").state_dict()
        for name, tensor in dense.state_dict().items():
            assert float((ours[name] - tensor).abs().max()) < 1e-6, name
    else:
        # Rounded once, in place: each element is a neighbour of the exact value, and nearly all the nearest.
        unit = torch.finfo(getattr(torch, dtype)).eps
        assert relative(found, wanted) < unit
        exact, rounded = truth.merge_and_unload().state_dict(), stock(tmp_path / "out").state_dict()
        for name, tensor in exact.items():
            nearest = tensor.to(getattr(torch, dtype)).float()
            assert float((rounded[name] != nearest).float().mean()) < 2e-3, name
            assert torch.all((rounded[name] - tensor).abs() <= unit * tensor.abs() + 1e-7), name
        low = logits(stock(tmp_path / "out", getattr(torch, dtype)))
        assert low.dtype == getattr(torch, dtype)
        assert relative(low, wanted) < 16 * unit


@pytest.mark.parametrize("base", ["original", "quantized"])
def test_what_no_adapter_changes_is_the_bases_to_the_byte(tmp_path: Path, base: str) -> None:
    """Also in the quantised form where the recipe's dtype holds the base's numbers: norms and embeddings in float32."""
    run = made("llama", "float32", True)
    merge(run.run.root, tmp_path / "out", base)  # type: ignore[arg-type]
    before, after = tensors_of(run.base), tensors_of(tmp_path / "out")
    adapted = {
        name.removeprefix("base_model.model.").replace(".lora_A", "")
        for name in load_file(run.adapter_file)
        if ".lora_A" in name
    }
    assert len(adapted) == 14
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) == (name not in adapted), name


CASES: dict[str, dict[str, Any]] = {
    "tied embeddings": {"model": {"tie_word_embeddings": True}},
    "biases": {"model": {"attention_bias": True, "mlp_bias": True}},
    "odd sizes": {"model": {"hidden_size": 60, "intermediate_size": 101, "vocab_size": 389, "head_dim": 14}},
    "excluded modules": {"recipe": {"adapter__exclude": ["o_proj", "model.layers.0.self_attn.q_proj"]}},
    "ranks of their own": {"recipe": {"adapter__ranks": {"mlp": 2, "q_proj": 7}, "adapter__alpha": 13}},
    "attention only": {"recipe": {"adapter__targets": ["attention"]}},
    "base in float32, trained in bfloat16": {"recipe": {"model__dtype": "bfloat16"}},
    "tied in bfloat16": {"dtype": "bfloat16", "model": {"tie_word_embeddings": True}, "sharded": True},
    "biases in float16": {"dtype": "float16", "model": {"attention_bias": True}},
}


@pytest.mark.parametrize("base", ["original", "quantized"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_unusual_about_a_run_is_merged_too(tmp_path: Path, case: str, base: str) -> None:
    settings = dict(CASES[case])
    run = made(**settings.pop("recipe", {}), **settings)
    merged = merge(run.run.root, tmp_path / "out", base)  # type: ignore[arg-type]
    assert merged.proof.holds
    truth = with_peft(expected_model(run, base), run)
    dtype = getattr(torch, settings.get("dtype", "float32"))
    bound = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    wanted = logits(truth)
    with truth.disable_adapter():
        assert relative(logits(truth), wanted) > 0.03
    assert relative(logits(stock(tmp_path / "out")), wanted) < bound


def test_a_run_on_a_base_that_was_not_quantised(tmp_path: Path) -> None:
    run = made("mistral", model__quantization="none")
    merged = merge(run.run.root, tmp_path / "out")
    assert "trained_base" not in merged.proof.content["reported"]
    assert relative(logits(stock(tmp_path / "out")), logits(with_peft(stock(run.base), run))) < 1e-5
    with pytest.raises(RunError, match=r"not quantised.*Leave out --base"):
        merge(run.run.root, tmp_path / "again", "quantized")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def without_prefix(folder: Path) -> None:
    change_tensors(
        folder / "model.safetensors", lambda tensors: rename(tensors, lambda name: name.removeprefix(PREFIX))
    )


def with_more(folder: Path) -> None:
    """What older exporters leave in a file, and no model has a place for."""

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(8)
        tensors["model.layers.0.self_attn.mask"] = torch.ones(3, 5, dtype=torch.bool)
        tensors["position_ids"] = torch.arange(7)
        tensors["scalar"] = torch.tensor(0.123456789)
        tensors["nothing"] = torch.empty(0, 3)

    change_tensors(folder / "model.safetensors", add)


PREFIX = "transformer."


def rename(tensors: dict[str, torch.Tensor], new: Any) -> None:
    for name in list(tensors):
        tensors[new(name)] = tensors.pop(name)


@pytest.mark.parametrize("family", ["bloom", "falcon"])
def test_a_checkpoint_without_the_models_prefix_keeps_its_names(tmp_path: Path, family: str) -> None:
    run = made(family, spoil=without_prefix)
    assert not any(name.startswith(PREFIX) for name in tensors_of(run.base))
    for base in ("original", "quantized"):
        merge(run.run.root, tmp_path / base, base)  # type: ignore[arg-type]
        assert tensors_of(tmp_path / base).keys() == tensors_of(run.base).keys()
        truth = logits(with_peft(expected_model(run, base), run))
        assert relative(logits(stock(tmp_path / base)), truth) < 1e-5


@pytest.mark.parametrize("base", ["original", "quantized"])
def test_tensors_that_the_model_has_no_place_for_are_copied(tmp_path: Path, base: str) -> None:
    run = made("llama", "bfloat16", spoil=with_more)
    merge(run.run.root, tmp_path / "out", base)  # type: ignore[arg-type]
    before, after = tensors_of(run.base), tensors_of(tmp_path / "out")
    for name in ("model.layers.0.self_attn.mask", "position_ids", "nothing", "scalar"):
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name], before[name]), name
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    assert torch.equal(after[name], before[name])


def test_a_base_in_float64_is_merged(tmp_path: Path) -> None:
    run = made("llama", "float64", model__dtype="float32")
    merge(run.run.root, tmp_path / "out")
    after = tensors_of(tmp_path / "out")
    assert {tensor.dtype for tensor in after.values()} == {torch.float64}
    assert relative(logits(stock(tmp_path / "out")), logits(with_peft(stock(run.base), run))) < 1e-5


def test_the_words_are_those_that_trained(tmp_path: Path) -> None:
    run = made("llama", data__system="You are brief.", data__template="vicuna").copy(tmp_path / "made")
    (run.base / "LICENSE").write_text("Do as you like.\n")
    (run.base / "tokenizer.model").write_bytes(b"pieces")
    (run.base / "README.md").write_text("# The base\n")
    change_json(run.base / "generation_config.json", temperature=0.7, do_sample=True)
    out = merge(run.run.root).folder
    assert out == run.run.merged
    tokenizer = AutoTokenizer.from_pretrained(out)
    trained = AutoTokenizer.from_pretrained(run.run.adapter)
    talk = [{"role": "user", "content": "Which sea?"}]
    text = tokenizer.apply_chat_template(talk, tokenize=False)
    assert text == trained.apply_chat_template(talk, tokenize=False)
    assert "You are brief." in text
    assert json.loads((out / "config.json").read_text()) == json.loads((run.base / "config.json").read_text())
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["temperature"] == 0.7
    assert (out / "LICENSE").read_text() == "Do as you like.\n"
    assert (out / "tokenizer.model").read_bytes() == b"pieces"
    assert "# The base" not in (out / "README.md").read_text(), "a merged model is another model than its base"
    assert not (out / "adapter_config.json").exists()


def test_the_config_forgets_where_the_base_once_was(tmp_path: Path) -> None:
    def named(folder: Path) -> None:
        change_json(folder / "config.json", _name_or_path="/home/somebody/base")

    run = made("llama", spoil=named)
    merge(run.run.root, tmp_path / "out")
    assert "somebody" not in (tmp_path / "out/config.json").read_text()


def test_a_checkpoint_of_a_run_is_merged_beside_it(tmp_path: Path) -> None:
    run = made("mistral", train__save_every=1, train__max_steps=3, train__keep=3).copy(tmp_path)
    first, last = run.run.checkpoint(1), run.run.checkpoint(3)
    assert merge(first).folder == run.run.root / "merged-step-000001"
    assert merge(run.run.root).folder == run.run.merged
    model = PeftModel.from_pretrained(stock(run.base), str(first)).eval()
    assert relative(logits(stock(run.run.root / "merged-step-000001")), logits(model)) < 1e-5
    merge(last)
    assert tensors_of(run.run.root / "merged-step-000003").keys() == tensors_of(run.run.merged).keys()
    for name, tensor in tensors_of(run.run.merged).items():
        assert torch.equal(tensors_of(run.run.root / "merged-step-000003")[name], tensor)
    assert not torch.equal(
        tensors_of(run.run.merged)["model.layers.0.mlp.up_proj.weight"],
        tensors_of(run.run.root / "merged-step-000001")["model.layers.0.mlp.up_proj.weight"],
    )


def test_a_run_that_is_not_finished_is_merged_from_its_newest_checkpoint(tmp_path: Path) -> None:
    run = made("mistral", train__save_every=1, train__max_steps=3, train__keep=3).copy(tmp_path)
    finished = merge(run.run.checkpoint(3), tmp_path / "finished").folder
    shutil.rmtree(run.run.adapter)
    run.run.finished.unlink()
    unfinished = merge(run.run.root, tmp_path / "unfinished").folder
    ours, theirs = files(unfinished), files(finished)
    assert (ours.pop("README.md") != b"") == (theirs.pop("README.md") != b"")  # one knows the losses, one does not
    assert ours == theirs, [name for name in theirs if ours.get(name) != theirs[name]]


def test_the_proof_says_whose_prompts_they_are(tmp_path: Path) -> None:
    held_out = made("llama", data__eval=0.2)
    assert merge(held_out.run.root, tmp_path / "one").proof.content["prompts"]["from"] == "held-out data"
    assert merge(made().run.root, tmp_path / "two").proof.content["prompts"]["from"] == "training data"


def test_the_proof_file_holds_bounds_figures_fingerprints_and_versions(tmp_path: Path) -> None:
    run = made("llama", "bfloat16", True)
    merged = merge(run.run.root, tmp_path / "out")

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    content = json.loads((tmp_path / "out/merge-proof.json").read_text(), parse_constant=refuse)
    assert content == merged.proof.content
    assert content["verdict"] == "proven"
    assert content["base"] == "original"
    bounded = content["bounded"]["logits"]
    for name in ("max_abs_difference", "mean_kl"):
        assert 0 < bounded[name]["figure"] <= bounded[name]["bound"]
    assert bounded["top1_agreement"]["figure"] >= bounded["top1_agreement"]["bound"] > 0.9
    assert content["bounded"]["weights"]["largest_error"]["figure"] <= 1
    assert content["bounded"]["tokenizer"]["equal"] == content["bounded"]["tokenizer"]["dialogues"] >= 3
    assert len(content["prompts"]["fingerprints"]) == content["prompts"]["count"] >= 4
    said = {"merge-proof.json", "README.md"}
    assert set(content["fingerprints"]["files"]) == {path.name for path in (tmp_path / "out").iterdir()} - said
    assert {"torch", "transformers", "peft"} <= content["versions"].keys()
    trained = content["reported"]["trained_base"]
    assert trained["max_abs_difference"] > bounded["max_abs_difference"]["figure"], "4 bits differ more than rounding"
    assert set(content["reported"]["loss"]) == {"adapter", "merged", "trained"}


def test_merging_the_same_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    run = made("llama", "bfloat16", True)
    one = files(merge(run.run.root, tmp_path / "one").folder)
    assert one == files(merge(run.run.root, tmp_path / "two").folder)


def prepare_output(kind: str, out: Path) -> None:
    if kind == "file":
        out.write_text("mine")
        return
    out.mkdir()
    if kind in ("proven", "unproven"):
        (out / "merge-proof.json").write_text("{}")
    if kind == "unproven":
        (out / "UNPROVEN").write_text("")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("empty", "is there already"),
        ("file", "is there already"),
        ("proven", "holds a proven merge already"),
        ("unproven", "whose proof failed"),
    ],
)
def test_an_output_that_exists_is_refused_and_kept(tmp_path: Path, kind: str, words: str) -> None:
    prepare_output(kind, tmp_path / "out")
    before = files(tmp_path)
    with pytest.raises(RunError, match=words) as refused:
        merge(made().run.root, tmp_path / "out")
    assert "--output" in str(refused.value)
    assert files(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_dangling_link_is_an_output_that_exists(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(RunError, match="is there already"):
        merge(made().run.root, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda base: weight_files(base)[1].unlink(), "is not the base"),
        (lambda base: change_json(base / "config.json", rms_norm_eps=0.5), "is not the base"),
        (shutil.rmtree, "does not exist"),
        (lambda base: (base / "config.json").unlink(), "holds no config.json"),
        (lambda base: weight_files(base)[0].write_bytes(b"1234"), "is not the base"),
    ],
)
def test_a_base_that_is_gone_or_another_is_refused(tmp_path: Path, spoil: Any, words: str) -> None:
    run = made("llama", "float32", True).copy(tmp_path / "made")
    spoil(run.base)
    with pytest.raises(ModelError, match=words) as refused:
        merge(run.run.root, tmp_path / "out")
    assert len(refused.value.problems) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"made"}


def test_a_run_without_provenance_says_how_to_get_it_back(tmp_path: Path) -> None:
    run = made().copy(tmp_path / "made")
    run.run.provenance.unlink()
    with pytest.raises(RunError, match=r"--resume` writes it again"):
        merge(run.run.root, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    train(load_recipe(run.run.recipe), resume=True)
    assert merge(run.run.root, tmp_path / "out").proof.holds


def test_a_tokenizer_larger_than_the_embeddings_is_refused(tmp_path: Path) -> None:
    run = made().copy(tmp_path / "made")
    tokenizer = AutoTokenizer.from_pretrained(run.run.adapter)
    tokenizer.add_tokens([f"<extra {number}>" for number in range(VOCABULARY)])
    tokenizer.save_pretrained(run.run.adapter)
    with pytest.raises(ModelError, match="has 710 tokens, and base and adapter have embeddings for 384"):
        merge(run.run.root, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"made"}


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    run = made().copy(tmp_path / "made")
    other = made("llama", model={"hidden_size": 128})
    run.adapter_file.write_bytes(other.adapter_file.read_bytes())
    with pytest.raises(ModelError, match=r"\[.*\].*belongs to another base"):
        merge(run.run.root, tmp_path / "out")
    run.adapter_file.write_bytes(made("bloom").adapter_file.read_bytes())
    with pytest.raises(ModelError, match="is no matrix of"):
        merge(run.run.root, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"made"}


def test_an_adapter_on_the_output_head_is_refused_by_name(tmp_path: Path) -> None:
    run = made().copy(tmp_path / "made")
    tensors = load_file(run.adapter_file)
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(4, 64)
    tensors["base_model.model.lm_head.lora_B.weight"] = torch.zeros(VOCABULARY, 4)
    save_file(tensors, run.adapter_file)
    with pytest.raises(ModelError, match="lm_head"):
        merge(run.run.root, tmp_path / "out")


def test_a_run_trained_anew_from_an_adapter_merges_both_trainings(tmp_path: Path) -> None:
    first = made()
    recipe = tiny_recipe(
        tmp_path, base=first.base, adapter__start_from=str(first.run.root), train__max_steps=2, train__save_every=2
    )
    train(recipe)
    run = Made(tmp_path)
    merge(run.run.root, tmp_path / "out")
    truth = PeftModel.from_pretrained(stock(first.base), str(run.run.adapter)).eval()
    assert relative(logits(stock(tmp_path / "out")), logits(truth)) < 1e-5


def test_a_sharded_base_on_the_hub_is_merged_from_there(tmp_path: Path) -> None:
    """Trained on and merged from the files of one commit."""
    local = made("llama", "float32", True)
    shutil.copytree(local.base, tmp_path / "published")
    (tmp_path / "published/LICENSE").write_text("Do as you like.\n")
    tiny_recipe(tmp_path, base="owner/tiny", train__max_steps=2, train__save_every=2)

    def with_a_hub(environment: dict[str, str]) -> None:
        from huggingface_hub import constants

        os.environ |= {**environment, "HF_HOME": str(tmp_path / "home")}
        importlib.reload(constants)  # read at import, and read from there by all who use them
        train(load_recipe(tmp_path / "recipe.yaml"))
        merge(tmp_path / "run", tmp_path / "out")

    with standing_in({"owner/tiny": tmp_path / "published"}, {}) as hub:
        log = tmp_path / "log"
        assert wait(fork(lambda: with_a_hub(hub.environment(tmp_path / "home")), log)) == 0, log.read_text()
    assert json.loads((tmp_path / "run/provenance.json").read_text())["base"]["commit"] == COMMIT
    assert [path.name for path in weight_files(tmp_path / "out")] == [path.name for path in weight_files(local.base)]
    assert all(path.is_file() and not path.is_symlink() for path in weight_files(tmp_path / "out"))
    truth = PeftModel.from_pretrained(stock(local.base), str(tmp_path / "run/adapter")).eval()
    assert relative(logits(stock(tmp_path / "out")), logits(truth)) < 1e-5


def test_a_matrix_is_merged_some_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made("llama", "bfloat16", True)
    whole = tensors_of(merge(run.run.root, tmp_path / "whole").folder)
    monkeypatch.setattr("tune.export.merge._ROWS", 10)
    pieces = tensors_of(merge(run.run.root, tmp_path / "pieces").folder)
    for name, tensor in whole.items():
        assert torch.allclose(pieces[name].float(), tensor.float(), rtol=0.01, atol=1e-6), name


def test_answers_end_where_they_did_in_training_too(tmp_path: Path) -> None:
    """At the base's own ends first, which may be others than the tokenizer's."""

    def ends_elsewhere(folder: Path) -> None:
        change_json(folder / "generation_config.json", eos_token_id=5)

    run = made("llama", spoil=ends_elsewhere)
    merge(run.run.root, tmp_path / "out")
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == [5, 1]
