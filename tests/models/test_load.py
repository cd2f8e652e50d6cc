from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import write_model
from tune.errors import ModelError
from tune.models.load import load_base
from tune.recipe import schema


def test_a_missing_file_of_a_local_folder_is_no_matter_of_the_hub(tmp_path: Path) -> None:
    """Whatever the folder is called: words of its path must not be read as the Hub's."""
    whole = write_model(tmp_path / "whole", "mistral")
    path = tmp_path / "offline, is a gated folder"
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(path, max_shard_size="100KB")
    shards = sorted(path.glob("*.safetensors"))
    assert len(shards) > 1
    shards[-1].unlink()
    with pytest.raises(ModelError, match=r"weights of .* cannot be read .*may be incomplete"):
        load_base(schema.Model(base=str(path)), torch.device("cpu"))
