"""Experts in NF4: packed as bitsandbytes would pack them, from any checkpoint, computing what stock experts compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import QuantState, quantize_4bit
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import VOCABULARY, dequantized_twin, write_model
from tune.adapters.coverage import check_coverage
from tune.errors import ModelError
from tune.models import experts as experts_file
from tune.models import nf4_quantizer
from tune.models.catalog import FAMILIES
from tune.models.experts import STACKS, NF4Experts, expert_modules, holds, pack, weights_of
from tune.models.isolation import keeps_examples_apart
from tune.models.load import LoadedBase, load_base, outline_base
from tune.models.mapped import MappedFiles
from tune.recipe import schema

MIXTURES = [name for name, family in FAMILIES.items() if family.experts]
CPU = torch.device("cpu")


def load(path: Path, storage: torch.dtype = torch.uint8, **section: Any) -> LoadedBase:
    return load_base(schema.Model(**{"base": str(path), "dtype": "float32", **section}), CPU, storage)


def some_ids() -> Tensor:
    return torch.randint(VOCABULARY, (2, 23), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=some_ids()).logits.float()


def relative(ours: Tensor, reference: Tensor) -> float:
    return float((ours - reference).norm() / reference.norm())


def same_state(ours: QuantState, reference: QuantState) -> bool:
    return (
        torch.equal(ours.absmax, reference.absmax)
        and torch.equal(ours.state2.absmax, reference.state2.absmax)
        and torch.equal(ours.state2.code, reference.state2.code)
        and torch.equal(ours.code, reference.code)
        and torch.equal(ours.offset, reference.offset)
        and (ours.shape, ours.dtype, ours.blocksize, ours.quant_type, ours.state2.blocksize)
        == (reference.shape, reference.dtype, reference.blocksize, reference.quant_type, reference.state2.blocksize)
    )


def same_stacks(ours: NF4Experts, reference: NF4Experts) -> bool:
    return all(
        torch.equal(getattr(ours, name).data, getattr(reference, name).data)
        and same_state(ours.state_of(name), reference.state_of(name))
        for name in STACKS
    )


def unfuse(path: Path, change: Any) -> None:
    """Rewrite the checkpoint with what `change` does to its tensors."""
    file = path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("shape", [(4, 128, 64), (3, 14, 10), (8, 6, 32), (1, 2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_a_stack_is_packed_as_bitsandbytes_packs_the_whole_of_it(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], dtype: torch.dtype, storage: torch.dtype
) -> None:
    """Whole or expert by expert, a few blocks at a time, and also where an expert ends within a block."""
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    if storage == torch.bfloat16 and stack.numel() % 4:
        pytest.skip("bitsandbytes cannot keep an odd number of bytes in 16 bits")
    settings = {"blocksize": 64, "compress_statistics": True, "quant_type": "nf4", "quant_storage": storage}
    packed, state = quantize_4bit(stack, **settings)
    gate, up = stack.chunk(2, dim=1)
    for elements in (2**22, 192):
        monkeypatch.setattr(experts_file, "_ELEMENTS", elements)
        for parts in ([stack], [part for expert in zip(gate, up, strict=True) for part in expert]):
            ours = pack(parts, shape, storage)
            assert ours.dtype == storage
            assert torch.equal(ours.data.view(torch.uint8), packed.view(torch.uint8))
            assert same_state(ours.quant_state, state)
            assert not ours.requires_grad


@pytest.mark.parametrize("family", MIXTURES)
def test_every_checkpoint_of_a_family_loads_to_the_bytes_of_its_stacks(tmp_path: Path, family: str) -> None:
    path = write_model(tmp_path / "per-expert", family)
    stock = AutoModelForCausalLM.from_pretrained(path)
    stock.save_pretrained(tmp_path / "fused", save_original_format=False)
    names = {name for name in load_file(tmp_path / "fused" / "model.safetensors") if "layers.0" in name}
    assert any(name.endswith("experts.gate_up_proj") for name in names)
    assert not any("gate_up_proj" in name for name in load_file(path / "model.safetensors"))
    bases = [load(path).model, load(tmp_path / "fused").model]
    found = expert_modules(bases[0])
    assert list(found) == [f"model.layers.{layer}.mlp.experts" for layer in range(2)]
    for name in found:
        for stack in STACKS:
            dense = stock.get_submodule(name).get_parameter(stack)
            packed, state = quantize_4bit(dense.data, compress_statistics=True, quant_type="nf4")
            for base in bases:
                module = base.get_submodule(name)
                assert isinstance(module, NF4Experts)
                assert torch.equal(getattr(module, stack).data, packed)
                assert same_state(module.state_of(stack), state)
                assert module.state_of(stack) is getattr(module, stack).quant_state


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_family_computes_what_a_stock_model_computes(tmp_path: Path, family: str, quantization: str) -> None:
    """Logits, and the gradient of the input, on the dequantised weights in float32."""
    path = write_model(tmp_path / "base", family)
    base = load(path, quantization=quantization)
    stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, experts_implementation="eager").eval()
    expected = logits(stock)
    twin = dequantized_twin(base.model, path)
    twin.set_experts_implementation("eager")
    assert relative(logits(base.model), logits(twin)) < 1e-5
    assert (relative(logits(base.model), expected) > 1e-2) == (quantization == "nf4")
    assert base.packs

    gradients = []
    embedded = stock.get_input_embeddings()(some_ids()).detach()
    for model in (base.model, twin):
        given = embedded.clone().requires_grad_()
        model(inputs_embeds=given).logits.square().sum().backward()
        gradients.append(given.grad)
    assert relative(*gradients) < 1e-5
    assert all(parameter.grad is None for parameter in base.model.parameters())


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_a_packed_model_is_saved_and_read_again(tmp_path: Path, family: str, storage: torch.dtype) -> None:
    """From either kind of checkpoint, and once more from what was saved: the same bytes and the same logits."""
    path = write_model(tmp_path / "base", family)
    AutoModelForCausalLM.from_pretrained(path).save_pretrained(tmp_path / "fused", save_original_format=False)
    whole = load(path).model
    for source in (path, tmp_path / "fused"):
        model = load(source, storage).model
        assert {module.gate_up_proj.dtype for module in expert_modules(model).values()} == {storage}
        expected = logits(model)
        assert torch.equal(expected, logits(whole))
        for number in range(2):
            model.save_pretrained(tmp_path / f"saved-{number}")
            model = AutoModelForCausalLM.from_pretrained(tmp_path / f"saved-{number}", experts_implementation="tune")
            config = model.config.quantization_config
            assert (config.quant_method, config.bnb_4bit_quant_storage) == (nf4_quantizer.METHOD, storage)
            assert len(expert_modules(model)) == 2
            for name, module in expert_modules(model).items():
                assert isinstance(module, NF4Experts)
                assert module.gate_up_proj.dtype == storage
                if storage == torch.uint8:
                    assert same_stacks(module, whole.get_submodule(name))
            for module in model.modules():  # an inference layout of bitsandbytes, which is not ours to test
                if hasattr(module, "support_avx512bf16_for_cpu"):
                    module.support_avx512bf16_for_cpu = False
            assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_odd_sizes_work(tmp_path: Path, dtype: str, quantization: str) -> None:
    """Rows of 20 and 56 values: no multiple of a block, nor of what transformers' grouped products ask for."""
    path = write_model(
        tmp_path / "base", "mixtral", hidden_size=56, intermediate_size=18, num_local_experts=3, num_experts_per_tok=3
    )
    base = load(path, dtype=dtype, quantization=quantization)
    twin = dequantized_twin(base.model, path)
    twin.set_experts_implementation("eager")
    assert relative(logits(base.model), logits(twin)) < (1e-5 if dtype == "float32" else 0.03)


def test_the_op_is_what_dense_and_packed_experts_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_model(tmp_path / "base", "mixtral")
    for quantization in ("nf4", "none"):
        model = load(path, quantization=quantization).model
        calls = []
        op = experts_file.experts
        monkeypatch.setattr(experts_file, "experts", lambda *given: calls.append(given) or op(*given))  # noqa: B023
        logits(model)
        monkeypatch.undo()
        assert [given[3].num_experts for given in calls] == [4, 4]


def test_weights_come_as_views(tmp_path: Path) -> None:
    path = write_model(tmp_path / "base", "mixtral")
    for quantization in ("nf4", "none"):
        for module in expert_modules(load(path, quantization=quantization).model).values():
            weights = weights_of(module)
            assert (weights.num_experts, weights.intermediate, weights.hidden) == (4, 128, 64)
            assert weights.gate_up.data_ptr() == module.gate_up_proj.data_ptr()
            assert weights.down.data_ptr() == module.down_proj.data_ptr()
            assert type(weights.gate_up) is Tensor or quantization == "none"
            assert (weights.down_state is None) == (quantization == "none")


def test_packed_experts_move_with_their_model(tmp_path: Path) -> None:
    """What unpacks them is found both ways, by the parameter and by the module, and stays one object."""
    model = load(write_model(tmp_path / "base", "mixtral")).model
    expected = logits(model)
    model.to("cpu")
    assert torch.equal(logits(model), expected)
    for module in expert_modules(model).values():
        for name in STACKS:
            setattr(module, name, nn.Parameter(getattr(module, name).data.as_subclass(Tensor), requires_grad=False))
    assert torch.equal(logits(model), expected)


def test_the_probe_sees_through_experts_and_leaves_them_as_they_were(tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        base = load(write_model(tmp_path / dtype, "mixtral"), dtype=dtype, quantization="none")
        assert base.packs
    assert all("forward" not in vars(module) for module in base.model.modules())
    forward = base.model.forward

    def leaking(position_ids: Tensor | None = None, **given: Any) -> Any:
        return forward(**given)

    base.model.forward = leaking
    assert not keeps_examples_apart(base.model)


def test_the_routers_noise_is_off(tmp_path: Path) -> None:
    path = write_model(tmp_path / "base", "mixtral", router_jitter_noise=0.5, attention_dropout=0.5)
    model = load(path).model.train()
    assert torch.equal(logits(model), logits(model))


def test_an_outline_has_its_experts(tmp_path: Path) -> None:
    outline = outline_base(schema.Model(base=str(config_only(tmp_path / "base", "mixtral", num_hidden_layers=2))))
    assert outline is not None
    assert list(expert_modules(outline.model)) == [f"model.layers.{layer}.mlp.experts" for layer in range(2)]


def config_only(folder: Path, family: str, **settings: Any) -> Path:
    """A model's folder whose weights cannot be read."""
    AutoConfig.for_model(family, **settings).save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"")
    return folder


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "granitemoe", "phimoe", "minimax", "dbrx", "jamba"])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_mixture_of_another_kind_is_refused_by_name_before_its_weights_are_read(
    tmp_path: Path, family: str, quantization: schema.Quantization
) -> None:
    path = config_only(tmp_path / "base", family)
    with pytest.raises(ModelError, match=rf"mixture of experts of a kind \({family}\).*mixtral, olmoe, qwen2_moe"):
        load(path, quantization=quantization)


def test_experts_with_another_activation_are_refused_before_their_weights_are_read(tmp_path: Path) -> None:
    path = config_only(tmp_path / "base", "mixtral", hidden_act="gelu")
    with pytest.raises(ModelError, match="hidden_act 'gelu'"):
        load(path)


def test_experts_that_the_config_does_not_tell_of_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64, "num_local_experts": 2}
    path = write_model(tmp_path / "base", "gpt_oss", num_experts_per_tok=1, **sizes)
    monkeypatch.setattr("tune.models.load.is_mixture", lambda config: False)
    with pytest.raises(ModelError, match=r"gpt_oss.*layers\.0\.mlp\.experts: GptOssExperts"):
        load(path)


def test_a_layout_that_the_op_does_not_compute_is_not_held() -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    sizes = {"hidden_size": 8, "intermediate_size": 4, "num_local_experts": 2}
    with torch.device("meta"):
        assert not holds(GptOssExperts(AutoConfig.for_model("gpt_oss", **sizes)))
        assert not holds(MixtralExperts(AutoConfig.for_model("mixtral", hidden_act="gelu", **sizes)))
        module = MixtralExperts(AutoConfig.for_model("mixtral", **sizes))
        assert holds(module)
        for key, value in (("is_transposed", True), ("has_bias", True), ("is_concatenated", False)):
            before = getattr(module, key)
            setattr(module, key, value)
            assert not holds(module)
            setattr(module, key, before)
        module.has_post_expert_norm = True
        assert not holds(module)
        module.has_post_expert_norm = False
        module.down_proj = nn.Parameter(torch.empty(2, 4, 8))
        assert not holds(module)


def drop(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


def cut(name: str) -> Any:
    return lambda tensors: tensors.update({name: tensors[name][1:].clone()})


EXPERT = "model.layers.1.block_sparse_moe.experts.2"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop(f"{EXPERT}.w3.weight"), r"wrong shape for 1 .*model\.layers\.1\.mlp\.experts\.gate_up_proj"),
        (cut(f"{EXPERT}.w1.weight"), r"wrong shape for 1 .*model\.layers\.1\.mlp\.experts\.gate_up_proj"),
        (cut(f"{EXPERT}.w2.weight"), r"wrong shape for 1 .*model\.layers\.1\.mlp\.experts\.down_proj"),
    ],
)
def test_a_broken_expert_is_refused_by_name(tmp_path: Path, change: Any, words: str) -> None:
    path = write_model(tmp_path / "base", "mixtral")
    unfuse(path, change)
    with pytest.raises(ModelError, match=words):
        load(path)


def test_missing_and_wrongly_counted_experts_are_refused_by_name(tmp_path: Path) -> None:
    path = write_model(tmp_path / "base", "mixtral")
    unfuse(path, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1." in name and "w2" in name])
    with pytest.raises(ModelError, match=r"lacks 1 tensors .*model\.layers\.1\.mlp\.experts\.down_proj"):
        load(path)
    path = write_model(tmp_path / "other", "mixtral")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_local_experts": 5}))
    with pytest.raises(ModelError, match=r"wrong shape for .*experts\.down_proj"):
        load(path)


def test_a_4bit_recipe_cannot_start_with_experts_that_stayed_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_model(tmp_path / "base", "mixtral")
    monkeypatch.setattr(nf4_quantizer, "holds", lambda module: False)
    model = load(path).model
    with pytest.raises(ModelError, match=r"nf4: .*experts"):
        check_coverage(model, {}, "nf4")


def resident(kind: str) -> int:
    """Bytes of this process's memory: RssFile or RssAnon."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


def test_files_that_were_read_leave_the_memory_and_older_mappings_stay(tmp_path: Path) -> None:
    file = tmp_path / "with space.safetensors"
    save_file({"weight": torch.ones(2**23)}, file)
    with safe_open(file, framework="pt") as older:
        changed = older.get_slice("weight")[...]
        changed[:10] = 7.0
        mapped = MappedFiles([file])
        with safe_open(file, framework="pt") as newer:
            tensor = newer.get_slice("weight")[...]
            assert float(tensor.sum()) == 2**23
            before = resident("RssFile")
            mapped.release()
            assert resident("RssFile") < before - 2**24
            assert float(tensor.sum()) == 2**23
            assert float(changed[:10].sum()) == 70.0


def test_loading_empties_the_files_as_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each stack and each linear layer, and of the files of this checkpoint alone."""
    path = write_model(tmp_path / "base", "mixtral")
    released = []
    monkeypatch.setattr(MappedFiles, "release", lambda self: released.append(self._paths))
    load(path)
    assert released == [{str(path / "model.safetensors")}] * (2 * (2 + 4))


@pytest.mark.gpu
def test_a_gpu_holds_no_more_than_the_packed_model_and_one_layers_stacks(tmp_path: Path) -> None:
    path = write_model(tmp_path / "base", "mixtral", torch.bfloat16, hidden_size=1024, intermediate_size=2048)
    torch.cuda.reset_peak_memory_stats()
    base = load_base(schema.Model(base=str(path)), torch.device("cuda"))
    stacks = 4 * 3 * 2048 * 1024 * 2
    assert torch.cuda.max_memory_allocated() <= torch.cuda.memory_allocated() + stacks
    assert len(expert_modules(base.model)) == 2
