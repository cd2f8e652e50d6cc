"""The card beside an adapter: what it is, how it was made, how to load it."""

from __future__ import annotations

from pathlib import Path

from tune.recipe.schema import Recipe


def adapter_card(recipe: Recipe, loss_before: float, loss_after: float, measured_on: str, step: int) -> str:
    """Return adapter/README.md, for the adapter of `step`. A local base or data path appears by its last name only."""
    base, adapter, train = recipe.model.base, recipe.adapter, recipe.train
    hub_base = base if base.count("/") == 1 and not Path(base).expanduser().exists() else None
    named = hub_base or Path(base).name
    sources = ", ".join(
        Path(source.path).name if Path(source.path).exists() else source.path for source in recipe.data.train
    )
    epochs = "1 epoch" if train.epochs == 1 else f"{train.epochs:g} epochs"
    length = f"{train.max_steps} steps" if train.max_steps else epochs
    rows = {
        "targets": ", ".join(adapter.targets),
        "rank, alpha, dropout": f"{adapter.rank}, {adapter.alpha:g}, {adapter.dropout:g}",
        "prompt template": f"{recipe.data.template} (chat_template.jinja beside this file)",
        "length": f"{length}, {train.batch_size} examples a step; this is the adapter after step {step}",
        "optimizer, learning rate": f"{train.optimizer}, {train.learning_rate:g} ({train.scheduler})",
        f"loss on {measured_on}": f"{loss_before:.4f} before, {loss_after:.4f} after",
    }
    return "\n".join(
        [
            "---",
            "library_name: peft",
            *([f"base_model: {hub_base}"] if hub_base else []),
            "tags: [lora]",
            "---",
            "",
            f"# LoRA adapter for {named}",
            "",
            f"Trained with tune on {sources}, over a base held in {recipe.model.quantization} "
            f"with {recipe.model.dtype} compute.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows.items()),
            "",
            "```python",
            *_loading(recipe, hub_base or f"PATH/TO/{named}"),
            "```",
            "",
        ]
    )


def _loading(recipe: Recipe, base: str) -> list[str]:
    """The lines that load the adapter over the base as it was trained, and ask it something."""
    quantized = recipe.model.quantization == "nf4"
    dtype = f"torch.{recipe.model.dtype}"
    classes = "AutoModelForCausalLM, AutoTokenizer" + (", BitsAndBytesConfig" if quantized else "")
    config = [
        "nf4 = BitsAndBytesConfig(",
        '    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,',
        f"    bnb_4bit_compute_dtype={dtype},",
        ")",
    ]
    return [
        "import torch",
        "from peft import PeftModel",
        f"from transformers import {classes}",
        "",
        'adapter = "PATH/TO/THIS/FOLDER"',
        *(config if quantized else []),
        "base = AutoModelForCausalLM.from_pretrained(",
        f'    "{base}", dtype={dtype}{", quantization_config=nf4" if quantized else ""}',
        ")",
        "model = PeftModel.from_pretrained(base, adapter)",
        "tokenizer = AutoTokenizer.from_pretrained(adapter)",
        'messages = [{"role": "user", "content": "Hello!"}]',
        "ids = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
        ")",
        "out = model.generate(**ids.to(model.device), max_new_tokens=100)",
        'print(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
