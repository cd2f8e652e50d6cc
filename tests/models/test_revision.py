"""`model.revision` is what is asked for of the base, each time and of each file."""

from __future__ import annotations

import importlib
import os
import shutil
from pathlib import Path

from tests.hub import COMMIT, standing_in
from tests.tiny import write_model
from tests.training.jobs import tiny_recipe
from tests.training.processes import fork, wait
from tune.cli.main import _run
from tune.evaluation.generate import load_run

REVISION = "second-edition"


def test_every_file_of_the_base_is_asked_for_at_its_revision(tmp_path: Path) -> None:
    """By training, and by loading the run in order to answer, each without a cache."""
    write_model(tmp_path / "base", "mistral")
    run = tmp_path / "run"
    tiny_recipe(tmp_path, base="owner/tiny", model__revision=REVISION, train__max_steps=1, output=run)

    def with_a_hub(home: Path, environment: dict[str, str], work: str) -> int:
        from huggingface_hub import constants

        os.environ |= {**environment, "HF_HOME": str(home)}
        importlib.reload(constants)  # read at import, and read from there by all who use them
        if work == "train":
            return _run(["train", str(tmp_path / "recipe.yaml")])
        shutil.rmtree(run / "adapter")  # without the tokenizer saved there, the base's is asked for
        load_run(run)
        return 0

    with standing_in({"owner/tiny": tmp_path / "base"}, {}) as hub:
        for work in ("train", "load"):
            home, log = tmp_path / f"home-{work}", tmp_path / f"log-{work}"
            hub.asked.clear()
            child = fork(lambda: with_a_hub(home, hub.environment(home), work), log)  # noqa: B023
            assert wait(child) == 0, log.read_text()
            for name in ("config.json", "tokenizer.json", "model.safetensors"):
                assert any(path.endswith(name) for path in hub.asked), (work, name, hub.asked)
            # Asked for a revision, the Hub names the commit, by which the libraries may go on asking.
            others = [path for path in hub.asked if "/tiny" in path and REVISION not in path and COMMIT not in path]
            assert not others, (work, others)
