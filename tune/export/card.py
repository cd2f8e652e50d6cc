"""The card beside an adapter: what it is, how it was made, how to load it."""

from __future__ import annotations

from pathlib import Path

from tune.recipe.schema import Recipe


def adapter_card(recipe: Recipe, loss_before: float, loss_after: float, measured_on: str) -> str:
    """Return adapter/README.md. A local base or data path appears by its last name only."""
    base, adapter, train = recipe.model.base, recipe.adapter, recipe.train
    hub_base = base if base.count("/") == 1 and not Path(base).expanduser().exists() else None
    named = hub_base or Path(base).name
    sources = ", ".join(
        Path(source.path).name if Path(source.path).exists() else source.path for source in recipe.data.train
    )
    header = [
        "---",
        "library_name: peft",
        *([f"base_model: {hub_base}"] if hub_base else []),
        "tags: [lora]",
        "---",
        "",
    ]
    length = f"{train.max_steps} steps" if train.max_steps else f"{train.epochs:g} epochs"
    return "\n".join(
        [
            *header,
            f"# LoRA adapter for {named}",
            "",
            f"Trained with tune on {sources}, in {recipe.model.quantization} with {recipe.model.dtype} compute.",
            "",
            "| | |",
            "|---|---|",
            f"| targets | {', '.join(adapter.targets)} |",
            f"| rank, alpha, dropout | {adapter.rank}, {adapter.alpha:g}, {adapter.dropout:g} |",
            f"| prompt template | {recipe.data.template} (chat_template.jinja beside this file) |",
            f"| length | {length}, {train.batch_size} examples a step |",
            f"| optimizer, learning rate | {train.optimizer}, {train.learning_rate:g} ({train.scheduler}) |",
            f"| loss on {measured_on} | {loss_before:.4f} before, {loss_after:.4f} after |",
            "",
            "```python",
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'base = AutoModelForCausalLM.from_pretrained("{named}")',
            'model = PeftModel.from_pretrained(base, "adapter")',
            'tokenizer = AutoTokenizer.from_pretrained("adapter")',
            "```",
            "",
        ]
    )
