"""Tokens that a template needs and the tokenizer lacks: added, trained, saved, and found again by stock PEFT."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.distributed.test_two_processes import compare, launch
from tests.tiny import dequantized_twin, write_model
from tests.training.jobs import tiny_recipe
from tune.adapters import token_rows
from tune.adapters.coverage import check_coverage
from tune.adapters.lora import adapter_parameters, attach, initialise, read_adapter
from tune.adapters.token_rows import vocabulary_rows
from tune.data.collate import Row
from tune.errors import ModelError, RunError
from tune.evaluation.generate import load_run
from tune.folder import RunFolder
from tune.models.load import load_base
from tune.models.vocabulary import grow_vocabulary
from tune.progress import Progress
from tune.run import train
from tune.training.resume import check_same
from tune.training.step import row_loss

TOKENS = 326
"""Of the tokenizer that `write_model` writes."""
ADDED = (326, 327)
ROWS = "token_adapter.trainable_tokens_delta"
CHATML = {"data__template": "chatml", "data__add_tokens": True, "train__max_steps": 5, "train__save_every": 2}

BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "untied, without a row to spare": ("mistral", {"vocab_size": TOKENS}),
    "tied, with rows to spare": ("llama", {"tie_word_embeddings": True}),
    "tied, without": ("llama", {"tie_word_embeddings": True, "vocab_size": TOKENS}),
    "one row to spare": ("mistral", {"vocab_size": TOKENS + 1}),
    "experts": ("mixtral", {"vocab_size": TOKENS}),
    "other names": ("bloom", {"vocab_size": TOKENS}),
}
WANTED_ROWS = {name: max(328, changes.get("vocab_size", 384)) for name, (_, changes) in BASES.items()}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("bases")

    @functools.cache
    def write(name: str) -> Path:
        family, changes = BASES[name]
        return write_model(folder / name.replace(", ", "-").replace(" ", "-"), family, **changes)

    return write


def chatml(folder: Path, base: Path, **changes: Any) -> Any:
    return tiny_recipe(folder, base=base, **{**CHATML, **changes})


def adapted(base: Path, folder: Path, quantization: str = "nf4", seed: int = 5, **changes: Any) -> tuple[Any, Any]:
    """A base with the adapter of a recipe, every tensor of which has been moved; and the base as it was loaded."""
    recipe = chatml(folder, base, model__quantization=quantization, **changes)
    loaded = load_base(recipe.model, torch.device("cpu"))
    grow_vocabulary(loaded, str(base), ADDED)
    model = attach(loaded, recipe.adapter, str(base), 0, recipe.router, ADDED)
    torch.manual_seed(seed)
    with torch.no_grad():
        for _, parameter in adapter_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, loaded


def row_of(count: int = 40) -> Row:
    """Two examples in one row, with the added tokens among what is read and what is predicted."""
    ids = torch.randint(TOKENS, (count,), generator=torch.Generator().manual_seed(1))
    ids[[0, 7, 22, 30]], ids[[9, 20, 39]] = ADDED[0], ADDED[1]
    positions = torch.cat([torch.arange(22), torch.arange(count - 22)])
    predict_at = torch.tensor([6, 8, 12, 19, 25, 29, 38])
    return Row(ids[None], positions[None], predict_at, ids[predict_at + 1])


def plain_loss(model: Any, row: Row) -> torch.Tensor:
    """The loss of a stock model by way of all logits."""
    logits = model(input_ids=row.ids_1T, position_ids=row.positions_1T, use_cache=False).logits[0, row.predict_at_N]
    return torch.nn.functional.cross_entropy(logits.float(), row.labels_N, reduction="sum")


def stock_twin(base: Path, quantized: Any = None) -> Any:
    """The dense float32 transformers model of a base, or of one loaded in 4 bits, resized as a user would."""
    twin = AutoModelForCausalLM.from_pretrained(base)
    if quantized is not None:
        twin = dequantized_twin(quantized, base)
    if ADDED[-1] >= twin.get_input_embeddings().weight.shape[0]:
        twin.resize_token_embeddings(ADDED[-1] + 1, mean_resizing=False)
    return twin.eval()


def save(model: Any, folder: Path) -> Path:
    from tune.adapters.lora import adapter_bytes, adapter_config_text

    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(adapter_bytes(model))
    (folder / "adapter_config.json").write_text(adapter_config_text(model))
    return folder


@pytest.mark.parametrize("name", [name for name in BASES if name != "other names"])
def test_loss_and_gradients_equal_stock_pefts(tmp_path: Path, bases: Any, name: str) -> None:
    from peft import PeftModel

    base = bases(name)
    model, _ = adapted(base, tmp_path)
    twin = stock_twin(base, load_base(chatml(tmp_path, base).model, torch.device("cpu")).model)
    stock = PeftModel.from_pretrained(twin, str(save(model, tmp_path / "adapter")), is_trainable=True).eval()
    row = row_of()
    ours, theirs = row_loss(model.get_base_model(), row), plain_loss(stock, row)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    torch.autograd.backward(ours)
    torch.autograd.backward(theirs)
    expected = {n: p.grad for n, p in stock.named_parameters() if p.requires_grad}
    found = {n: p.grad for n, p in adapter_parameters(model)}
    assert found.keys() == expected.keys()
    assert sum(ROWS in n for n in found) == (1 if name.startswith("tied") else 2)
    for n, gradient in found.items():
        assert expected[n].norm() > 0, n
        assert (gradient - expected[n]).norm() < 1e-5 * expected[n].norm(), n


@pytest.mark.parametrize("name", ["untied, without a row to spare", "tied, with rows to spare"])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_gradient_of_the_rows_is_plain_autograds(tmp_path: Path, bases: Any, name: str, recompute: bool) -> None:
    """Of the whole matrices, made leaves, these rows; and the logits are of one model."""
    from tune.models.load import recompute_activations

    base = bases(name)
    model, _ = adapted(base, tmp_path, quantization="none", adapter__targets=["q_proj"])
    with torch.no_grad():
        for parameter_name, parameter in adapter_parameters(model):
            if "lora_B" in parameter_name:
                parameter.zero_()  # the plain model has no LoRA
    if recompute:
        recompute_activations(model.get_base_model())
        model.get_base_model().train()
    plain = stock_twin(base)
    tied = plain.get_input_embeddings().weight is plain.get_output_embeddings().weight
    assert tied == name.startswith("tied")
    rows = {n: p for n, p in adapter_parameters(model) if ROWS in n}
    with torch.no_grad():
        for n, parameter in rows.items():
            module = plain.get_output_embeddings() if "lm_head" in n else plain.get_input_embeddings()
            module.weight[list(ADDED)] = parameter
    row = row_of()
    ours, theirs = row_loss(model.get_base_model(), row), plain_loss(plain, row)
    torch.autograd.backward(ours)
    torch.autograd.backward(theirs)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    for n, parameter in rows.items():
        module = plain.get_output_embeddings() if "lm_head" in n else plain.get_input_embeddings()
        expected = module.weight.grad[list(ADDED)]
        assert (parameter.grad - expected).norm() < 1e-5 * expected.norm(), n
    model.eval()
    with torch.no_grad():
        whole = plain(input_ids=row.ids_1T).logits
        assert (model(input_ids=row.ids_1T).logits - whole).abs().max() < 1e-5 * whole.abs().max()


def test_without_the_adapter_the_base_answers(tmp_path: Path, bases: Any) -> None:
    base = bases("untied, without a row to spare")
    model, loaded = adapted(base, tmp_path, quantization="none")
    row = row_of()
    plain = stock_twin(base)
    with torch.no_grad():
        for ours, theirs in (
            (loaded.model.get_input_embeddings(), plain.get_input_embeddings()),
            (loaded.model.get_output_embeddings(), plain.get_output_embeddings()),
        ):
            theirs.weight[list(ADDED)] = theirs.weight[:TOKENS].mean(0)
            frozen = token_rows.unwrapped(ours).weight
            assert (frozen - theirs.weight).abs().max() < 1e-7, "the rows start as the mean of the others"
        with model.disable_adapter():
            assert row_loss(model.get_base_model(), row).item() == pytest.approx(plain_loss(plain, row).item(), 1e-5)
            bare = model(input_ids=row.ids_1T).logits
        assert (bare - plain(input_ids=row.ids_1T).logits).abs().max() < 1e-5
        assert row_loss(model.get_base_model(), row).item() != pytest.approx(plain_loss(plain, row).item(), 1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_start_as_the_rounded_mean_of_the_vocabulary(tmp_path: Path, dtype: str) -> None:
    """Also where a row was there: padding is whatever it is, and here it is far away."""
    base = write_model(tmp_path / "base", "mistral", getattr(torch, dtype))
    tensors = load_file(base / "model.safetensors")
    recipe = chatml(tmp_path, base, model__dtype=dtype)
    loaded = load_base(recipe.model, torch.device("cpu"))
    grow_vocabulary(loaded, "base", ADDED)
    model = attach(loaded, recipe.adapter, "base", 0, recipe.router, ADDED)
    starts = {n: p for n, p in adapter_parameters(model) if ROWS in n}
    assert len(starts) == 2
    for n, parameter in starts.items():
        stored = tensors["lm_head.weight" if "lm_head" in n else "model.embed_tokens.weight"]
        mean = stored[:TOKENS].double().mean(0).float().to(getattr(torch, dtype)).float()
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter.detach(), mean.expand(2, -1)), n
    before = {n: p.clone() for n, p in starts.items()}
    initialise(model, recipe.adapter, 0)
    assert all(torch.equal(before[n], p) for n, p in starts.items())


@pytest.mark.parametrize("name", list(BASES))
def test_training_changes_the_adapter_and_the_new_rows_alone(tmp_path: Path, bases: Any, name: str) -> None:
    base = bases(name)
    heard: list[str] = []

    class Heard(Progress):
        def line(self, text: str) -> None:
            heard.append(text)

    run = RunFolder(tmp_path / "run")
    train(chatml(tmp_path, base), progress=Heard())
    tied = name.startswith("tied") or name == "other names"
    embedding = "word_embeddings" if name == "other names" else "embed_tokens"
    assert "added tokens <|im_start|> 326, <|im_end|> 327" in heard
    line = f"trained rows 2 of {embedding}" + (", tied to lm_head" if tied else " and lm_head")
    assert line in heard
    assert line in json.loads(run.coverage.read_text())["lines"]

    tensors = load_file(run.adapter / "adapter_model.safetensors")
    rows = {key: tensor for key, tensor in tensors.items() if "lora_" not in key}
    assert len(rows) == (1 if tied else 2)
    stored = load_file(base / "model.safetensors")
    for key, tensor in rows.items():
        assert key.endswith(ROWS)
        matrix = next(v for k, v in stored.items() if k.endswith(key.split(".")[-3] + ".weight"))
        moved = (tensor - matrix[:TOKENS].mean(0)).abs().max(1).values
        assert tensor.shape == (2, 64)
        assert (moved > 1e-3).all(), f"{key}: both rows are read and predicted, so both move"
        assert (moved < 0.2).all()
    tokenizer = AutoTokenizer.from_pretrained(run.adapter)
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == list(ADDED)
    assert tokenizer.decode([*ADDED], skip_special_tokens=True) == ""
    said = json.loads((run.adapter / "adapter_config.json").read_text())["trainable_token_indices"]
    assert said == {embedding: [*ADDED]} if tied else {embedding: [*ADDED], "lm_head": [*ADDED]}


@pytest.mark.parametrize("name", list(BASES))
def test_stock_peft_loads_the_finished_adapter(tmp_path: Path, bases: Any, name: str) -> None:
    from peft import PeftModel

    base = bases(name)
    train(chatml(tmp_path, base, model__quantization="none"))
    ours = load_run(tmp_path / "run")
    place = str(tmp_path / "run/adapter")
    tokenizer = AutoTokenizer.from_pretrained(place)
    bare = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if WANTED_ROWS[name] > bare.get_input_embeddings().weight.shape[0]:
        bare.resize_token_embeddings(len(tokenizer))
    stock = PeftModel.from_pretrained(bare, place).eval()
    asked = [{"role": "user", "content": "Say 5 things."}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert ADDED[0] in ids["input_ids"]
    with torch.no_grad():
        expected = stock(input_ids=ids["input_ids"]).logits
        found = ours.model(input_ids=ids["input_ids"]).logits
    assert found.shape == expected.shape == (*ids["input_ids"].shape, WANTED_ROWS[name])
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert ours.ends[0] == ADDED[1], "an answer ends at <|im_end|>"
    assert vocabulary_rows(ours.model) == WANTED_ROWS[name]
    ours.answer("Say 5 things.", max_new_tokens=3)
    ours.answer("Say 5 things.", adapter=False, max_new_tokens=3)


def test_it_resumes_bit_for_bit_and_answers_from_a_checkpoint(tmp_path: Path, bases: Any) -> None:
    base = bases("untied, without a row to spare")
    train(chatml(tmp_path, base, output=tmp_path / "whole"))
    recipe = chatml(tmp_path, base, output=tmp_path / "cut", train__max_steps=2)
    train(recipe)
    shutil.rmtree(tmp_path / "cut/adapter")
    assert load_run(tmp_path / "cut").ends[0] == ADDED[1], "without a saved tokenizer, the base's is prepared again"
    train(chatml(tmp_path, base, output=tmp_path / "cut"), resume=True)
    one, two = (tmp_path / name / "adapter/adapter_model.safetensors" for name in ("whole", "cut"))
    longer = chatml(tmp_path, base, output=tmp_path / "again")
    train(longer)
    shutil.rmtree(tmp_path / "again/adapter")
    (tmp_path / "again/finished.json").unlink()
    shutil.rmtree(tmp_path / "again/checkpoints/step-000005")
    train(longer, resume=True)
    three = tmp_path / "again/adapter/adapter_model.safetensors"
    assert one.read_bytes() == three.read_bytes()
    assert load_file(two).keys() == load_file(one).keys()

    with pytest.raises(RunError, match=r"data\.add_tokens cannot change on --resume \(was True, is False\)"):
        check_same(RunFolder(tmp_path / "cut"), tiny_recipe(tmp_path, base=base, output=tmp_path / "cut",
                                                            **{**CHATML, "data__add_tokens": False}))  # fmt: skip


def test_two_processes_train_the_rows_of_one(tmp_path: Path, bases: Any) -> None:
    base = bases("untied, without a row to spare")
    train(chatml(tmp_path, base, output=tmp_path / "one"))
    chatml(tmp_path, base, output=tmp_path / "two")
    assert launch(["train", str(tmp_path / "recipe.yaml")], 2, tmp_path / "log") == [0, 0], (
        tmp_path / "log.0"
    ).read_text()
    compare(tmp_path / "one", tmp_path / "two")


def test_packing_does_not_change_the_rows(tmp_path: Path, bases: Any) -> None:
    base = bases("one row to spare")
    train(chatml(tmp_path, base, output=tmp_path / "one"))
    train(chatml(tmp_path, base, output=tmp_path / "two", train__micro_batch_tokens=64))
    compare(tmp_path / "one", tmp_path / "two")


def test_nothing_is_added_where_nothing_lacks(tmp_path: Path, bases: Any) -> None:
    heard: list[str] = []

    class Heard(Progress):
        def line(self, text: str) -> None:
            heard.append(text)

    base = bases("untied, without a row to spare")
    train(chatml(tmp_path, base, data__template="alpaca", train__max_steps=1), progress=Heard())
    assert "added tokens none: the tokenizer has all that the templates write" in heard
    assert not any(line.startswith("trained rows") for line in heard)
    config = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert config["trainable_token_indices"] is None


def test_an_adapter_with_added_tokens_is_continued_or_refused(tmp_path: Path, bases: Any) -> None:
    base = bases("untied, without a row to spare")
    train(chatml(tmp_path, base, output=tmp_path / "first"))
    first = load_file(tmp_path / "first/adapter/adapter_model.safetensors")
    changes = {"adapter__start_from": tmp_path / "first", "train__learning_rate": 1e-12}
    train(chatml(tmp_path, base, output=tmp_path / "second", **changes))
    second = load_file(tmp_path / "second/adapter/adapter_model.safetensors")
    for name, tensor in first.items():
        assert torch.allclose(second[name], tensor, atol=1e-6), name

    with pytest.raises(ModelError, match=r"trained the rows of 2 tokens \(326, 327\), and the recipe adds no token"):
        train(chatml(tmp_path, base, output=tmp_path / "third", data__template="alpaca", **changes))

    train(chatml(tmp_path, base, output=tmp_path / "plain", data__template="alpaca"))
    changes["adapter__start_from"] = tmp_path / "plain"
    with pytest.raises(ModelError, match=r"trained the rows of no token, and the recipe adds 2 tokens \(326, 327\)"):
        train(chatml(tmp_path, base, output=tmp_path / "fourth", **changes))

    saved = tmp_path / "first/adapter/tokenizer.json"
    saved.write_text(saved.read_text().replace("<|im_start|>", "<|begin|>"))
    changes["adapter__start_from"] = tmp_path / "first"
    with pytest.raises(ModelError, match=r"added token 326 is <\|begin\|>, and this recipe's templates make it"):
        train(chatml(tmp_path, base, output=tmp_path / "fifth", **changes))


def test_rows_that_do_not_train_stop_the_run(tmp_path: Path, bases: Any) -> None:
    _, loaded = adapted(bases("untied, without a row to spare"), tmp_path, "none")
    claimed: dict[str, int] = {}
    assert check_coverage(loaded.model, claimed, "none", ADDED).trained_rows is not None
    with pytest.raises(ModelError, match=r"2 matrices do not train the rows of added tokens: .*lm_head"):
        check_coverage(loaded.model, claimed, "none", (*ADDED, 328))
    head = loaded.model.get_output_embeddings().token_adapter
    head.trainable_tokens_delta["default"].requires_grad_(False)
    with pytest.raises(ModelError, match=r"1 matrices do not train the rows of added tokens: lm_head\."):
        check_coverage(loaded.model, claimed, "none", ADDED)


def test_a_base_that_cannot_take_them_is_refused(tmp_path: Path) -> None:
    short = write_model(tmp_path / "short", "mistral", vocab_size=300)
    with pytest.raises(ModelError, match=r"has 326 tokens before any is added, and the model has 300 embeddings"):
        train(chatml(tmp_path, short))
    biased = load_base(chatml(tmp_path, write_model(tmp_path / "b", "llama")).model, torch.device("cpu"))
    biased.model.lm_head.bias = torch.nn.Parameter(torch.zeros(384))
    with pytest.raises(ModelError, match=r"data\.add_tokens: the output head of here has a bias"):
        grow_vocabulary(biased, "here", ADDED)


def test_an_adapter_of_other_rows_is_refused(tmp_path: Path, bases: Any) -> None:
    base = bases("untied, without a row to spare")
    model, _ = adapted(base, tmp_path, "none")
    folder = save(model, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    for tokens in ([5, 327], [327, 326]):
        config["trainable_token_indices"] = {"embed_tokens": [326, 327], "lm_head": tokens}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        words = rf"of 2 tokens \({tokens[0]}, {tokens[1]}\), and the recipe adds 2 tokens \(326, 327\)"
        with pytest.raises(ModelError, match=words):
            read_adapter(folder, model)
