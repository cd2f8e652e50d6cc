"""`tune merge` as a person types it: what it says, its exit codes, and its mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.mistakes import Mistake, assert_refused, change_json, cut_in_half, files, mistake, remove, write
from tune.cli.main import _run

MERGE = ("merge", "run")


@pytest.fixture
def here(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a finished run in run/, to be changed."""
    shutil.copytree(finished, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def test_a_merge_ends_with_its_proof_and_what_to_type_next(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert _run(["merge", "run"]) == 0
    out, err = capfd.readouterr()
    assert not err.strip()
    proof = json.loads(Path("run/merged/merge-proof.json").read_text())
    assert "proof        the merged model is the trained model" in out
    assert "14 tensors are base plus adapter, rounded once; the other 7 are the base's" in out
    assert f"over {proof['bounded']['logits']['positions']:,} tokens of {proof['prompts']['count']} prompts" in out
    assert "from the training data" in out
    assert "4 of 4 dialogues" in out
    assert "--base quantized merges into that one" in out
    assert f"{proof['reported']['loss']['trained']:.4f} as trained" in out
    assert "merged       run/merged" in out
    assert 'generate run/merged "your prompt"' in out
    assert not Path("run/merged/UNPROVEN").exists()
    assert _run(["generate", "run/merged", "hi", "--max-new-tokens", "3"]) == 0


def test_the_four_bit_base_is_named(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert _run(["merge", "run", "--base", "quantized", "--output", "four/bits"]) == 0
    out = capfd.readouterr().out
    assert "tensors are 4-bit base plus adapter" in out
    assert "is another model" not in out
    assert json.loads(Path("four/bits/merge-proof.json").read_text())["base"] == "quantized"
    assert {path.name for path in Path("four").iterdir()} == {"bits"}
    assert not Path("run/merged").exists()


def test_quiet_says_nothing(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert _run(["merge", "run", "--quiet"]) == 0
    out, err = capfd.readouterr()
    assert not (out + err).strip()
    assert Path("run/merged/merge-proof.json").is_file()


def test_the_adapters_folder_means_its_run(here: Path) -> None:
    assert _run(["merge", "run/adapter", "--quiet"]) == 0
    assert Path("run/merged/model.safetensors").is_file()


def test_a_checkpoint_is_merged_beside_the_run(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert _run(["merge", "run/checkpoints/step-000002"]) == 0
    assert "merged       run/merged-step-000002" in capfd.readouterr().out


def test_a_failed_proof_ends_in_3(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from tune.export.deltas import Delta

    right = Delta.rows
    monkeypatch.setattr(Delta, "rows", lambda self, start, stop: right(self, start, stop) * 1.5)
    assert _run(["merge", "run"]) == 3
    out, err = capfd.readouterr()
    assert "the merged model is the trained model" not in out
    assert "run/merged: the proof failed, and nobody should use these weights" in err
    assert "14 tensors are not the base plus the adapter" in err
    assert Path("run/merged/UNPROVEN").is_file()
    assert json.loads(Path("run/merged/merge-proof.json").read_text())["verdict"] == "failed"
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert _run(["merge", "run"]) == 2
    assert "holds a merge whose proof failed. Remove it" in capfd.readouterr().err


def test_the_same_command_again_is_refused(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert _run(["merge", "run", "--quiet"]) == 0
    before = files(here)
    capfd.readouterr()
    assert _run(["merge", "run"]) == 2
    assert "run/merged: holds a proven merge already" in capfd.readouterr().err
    assert files(here) == before


def put_a_folder(work: Path) -> None:
    (work / "out").mkdir()


MISTAKES = [
    mistake("a wrong base word", "--base", "'quantised'", "Did you mean 'quantized'?",
            arguments=(*MERGE, "--base", "quantised")),
    mistake("a wrong base word near nothing", "Write original or quantized.", arguments=(*MERGE, "--base", "8bit")),
    mistake("no such run", "runn: no such run", "Did you mean 'run'?", arguments=("merge", "runn")),
    mistake("a folder that is no run", "base: not a run folder", arguments=("merge", "base")),
    mistake("an output that is there", "out: is there already", "--output",
            prepare=put_a_folder, arguments=(*MERGE, "--output", "out")),
    mistake("an output that is a file", "train.jsonl: is there already",
            arguments=(*MERGE, "--output", "train.jsonl")),
    mistake("an output that is the run", "run: is there already", arguments=(*MERGE, "--output", "run")),
    mistake("no provenance", "provenance.json: cannot be read", "--resume",
            prepare=remove("run/provenance.json"), arguments=MERGE),
    mistake("half a provenance", "provenance.json: cannot be read", "--resume",
            prepare=cut_in_half("run/provenance.json"), arguments=MERGE),
    mistake("a base without weights", "base holds no .safetensors weights",
            prepare=remove("base/*.safetensors"), arguments=MERGE),
    mistake("a base cut in half", "is not the base that run was trained on",
            prepare=cut_in_half("base/model.safetensors"), arguments=MERGE),
    mistake("a base with another config", "is not the base that run was trained on", "Put the old files back",
            prepare=change_json("base/config.json", rms_norm_eps=0.1), arguments=MERGE),
    mistake("a base whose config is broken", "base/config.json",
            prepare=write("base/config.json", "{"), arguments=MERGE),
    mistake("an adapter with DoRA", "use_dora (DoRA's magnitudes)",
            prepare=change_json("run/adapter/adapter_config.json", use_dora=True), arguments=MERGE),
    mistake("an adapter cut in half", "adapter_model.safetensors", "may be incomplete",
            prepare=cut_in_half("run/adapter/adapter_model.safetensors"), arguments=MERGE),
    mistake("an adapter without weights", "adapter_model.safetensors",
            prepare=remove("run/adapter/adapter_model.safetensors"), arguments=MERGE),
    mistake("an adapter without its config", "holds no adapter_config.json",
            prepare=remove("run/adapter/adapter_config.json"), arguments=MERGE),
]  # fmt: skip


@pytest.mark.parametrize("wrong", MISTAKES)
def test_a_mistake_is_told_in_one_line(wrong: Mistake, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert_refused(wrong, here, capfd)


def test_an_output_inside_a_file(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = files(here)
    assert _run([*MERGE, "--output", "train.jsonl/out"]) == 2
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1
    assert "train.jsonl" in err
    assert "a file" in err
    assert files(here) == before


def test_a_base_that_is_gone(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.move("base", "bases")
    before = files(here)
    assert _run(["merge", "run"]) == 2
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1
    assert "base" in err
    assert files(here) == before
