"""A small finished run to publish: trained once for all tests of publishing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.training.jobs import tiny_recipe
from tune.folder import RunFolder
from tune.run import train

TOKEN = "hf_" + "Wr1te" * 7


def make_run(folder: Path, **changes: Any) -> RunFolder:
    """Train four steps under `folder`/run, unquantised unless told; the base beside it says its licence."""
    settings = {"train__max_steps": 4, "train__save_every": 2, "train__eval_every": 2, "data__eval": 0.2}
    recipe = tiny_recipe(folder, **{"model__quantization": "none", **settings, **changes})
    (folder / "base/README.md").write_text("---\nlicense: apache-2.0\n---\n\n# A base\n")
    train(recipe)
    return RunFolder(folder / "run")


def add_merged(run: RunFolder, base: Path, **proof: Any) -> Path:
    """Put beside a run what `tune merge` puts there, merged by stock PEFT."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, str(run.adapter)).merge_and_unload()
    merged.save_pretrained(run.merged)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(run.adapter / name, run.merged / name)
    content = {
        "verdict": "proven",
        "reasons": [],
        "base": "original",
        "bounded": {
            "logits": {
                "max_abs_difference": {"figure": 1e-6, "bound": 3e-6},
                "mean_kl": {"figure": 2e-13, "bound": 1e-9},
                "top1_agreement": {"figure": 1.0, "bound": 0.999},
                "positions": 321,
            }
        },
        "reported": {"loss": {"trained": 5.1, "merged": 5.2}},
        "prompts": {"from": "held-out data", "count": 8, "tokens": 321},
    }
    (run.merged / "merge-proof.json").write_text(json.dumps({**content, **proof}))
    return run.merged
