"""LoRA on the experts of a small Mixtral on a CPU: the expert op beside stock PEFT, in one run.

Forward and backward of a randomly initialised bf16 Mixtral (hidden 512, intermediate 1792, 8 experts, top 2, 4
layers) on one row of tokens, rank 16 on both expert projections, nothing else trained. Stock is transformers' own
experts with PEFT's `target_parameters`; ours is `tune.kernels.nf4_experts.experts` on the same bf16 experts or on
NF4, which either saves only its inputs for the backward or keeps activations too. Each measurement is a process of
its own, all methods in turn in every round, so that peaks do not mix and noise falls on all.

    python benchmarks/experts_cpu.py [--tokens 2048] [--rounds 3] [--steps 5] [--output FILE]

Prints a JSON list and, with --output, writes it. Speeds are medians over rounds, and a ratio is the median over
rounds of the ratio within a round; tokens per second of CPU time hold on a busy machine too. Peak bytes are the
process's largest resident set, interpreter and libraries included; `model_bytes` is the resident set before the first
step. The peak grows with the steps where experts' rows come in ever new numbers: oneDNN keeps a kernel for each.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SIZES = {"hidden": 512, "intermediate": 1792, "experts": 8, "top_k": 2, "layers": 4, "rank": 16, "vocabulary": 1024}
METHODS = ["stock", "bf16 inputs", "bf16 activations", "nf4 inputs", "nf4 activations"]


def plain_model() -> Any:
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=SIZES["hidden"],
        intermediate_size=SIZES["intermediate"],
        num_local_experts=SIZES["experts"],
        num_experts_per_tok=SIZES["top_k"],
        num_hidden_layers=SIZES["layers"],
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=SIZES["vocabulary"],
        dtype="bfloat16",
        use_cache=False,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = MixtralForCausalLM(config).requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    return model


def with_the_op(model: Any, quantization: str, keep: str) -> Any:
    """Replace every layer's experts by the op, with a LoRA like PEFT's."""
    import torch
    from bitsandbytes.functional import quantize_4bit

    from tune.kernels.nf4_experts import ExpertLora, ExpertWeights, experts

    class Experts(torch.nn.Module):
        def __init__(self, base: Any) -> None:
            super().__init__()
            gate_up, down = base.gate_up_proj.data, base.down_proj.data
            count, hidden, inner = down.shape
            rank = SIZES["rank"]
            shapes = [(count * rank, hidden), (2 * inner, rank * count), (count * rank, inner), (hidden, rank * count)]
            self.adapters = torch.nn.ParameterList(torch.randn(shape) / 100 for shape in shapes)
            states = [None, None]
            if quantization == "nf4":
                options = {"blocksize": 64, "compress_statistics": True, "quant_type": "nf4"}
                (gate_up, states[0]), (down, states[1]) = (quantize_4bit(x, **options) for x in (gate_up, down))
            self.stacks = ExpertWeights(gate_up, down, *states, count, inner, hidden)

        def forward(self, x: Any, index: Any, weights: Any) -> Any:
            a1, b1, a2, b2 = self.adapters
            return experts(x, index, weights, self.stacks, ExpertLora(a1, b1, 2.0), ExpertLora(a2, b2, 2.0), keep=keep)

    for layer in model.model.layers:
        layer.mlp.experts = Experts(layer.mlp.experts)
    return model


def with_stock_peft(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=SIZES["rank"], lora_alpha=2 * SIZES["rank"], target_modules=[], target_parameters=targets)
    return get_peft_model(model, config)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure(method: str, tokens: int, steps: int) -> dict[str, float]:
    """Run a few forwards and backwards in this process and return its speed and peak."""
    import torch

    import tune.kernels  # noqa: F401

    model = plain_model()
    model = with_stock_peft(model) if method == "stock" else with_the_op(model, *method.split())
    model.train()
    import peft  # noqa: F401  (in every process, for its memory)

    draw = torch.Generator().manual_seed(0)
    before = resident()
    seconds, cpu_seconds = [], []
    for _ in range(steps + 1):  # the first one warms up
        # Other tokens in every step, as in training: experts get other numbers of rows.
        ids = torch.randint(SIZES["vocabulary"], (1, tokens), generator=draw)
        model.zero_grad()
        started, cpu_started = time.perf_counter(), time.process_time()
        model(input_ids=ids, labels=ids).loss.backward()
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - cpu_started)
    return {
        "tokens_per_second": tokens / statistics.median(seconds[1:]),
        "tokens_per_cpu_second": tokens / statistics.median(cpu_seconds[1:]),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "model_bytes": before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.method:
        print(json.dumps(measure(options.method, options.tokens, options.steps)))
        return
    measured: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    for _ in range(options.rounds):
        for method, results in measured.items():
            arguments = ["--tokens", str(options.tokens), "--steps", str(options.steps), "--method", method]
            command = [sys.executable, "-W", "ignore", __file__, *arguments]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
            results.append(json.loads(done.stdout.splitlines()[-1]))
    import bitsandbytes
    import peft
    import torch
    import transformers

    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft, bitsandbytes)}
    rows = []
    for method, results in measured.items():

        def of(key: str, results: list[dict[str, float]] = results) -> list[float]:
            return [result[key] for result in results]

        def ratio(key: str, results: list[dict[str, float]] = results) -> float:
            pairs = zip(results, measured["stock"], strict=True)
            return round(statistics.median(ours[key] / stock[key] for ours, stock in pairs), 3)

        rows.append(
            {
                "benchmark": "experts_cpu",
                "method": method,
                "against": "stock peft",
                "model": "Mixtral, " + ", ".join(f"{name} {size}" for name, size in SIZES.items()),
                "row_tokens": options.tokens,
                "steps": options.steps,
                "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
                "cpu_capability": torch.backends.cpu.get_cpu_capability(),
                "versions": {**versions, "python": platform.python_version()},
                "tokens_per_second": round(statistics.median(of("tokens_per_second")), 1),
                "tokens_per_second_all": [round(speed, 1) for speed in of("tokens_per_second")],
                "tokens_per_second_over_stock": ratio("tokens_per_second"),
                "tokens_per_cpu_second": round(statistics.median(of("tokens_per_cpu_second")), 1),
                "tokens_per_cpu_second_all": [round(speed, 1) for speed in of("tokens_per_cpu_second")],
                "tokens_per_cpu_second_over_stock": ratio("tokens_per_cpu_second"),
                "peak_bytes": int(statistics.median(of("peak_bytes"))),
                "peak_bytes_over_stock": ratio("peak_bytes"),
                "model_bytes": int(statistics.median(of("model_bytes"))),
            }
        )
    text = json.dumps(rows, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
