"""Training steps on a CPU, ours beside stock PEFT, in one run.

Both train the same LoRA (rank 16, every linear layer) on the same packed row of the same NF4 base in float32:
stock is transformers' load_in_4bit with `get_peft_model` and the model's own loss; ours is what `tune train` runs.
Each measurement is a process of its own, the two in turn, so that peaks do not mix and noise falls on both.

    python benchmarks/step_cpu.py [--base FOLDER] [--tokens 512] [--rounds 3] [--output FILE]

Prints a JSON list and, with --output, writes it. Tokens per second are the median over rounds; peak bytes are the
process's largest resident set, interpreter and libraries included.
"""

from __future__ import annotations

import argparse
import json
import os
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
STEPS = 4


def build(method: str, base: str) -> tuple[Any, Any]:
    """Return (model, function of a row that returns the loss)."""
    import torch

    import tune.kernels  # noqa: F401
    from tune.recipe import schema

    if method == "tune":
        from tune.adapters.lora import attach
        from tune.models.load import load_base
        from tune.training.step import row_loss

        loaded = load_base(schema.Model(base=base, dtype="float32"), torch.device("cpu"))
        attach(loaded, schema.Adapter(), base, seed=0)
        return loaded.model, lambda row: row_loss(loaded.model, row) / len(row.labels_N)

    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=quantization)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=targets))

    def loss(row: Any) -> Any:
        labels = torch.full_like(row.ids_1T, -100)
        labels[0, row.predict_at_N + 1] = row.labels_N
        return adapted(input_ids=row.ids_1T, position_ids=row.positions_1T, labels=labels, use_cache=False).loss

    return adapted, loss


def measure(method: str, base: str, tokens: int) -> dict[str, float]:
    """Train a few steps in this process and return its speed and peak."""
    import torch

    from tune.data.load import load_data
    from tune.data.tokenizer import load_tokenizer
    from tune.evaluation.loss import rows_of
    from tune.recipe.load import load_recipe

    os.chdir(ROOT)
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml", [f"model.base={base}"])
    data = load_data(recipe, load_tokenizer(base))
    rows = list(rows_of(data.train, range(len(data.train)), tokens, True, torch.device("cpu")))[:STEPS]
    model, loss_of = build(method, base)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    seen, seconds = 0, 0.0
    for number, row in enumerate([rows[0], *rows]):
        started = time.perf_counter()
        loss_of(row).backward()
        optimizer.step()
        optimizer.zero_grad()
        if number:  # the first one warms up
            seconds += time.perf_counter() - started
            seen += row.ids_1T.shape[1]
    return {
        "tokens_per_second": seen / seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--base", default="models/smollm2-135m-instruct-mistral")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--method", choices=["tune", "stock"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.method:
        print(json.dumps(measure(options.method, options.base, options.tokens)))
        return
    measured: dict[str, list[dict[str, float]]] = {"tune": [], "stock": []}
    for _ in range(options.rounds):
        for method, results in measured.items():
            arguments = ["--base", options.base, "--tokens", str(options.tokens), "--method", method]
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
        rows.append(
            {
                "benchmark": "step_cpu",
                "method": method,
                "against": "stock peft",
                "model": Path(options.base).name,
                "row_tokens": options.tokens,
                "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
                "cpu_capability": torch.backends.cpu.get_cpu_capability(),
                "versions": {**versions, "python": platform.python_version()},
                "tokens_per_second": round(statistics.median(result["tokens_per_second"] for result in results), 1),
                "tokens_per_second_all": [round(result["tokens_per_second"], 1) for result in results],
                "peak_bytes": int(statistics.median(result["peak_bytes"] for result in results)),
            }
        )
    text = json.dumps(rows, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
