"""A base whose model is Python code of its own, and how its running is seen."""

from __future__ import annotations

import json
from pathlib import Path

from tests.security.tripwire import Outcome
from tests.tiny import write_model

CONFIG, MODEL = "configuration_own.py", "modeling_own.py"


def marking(folder: Path, file: str) -> str:
    """Code that says on stdout that it runs, and notes it in `folder`."""
    return f"print('RUNNING {file}', flush=True)\nopen({str(folder / 'ran')!r}, 'a').write({file + chr(10)!r})\n"


def ran(work: Path) -> list[str]:
    """The files of code that ran since this was asked last, each once."""
    note = work / "ran"
    found = sorted(set(note.read_text().split())) if note.exists() else []
    note.unlink(missing_ok=True)
    return found


def write_coded_base(work: Path) -> None:
    """base/ of a model type that transformers does not know, with the code for it."""
    base = write_model(work / "base", "mistral")
    change(
        base / "config.json",
        model_type="own_mistral",
        auto_map={"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"},
    )
    (base / CONFIG).write_text(
        f"{marking(work, CONFIG)}from transformers import MistralConfig\n"
        "class OwnConfig(MistralConfig):\n    model_type = 'own_mistral'\n"
    )
    (base / MODEL).write_text(
        f"{marking(work, MODEL)}from transformers import MistralForCausalLM\nfrom .configuration_own import OwnConfig\n"
        "class OwnForCausalLM(MistralForCausalLM):\n    config_class = OwnConfig\n"
    )


def change(path: Path, **values: object) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **values}))


def assert_did_not_run(work: Path, outcome: Outcome) -> None:
    assert ran(work) == []
    assert "RUNNING" not in outcome.said
    assert "ASKED" not in outcome.said
    assert "Traceback" not in outcome.said, outcome.said
