"""A merge that is there can be proven once more: after a copy, or when a file of it is in doubt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.export.merges import change_tensors, files, made, weight_files
from tune.cli.main import _run
from tune.errors import RunError, UntrustworthyError
from tune.export.merge import merge, prove_again


@pytest.mark.parametrize("base", ["original", "quantized"])
def test_a_copy_is_proven_and_a_changed_one_is_not_until_it_is_whole_again(tmp_path: Path, base: str) -> None:
    run = made(dtype="bfloat16").copy(tmp_path / "made").run
    folder = merge(run.root, base=base).folder  # type: ignore[arg-type]
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(folder, elsewhere)
    before = files(elsewhere)
    again = prove_again(run.root, elsewhere)
    assert again.proof.content["base"] == base
    assert files(elsewhere) == before

    (weights,) = weight_files(elsewhere)
    good = weights.read_bytes()
    weights.write_bytes(good[:-1000] + bytes([good[-1000] ^ 4]) + good[-999:])
    with pytest.raises(UntrustworthyError, match="the proof failed"):
        prove_again(run.root, elsewhere)
    assert (elsewhere / "UNPROVEN").read_text().startswith("weights: 1 tensors")
    assert json.loads((elsewhere / "merge-proof.json").read_text())["verdict"] == "failed"

    weights.write_bytes(good)
    prove_again(run.root, elsewhere)
    assert files(elsewhere) == before


def test_the_command_line_proves_and_writes_no_weights(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = made().copy(tmp_path / "made").run
    assert _run(["merge", str(run.root), "--prove"]) == 2
    assert "nothing to prove again" in capfd.readouterr().err
    merge(run.root)
    (weights,) = weight_files(run.merged)
    written = weights.stat().st_mtime_ns
    assert _run(["merge", str(run.root), "--prove"]) == 0
    assert "the merged model is the trained model" in capfd.readouterr().out
    assert weights.stat().st_mtime_ns == written


def test_a_folder_that_is_no_merge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nothing to prove again"):
        prove_again(made().run.root, tmp_path)


def test_what_a_killed_merge_left_after_its_last_rename_is_swept(tmp_path: Path) -> None:
    run = made().copy(tmp_path / "made").run
    merge(run.root)
    left = run.root / ".merging-merged"
    left.mkdir()
    (left / "journal.json").write_text("{}")
    with pytest.raises(RunError, match="a proven merge already"):
        merge(run.root)
    assert not left.exists()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("verb", [["merge"], ["push", "owner/name", "--dry-run"]])
def test_an_adapter_that_was_changed_after_training_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, verb: list[str]
) -> None:
    run = made().copy(tmp_path / "made").run
    path = run.adapter / name
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(bytes(content))
    assert _run([verb[0], str(run.root), *verb[1:]]) == 2
    assert "Traceback" not in (said := capfd.readouterr().err)
    assert name in said or "adapter" in said


def test_an_adapter_of_another_seed_is_refused_and_can_be_written_again(tmp_path: Path) -> None:
    run = made().copy(tmp_path / "made").run
    before = (run.adapter / "adapter_model.safetensors").read_bytes()
    change_tensors(run.adapter / "adapter_model.safetensors", lambda tensors: [t.mul_(1.01) for t in tensors.values()])
    with pytest.raises(RunError, match="is not the file that training wrote"):
        merge(run.root)
    run.finished.unlink()
    assert _run(["train", str(run.recipe), "--resume"]) == 0
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == before
    assert merge(run.root).proof.holds


def test_a_lost_provenance_is_written_again_only_from_what_was_trained_on(tmp_path: Path) -> None:
    made_here = made().copy(tmp_path / "made")
    run = made_here.run
    before = json.loads(run.provenance.read_text())
    run.provenance.unlink()
    assert _run(["train", str(run.recipe), "--resume"]) == 0
    assert json.loads(run.provenance.read_text())["base"]["fingerprint"] == before["base"]["fingerprint"]
    assert merge(run.root).proof.holds

    run.provenance.unlink()
    change_tensors(weight_files(made_here.base)[0], lambda tensors: next(iter(tensors.values())).mul_(2))
    assert _run(["train", str(run.recipe), "--resume"]) == 2
    assert not run.provenance.exists()
