"""Packed examples never see each other, whatever computes the attention; and what computes it is chosen with care."""

from __future__ import annotations

import functools
import itertools
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from tests.tiny import VOCABULARY, write_model
from tests.training.jobs import tiny_recipe
from tune.models import attention
from tune.models.attention import (
    BLOCKS,
    VARLEN,
    Blocks,
    Machine,
    Needs,
    block_attention,
    candidates,
    machine_of,
    needs_of,
    settle_attention,
    varlen_attention,
)
from tune.models.isolation import find_fault
from tune.models.load import LoadedBase, load_base
from tune.progress import Progress
from tune.recipe import schema
from tune.run import train

CPU = torch.device("cpu")

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {}),
    "mistral with a window": ("mistral", {"sliding_window": 16}),
    "mixtral": ("mixtral", {}),
    "mixtral with a window": ("mixtral", {"sliding_window": 16, "num_local_experts": 8}),
    "llama": ("llama", {}),
    "olmoe": ("olmoe", {}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen3_moe": ("qwen3_moe", {}),
}
"""Every family whose examples may share a row."""

LENGTHS = (23, 40, 17, 30)
"""Some are longer than the window."""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Loads each tiny model once."""

    @functools.cache
    def load(name: str, dtype: str = "float32", quantization: str = "none") -> LoadedBase:
        family, changes = MODELS[name]
        path = write_model(tmp_path_factory.mktemp("base"), family, **changes)
        return load_base(schema.Model(base=str(path), dtype=dtype, quantization=quantization), CPU)

    return load


def reference_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> Tensor:
    """What torch.nn.attention.varlen.varlen_attn says it computes; torch has it for GPUs only."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert max_q == max_k == int(cu_seq_q.diff().max())
    assert enable_gqa == (query.shape[1] != key.shape[1])
    key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1) for tensor in (key, value))
    outputs = []
    for start, end in itertools.pairwise(cu_seq_q):
        at = torch.arange(end - start)
        before = at[:, None] - at
        seen = (before <= window_size[0]) | (window_size[0] < 0)
        seen &= before >= -window_size[1]
        scores = torch.einsum("qhd,khd->hqk", query[start:end], key[start:end]) * scale
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, value[start:end]))
    return torch.cat(outputs)


@contextmanager
def as_it_is() -> Iterator[None]:
    yield


@contextmanager
def uncompiled() -> Iterator[None]:
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        warnings.filterwarnings("ignore", "_compile flag on create_block_mask", DeprecationWarning)
        yield


@contextmanager
def with_the_reference_kernel() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "varlen_attn", reference_kernel)
        yield


BACKENDS: dict[str, tuple[str, Callable[[], Any]]] = {
    "transformers' sdpa": ("sdpa", as_it_is),
    "sdpa example by example": (BLOCKS, as_it_is),
    "eager": ("eager", as_it_is),
    "flex_attention": ("flex_attention", uncompiled),
    "varlen": (VARLEN, with_the_reference_kernel),
}


@torch.no_grad()
def logits(model: Any, examples: list[Tensor]) -> tuple[Tensor, ...]:
    """Of each example in one packed row."""
    positions = torch.cat([torch.arange(len(example)) for example in examples])[None]
    row = model(input_ids=torch.cat(examples)[None], position_ids=positions, use_cache=False).logits[0]
    return row.split([len(example) for example in examples])


def some_examples(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (length,), generator=generator) for length in lengths]


def relative(ours: Tensor, reference: Tensor) -> float:
    return float((ours - reference).norm() / reference.norm())


def check_nobody_else_changes(model: Any, lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> None:
    examples, others = some_examples(lengths, 2 * seed), some_examples(lengths, 2 * seed + 1)
    before = logits(model, examples)
    for changed in range(len(lengths)):
        after = logits(model, [*examples[:changed], others[changed], *examples[changed + 1 :]])
        for i, (one, two) in enumerate(zip(before, after, strict=True)):
            assert torch.equal(one, two) == (i != changed), (changed, i)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_changing_one_example_changes_no_bit_of_the_others(
    loaded: Callable[..., LoadedBase], name: str, backend: str
) -> None:
    base = loaded(name)
    implementation, circumstances = BACKENDS[backend]
    if implementation == "flex_attention" and not base.model._supports_flex_attn:
        pytest.skip("transformers says that the family is not right with it")
    alone = [logits(base.model, [example])[0] for example in some_examples()]
    try:
        with circumstances():
            base.model.set_attn_implementation(implementation)
            check_nobody_else_changes(base.model)
            for ours, reference in zip(logits(base.model, some_examples()), alone, strict=True):
                assert relative(ours, reference) < 1e-5
    finally:
        base.model.set_attn_implementation(BLOCKS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler has many of its own
@pytest.mark.parametrize("name", ["mistral", "mistral with a window"])
def test_compiled_flex_attention_keeps_examples_apart(loaded: Callable[..., LoadedBase], name: str) -> None:
    base = loaded(name)
    try:
        base.model.set_attn_implementation("flex_attention")
        check_nobody_else_changes(base.model)
    finally:
        base.model.set_attn_implementation(BLOCKS)


@pytest.mark.parametrize(("dtype", "quantization"), [("float32", "none"), ("float32", "nf4"), ("bfloat16", "nf4")])
@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen3_moe"])
def test_how_many_tokens_share_an_expert_rounds_nobody_differently(
    loaded: Callable[..., LoadedBase], name: str, dtype: str, quantization: str
) -> None:
    """Short rows, so that experts get one token or two: another example's text changes how many."""
    model = loaded(name, dtype, quantization).model
    for seed in range(8):
        check_nobody_else_changes(model, (3, 5, 4, 2), seed)


@pytest.mark.parametrize("family", ["falcon", "bloom"])
def test_families_that_leak_get_one_example_a_row_and_the_table_says_so(tmp_path: Path, family: str) -> None:
    recipe = tiny_recipe(tmp_path, family, train__max_steps=1)
    base = load_base(recipe.model, CPU)
    assert find_fault(base.model) == "lets packed examples see each other"
    assert not base.packs
    heard = Heard()
    train(recipe, progress=heard)
    assert f"attention {base.model.config._attn_implementation}, one example a row" in heard.lines
    assert not [words for words in heard.warnings if "attention" in words]


class Heard(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.warnings: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_gets_blocks_on_a_cpu_and_the_table_calls_it_sdpa(
    loaded: Callable[..., LoadedBase], name: str
) -> None:
    base = loaded(name)
    assert (base.attention, base.packs, base.declined) == ("sdpa", True, ())
    assert base.model.config._attn_implementation == BLOCKS
    assert "attn" not in base.model.config.to_json_string(use_diff=False), "a saved config would name it"


def leaky(query_to: int, key_from: int) -> Callable[..., Any]:
    """A mask for packed rows with one leak between neighbours: by position relative to the start of the second."""

    def mask(**given: Any) -> Any:
        seen = sdpa_mask(**given)
        if seen is not None and not given["allow_is_causal_skip"]:
            seen = seen.clone()
            for start in Blocks(given["mask_function"], given["q_length"], "cpu").starts[1:]:
                if start + query_to < given["q_length"]:
                    seen[0, 0, start + query_to, start + key_from] = True
        return seen

    return mask


LEAKS = {
    "the next example sees one token": leaky(0, -1),
    "its last token alone sees one": leaky(5, -1),
    "an example sees one of the next": leaky(-1, 0),
}


@pytest.mark.parametrize("leak", LEAKS)
@pytest.mark.parametrize("name", MODELS)
def test_the_probe_finds_a_planted_leak(loaded: Callable[..., LoadedBase], name: str, leak: str) -> None:
    model = loaded(name).model
    register("leaky", mask=LEAKS[leak])
    try:
        model.set_attn_implementation("leaky")
        assert find_fault(model) == "lets packed examples see each other"
    finally:
        model.set_attn_implementation(BLOCKS)
    assert find_fault(model) is None


def register(name: str, function: Any = block_attention, mask: Any = attention._mask) -> None:
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, mask)


@pytest.mark.parametrize("name", MODELS)
def test_the_probe_finds_positions_that_are_not_heeded(
    loaded: Callable[..., LoadedBase], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(name).model
    forward = model.forward

    def deaf(position_ids: Tensor | None = None, **given: Any) -> Any:
        return forward(**given)

    monkeypatch.setattr(model, "forward", deaf)
    assert find_fault(model) == "lets packed examples see each other"


def test_the_probe_finds_examples_that_are_apart_and_wrong(loaded: Callable[..., LoadedBase]) -> None:
    def first_only(*given: Any, **more: Any) -> Any:
        output, _ = block_attention(*given, **more)
        return output if isinstance(given[4], Blocks) else output * 0, None

    model = loaded("mistral").model
    register("wrong", first_only)
    try:
        model.set_attn_implementation("wrong")
        assert find_fault(model) == "computes something else for packed examples"
    finally:
        model.set_attn_implementation(BLOCKS)


class Backward(torch.autograd.Function):
    """Does nothing forward, and something backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.change(gradients[0]), None


def raising(*given: Any, **more: Any) -> Any:
    raise RuntimeError("no kernel for this device\nand much more")


def with_backward(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def function(*given: Any, **more: Any) -> Any:
        output, weights = block_attention(*given, **more)
        return Backward.apply(output, change), weights

    return function


FAULTS: dict[str, tuple[Callable[..., Any], str]] = {
    "raises": (raising, r"does not run \(.*no kernel for this device"),
    "gradient leaks": (
        with_backward(lambda gradient: gradient + gradient.roll(1, 1)),
        "gives gradients to other examples in the row",
    ),
    "gradient is wrong": (with_backward(lambda gradient: gradient * 3), "computes another gradient than sdpa"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_implementation_that_fails_its_probe_gives_way_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    function, words = FAULTS[fault]
    register("broken", function)
    monkeypatch.setattr(attention, "candidates", lambda machine, needs: ["broken", BLOCKS, "sdpa"])
    heard = Heard()
    train(tiny_recipe(tmp_path, train__max_steps=1), progress=heard)
    assert "attention sdpa, packed" in heard.lines
    (said,) = [said for said in heard.warnings if said.startswith("attention")]
    assert re.fullmatch(rf"attention: broken {words}.*, so sdpa is used", said), said


def test_what_works_is_used_and_called_by_its_name(
    loaded: Callable[..., LoadedBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded("mixtral with a window").model
    model.set_attn_implementation("sdpa")
    monkeypatch.setattr(varlen, "varlen_attn", reference_kernel)
    monkeypatch.setattr(attention, "machine_of", lambda device: Machine("cuda", (8, 0), varlen=True))
    monkeypatch.setattr(attention, "needs_of", lambda model: needs(head_size=16))
    try:
        assert settle_attention(model, CPU) == attention.Attention("varlen", True)
        assert model.config._attn_implementation == VARLEN
    finally:
        model.set_attn_implementation(BLOCKS)


def test_without_any_that_works_the_model_keeps_its_own(
    loaded: Callable[..., LoadedBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded("mistral").model
    model.set_attn_implementation("sdpa")
    monkeypatch.setattr(attention, "find_fault", lambda model: "lets packed examples see each other")
    try:
        settled = settle_attention(model, CPU)
        assert (settled.name, settled.packs, settled.declined) == ("sdpa", False, ())
        assert model.config._attn_implementation == "sdpa"
    finally:
        model.set_attn_implementation(BLOCKS)


def needs(**changes: Any) -> Needs:
    usual = {"chosen": "sdpa", "settable": True, "sdpa": True, "flash": True, "flex": True}
    return Needs(**{**usual, "half": True, "head_size": 128, **changes})


H100 = Machine("cuda", (9, 0), varlen=True, flash_attn=True, compiles=True)
FLASH, FLEX = "flash_attention_2", "flex_attention"

CHOICES: dict[str, tuple[Machine, Needs, list[str]]] = {
    "a CPU": (Machine("cpu"), needs(), [BLOCKS, "sdpa"]),
    "another accelerator": (Machine("mps"), needs(), [BLOCKS, "sdpa"]),
    "a GPU with everything": (H100, needs(), [VARLEN, FLASH, FLEX, BLOCKS, "sdpa"]),
    "a GPU with torch alone": (Machine("cuda", (8, 0), varlen=True), needs(), [VARLEN, BLOCKS, "sdpa"]),
    "without torch's own kernel": (
        Machine("cuda", (8, 0), flash_attn=True, compiles=True),
        needs(),
        [FLASH, FLEX, BLOCKS, "sdpa"],
    ),
    "a GPU before Ampere": (Machine("cuda", (7, 5), True, True, True), needs(), [BLOCKS, "sdpa"]),
    "float32": (H100, needs(half=False), [BLOCKS, "sdpa"]),
    "wide heads": (H100, needs(head_size=320), [BLOCKS, "sdpa"]),
    "odd heads": (H100, needs(head_size=100), [BLOCKS, "sdpa"]),
    "heads of no power of two": (H100, needs(head_size=80), [VARLEN, FLASH, BLOCKS, "sdpa"]),
    "a family without flash": (H100, needs(flash=False), [FLEX, BLOCKS, "sdpa"]),
    "a family without flex": (H100, needs(flex=False), [VARLEN, FLASH, BLOCKS, "sdpa"]),
    "attention of its own": (H100, needs(settable=False), ["sdpa"]),
    "no sdpa": (Machine("cpu"), needs(sdpa=False, chosen="eager"), ["eager"]),
}


@pytest.mark.parametrize("case", CHOICES)
def test_the_choice_follows_from_machine_and_model(case: str) -> None:
    machine, model, names = CHOICES[case]
    assert candidates(machine, model) == names


def test_machine_and_model_are_looked_at(loaded: Callable[..., LoadedBase]) -> None:
    assert machine_of(CPU) == Machine("cpu")
    seen = needs_of(loaded("qwen3_moe").model)
    assert (seen.settable, seen.sdpa, seen.flash, seen.flex, seen.half, seen.head_size) == (*[True] * 4, False, 16)
    assert needs_of(loaded("mixtral", "bfloat16", "nf4").model).half


def test_a_packed_row_needs_no_mask_unless_an_example_is_longer_than_the_window(
    loaded: Callable[..., LoadedBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Blocks] = []

    def noting(*given: Any, **more: Any) -> Any:
        seen.append(given[4])
        return block_attention(*given, **more)

    model = loaded("mistral with a window").model
    register("noting", noting)
    try:
        model.set_attn_implementation("noting")
        logits(model, some_examples((5, 16, 17)))
        assert len(seen) == 2, "one for each layer"
        assert seen[0] is seen[1]
        assert (seen[0].starts, seen[0].lengths) == ([0, 5, 21], [5, 16, 17])
        assert seen[0].boundaries.tolist() == [0, 5, 21, 38]
        one, two, three = seen[0].masks
        assert (one, two) == (None, None)
        assert three is not None
        assert three.shape == (1, 1, 17, 17)
        assert int(three.sum()) == 17 * 18 // 2 - 1, "the last token does not see the first"
        logits(model, some_examples((30,)))
        assert isinstance(seen[-1], Tensor), "one example is left to transformers"
    finally:
        model.set_attn_implementation(BLOCKS)


def test_a_row_with_a_mask_of_its_own_is_left_to_transformers() -> None:
    def causal(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    padding = torch.tensor([[False, True, True, True]])
    usual = {"batch_size": 1, "q_length": 4, "kv_length": 4, "mask_function": causal, "allow_is_causal_skip": False}
    mask = attention._mask(**usual, attention_mask=padding)
    assert isinstance(mask, Tensor)
    assert int(mask.sum()) == 6
    assert isinstance(attention._mask(**usual), Blocks)
    assert isinstance(attention._mask(**{**usual, "batch_size": 2}), Tensor)
    assert attention._mask(**{**usual, "allow_is_causal_skip": True}) is None


@pytest.mark.parametrize("implementation", [BLOCKS, VARLEN])
@pytest.mark.parametrize("name", ["mistral", "mixtral with a window"])
def test_generation_and_padded_batches_are_as_with_transformers_own(
    loaded: Callable[..., LoadedBase], name: str, implementation: str
) -> None:
    model = loaded(name).model
    ids = torch.stack(some_examples((30, 30)))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    results = []
    try:
        for chosen in ("sdpa", implementation):
            model.set_attn_implementation(chosen)
            generated = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=12,
                do_sample=False,
                pad_token_id=1,
                eos_token_id=None,
            )
            results.append(generated)
    finally:
        model.set_attn_implementation(BLOCKS)
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize(
    ("function", "unknown"),
    [(block_attention, "position_bias"), (varlen_attention, "softcap"), (varlen_attention, "s_aux")],
)
def test_what_an_implementation_does_not_do_is_refused_not_left_out(function: Any, unknown: str) -> None:
    row = Blocks(lambda _, __, query, key: (query >= key) & ((query >= 3) == (key >= 3)), 7, "cpu")
    assert row.lengths == [3, 4]
    q = torch.randn(1, 2, 7, 8)
    with pytest.raises(ValueError, match=f"does not do {unknown}"):
        function(torch.nn.Module(), q, q, q, row, **{unknown: torch.ones(1)})
    with pytest.raises(ValueError, match="does not do dropout"):
        varlen_attention(torch.nn.Module(), q, q, q, row, dropout=0.1)
