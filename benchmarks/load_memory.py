"""Peak memory and time of loading a mixture of experts of 2 GB into NF4.

    python benchmarks/load_memory.py [--layers 11] [--against] [--json FILE]

A random Mixtral of about one billion parameters is written in bfloat16, as on the Hub: in shards of 500 MB, with
three tensors for each expert. Figures are the peak resident memory (VmHWM) of fresh processes: one that loads it as a
run does, probes included, and one that only imports what loading imports. `--against` also measures stock
transformers with bitsandbytes' 4-bit configuration, which leaves the experts in 16 bit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LIMIT = 1.2e9


def write_base(folder: Path, layers: int) -> int:
    """Write the base; return its size in bytes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "mixtral", hidden_size=1024, intermediate_size=3584, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2, vocab_size=32000, sliding_window=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="500MB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert f"model.layers.{layers - 1}.block_sparse_moe.experts.7.w3.weight" in index["weight_map"]
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def measured(base: str, stock: bool) -> dict[str, Any]:
    """Import what loading imports, load `base` unless it is empty, and return this process's peak and seconds."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.models.mixtral import modeling_mixtral  # noqa: F401

    import tune.kernels  # noqa: F401  first: it keeps bitsandbytes quiet
    from tune.models import nf4_quantizer
    from tune.models.experts import expert_modules
    from tune.models.load import load_base
    from tune.recipe import schema

    started = time.perf_counter()
    packed = -1
    if base and stock:
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
        AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.bfloat16, quantization_config=settings, device_map={"": "cpu"}
        )
    elif base:
        loaded = load_base(schema.Model.model_validate({"base": base}), torch.device("cpu"))
        packed = sum(isinstance(module, nf4_quantizer.NF4Experts) for module in expert_modules(loaded.model).values())
    # Not ru_maxrss, which a process inherits from the one that started it.
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {
        "peak_bytes": int(line.split()[1]) * 1024,
        "seconds": time.perf_counter() - started,
        "packed": packed,
    }


def fresh(base: str, stock: bool = False) -> dict[str, Any]:
    """`measured` in a process of its own."""
    command = [sys.executable, __file__, "--measure", base, *(["--against"] if stock else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> int:
    """Build, measure and print; the exit code is 1 when the peak is above the limit."""
    parser = argparse.ArgumentParser(description="Peak memory of loading a mixture of experts.")
    parser.add_argument("--layers", type=int, default=11)
    parser.add_argument("--against", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure is not None:
        print(json.dumps(measured(given.measure, given.against)))
        return 0
    import tune.kernels  # noqa: F401  first: it keeps bitsandbytes quiet
    from tune.versions import versions

    with tempfile.TemporaryDirectory() as scratch:
        base = str(Path(scratch) / "base")
        size = write_base(Path(base), given.layers)
        own, loading = fresh(""), fresh(base)
        stock = fresh(base, stock=True) if given.against else None
    assert loading["packed"] == given.layers, loading
    above = loading["peak_bytes"] - own["peak_bytes"]
    print(
        f"model {size / 1e9:.2f} GB: peak {loading['peak_bytes'] / 1e6:.0f} MB, of which the interpreter's own "
        f"{own['peak_bytes'] / 1e6:.0f} MB; above it {above / 1e6:.0f} MB (limit {LIMIT / 1e6:.0f}); "
        f"{loading['seconds']:.0f} s"
    )
    if stock is not None:
        more = stock["peak_bytes"] - own["peak_bytes"]
        print(f"stock transformers in 4-bit: above it {more / 1e6:.0f} MB; {stock['seconds']:.0f} s")
    if given.json:
        result = {
            "benchmark": "load_memory",
            "model": f"random mixtral, {size / 1e9:.2f} GB bfloat16, to NF4",
            "against": "a process that imports the same",
            "device": "cpu",
            "versions": versions(),
            "peak_bytes": int(loading["peak_bytes"]),
            "above_interpreter_bytes": int(above),
            "stock_above_interpreter_bytes": None if stock is None else int(stock["peak_bytes"] - own["peak_bytes"]),
            "seconds": round(loading["seconds"], 1),
        }
        given.json.write_text(json.dumps([result], indent=1) + "\n")
    return int(above > LIMIT)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    sys.exit(main())
