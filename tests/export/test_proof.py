"""Faults planted in merged folders, and in the merging itself: the proof must find each, and say where."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

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
from tests.tiny import write_model
from tune.errors import UntrustworthyError
from tune.export import merge as merging
from tune.export.deltas import Delta
from tune.export.merge import merge
from tune.export.proof import UNPROVEN, Proof, prove
from tune.export.proof.logits import Difference, _distinct
from tune.export.proof.prompts import Prompt, choose_prompts
from tune.export.subject import Subject, find_subject

LAYER = "model.layers.1.self_attn."
Q, K, V = (f"{LAYER}{which}_proj.weight" for which in "qkv")
NORM = "model.layers.0.input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Case:
    """A proven merge in `folder`, of which a test may spoil anything."""

    run: Made
    folder: Path
    subject: Subject

    @functools.cached_property
    def deltas(self) -> dict[str, Tensor]:
        """ΔW by the stored name of its matrix."""
        found = {name: d for name, d in self.subject.deltas.items() if isinstance(d, Delta)}
        return {name: (d.b_OR @ d.a_RI) * d.scaling for name, d in found.items()}

    def weight(self, name: str) -> Tensor:
        """A matrix of the base."""
        return tensors_of(self.run.base)[name]

    def set(self, name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> None:
        """Put another tensor into the merged folder, in the type that is there."""
        kept = dtype or self.weight(name).dtype
        change_tensors(file_of(self.folder, name), lambda tensors: tensors.update({name: tensor.to(kept)}))

    def set_delta(self, name: str, delta: Tensor) -> None:
        """Merge another delta into a matrix."""
        self.set(name, self.weight(name).float() + delta)

    def prove(self) -> Proof:
        return prove(self.subject, self.folder)

    def reasons(self) -> str:
        return "\n".join(self.prove().reasons)


@functools.cache
def merged(dtype: str, base: str = "original") -> tuple[Made, Path, Subject]:
    run = made("llama", dtype, True)
    folder = run.root / f"merged-{base}"
    merge(run.run.root, folder, base)  # type: ignore[arg-type]
    return run, folder, find_subject(run.run.root, base)  # type: ignore[arg-type]


@pytest.fixture(params=["float32", "bfloat16"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    """In each of the types that a base has."""
    return spoilable(request.param, tmp_path)


@pytest.fixture
def one(tmp_path: Path) -> Case:
    """In one type, for faults that have nothing to do with it."""
    return spoilable("bfloat16", tmp_path)


def spoilable(dtype: str, tmp_path: Path, base: str = "original") -> Case:
    run, folder, subject = merged(dtype, base)
    shutil.copytree(folder, tmp_path / "merged")
    return Case(run, tmp_path / "merged", subject)


def test_the_merge_itself_holds(case: Case) -> None:
    assert not case.reasons()


# --- the weights ---


def drop_a_layer(case: Case) -> None:
    for name in case.deltas:
        if name.startswith("model.layers.1."):
            case.set(name, case.weight(name))


def drop_a_matrix(case: Case) -> None:
    case.set(Q, case.weight(Q))


def swap_a_and_b(case: Case) -> None:
    case.set_delta(Q, case.deltas[Q].T)


def scale_by_one_percent(case: Case) -> None:
    for name, delta in case.deltas.items():
        case.set_delta(name, delta * 1.01)


def scale_one_matrix_by_one_percent(case: Case) -> None:
    case.set_delta(Q, case.deltas[Q] * 0.99)


def put_a_delta_on_another(case: Case) -> None:
    case.set_delta(K, case.deltas[V])


def merge_twice(case: Case) -> None:
    case.set_delta(Q, case.deltas[Q] * 2)


def subtract(case: Case) -> None:
    case.set_delta(Q, -case.deltas[Q])


def put_nan(case: Case) -> None:
    tensor = tensors_of(case.folder)[Q].float()
    tensor[3, 5] = torch.nan
    case.set(Q, tensor)


def put_infinity(case: Case) -> None:
    tensor = tensors_of(case.folder)[Q].float()
    tensor[0, 0] = torch.inf
    case.set(Q, tensor)


def change_one_number(case: Case) -> None:
    """By four units in the last place in float32, whose sums are bounded no nearer; by one in 16 bits."""
    tensor = tensors_of(case.folder)[Q]
    row, column = divmod(int(tensor.float().abs().argmax()), tensor.shape[1])
    for _ in range(16 if tensor.dtype == torch.float32 else 2):
        tensor[row, column] = torch.nextafter(tensor[row, column], torch.tensor(9.0, dtype=tensor.dtype))
    case.set(Q, tensor)


def exchange_rows(case: Case) -> None:
    tensor = tensors_of(case.folder)[Q]
    tensor[[0, 1]] = tensor[[1, 0]]
    case.set(Q, tensor)


@pytest.mark.parametrize(
    ("plant", "named"),
    [
        (drop_a_layer, "7 tensors are not the base plus the adapter: model.layers.1."),
        (drop_a_matrix, Q),
        (swap_a_and_b, Q),
        (scale_by_one_percent, "14 tensors are not the base plus the adapter"),
        (scale_one_matrix_by_one_percent, Q),
        (put_a_delta_on_another, K),
        (merge_twice, Q),
        (subtract, Q),
        (put_nan, Q),
        (put_infinity, Q),
        (change_one_number, Q),
        (exchange_rows, Q),
    ],
)
def test_a_wrong_delta_is_found_by_name(case: Case, plant: Callable[[Case], None], named: str) -> None:
    plant(case)
    proof = case.prove()
    assert proof.content["verdict"] == "failed"
    assert not proof.holds
    found = next(reason for reason in proof.reasons if reason.startswith("weights: "))
    assert named in found
    assert found.startswith("weights: 1 tensors are not the base plus the adapter") == (named in (Q, K))
    strict_json(proof)


def strict_json(proof: Proof) -> None:
    def refuse(word: str) -> None:
        pytest.fail(f"merge-proof.json holds {word}, which is no JSON")

    assert json.loads(proof.to_text(), parse_constant=refuse)["verdict"] == "failed"


def flip_a_bit(case: Case) -> None:
    """In the embedding of a token that no prompt holds, where no logit shows it."""
    path = file_of(case.folder, EMBEDDING)
    content = bytearray(path.read_bytes())
    header = json.loads(header_of(path)[8:])
    content[len(header_of(path)) + header[EMBEDDING]["data_offsets"][1] - 1] ^= 1
    path.write_bytes(content)


def change_a_norm(case: Case) -> None:
    case.set(NORM, case.weight(NORM) * 1.01)


def leave_out(case: Case) -> None:
    path = file_of(case.folder, NORM)
    change_tensors(path, lambda tensors: tensors.pop(NORM))
    change_index(case, {NORM: None})


def add_another(case: Case) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.2.input_layernorm.weight"] = torch.ones(64)

    change_tensors(weight_files(case.folder)[0], add)


def change_the_type(case: Case) -> None:
    case.set(NORM, case.weight(NORM), torch.float16)


def change_the_shape(case: Case) -> None:
    case.set(K, tensors_of(case.folder)[K].T)


def move_to_another_file(case: Case) -> None:
    first, last = weight_files(case.folder)[0], weight_files(case.folder)[-1]
    assert file_of(case.folder, NORM) != last
    taken = load_file(file_of(case.folder, NORM))[NORM]
    change_tensors(file_of(case.folder, NORM), lambda tensors: tensors.pop(NORM))
    change_tensors(last, lambda tensors: tensors.update({NORM: taken}))
    change_index(case, {NORM: last.name})
    assert first.exists()


def change_index(case: Case, changes: dict[str, str | None]) -> None:
    path = case.folder / "model.safetensors.index.json"
    weight_map = {**json.loads(path.read_text())["weight_map"], **changes}
    change_json(path, weight_map={name: shard for name, shard in weight_map.items() if shard is not None})


def name_another_shard(case: Case) -> None:
    change_index(case, {NORM: weight_files(case.folder)[-1].name})


def forget_in_the_index(case: Case) -> None:
    change_index(case, {NORM: None})


def index_without_json(case: Case) -> None:
    (case.folder / "model.safetensors.index.json").write_text("{")


def index_outside(case: Case) -> None:
    change_index(case, {NORM: "../other.safetensors"})


def rename_a_shard(case: Case) -> None:
    weight_files(case.folder)[1].rename(case.folder / "model-of-mine.safetensors")


def rename_a_shard_and_the_index(case: Case) -> None:
    old = weight_files(case.folder)[1]
    old.rename(case.folder / "model-of-mine.safetensors")
    path = case.folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace(old.name, "model-of-mine.safetensors"))


def swap_two_shards(case: Case) -> None:
    one, two = weight_files(case.folder)[:2]
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)


def truncate(case: Case) -> None:
    path = weight_files(case.folder)[1]
    path.write_bytes(path.read_bytes()[:-1])


def truncate_to_the_header(case: Case) -> None:
    path = weight_files(case.folder)[1]
    path.write_bytes(header_of(path))


def empty_a_shard(case: Case) -> None:
    weight_files(case.folder)[1].write_bytes(b"")


def take_a_shard_of_the_base(case: Case) -> None:
    name = file_of(case.folder, Q).name
    shutil.copy(case.run.base / name, case.folder / name)


def take_a_shard_of_another_checkpoint(case: Case) -> None:
    """Of one with the same names and shapes."""
    other = made("llama", str(case.weight(Q).dtype).removeprefix("torch."), True, spoil=other_numbers)
    for path in weight_files(case.folder)[1:2]:
        assert (other.base / path.name).stat().st_size == path.stat().st_size
        shutil.copy(other.base / path.name, path)


def other_numbers(folder: Path) -> None:
    for path in weight_files(folder):
        change_tensors(path, lambda tensors: [tensor.mul_(1.5) for tensor in tensors.values()])


def take_a_shard_of_another_merge(case: Case) -> None:
    """The 4-bit base's with the same adapter."""
    dtype = str(case.weight(Q).dtype).removeprefix("torch.")
    name = file_of(case.folder, Q).name
    shutil.copy(merged(dtype, "quantized")[1] / name, case.folder / name)


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (flip_a_bit, ("1 tensors should be as in the base and are not", EMBEDDING)),
        (change_a_norm, ("should be as in the base and are not", NORM)),
        (leave_out, ("1 tensors are missing", NORM)),
        (add_another, ("1 tensors are not in the base", "model.layers.2.input_layernorm.weight")),
        (change_the_type, ("another type, shape or file", NORM)),
        (change_the_shape, ("another type, shape or file", K)),
        (move_to_another_file, ("another type, shape or file", NORM)),
        (name_another_shard, ("weights: ", "index.json", NORM)),
        (forget_in_the_index, ("weights: ", "index.json")),
        (index_without_json, ("weights: ", "is no index")),
        (index_outside, ("weights: ", "../other.safetensors")),
        (rename_a_shard, ("weights: ", "cannot be read")),
        (rename_a_shard_and_the_index, ("another type, shape or file",)),
        (swap_two_shards, ("weights: ",)),
        (truncate, ("weights: ", "should be", "copy it again")),
        (truncate_to_the_header, ("weights: ",)),
        (empty_a_shard, ("weights: ", "no whole safetensors file")),
        (take_a_shard_of_the_base, ("are not the base plus the adapter",)),
        (take_a_shard_of_another_checkpoint, ("are not the base plus the adapter",)),
        (take_a_shard_of_another_merge, ("are not the base plus the adapter",)),
    ],
)
def test_a_wrong_file_is_found_by_name(one: Case, plant: Callable[[Case], None], words: tuple[str, ...]) -> None:
    plant(one)
    proof = one.prove()
    for word in words:
        assert word in "\n".join(proof.reasons)
    strict_json(proof)


def test_faults_in_the_four_bit_merge_are_found(tmp_path: Path) -> None:
    case = spoilable("bfloat16", tmp_path, "quantized")
    assert not case.reasons()
    case.set_delta(Q, case.deltas[Q])  # W + ΔW of the original
    assert f"1 tensors are not the base plus the adapter: {Q}" in case.reasons()


def test_an_unadapted_matrix_of_the_four_bit_base_is_compared(tmp_path: Path) -> None:
    run = made("llama", "bfloat16", adapter__exclude=["o_proj"])
    merge(run.run.root, tmp_path / "merged", "quantized")
    case = Case(run, tmp_path / "merged", find_subject(run.run.root, "quantized"))
    name = f"{LAYER}o_proj.weight"
    assert not torch.equal(tensors_of(case.folder)[name], case.weight(name)), "as trained, not as in the file"
    case.set(name, case.weight(name))
    assert f"1 tensors are not those of the 4-bit base: {name}" in case.reasons()


# --- the words ---


def swap_two_ids(case: Case) -> None:
    path = case.folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    one, two = [token for token in vocabulary if token.isalpha()][20:22]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    path.write_text(json.dumps(content))


def drop_a_merge_rule(case: Case) -> None:
    path = case.folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][: len(content["model"]["merges"]) // 2]
    path.write_text(json.dumps(content))


def other_chat_template(case: Case) -> None:
    (case.folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")


def almost_the_chat_template(case: Case) -> None:
    path = case.folder / "chat_template.jinja"
    path.write_text(path.read_text() + " ")


def no_chat_template(case: Case) -> None:
    (case.folder / "chat_template.jinja").unlink()


def broken_chat_template(case: Case) -> None:
    (case.folder / "chat_template.jinja").write_text("{% for %}")


def other_end(case: Case) -> None:
    change_json(case.folder / "generation_config.json", eos_token_id=5)


def no_tokenizer_config(case: Case) -> None:
    (case.folder / "tokenizer_config.json").unlink()


def no_generation_config(case: Case) -> None:
    (case.folder / "generation_config.json").unlink()


def no_tokenizer(case: Case) -> None:
    (case.folder / "tokenizer.json").unlink()


def half_a_tokenizer(case: Case) -> None:
    path = case.folder / "tokenizer.json"
    path.write_text(path.read_text()[:1000])


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (swap_two_ids, "its vocabulary is not the one that trained"),
        (drop_a_merge_rule, "dialogues become other tokens than in training"),
        (other_chat_template, "the chat template is not the one that trained"),
        (almost_the_chat_template, "the chat template is not the one that trained"),
        (no_chat_template, "tokenizer: "),
        (broken_chat_template, "tokenizer: "),
        (other_end, "generation_config.json ends answers at 5"),
        (no_tokenizer_config, "tokenizer: "),
        (no_generation_config, "tokenizer: "),
        (no_tokenizer, "tokenizer: "),
        (half_a_tokenizer, "tokenizer: "),
    ],
)
def test_wrong_words_are_found(one: Case, plant: Callable[[Case], None], words: str) -> None:
    plant(one)
    proof = one.prove()
    assert any(reason.startswith("tokenizer: ") and words in reason for reason in proof.reasons), proof.reasons
    strict_json(proof)


def test_the_dialogues_that_a_wrong_template_changes_are_counted(one: Case) -> None:
    other_chat_template(one)
    proof = one.prove()
    assert proof.content["bounded"]["tokenizer"]["equal"] == 0
    assert "4 of 4 dialogues" in "\n".join(proof.reasons)


# --- the config ---


def no_config(case: Case) -> None:
    (case.folder / "config.json").unlink()


def half_a_config(case: Case) -> None:
    path = case.folder / "config.json"
    path.write_text(path.read_text()[:50])


def one_end_more(case: Case) -> None:
    change_json(case.folder / "generation_config.json", eos_token_id=[1, 77])


def hotter(case: Case) -> None:
    change_json(case.folder / "generation_config.json", do_sample=True, temperature=2.0)


def changed(**changes: Any) -> Callable[[Case], None]:
    def change(case: Case) -> None:
        change_json(case.folder / "config.json", **changes)

    return change


@pytest.mark.parametrize(
    "plant",
    [
        no_config,
        half_a_config,
        one_end_more,
        hotter,
        no_generation_config,
        changed(rope_parameters={"rope_type": "default", "rope_theta": 20000.0}),
        changed(rms_norm_eps=1e-4),
        changed(hidden_act="gelu"),
        changed(num_hidden_layers=1),
        changed(num_hidden_layers=3),
        changed(num_attention_heads=8, num_key_value_heads=4, head_dim=8),
        changed(num_attention_heads=3),
        changed(hidden_size=128),
        changed(vocab_size=500),
        changed(model_type="mistral", sliding_window=3),
        changed(model_type="nonsense"),
        changed(eos_token_id=7),
        changed(tie_word_embeddings=True),
    ],
)
def test_another_models_config_is_found(one: Case, plant: Callable[[Case], None]) -> None:
    plant(one)
    proof = one.prove()
    assert any(reason.startswith("config: ") for reason in proof.reasons), proof.reasons
    strict_json(proof)


@pytest.mark.parametrize(
    "plant",
    [
        changed(rope_parameters={"rope_type": "default", "rope_theta": 20000.0}),
        changed(num_hidden_layers=1),
        changed(num_attention_heads=8, num_key_value_heads=4, head_dim=8),
    ],
)
def test_the_merged_models_logits_are_those_of_its_own_config(one: Case, plant: Callable[[Case], None]) -> None:
    plant(one)
    assert "logits: " in one.reasons()


# --- the adapter ---


def test_an_adapter_that_changed_after_the_merge_is_found(one: Case, tmp_path: Path) -> None:
    run = one.run.copy(tmp_path / "made")

    def empty_a_layer(tensors: dict[str, Tensor]) -> None:
        tensors[f"base_model.model.{LAYER}q_proj.lora_B.weight"].zero_()

    change_tensors(run.adapter_file, empty_a_layer)
    proof = prove(find_subject(run.run.root, "original"), one.folder)
    assert f"1 tensors are not the base plus the adapter: {Q}" in proof.reasons[0]


# --- faults in the code that merges ---


def wrong_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Delta.rows
    monkeypatch.setattr(Delta, "rows", lambda self, start, stop: right(self, start, stop) * 1.01)


def swapped_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The factors multiplied the other way round, where a matrix is square."""
    right = Delta.rows

    def rows(self: Delta, start: int, stop: int) -> Tensor:
        whole = right(self, 0, self.shape[0])
        return whole.T[start:stop] if self.shape[0] == self.shape[1] else right(self, start, stop)

    monkeypatch.setattr(Delta, "rows", rows)


def changed_deltas(change: Callable[[dict[str, Delta]], None]) -> Callable[[pytest.MonkeyPatch], None]:
    """A merge that works with other deltas than it should, and a proof that does not."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        right = merging.find_subject

        def find(*arguments: Any) -> Subject:
            subject = right(*arguments)
            change(subject.deltas)
            return subject

        monkeypatch.setattr(merging, "find_subject", find)

    return plant


def without_a_layer(deltas: dict[str, Delta]) -> None:
    for name in [name for name in deltas if name.startswith("model.layers.1.")]:
        del deltas[name]


def exchanged(deltas: dict[str, Delta]) -> None:
    deltas[K], deltas[V] = deltas[V], deltas[K]


def rounded_delta(monkeypatch: pytest.MonkeyPatch) -> None:
    """ΔW rounded to 16 bits before it is added: the rounding twice that this merge promises not to do."""
    right = Delta.rows
    monkeypatch.setattr(Delta, "rows", lambda self, start, stop: right(self, start, stop).bfloat16().float())


def other_words(monkeypatch: pytest.MonkeyPatch) -> None:
    right = merging.write_words

    def write(folder: Path, subject: Subject) -> None:
        right(folder, subject)
        (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")

    monkeypatch.setattr(merging, "write_words", write)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("plant", "named"),
    [
        (wrong_scale, "14 tensors are not the base plus the adapter"),
        (swapped_factors, "4 tensors are not the base plus the adapter"),
        (changed_deltas(without_a_layer), "7 tensors are not the base plus the adapter"),
        (changed_deltas(exchanged), V),
        (rounded_delta, "are not the base plus the adapter"),
        (other_words, "the chat template is not the one that trained"),
    ],
)
def test_a_merge_that_goes_wrong_says_so_beside_the_weights(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    plant: Callable[[pytest.MonkeyPatch], None],
    named: str,
) -> None:
    run = made("llama", dtype, True)
    plant(monkeypatch)
    with pytest.raises(UntrustworthyError, match="the proof failed") as failed:
        merge(run.run.root, tmp_path / "out")
    assert failed.value.exit_code == 3
    assert named in str(failed.value)
    content = json.loads((tmp_path / "out/merge-proof.json").read_text())
    assert content["verdict"] == "failed"
    assert (tmp_path / "out" / UNPROVEN).read_text() == "\n".join(content["reasons"]) + "\n"
    assert len(weight_files(tmp_path / "out")) == len(weight_files(run.base))
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


# --- its parts ---


def test_the_bounds_tell_the_adapter_from_none(case: Case) -> None:
    """The logits alone find a merge without its adapter, by each of their three measures."""
    for path in weight_files(case.run.base):
        shutil.copy(path, case.folder / path.name)
    reasons = case.prove().reasons
    for measure in ("max_abs_difference", "mean_kl", "top1_agreement"):
        assert any(reason.startswith(f"logits: {measure}") for reason in reasons), measure


@pytest.mark.parametrize(("family", "dtype"), [("falcon", "float16"), ("llama", "bfloat16"), ("bloom", "bfloat16")])
@pytest.mark.parametrize("rate", [1e-2, 1e-3, 1e-4])
def test_rounding_alone_is_no_fault(tmp_path: Path, family: str, dtype: str, rate: float) -> None:
    """Also where the adapter is so small that 16 bits hold little of it, and where prompts begin alike."""
    run = made(family, dtype, train__learning_rate=rate)
    assert merge(run.run.root, tmp_path / "out").proof.holds


@pytest.mark.parametrize("rate", [1e-2, 1e-4])
def test_the_control_says_what_rounding_alone_does(tmp_path: Path, rate: float) -> None:
    """It rounds as a merge does, so that an adapter of which rounding loses a part, alike everywhere, is no fault."""
    run = made("llama", "bfloat16", train__learning_rate=rate)
    logits = merge(run.run.root, tmp_path / "out").proof.content["bounded"]["logits"]
    for name in ("max_abs_difference", "mean_kl"):
        assert logits[name]["figure"] == pytest.approx(logits["control"][name], rel=0.1)
        assert 1.3 * logits[name]["figure"] < logits[name]["bound"]


def prompt(*ids: int) -> Prompt:
    import numpy as np

    return Prompt(np.array(ids, dtype=np.int64), np.ones(len(ids), dtype=bool))


def test_the_losses_are_those_of_the_stock_models_on_what_was_learned(one: Case) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    @torch.no_grad()
    def loss(model: Any) -> float:
        total, count = 0.0, 0
        for prompt in choose_prompts(one.subject.provenance["examples"]):
            logits = model(input_ids=torch.from_numpy(prompt.ids)[None]).logits[0, :-1]
            nll = torch.nn.functional.cross_entropy(logits, torch.from_numpy(prompt.ids)[1:], reduction="none")
            learned = torch.from_numpy(prompt.trained)[1:]
            assert 0 < int(learned.sum()) < len(learned)
            total, count = total + float(nll[learned].double().sum()), count + int(learned.sum())
        return total / count

    def load(folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    reported = one.prove().content["reported"]["loss"]
    assert reported["merged"] == pytest.approx(loss(load(one.folder)), rel=1e-5)
    adapted = PeftModel.from_pretrained(load(one.run.base), str(one.run.run.adapter)).eval()
    assert reported["adapter"] == pytest.approx(loss(adapted), rel=1e-5)
    assert reported["trained"] != reported["adapter"]


def test_positions_behind_the_same_tokens_are_one_position() -> None:
    prompts = [prompt(5, 6, 7), prompt(5, 6, 8, 7), prompt(6, 5), prompt(5, 6, 7, 9)]
    found = _distinct(prompts).tolist()
    assert found == [True, True, True, False, False, True, True, True, True, False, False, False, True]


def test_the_figures_are_those_of_their_definitions() -> None:
    one = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0], [3.0, 0.0, 0.0]])
    two = torch.tensor([[2.5, 2.0, 0.0], [3.0, 0.5, 0.0], [0.0, 1.0, 0.0]])
    difference = Difference()
    difference.add(one, two, torch.tensor([True, True, False]))
    log_one, log_two = one.double().log_softmax(1), two.double().log_softmax(1)
    kl = float((log_one.exp() * (log_one - log_two)).sum(1).mean())
    assert difference.figures["max_abs_difference"] == 3.0
    assert difference.figures["mean_kl"] == pytest.approx(kl)
    assert difference.figures["top1_agreement"] == 0.5
    assert difference.finite
    difference.add(one[:1] * torch.nan, two[:1], torch.tensor([True]))
    assert not difference.finite


def test_prompts_are_cut_and_bounded_in_number() -> None:
    long = [{"ids": list(range(1000)), "trained": [0, 1] * 500}] * 16
    chosen = choose_prompts(long)
    assert [len(prompt.ids) for prompt in chosen] == [256] * 4
    assert chosen[0].trained[:4].tolist() == [False, True, False, True]
    short = [{"ids": [number, 1], "trained": [0, 1]} for number in range(16)]
    assert len(choose_prompts(short)) == 16
    assert len({prompt.fingerprint for prompt in choose_prompts(short)}) == 16


def test_another_seed_makes_another_base(tmp_path: Path) -> None:
    """What the shards of another checkpoint rest on."""
    write_model(tmp_path / "base", "llama", torch.bfloat16, seed=1)
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert not torch.equal(tensors_of(tmp_path / "base")[Q], tensors_of(made("llama", "bfloat16").base)[Q])
