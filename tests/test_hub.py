"""Base, data and a first adapter from the Hub: a stand-in on 127.0.0.1, met by the real client in a fresh process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub import COMMIT, standing_in
from tests.training.jobs import tiny_recipe, write_rows
from tune.recipe.load import load_recipe
from tune.run import train


@pytest.mark.slow
def test_a_run_takes_base_data_and_adapter_from_the_hub_and_then_works_offline(tmp_path: Path) -> None:
    first = train(tiny_recipe(tmp_path, train__max_steps=2))
    data = tmp_path / "data"
    data.mkdir()
    write_rows(data / "train.jsonl", 12)
    recipe = {
        "model": {"base": "owner/tiny", "dtype": "float32"},
        "adapter": {"rank": 4, "start_from": "owner/adapter"},
        "data": {"train": [{"path": "owner/lamps", "format": "alpaca"}], "template": "alpaca"},
        "train": {"max_steps": 2, "batch_size": 4},
    }
    (tmp_path / "hub.yaml").write_text(json.dumps(recipe))
    models = {"owner/tiny": tmp_path / "base", "owner/adapter": first.adapter}
    command = [sys.executable, "-m", "tune", "train", "hub.yaml"]
    with standing_in(models, {"owner/lamps": data}) as hub:
        environment = {**os.environ, **hub.environment(tmp_path / "home")}
        environment["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "adapted 14/14" in done.stdout
        asked = " ".join(hub.asked)
        for path in ("owner/tiny/resolve", "owner/adapter/resolve", "owner/lamps"):
            assert path in asked
    environment["HF_HUB_OFFLINE"] = "1"
    # As where somebody else filled the cache, with what PEFT saves and no word of what there is not.
    (cached,) = (tmp_path / "home").rglob("hub/models--owner--adapter")
    for path in (cached / ".no_exist", *cached.rglob("tokenizer.json")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    again = [*command, "output=again"]
    done = subprocess.run(again, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    files = [tmp_path / name / "adapter/adapter_model.safetensors" for name in ("runs/hub", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    # The run holds on to the commit that it was trained on, and its merge finds it in the cache.
    assert load_recipe(tmp_path / "again/recipe.yaml").model.revision == COMMIT
    merge = [sys.executable, "-m", "tune", "merge", "again"]
    done = subprocess.run(merge, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "the merged model is the trained model" in done.stdout
