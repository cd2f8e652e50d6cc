"""scripts/upcycle.py on tiny models: the same function without noise, known tensors with it, and every refusal."""

from __future__ import annotations

import errno
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.tiny import write_model

OFFLINE = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "TQDM_DISABLE", "HF_DEACTIVATE_ASYNC_LOAD")
W1 = "model.layers.0.block_sparse_moe.experts.0.w1.weight"


@pytest.fixture
def upcycle(load_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script; what it changes for its whole process is put back after the test."""
    from transformers.utils import logging

    for name in OFFLINE:
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(sys, "path", list(sys.path))
    verbosity = logging.get_verbosity()
    yield load_script("upcycle")
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mistral in float32, with everything that a folder from the Hub has beside its weights."""
    folder = write_model(tmp_path_factory.mktemp("upcycle") / "dense", "mistral", sliding_window=16)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# Tiny\n")
    (folder / "NOTICE").write_text("keep me\n")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture
def copy(dense: Path, tmp_path: Path) -> Path:
    """A copy of `dense` to change."""
    return Path(shutil.copytree(dense, tmp_path / "copy"))


def tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def logits(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    with torch.inference_mode():
        return model(torch.arange(40)[None] * 7 % 384).logits


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def change_tensors(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    from safetensors.torch import save_file

    found = tensors(folder)
    change(found)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


@pytest.mark.parametrize(
    ("family", "changes", "experts", "top_k"),
    [
        ("mistral", {"sliding_window": 16, "head_dim": 32, "rms_norm_eps": 1e-3}, 4, 2),
        ("mistral", {"tie_word_embeddings": True, "intermediate_size": 37}, 2, 1),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}}, 5, 3),
    ],
)
def test_without_noise_it_is_the_dense_model(
    upcycle: ModuleType, tmp_path: Path, family: str, changes: dict[str, Any], experts: int, top_k: int
) -> None:
    dense = write_model(tmp_path / "dense", family, **changes)
    command = [str(dense), str(tmp_path / "moe"), "--experts", str(experts), "--top-k", str(top_k), "--noise", "0"]
    assert upcycle.main(command) == 0
    exact = logits(dense)
    assert (logits(tmp_path / "moe") - exact).abs().max() <= 1e-5 * exact.abs().max()
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert (config["model_type"], config["dtype"]) == ("mixtral", "float32")
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (experts, top_k)
    found = tensors(tmp_path / "moe")
    assert all(torch.equal(found[W1.replace("0.w1", f"{e}.w1")], found[W1]) for e in range(experts))


def test_real_weights_keep_telling_the_same_story(upcycle: ModuleType, stories: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert upcycle.main([str(stories), str(tmp_path / "moe"), "--noise", "0"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "moe")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32)
    ids = model.generate(torch.tensor([[1]]), max_new_tokens=60, do_sample=False)
    golden = (stories.parents[1] / "goldens" / "stories260K_greedy_200.txt").read_text(encoding="utf-8")
    text = tokenizer.decode(ids[0], skip_special_tokens=True).strip()
    assert len(text) > 80
    assert golden.strip().startswith(text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_is_relative_independent_and_seeded(upcycle: ModuleType, tmp_path: Path, dtype: Any) -> None:
    dense = write_model(tmp_path / "dense", "mistral", dtype)
    for name, seed in (("a", "0"), ("again", "0"), ("b", "1")):
        assert upcycle.main([str(dense), str(tmp_path / name), "--noise", "0.05", "--seed", seed]) == 0
    was, first, other = (tensors(tmp_path / name) for name in ("dense", "a", "b"))
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()
    moved = []
    for dense_name, new in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        weight = was[f"model.layers.1.mlp.{dense_name}.weight"].float()
        for expert in range(4):
            name = f"model.layers.1.block_sparse_moe.experts.{expert}.{new}.weight"
            assert first[name].dtype is dtype
            noise = (first[name].float() - weight).flatten() / weight.std()
            assert float(noise.std()) == pytest.approx(0.05, rel=0.03)
            assert abs(float(noise.mean())) < 0.003
            assert not torch.equal(first[name], other[name])
            moved.append(noise)
    # No two matrices share their noise.
    assert torch.corrcoef(torch.stack(moved)).fill_diagonal_(0).abs().max() < 0.05
    for name in was:
        if ".mlp." not in name:
            assert torch.equal(first[name], was[name]), name


def test_noise_does_not_depend_on_how_many_experts_there_are(upcycle: ModuleType, dense: Path, tmp_path: Path) -> None:
    for experts in ("3", "4"):
        assert upcycle.main([str(dense), str(tmp_path / experts), "--experts", experts]) == 0
    three, four = tensors(tmp_path / "3"), tensors(tmp_path / "4")
    shared = [name for name in three if ".gate.weight" not in name]
    assert len(shared) == len(three) - 2
    assert all(torch.equal(three[name], four[name]) for name in shared)


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_the_router_decides_and_leaves_nobody_out(upcycle: ModuleType, dense: Path, scale: float) -> None:
    weights = sys.modules["upcycle_weights"]
    norm = torch.rand(64, generator=torch.Generator().manual_seed(1)) * scale
    checkpoint = SimpleNamespace(read=lambda name: norm)
    name = "model.layers.{}.block_sparse_moe.gate.weight"
    spread = []
    for layer in range(20):
        part = weights.Part(name.format(layer), "norm", "router", (4, 64), "F32", 0)
        router = weights.tensor_of(part, checkpoint, weights.Settings())
        hidden = torch.randn(500, 64, generator=torch.Generator().manual_seed(layer)) * norm
        spread.append(float((hidden @ router.T).std(dim=1).mean()))
    # The mean of the standard deviation of four normal numbers is 0.92 of their own.
    assert sum(spread) / len(spread) == pytest.approx(0.92 * weights.ROUTER_SPREAD, rel=0.15)


def test_routing_is_measured(upcycle: ModuleType) -> None:
    check = sys.modules["upcycle_check"]
    # Everybody chooses experts 0 and 1, at odds of 3 to 1; in the second layer the four share the tokens.
    collapsed = torch.tensor([[math.log(3.0), 0.0, -9.0, -9.0]] * 4)
    balanced = torch.tensor([[1.0, 1.0, -9.0, -9.0], [-9.0, -9.0, 1.0, 1.0]] * 2)
    first, load = check.routing([collapsed, balanced], 2)
    assert first == pytest.approx((0.75 + 0.5) / 2)
    assert load == pytest.approx((2 + 1) / 2)


def test_shards_in_and_out_change_nothing(
    upcycle: ModuleType, dense: Path, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    assert upcycle.main([str(dense), str(tmp_path / "one")]) == 0
    names = sorted(tensors(copy))
    where = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(names)}
    for file in sorted(set(where.values())):
        save_file({name: tensors(dense)[name] for name in names if where[name] == file}, copy / file)
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    monkeypatch.setattr(sys.modules["upcycle_weights"], "SHARD_BYTES", 400_000)
    assert upcycle.main([str(copy), str(tmp_path / "many")]) == 0
    one, many = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    files = sorted((tmp_path / "many").glob("model-*.safetensors"))
    total = sum(value.nbytes for value in many.values())
    assert total / 400_000 <= len(files) < 2 * total / 400_000 + 1
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in files}
    assert index["metadata"]["total_size"] == total
    assert max(path.stat().st_size for path in files) < 420_000


def test_what_travels_with_the_weights(upcycle: ModuleType, dense: Path, tmp_path: Path) -> None:
    from tune.export.licence import card_licence

    assert upcycle.main([str(dense), str(tmp_path / "moe"), "--noise", "0.02", "--seed", "7"]) == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "NOTICE"):
        assert (tmp_path / "moe" / name).read_bytes() == (dense / name).read_bytes(), name
    assert (tmp_path / "moe" / "README-dense.md").read_text().endswith("# Tiny\n")
    assert card_licence(tmp_path / "moe").identifier == "apache-2.0"
    text = (tmp_path / "moe" / "README.md").read_text()
    assert "--experts 4 --top-k 2 --noise 0.02 --seed 7" in text
    assert "arXiv:2212.05055" in text
    assert "dense model `dense`" in text
    for path in (tmp_path / "moe").glob("*.*"):
        assert path.suffix == ".safetensors" or str(tmp_path) not in path.read_text(), path.name


def test_what_is_printed(upcycle: ModuleType, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert upcycle.main([str(dense), str(tmp_path / "moe")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "noise taken out, float32: largest logit difference" in out
    assert "with the noise (0.01 of a standard deviation as stored)" in out
    assert "(balanced 1, collapsed 2)" in out


def test_a_finished_folder_is_reused_and_another_is_not(
    upcycle: ModuleType, dense: Path, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "moe"
    assert upcycle.main([str(dense), str(output)]) == 0
    before = (output / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert upcycle.main([str(copy), str(output)]) == 0  # the same model in another place
    assert "already made" in capsys.readouterr().out
    for arguments, words in (
        (["--experts", "5"], "was made with experts 4"),
        (["--noise", "0"], "was made with noise 0.01"),
        (["--seed", "3"], "was made with seed 0"),
    ):
        assert upcycle.main([str(dense), str(output), *arguments]) == 2
        assert words in capsys.readouterr().err
    change_tensors(copy, lambda found: found["model.norm.weight"].mul_(2))
    assert upcycle.main([str(copy), str(output)]) == 2
    assert "of another dense model" in capsys.readouterr().err
    assert (output / "model.safetensors").stat().st_mtime_ns == before


def test_a_folder_of_something_else_is_kept(
    upcycle: ModuleType, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "moe"
    output.mkdir()
    (output / "config.json").write_text("mine")
    assert upcycle.main([str(dense), str(output)]) == 2
    assert "not a finished upcycling" in capsys.readouterr().err
    assert (output / "config.json").read_text() == "mine"


def drop(name: str) -> Callable[[Path], object]:
    return lambda folder: change_tensors(folder, lambda found: found.pop(name))


def put(name: str, value: Any) -> Callable[[Path], object]:
    return lambda folder: change_tensors(folder, lambda found: found.update({name: value}))


def config(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: change_config(folder, **changes)


NORM = "model.norm.weight"
REFUSED: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "another family": (config(model_type="falcon"), [], "its model_type is 'falcon'"),
    "a mixture already": (config(model_type="mixtral"), [], "its model_type is 'mixtral'"),
    "attention bias": (config(attention_bias=True), [], "has biases (attention_bias)"),
    "mlp bias": (config(mlp_bias=True), [], "has biases (mlp_bias)"),
    "a bias stored": (put("model.layers.0.self_attn.q_proj.bias", torch.zeros(64)), [], "holds model.layers.0.self"),
    "quantised": (config(quantization_config={"quant_method": "x"}), [], "its weights are quantised"),
    "integers": (put(NORM, torch.ones(64, dtype=torch.int8)), [], f"{NORM} is of type I8"),
    "another activation": (config(hidden_act="gelu"), [], "its activation is gelu"),
    "a config of nonsense": (config(hidden_size="wide"), [], "transformers does not accept it"),
    "a broken config": (lambda folder: (folder / "config.json").write_text("{"), [], "config.json: cannot be read"),
    "no config": (lambda folder: (folder / "config.json").unlink(), [], "holds no config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), [], "holds neither model.safetensors"),
    "a tensor missing": (drop(NORM), [], f"lacks {NORM}"),
    "another shape": (put(NORM, torch.ones(65)), [], f"{NORM} is (65,), and by config.json it is (64,)"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), [], "holds no tokenizer"),
    "a broken tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{}"), [], "tokenizer cannot be lo"),
    "no folder": (shutil.rmtree, [], "no such folder"),
    "fewer experts than top-k": (str, ["--experts", "2", "--top-k", "3"], "2 experts are fewer than the 3"),
    "one expert": (str, ["--experts", "1", "--top-k", "1"], "--experts: must be at least 2 (1)"),
    "no expert chosen": (str, ["--top-k", "0"], "--top-k: must be at least 1 (0)"),
    "negative noise": (str, ["--noise", "-0.1"], "--noise: must be 0 or a positive number (-0.1)"),
    "no number": (str, ["--noise", "nan"], "--noise: must be 0 or a positive number (nan)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_reason_and_nothing_left(
    upcycle: ModuleType, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    spoil, arguments, words = REFUSED[case]
    spoil(copy)
    output = tmp_path / "models" / "moe"
    assert upcycle.main([str(copy), str(output), *arguments]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
    assert message.endswith(".\n")
    assert not output.parent.exists() or visible(output.parent) == []


def test_no_room_is_said_before_anything_is_written(
    upcycle: ModuleType,
    dense: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "models" / "moe"
    with monkeypatch.context() as patch:
        patch.setattr(upcycle, "free_memory", lambda: 1000)
        assert upcycle.main([str(dense), str(output)]) == 2
    assert "of memory, 0.0 GB are free" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert upcycle.main([str(dense), str(output)]) == 2
    assert "on the disk, 0.0 GB are free" in capsys.readouterr().err
    assert not output.parent.exists()


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_nothing(
    upcycle: ModuleType,
    dense: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failure: BaseException,
) -> None:
    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(upcycle, "copy_beside", fail)
    assert upcycle.main([str(dense), str(tmp_path / "moe")]) == (2 if isinstance(failure, OSError) else 130)
    assert ("No space left" if isinstance(failure, OSError) else "nothing was kept") in capsys.readouterr().err
    assert visible(tmp_path) == []


def test_a_wrong_mixtral_is_not_kept(
    upcycle: ModuleType,
    dense: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights = sys.modules["upcycle_weights"]
    tensor_of, mixtral_config, parts_of = weights.tensor_of, upcycle.mixtral_config, weights.parts_of

    def other_epsilon(*arguments: Any) -> Any:
        made = mixtral_config(*arguments)
        made.rms_norm_eps = 0.1
        return made

    def no_router(*arguments: Any) -> Any:
        return (part for part in parts_of(*arguments) if part.kind != "router")

    def twice_the_noise(part: Any, *rest: Any) -> Any:
        found = tensor_of(part, *rest)
        return found * 1.02 if part.name == W1 else found

    for module, name, value, words in (
        (weights, "EXPERT_NAMES", {"gate_proj": "w3", "down_proj": "w2", "up_proj": "w1"}, "layer 0, expert 0: gate_p"),
        (upcycle, "mixtral_config", other_epsilon, "logits differ from the dense model"),
        (weights, "parts_of", no_router, "gate.weight does not load"),
        (weights, "tensor_of", twice_the_noise, "layer 0, expert 0: gate_proj is 0.023"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            assert upcycle.main([str(dense), str(tmp_path / "moe")]) == 1
        message = capsys.readouterr().err
        assert words in message
        assert message.endswith("The folder was not kept.\n")
        assert visible(tmp_path) == []
    for difference in (1e-3, math.nan):
        measured = sys.modules["upcycle_check"].Measured(difference, 0.1, 1.0, 0.01, 0.6, 1.2)
        monkeypatch.setattr(upcycle, "compare", lambda *_, found=measured: found)
        assert upcycle.main([str(dense), str(tmp_path / "moe")]) == 1
        assert visible(tmp_path) == []
