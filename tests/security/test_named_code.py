"""Code that comes by other ways than a base's own: kernels, quantisers, and modules that files name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.security.coded import assert_did_not_run, change, marking, ran
from tests.security.tripwire import run, slow

CHECK = ("check", "recipe.yaml")
GENERATE = ("generate", "run", "hi", "--max-new-tokens", "1")
MERGE = ("merge", "run", "--output", "out")


@pytest.mark.parametrize(
    "asked",
    [
        {"_attn_implementation": "someone/kernel"},
        {"text_config": {"attn_implementation": {"": "someone/kernel"}}},
        *slow(
            {"attn_implementation": "kernels-community/flash-attn2@main:run"},
            {"_experts_implementation": "someone/kernel"},
        ),
    ],
    ids=lambda asked: json.dumps(asked)[:40],
)
def test_a_kernel_of_the_hub_is_refused_by_its_key(asked: dict[str, object], work: Path) -> None:
    change(work / "base/config.json", **asked)
    outcome = run(work, *CHECK)
    assert outcome.code == 2
    assert "kernel from the Hub" in outcome.said
    assert "attn_implementation" in outcome.said or "experts_implementation" in outcome.said


@pytest.mark.parametrize("name", ["flash_attention_2", *slow("flash_attention_3", "flex_attention", "nonsense")])
def test_an_attention_that_a_config_asks_for_fetches_nothing(
    name: str, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its package transformers would take a kernel from the Hub for flash attention."""

    def fetches(*given: object, **more: object) -> None:
        (work / "fetched").touch()

    monkeypatch.setattr("transformers.modeling_utils.is_kernels_available", lambda: True)
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", fetches)
    change(work / "base/config.json", _attn_implementation=name, _experts_implementation="deepgemm")
    outcome = run(work, "train", "recipe.yaml", "output=new")
    assert outcome.code == 0, outcome.said
    assert "attention sdpa, packed" in outcome.said
    assert not (work / "fetched").exists()


@pytest.mark.parametrize(
    "given",
    [
        {"quantization_config": {}},
        {"text_config": {"quantization_config": {"quant_method": "mxfp4"}}},
        *slow(
            {"quantization_config": {"quant_method": "someone/method"}},
            {"quantization_config": ["gptq"]},
            {"compression_config": {"quant_method": "compressed-tensors"}},
        ),
    ],
    ids=json.dumps,
)
def test_a_quantiser_that_a_config_names_is_not_looked_for(given: dict[str, object], work: Path) -> None:
    change(work / "base/config.json", **given)
    outcome = run(work, *CHECK)
    assert outcome.code == 2
    assert "already quantised" in outcome.said


@pytest.mark.parametrize(
    "named",
    [
        {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil_module"}},
        {"megatron_config": {"a": 1}, "megatron_core": "evil_module"},
        *slow({"peft_type": "XLORA", "adapters": {"a": "evil"}}),
    ],
    ids=lambda named: next(iter(named)),
)
@pytest.mark.parametrize(
    "verb", [MERGE, *slow(GENERATE, ("train", "recipe.yaml", "output=new", "adapter.start_from=old"))]
)
def test_a_module_that_an_adapters_config_names_is_not_imported(
    named: dict[str, object], verb: tuple[str, ...], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (work / "evil_module.py").write_text(marking(work, "evil_module.py"))
    monkeypatch.syspath_prepend(str(work))
    shutil.copytree(work / "run/adapter", work / "old")
    (work / "run/finished.json").unlink()  # in which the adapter is known by its digests
    for folder in ("old", "run/adapter"):
        change(work / folder / "adapter_config.json", **named)
    outcome = run(work, *verb)
    assert_did_not_run(work, outcome)
    assert outcome.code in (0, 2), outcome.said


@pytest.mark.slow
def test_the_kernels_package_is_not_taken_while_bitsandbytes_is_imported(tmp_path: Path) -> None:
    """On some CPUs bitsandbytes would fetch a kernel from the Hub through it, and run it."""
    root = Path(__file__).resolve().parents[2]
    (tmp_path / "kernels.py").write_text(marking(tmp_path, "kernels.py"))
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    program = "import tune.kernels, sys; assert 'kernels' not in sys.modules; print('done')"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "done\n", done.stderr
    assert ran(tmp_path) == []
