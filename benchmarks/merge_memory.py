"""Peak memory and time of `tune merge`, proof included, on a model of 2 GB.

    python benchmarks/merge_memory.py [--layers 20] [--json FILE]

A random Mistral of about one billion parameters is written in bfloat16, in shards of 500 MB, with a random LoRA of
rank 16 on every linear layer. Both figures are the peak resident memory (VmHWM) of a fresh process: one that merges,
and one that only imports what a merge imports. That the weights are random changes nothing about either.
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

LIMIT = 600e6


def write_base(folder: Path, layers: int) -> int:
    """Write the base and its tokenizer; return its size in bytes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.tiny import write_tokenizer

    config = AutoConfig.for_model(
        "mistral", hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=8, vocab_size=32000, sliding_window=None, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="500MB")
    write_tokenizer(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def write_run(folder: Path, base: Path) -> None:
    """Write a run folder with a random adapter, as training would leave it."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    from tests.training.jobs import write_rows
    from tune.data.load import load_data
    from tune.data.tokenizer import load_tokenizer
    from tune.folder import RunFolder
    from tune.models.hub import fingerprint_base, read_config
    from tune.models.streamed import StreamedModel
    from tune.recipe.load import load_recipe, recipe_to_yaml
    from tune.training.provenance import remember

    write_rows(folder.parent / "rows.jsonl", 40)
    recipe = load_recipe(
        {
            "model": {"base": str(base)},
            "data": {"train": str(folder.parent / "rows.jsonl"), "template": "alpaca"},
            "output": str(folder),
        }
    )
    run = RunFolder(folder)
    run.adapter.mkdir(parents=True)
    run.recipe.write_text(recipe_to_yaml(recipe))
    tokenizer = load_tokenizer(str(base))
    data = load_data(recipe, tokenizer)
    remember(run, recipe, data, tokenizer, fingerprint_base(str(base)))
    tokenizer.chat_template = data.template.jinja
    tokenizer.save_pretrained(run.adapter)
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Any] = {}
    linears = StreamedModel(read_config(str(base)), str(base)).linears()
    for name, linear in linears.items():
        for letter, shape in (("A", (16, linear.in_features)), ("B", (linear.out_features, 16))):
            tensor = torch.empty(shape).normal_(0, 0.02, generator=generator)
            tensors[f"base_model.model.{name}.lora_{letter}.weight"] = tensor
    save_file(tensors, run.adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({name.rsplit(".", 1)[-1] for name in linears})
    LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM").save_pretrained(run.adapter)


def measured(run: Path | None) -> dict[str, float]:
    """Import what a merge imports, merge `run` if there is one, and return this process's peak and seconds."""
    import peft  # noqa: F401
    import transformers  # noqa: F401
    from peft import PeftModel  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    from transformers.models.mistral import modeling_mistral  # noqa: F401

    import tune.kernels  # noqa: F401  first: it keeps bitsandbytes quiet
    from tune.export.merge import merge

    started = time.perf_counter()
    proven = run is None or merge(run).proof.holds
    # Not ru_maxrss, which a process inherits from the one that started it.
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    peak = int(line.split()[1]) * 1024
    return {"peak_bytes": peak, "seconds": time.perf_counter() - started, "proven": proven}


def fresh(run: Path | None) -> dict[str, float]:
    """`measured` in a process of its own."""
    command = [sys.executable, __file__, "--measure", str(run or "")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> int:
    """Build, measure and print; the exit code is 1 when the peak is above the limit."""
    parser = argparse.ArgumentParser(description="Peak memory of a merge.")
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure is not None:
        print(json.dumps(measured(Path(given.measure) if given.measure else None)))
        return 0
    import tune.kernels  # noqa: F401  first: it keeps bitsandbytes quiet
    from tune.versions import versions

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        size = write_base(folder / "base", given.layers)
        write_run(folder / "run", folder / "base")
        own, merging = fresh(None), fresh(folder / "run")
    above = merging["peak_bytes"] - own["peak_bytes"]
    print(
        f"model {size / 1e9:.2f} GB: peak {merging['peak_bytes'] / 1e6:.0f} MB, of which the interpreter's own "
        f"{own['peak_bytes'] / 1e6:.0f} MB; above it {above / 1e6:.0f} MB (limit {LIMIT / 1e6:.0f}); "
        f"{merging['seconds']:.0f} s, {'proven' if merging['proven'] else 'NOT PROVEN'}"
    )
    if given.json:
        result = {
            "benchmark": "merge_memory",
            "model": f"random mistral, {size / 1e9:.2f} GB bfloat16",
            "against": "a process that imports the same",
            "device": "cpu",
            "versions": versions(),
            "peak_bytes": int(merging["peak_bytes"]),
            "above_interpreter_bytes": int(above),
            "seconds": round(merging["seconds"], 1),
        }
        given.json.write_text(json.dumps([result], indent=1) + "\n")
    return int(above > LIMIT)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    sys.exit(main())
