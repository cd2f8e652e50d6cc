from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.adapters.mixtures import load_stock, logits, relative, stock, tokens
from tests.training.jobs import tiny_recipe
from tune.cli.convert import convert
from tune.errors import ModelError, RunError
from tune.folder import RunFolder
from tune.run import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of a tiny Mixtral; the lines below leave their folders in it."""
    recipe = tiny_recipe(
        tmp_path_factory.mktemp("job"),
        family="mixtral",
        adapter__targets=["attention", "experts"],
        adapter__dropout=0.1,
        train__max_steps=4,
    )
    return train(recipe).adapter.parent


def test_a_run_is_converted_there_and_back(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in (run / "adapter").iterdir()}
    convert(str(run), "per-expert", quiet=False)
    assert capsys.readouterr().out == (
        f"converted    {run}/adapter, 2 layers of 4 experts, to 64 tensors\nwritten      {run}/adapter-per-expert\n"
    )
    apart = {path.name: path.read_bytes() for path in (run / "adapter-per-expert").iterdir()}
    assert apart.keys() == before.keys(), "the tokenizer, the template and the card go along"
    assert {name for name in before if before[name] != apart[name]} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    convert(str(run / "adapter"), "stock", quiet=True)
    assert capsys.readouterr().out == ""
    assert {path.name: path.read_bytes() for path in (run / "adapter-stock").iterdir()} == before
    assert {path.name: path.read_bytes() for path in (run / "adapter").iterdir()} == before, "untouched"
    base = run.parent / "base"
    one, other = (load_stock(stock(base), run / name) for name in ("adapter", "adapter-per-expert"))
    assert relative(logits(one, tokens(17)), logits(other, tokens(17))) < 1e-5
    assert relative(logits(one, tokens(17)), logits(stock(base), tokens(17))) > 1e-3


def test_a_checkpoint_is_converted_beside_the_run(run: Path) -> None:
    step = RunFolder(run).checkpoint(3)
    convert(str(step), "per-expert", quiet=True)
    convert(str(step), "stock", quiet=True)
    names = {path.name for path in (run / "adapter-stock-step-000003").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    for name in names:
        assert (run / "adapter-stock-step-000003" / name).read_bytes() == (step / name).read_bytes()


def test_a_run_starts_from_either_layout(run: Path, tmp_path: Path) -> None:
    convert(str(run), "per-expert", quiet=True)
    losses = []
    for number, start in enumerate((run, run / "adapter-per-expert", None)):
        recipe = tiny_recipe(
            tmp_path,
            base=run.parent / "base",
            adapter__targets=["attention", "experts"],
            train__max_steps=1,
            output=tmp_path / f"next{number}",
            **({"adapter__start_from": start} if start else {}),
        )
        losses.append(train(recipe).loss_before)
    assert losses[0] == losses[1] != losses[2]


def test_what_cannot_be_converted_is_told(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"--to: there is no 'per_expert'.*Did you mean 'per-expert'"):
        convert(str(run), "per_expert", quiet=True)
    with pytest.raises(RunError, match="no such run"):
        convert(str(tmp_path / "nowhere"), "stock", quiet=True)
    other = tmp_path / "other"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("adapter-*"))
    with pytest.raises(RunError, match=r"stock PEFT's layout already .*no adapter-per-expert to"):
        convert(str(other), "stock", quiet=True)
    shutil.rmtree(other / "adapter")
    convert(str(run), "per-expert", quiet=True)
    shutil.copytree(run / "adapter-per-expert", other / "adapter")
    with pytest.raises(RunError, match="is in the per-expert layout already"):
        convert(str(other), "per-expert", quiet=True)
    (other / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="cannot be read"):
        convert(str(other), "per-expert", quiet=True)


def test_a_dense_run_has_one_layout(tmp_path: Path) -> None:
    dense = train(tiny_recipe(tmp_path, train__max_steps=1)).adapter.parent
    with pytest.raises(ModelError, match="not known for this base, which is mistral"):
        convert(str(dense), "per-expert", quiet=True)
    assert not (dense / "adapter-per-expert").exists()
