"""The balance of a mixture of experts: what it reads, what it counts, and its gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import SIZES, VOCABULARY
from tests.training.jobs import tiny_recipe
from tune.data.load import load_data
from tune.data.tokenizer import load_tokenizer
from tune.evaluation.loss import rows_of
from tune.training import step
from tune.training.devices import Devices
from tune.training.router_balance import RouterLoad, Routers, StepBalance, routers_of

CPU = torch.device("cpu")
EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}


def one_step(
    logits: Sequence[Tensor], top_k: int = 2, weight: float = 1.0, previous: list[list[int]] | None = None
) -> tuple[Tensor, RouterLoad]:
    """The balance of a step of a single row with these router logits [T, E], one of each layer."""
    tokens, experts = logits[0].shape
    balance = StepBalance(Routers(len(logits), experts, top_k), weight, tokens, previous, CPU)
    return balance.row_loss(logits), balance.finish(Devices())


def sent_to(*experts: tuple[int, int], of: int = 8, tokens: int = 64) -> list[Tensor]:
    """Router logits of layers that send every token to the same two experts, with equal weight."""
    layers = []
    for pair in experts:
        layers.append(torch.zeros(tokens, of))
        layers[-1][:, list(pair)] = 30.0
    return layers


def tiny_moe(family: str = "mixtral", layers: int = 2, **changes: Any) -> Any:
    """A random float32 model whose routers tell experts apart."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        **SIZES.get(family, {}),
        "intermediate_size": 32,
        **changes,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_a_balanced_layer_reads_k(top_k: int) -> None:
    """Every token has favourites of its own, and each expert is the favourite of equally many."""
    favourites = torch.arange(64)[:, None] + torch.arange(top_k)
    logits = torch.zeros(64, 8).scatter(1, favourites % 8, 5.0)
    _, load = one_step([logits, logits.roll(3, 1)], top_k)
    assert load.counts == [[8 * top_k] * 8] * 2
    assert load.balance == pytest.approx(top_k)
    assert load.metrics() == {
        "balance": load.balance,
        "largest_load": [1.0, 1.0],
        "entropy": [round(math.log(8), 4)] * 2,
        "dead_experts": [0, 0],
    }


def test_layers_collapsed_onto_different_experts_read_the_number_of_experts_and_not_as_if_balanced() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = sent_to((0, 1), (2, 3), (4, 5), (6, 7))
    _, load = one_step(logits)
    assert load.balance == pytest.approx(8.0)
    assert float(load_balancing_loss_func(tuple(logits), 8, 2)) == pytest.approx(2.0), "as if they were balanced"
    assert load.counts == [[64 * (expert in (2 * layer, 2 * layer + 1)) for expert in range(8)] for layer in range(4)]
    told = load.metrics()
    assert told["largest_load"] == [4.0] * 4
    assert told["entropy"] == [round(math.log(2), 4)] * 4
    assert told["dead_experts"] == [6] * 4


def test_each_layer_is_told_by_itself() -> None:
    even = torch.zeros(64, 8).scatter(1, (torch.arange(64)[:, None] + torch.tensor([0, 1])) % 8, 5.0)
    (collapsed,) = sent_to((3, 5))
    _, load = one_step([even, collapsed])
    assert load.balance == pytest.approx((2 + 8) / 2)
    assert load.metrics()["largest_load"] == [1.0, 4.0]
    assert load.metrics()["dead_experts"] == [0, 6]


def test_the_loss_goes_by_the_load_of_the_step_before() -> None:
    """Its gradient lowers the probability of what was crowded then, whatever is crowded now."""
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    before = [[100, 50, 40, 10]]
    loss, load = one_step([logits], weight=0.5, previous=before)
    f = torch.tensor([1.0, 0.5, 0.4, 0.1])
    expected = 0.5 * 4 * (f * logits.softmax(-1).mean(0)).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    (ours,) = torch.autograd.grad(loss, logits)
    (reference,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-9)
    assert load.counts != before


@pytest.mark.parametrize(("weight", "previous"), [(1.0, None), (0.0, [[100, 50, 40, 10]])])
def test_before_the_first_step_and_with_no_weight_there_is_no_gradient_and_the_load_is_told(
    weight: float, previous: list[list[int]] | None
) -> None:
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss, load = one_step([logits], weight=weight, previous=previous)
    assert float(loss) == 0
    assert not loss.requires_grad
    assert sum(load.counts[0]) == 100
    assert load.balance > 2


_SIX = {"num_experts": 6, "num_experts_per_tok": 3}


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("mixtral", EXPERTS, Routers(3, 8, 2)),
        ("olmoe", _SIX, Routers(3, 6, 3)),
        ("qwen2_moe", {**_SIX, "moe_intermediate_size": 16}, Routers(3, 6, 3)),
        ("qwen3_moe", {**_SIX, "moe_intermediate_size": 16, "mlp_only_layers": [1]}, Routers(2, 6, 3)),
        ("mistral", {}, None),
        ("falcon", {}, None),
    ],
)
def test_routers_are_found_where_the_model_returns_their_logits(
    family: str, changes: dict[str, Any], expected: Routers | None
) -> None:
    model = tiny_moe(family, layers=3, **changes)
    assert routers_of(model) == expected
    if expected is not None:
        ids = torch.arange(10)[None]
        logits = model.base_model(input_ids=ids, use_cache=False, output_router_logits=True).router_logits
        assert [tuple(layer.shape) for layer in logits] == [(10, expected.experts)] * expected.layers


def choices(model: Any) -> list[list[Tensor]]:
    """Note, from now on, the experts [T, K] that each forward of each layer's experts is given."""
    noted: list[list[Tensor]] = []
    for layer in model.base_model.layers:
        noted.append([])
        layer.mlp.experts.register_forward_pre_hook(lambda _, args, into=noted[-1]: into.append(args[1].clone()))
    return noted


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_counted_is_where_the_tokens_went_once(recompute: bool, dtype: torch.dtype) -> None:
    """In bfloat16 many tokens have a tie for their second expert; the count must follow the router's choice."""
    from tune.models.load import recompute_activations

    model = tiny_moe(**EXPERTS).to(dtype).train()
    if recompute:
        recompute_activations(model)
    routers = routers_of(model)
    assert routers is not None
    noted = choices(model)
    ids = torch.randint(VOCABULARY, (1, 2000), generator=torch.Generator().manual_seed(1))
    even = [[1] * 8] * 2
    balance = StepBalance(routers, 1.0, 2000, even, CPU)
    for part in ids.split(500, dim=1):
        outputs = model.base_model(input_ids=part, use_cache=False, output_router_logits=True)
        (outputs[0].float().square().mean() + balance.row_loss(outputs.router_logits)).backward()
    assert [len(layer) for layer in noted] == [8 if recompute else 4] * 2
    once = [torch.cat(layer[:: 2 if recompute else 1]) for layer in noted]
    assert balance.finish(Devices()).counts == [layer.flatten().bincount(minlength=8).tolist() for layer in once]


def test_a_token_that_is_not_counted_is_noticed() -> None:
    balance = StepBalance(Routers(1, 8, 2), 1.0, 65, None, CPU)
    balance.row_loss(sent_to((0, 1)))
    with pytest.raises(AssertionError, match="token"):
        balance.finish(Devices())


def test_reentrant_recomputation_is_refused() -> None:
    model = tiny_moe()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": True})
    with pytest.raises(AssertionError, match="reentrant"):
        routers_of(model)


class Kept(torch.optim.SGD):
    """Keeps the gradients of the step and changes nothing."""

    seen: list[Tensor]

    def step(self, closure: Any = None) -> None:
        self.seen = [parameter.grad.clone() for group in self.param_groups for parameter in group["params"]]


def test_the_gradient_is_that_of_the_plain_formula(tmp_path: Path) -> None:
    """Packed rows through the step's own loss, against each example alone through the formula as it is written."""
    recipe = tiny_recipe(tmp_path)
    data = load_data(recipe, load_tokenizer(recipe.model.base)).train
    model = tiny_moe(**EXPERTS).train()
    named = [(name, p) for name, p in model.named_parameters() if name != "lm_head.weight"]  # always frozen
    parameters = [parameter for _, parameter in named]
    chosen = list(range(12))
    tokens, trained = int(data.lengths[chosen].sum()), int(data.trained_counts[chosen].sum())
    previous = [[900, 700, 400, 300, 200, 100, 50, 10], [10, 20, 30, 40, 500, 600, 800, 800]]

    nll, logits = torch.zeros(()), []
    for number in chosen:
        ids, mask = (torch.tensor(part) for part in data.example(number))
        ids = ids.long()
        outputs = model(input_ids=ids[None], use_cache=False, output_router_logits=True)
        log_p = outputs.logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        nll = nll - log_p[mask[1:]].sum()
        logits.append(outputs.router_logits)
    formula = nll / trained
    for layer, counts in zip(zip(*logits, strict=True), previous, strict=True):
        f = torch.tensor(counts) / (sum(counts) / 2)
        formula = formula + 0.5 / 2 * 8 * (f * torch.cat(layer).softmax(-1).mean(0)).sum()
    reference = torch.autograd.grad(formula, parameters)

    optimizer = Kept(parameters, lr=1.0)
    routers = routers_of(model)
    assert routers is not None
    balance = StepBalance(routers, 0.5, tokens, previous, CPU)
    rows = rows_of(data, chosen, 300, True, CPU)
    result = step.train_step(model, rows, trained, parameters, optimizer, 0.0, Devices(), balance)
    assert result.loss == pytest.approx(float(nll.detach() / trained), rel=1e-5), "told without the balance"
    for (name, _), ours, theirs in zip(named, optimizer.seen, reference, strict=True):
        assert float((ours - theirs).norm()) < 1e-5 * float(theirs.norm()), name
