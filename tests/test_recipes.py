"""Every shipped recipe trains, on a tiny model of its family and on rows in the form of each data set that it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import write_model
from tune.data.formats import FORMATS
from tune.recipe.load import load_recipe, shipped_recipes

ROOT = Path(__file__).resolve().parents[1]

_TURNS = [{"from": "human", "value": "Name a bird."}, {"from": "gpt", "value": "The tern."}]
# One row as each data set on the Hub has them, every column included.
ROWS: dict[str, dict[str, Any]] = {
    "tatsu-lab/alpaca": {"instruction": "Name a bird.", "input": "", "output": "The tern.", "text": "Below is"},
    "mlabonne/FineTome-100k": {"conversations": _TURNS * 2, "source": "a", "score": 4.5},
    "databricks/databricks-dolly-15k": {
        "instruction": "Name a bird.",
        "context": "Birds of the shore.",
        "response": "The tern.",
        "category": "closed_qa",
    },
    "openai/gsm8k": {"question": "What is 2 + 2?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
    "CohereLabs/aya_dataset": {
        "inputs": "Nenne einen Vogel.",
        "targets": "Die Seeschwalbe.",
        "language": "German",
        "language_code": "deu",
        "annotation_type": "original-annotations",
        "user_id": "x",
    },
    "timdettmers/openassistant-guanaco": {
        "text": "### Human: Nombra un pájaro.### Assistant: El charrán.### Human: ¿Otro?### Assistant: La gaviota."
    },
}


def stand_in(folder: Path, name: str) -> Path:
    """Thirty rows in the form of a data set, each with words of its own."""
    path = folder / f"{name.replace('/', '-')}.jsonl"

    def row(number: int) -> dict[str, Any]:
        text = json.dumps(ROWS[name], ensure_ascii=False)
        return dict(json.loads(text.replace("bird", f"bird of {number}").replace("Vogel", f"Vogel {number}")))

    path.write_text("".join(json.dumps(row(number)) + "\n" for number in range(30)))
    return path


def tiny_base(folder: Path, recipe: Any) -> Path:
    """A tiny model of the base's family whose tokenizer has what the template needs."""
    mixture = "mixtral" in recipe.model.base.lower()
    base = write_model(folder / "base", "mixtral" if mixture else "mistral")
    template = recipe.data.template
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    if template == "mistral-v3":
        tokenizer.add_special_tokens({"additional_special_tokens": ["[INST]", "[/INST]"]})
    if template == "tokenizer":
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m['role'] + ': ' }}{% if m['role'] == 'assistant' %}{% generation %}"
            "{{ m['content'] + eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
        )
    tokenizer.save_pretrained(base)
    return base


def overrides(folder: Path, name: str) -> list[str]:
    """What points a shipped recipe at its stand-ins, and makes it short."""
    recipe = load_recipe(shipped_recipes()[name])
    changed = [f"model.base={tiny_base(folder, recipe)}", "model.dtype=float32", f"output={folder / 'run'}"]
    changed += ["train.max_steps=2", "train.batch_size=8", "train.micro_batch_tokens=256"]
    for number, source in enumerate(recipe.data.train):
        if (ROOT / source.path).exists():
            changed.append(f"data.train.{number}.path={ROOT / source.path}")
            continue
        changed.append(f"data.train.{number}.path={stand_in(folder, source.path)}")
        changed += [f"data.train.{number}.config=none"] if source.config else []
    if isinstance(recipe.data.eval, tuple):
        changed += [f"data.eval.{n}.path={ROOT / source.path}" for n, source in enumerate(recipe.data.eval)]
    else:
        changed.append("data.eval=0.2")
    return changed


@pytest.mark.parametrize("name", shipped_recipes())
def test_it_trains_on_stand_ins(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tune.run import train

    recipe = load_recipe(shipped_recipes()[name], overrides(tmp_path, name))
    finished = train(recipe)
    assert finished.steps == 2
    assert finished.loss_after < 20
    coverage = json.loads((tmp_path / "run" / "coverage.json").read_text())
    claimed = " ".join(coverage["lines"])
    assert ("experts" in claimed) is ("mixtral" in name)


def test_every_format_that_is_shipped_and_every_stand_in_is_used() -> None:
    sources = [source for path in shipped_recipes().values() for source in load_recipe(path).data.train]
    assert {source.path for source in sources if not (ROOT / source.path).exists()} == set(ROWS)
    assert {source.format for source in sources} - {"auto"} <= set(FORMATS)
    assert len(shipped_recipes()) == 9
