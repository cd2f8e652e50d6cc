"""adapter_config.json and adapter_model.safetensors of somebody else's: refused in one line, or read and not obeyed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from tests.security.watched import Seen, watch, watch_command
from tune.adapters.config_file import peft_config, read_adapter_config
from tune.adapters.files import read_files
from tune.adapters.patterns import Ranks, few_ways, ways
from tune.errors import ModelError
from tune.export.deltas import read_pairs

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
NEVER_IMPORTED = "antigravity"
"""A module that nothing imports, and that would open a browser."""

GOOD: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "auto_mapping": None,
    "base_model_name_or_path": "owner/base",
    "revision": None,
    "inference_mode": True,
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj"],
    "rank_pattern": {},
    "alpha_pattern": {},
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "use_dora": False,
    "a_key_of_a_newer_peft": None,
    "and_another": False,
}


def tensors(rank: int = 4) -> dict[str, torch.Tensor]:
    return {f"{LAYER}.lora_A.weight": torch.ones(rank, 8), f"{LAYER}.lora_B.weight": torch.ones(16, rank)}


def write(folder: Path, config: object = GOOD, weights: dict[str, torch.Tensor] | bytes | None = None) -> Path:
    """A PEFT folder with this adapter_config.json (bytes stay as they are), and a decoy beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    text = config if isinstance(config, bytes) else json.dumps(config).encode()
    (folder / "adapter_config.json").write_bytes(text)
    content = weights if isinstance(weights, bytes) else save(tensors() if weights is None else weights)
    (folder / "adapter_model.safetensors").write_bytes(content)
    decoy = folder.parent / "decoy"
    decoy.mkdir(exist_ok=True)
    shutil.copy(folder / "adapter_model.safetensors", decoy / "adapter_model.safetensors")
    for name in ("adapter_config.json", "config.json", "secret.txt"):
        (decoy / name).write_text("{}")
    return folder


def read(folder: Path) -> None:
    """Every way of this program into a PEFT folder."""
    read_files(folder)
    read_pairs(folder)
    peft_config(folder, read_adapter_config(folder))


def watch_reading(folder: Path, scratch: Path) -> Seen:
    seen = watch(lambda: read(folder), scratch, 60)
    decoys = [path for path in (folder.parent / "decoy").rglob("*") if path.is_file()]
    seen.assert_inside(scratch, untouched=decoys)
    assert NEVER_IMPORTED not in seen.imported
    return seen


def test_a_good_adapter_is_read(tmp_path: Path) -> None:
    seen = watch_reading(write(tmp_path / "adapter"), tmp_path / "scratch")
    assert (seen.code, seen.said) == (0, "")


HOSTILE: list[tuple[str, object]] = [
    ("base_model_name_or_path", "name\0"),
    ("base_model_name_or_path", "x" * 10_000),
    ("base_model_name_or_path", ["owner/base"]),
    ("revision", "../../../etc"),
    ("revision", 7),
    ("task_type", {}),
    ("peft_version", 3),
    ("inference_mode", "yes"),
    ("r", 0),
    ("r", -1),
    ("r", 10**9),
    ("r", 4.0),
    ("r", "4"),
    ("r", True),
    ("r", None),
    ("r", [4]),
    ("lora_alpha", 0),
    ("lora_alpha", -8),
    ("lora_alpha", 10**90),
    ("lora_alpha", "8"),
    ("lora_alpha", False),
    ("lora_alpha", None),
    ("lora_dropout", -0.1),
    ("lora_dropout", 7),
    *(("init_lora_weights", how) for how in ("pissa", "pissa_niter_1000000", "olora", "corda", "loftq", "../x")),
    ("rank_pattern", {"(a+)+$": 4}),
    ("rank_pattern", {"(a|a)" * 30: 4}),
    ("rank_pattern", {"a?" * 40 + "a" * 40: 4}),
    ("rank_pattern", {".*" * 6 + "x": 4}),
    ("rank_pattern", {"[": 4}),
    ("rank_pattern", {"x" * 100_000: 4}),
    ("rank_pattern", {"q_proj": 10**9}),
    ("rank_pattern", {"q_proj": "4"}),
    ("rank_pattern", ["q_proj"]),
    ("rank_pattern", {f"layer.{number}": 4 for number in range(20_000)}),
    ("alpha_pattern", {"(a+)+$": 4}),
    ("alpha_pattern", {"q_proj": -4}),
    ("target_modules", "(a+)+$"),
    ("target_modules", r"(\w+\.)*q_proj"),
    ("target_modules", "(x+x+)+y"),
    ("target_modules", [f"layer{number}" for number in range(10**5)]),
    ("target_modules", [["q_proj"]]),
    ("target_modules", ["../../etc/passwd"]),
    ("target_modules", [".."]),
    ("target_modules", 4),
    ("exclude_modules", "(a+)+$"),
    ("exclude_modules", {"q_proj": 1}),
    ("target_parameters", ["mlp/../experts"]),
    ("target_parameters", "experts"),
    ("modules_to_save", ["/etc/passwd"]),
    ("modules_to_save", ["../lm_head"]),
    ("modules_to_save", [None]),
    ("layers_to_transform", -1),
    ("layers_to_transform", [10**12]),
    ("layers_pattern", "(a+)+"),
    ("layer_replication", [[0, 10**12]]),
    ("layer_replication", "all"),
    ("trainable_token_indices", [-1]),
    ("trainable_token_indices", [2**62]),
    ("trainable_token_indices", [5, 5]),
    ("trainable_token_indices", {"embed_tokens": [1.5]}),
    ("trainable_token_indices", {"../x": [1]}),
    ("trainable_token_indices", "all"),
    ("megatron_config", {"tensor_model_parallel_size": 1}),
    ("megatron_core", NEVER_IMPORTED),
    ("runtime_config", {"ephemeral_gpu_offload": True}),
    ("init_lora_weights", "../../x"),
    ("init_lora_weights", 3),
    ("bias", "some"),
    ("fan_in_fan_out", "true"),
    ("use_dora", 1),
    ("use_rslora", "yes"),
    ("a_key_of_a_newer_peft", 0.5),
    ("a_key_of_a_newer_peft", {"path": "/etc"}),
    ("peft_type", "PREFIX_TUNING"),
    ("peft_type", "XLORA"),
    ("peft_type", "NO_SUCH_METHOD"),
    ("peft_type", ["LORA"]),
    ("peft_type", None),
    ("auto_mapping", {"parent_library": [NEVER_IMPORTED]}),
    ("auto_mapping", NEVER_IMPORTED),
]


@pytest.mark.parametrize("many", [False, True], ids=["first", "all"])
def test_a_value_that_no_adapter_has_is_refused_by_its_key(tmp_path: Path, many: bool) -> None:
    """Each alone, in one child each for the first few and in one for all."""
    if not many:
        key, value = HOSTILE[0]
        seen = watch_reading(write(tmp_path / "adapter", {**GOOD, key: value}), tmp_path / "scratch")
        seen.assert_refused("adapter_config.json", key, "Put the file back")
        return
    folders = [
        write(tmp_path / str(number) / "adapter", {**GOOD, key: value}) for number, (key, value) in enumerate(HOSTILE)
    ]

    def every() -> None:
        answers = []
        for folder in folders:
            try:
                read_adapter_config(folder)
                read_files(folder)
                answers.append("")
            except Exception as error:
                answers.append(f"{type(error).__name__} {error}")
        (tmp_path / "scratch" / "answers.json").write_text(json.dumps(answers))

    seen = watch(every, tmp_path / "scratch", 60)
    assert seen.code == 0, seen.said
    seen.assert_inside(tmp_path / "scratch", untouched=tmp_path.glob("*/decoy/*"))
    assert NEVER_IMPORTED not in seen.imported
    assert seen.seconds < 10, f"{len(HOSTILE)} took {seen.seconds:.1f} s"
    assert seen.grown < 2**28
    answers = json.loads((tmp_path / "scratch" / "answers.json").read_text())
    for (key, value), said, folder in zip(HOSTILE, answers, folders, strict=True):
        shown = json.dumps(value)[:60]
        assert said.startswith("ModelError"), (key, shown, said)
        assert key in said or "method" in said or "without lora_alpha" in said, (key, shown, said)
        assert str(folder) in said, (key, shown, said)
        assert len(said.splitlines()) == 1, (key, shown, said)
        assert len(said) < 600 + len(str(folder)), (key, shown, said)


NOT_FOLLOWED: list[tuple[str, object]] = [
    ("base_model_name_or_path", "../decoy"),
    ("base_model_name_or_path", "/etc"),
    ("base_model_name_or_path", "file:///etc/passwd"),
    ("base_model_name_or_path", "https://example.org/model"),
    ("auto_mapping", {"base_model_class": "x", "parent_library": NEVER_IMPORTED}),
    ("loftq_config", {"loftq_bits": 10**9}),
    ("eva_config", {"rho": 1e9}),
    ("corda_config", {"cache_file": "../decoy/secret.txt", "covariance_file": "../decoy/secret.txt"}),
    ("init_lora_weights", "gaussian"),
    ("init_lora_weights", "eva"),
    ("target_modules", "all-linear"),
    ("target_modules", r".*\.layers\.\d+\.self_attn\.(q|k|v|o)_proj"),
    ("rank_pattern", {r"^model\.layers\.[0-9]+\.self_attn\.q_proj": 4, r"model\.layers\.1\.mlp": 8}),
    ("megatron_core", "megatron.core"),
]


@pytest.mark.parametrize(("key", "value"), NOT_FOLLOWED)
def test_what_a_file_names_is_not_followed(tmp_path: Path, key: str, value: object) -> None:
    seen = watch_reading(write(tmp_path / "adapter", {**GOOD, key: value}), tmp_path / "scratch")
    assert (seen.code, seen.said) == (0, ""), seen.said
    assert not any("megatron" in name or "scipy" in name for name in seen.imported)


def text(**changes: object) -> str:
    return json.dumps({**GOOD, **changes})


WRITTEN: dict[str, bytes] = {
    "nothing": b"",
    "spaces": b"  \n",
    "a list": b"[1, 2]",
    "a number": b"7",
    "half": text()[:40].encode(),
    "NaN": text().replace('"lora_alpha": 8', '"lora_alpha": NaN').encode(),
    "infinity": text().replace('"lora_alpha": 8', '"lora_alpha": Infinity').encode(),
    "beyond a float": text().replace('"lora_alpha": 8', '"lora_alpha": 1e400').encode(),
    "a long number": text().replace('"r": 4', '"r": ' + "9" * 5000).encode(),
    "a key twice": text().replace('"r": 4', '"r": 4, "r": 1000000000').encode(),
    "deeply nested": text().replace('"r": 4', '"r": 4, "x": ' + "[" * 100_000 + "]" * 100_000).encode(),
    "nested": text().replace('"r": 4', '"r": 4, "x": ' + '{"x": ' * 200 + "1" + "}" * 200).encode(),
    "no UTF-8": text().encode() + b"\xff\xfe",
    "UTF-16": text().encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf" + text().encode(),
    "10 MB of text": text(base_model_name_or_path="x" * 10**7).encode(),
    "a million keys": text(**{f"key{number}": None for number in range(10**6)}).encode(),
    "half a surrogate": text().replace("owner/base", "\\ud800").encode(),
}


@pytest.mark.parametrize("what", WRITTEN)
def test_a_file_that_is_no_such_json_is_refused(tmp_path: Path, what: str) -> None:
    seen = watch_reading(write(tmp_path / "adapter", WRITTEN[what]), tmp_path / "scratch")
    words = "base_model_name_or_path" if what == "half a surrogate" else "cannot be read"
    seen.assert_refused(str(tmp_path / "adapter"), words, "adapter_config.json", seconds=5)


def header(entries: dict[str, Any], data: bytes = b"") -> bytes:
    content = json.dumps(entries).encode()
    return len(content).to_bytes(8, "little") + content + data


def entry(dtype: object, shape: object, *offsets: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"


def named(*names: str) -> bytes:
    return header({name: entry("F32", [1], 4 * at, 4 * at + 4) for at, name in enumerate(names)}, bytes(4 * len(names)))


WEIGHTS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "cannot be read"),
    "a header of 2^60 bytes": ((2**60).to_bytes(8, "little") + b"{}", "no whole safetensors file"),
    "a header of half a GB": ((2**29).to_bytes(8, "little") + b"{}", "no whole safetensors file"),
    "a header that is no JSON": (header({})[:8] + b"[]", "cannot be read"),
    "a header that is nested": ((200_000).to_bytes(8, "little") + b"[" * 200_000, "nested too deeply"),
    "one name twice": (
        (lambda text: len(text).to_bytes(8, "little") + text + bytes(4))(
            f'{{"{A}":{json.dumps(entry("F32", [1], 0, 4))},"{A}":{json.dumps(entry("F32", [1], 0, 4))}}}'.encode()
        ),
        "twice",
    ),
    "overlapping": (header({A: entry("F32", [2], 0, 8), B: entry("F32", [2], 4, 12)}, bytes(12)), "hole"),
    "beyond the end": (header({A: entry("F32", [4, 2**40], 0, 2**44)}, bytes(8)), "bytes long"),
    "before the start": (header({A: entry("F32", [1], -4, 0)}, bytes(4)), "safetensors header"),
    "a shape of other size": (header({A: entry("F32", [4, 10**9], 0, 16)}, bytes(16)), "are not of shape"),
    "a shape beyond 64 bits": (header({A: entry("F32", [2**62, 2**62], 0, 16)}, bytes(16)), "shape"),
    "a negative shape": (header({A: entry("F32", [-1, -4], 0, 16)}, bytes(16)), "safetensors header"),
    "a shape of truths": (header({A: entry("F32", [True, 4], 0, 16)}, bytes(16)), "safetensors header"),
    "a shape of text": (header({A: entry("F32", "4", 0, 16)}, bytes(16)), "safetensors header"),
    "a thousand dimensions": (header({A: entry("F32", [1] * 1000, 0, 4)}, bytes(4)), "safetensors header"),
    "an unknown type": (header({A: entry("F31", [4], 0, 16)}, bytes(16)), "F31"),
    "whole numbers": (save({A: torch.ones(4, 8, dtype=torch.int64), B: torch.ones(16, 4)}), "I64"),
    "a name with a path": (named("../../etc/passwd"), "no module's"),
    "a name with a null byte": (named("x\0y"), "no module's"),
    "a name for the terminal": (named("\x1b[2Jx"), "no module's"),
    "a name of 10,000 letters": (named("x" * 10_000), "no module's"),
    "no tensors": (header({}), "no LoRA"),
    "NaN": (save({**tensors(), A: torch.full((4, 8), torch.nan)}), "NaN or infinity"),
    "infinity": (save({**tensors(), B: torch.full((16, 4), -torch.inf)}), "NaN or infinity"),
    "of no rank": (save({A: torch.zeros(0, 8), B: torch.zeros(16, 0)}), "no A or B"),
    "one dimension": (save({A: torch.zeros(4), B: torch.zeros(16, 4)}), "no A or B"),
    "cut": (save(tensors())[:-100], "bytes long"),
    "longer": (save(tensors()) + bytes(5), "bytes long"),
}


@pytest.mark.parametrize("what", WEIGHTS)
def test_weights_that_are_none_are_refused(tmp_path: Path, what: str) -> None:
    content, words = WEIGHTS[what]
    seen = watch_reading(write(tmp_path / "adapter", weights=content), tmp_path / "scratch")
    seen.assert_refused(str(tmp_path / "adapter"), words, seconds=5)


def link_to(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


KINDS: dict[str, Callable[[Path], object]] = {
    "a link to a private file": link_to("/etc/passwd"),
    "a link to another adapter": link_to("../decoy/adapter_model.safetensors"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to nothing": link_to("nothing"),
    "a device that never ends": link_to("/dev/zero"),
    "a pipe": os.mkfifo,
    "a folder": os.mkdir,
}


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_of_the_folder_is_refused(tmp_path: Path, kind: str, name: str) -> None:
    folder = write(tmp_path / "adapter")
    (folder / name).unlink()
    KINDS[kind](folder / name)
    seen = watch_reading(folder, tmp_path / "scratch")
    seen.assert_refused(str(folder), seconds=5)
    assert "root:" not in seen.said
    assert "/etc/passwd" not in seen.opened


def test_an_adapter_in_the_hubs_cache_is_read_through_its_links(tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--adapter"
    snapshot = repository / "snapshots" / "0123abcd"
    write(snapshot)
    (repository / "blobs").mkdir()
    for number, name in enumerate(("adapter_config.json", "adapter_model.safetensors")):
        (snapshot / name).rename(repository / "blobs" / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    read(snapshot)
    # A cache that somebody else made may hold links that leave it.
    (repository / "blobs" / "0").unlink()
    (repository / "blobs" / "0").symlink_to("/etc/passwd")
    watch_reading(snapshot, tmp_path / "scratch").assert_refused("is a link out of its folder")


def test_only_what_places_a_lora_reaches_peft(tmp_path: Path) -> None:
    changes: dict[str, Any] = dict(NOT_FOLLOWED)
    changes |= {"target_modules": ["q_proj"], "runtime_config": None, "inference_mode": False}
    folder = write(tmp_path / "adapter", {**GOOD, **changes})
    config = peft_config(folder, read_adapter_config(folder))
    assert config.init_lora_weights is True
    assert config.base_model_name_or_path is None
    assert config.auto_mapping is None
    assert not config.loftq_config
    assert config.corda_config is None
    assert config.eva_config is None
    assert (config.r, config.lora_alpha, config.target_modules) == (4, 8, {"q_proj"})
    change(folder, layers_pattern="layers")
    with pytest.raises(ModelError, match=r"PEFT refuses it .*layers_to_transform"):
        peft_config(folder, read_adapter_config(folder))


@pytest.mark.parametrize(
    ("pattern", "taken"),
    [
        ("q_proj", True),
        (r"model\.layers\.3\.mlp\.experts\.\d+\.(w1|w3)", True),
        (r"(?:.*\.)?layers\.(0|1|2|3)\..*_proj", True),
        (r"^(?!.*visual).*(q_proj|v_proj)$", True),
        (r"(.*)*", False),
        (r"(\d+)+", False),
        (r"(a{1,9}){1,9}", False),
        (r"((a?){20}){20}", False),
        (r"(.)\1", False),
        (r"(?P<x>a)", False),
        (r"(?i)q_proj", False),
        (r"a)|(b", False),
        (r".*.*.*.*", False),
        ("", True),
    ],
)
def test_a_pattern_is_taken_if_it_can_be_matched_soon(pattern: str, taken: bool) -> None:
    assert few_ways([pattern]) is taken
    assert (ways(pattern) < float("inf")) or not taken


def test_ranks_are_those_that_stock_peft_gives() -> None:
    from peft.utils.other import get_pattern_key

    patterns = {
        r"layers\.1\.q_proj": 1,
        "mlp.experts.down_proj": 2,
        r"layers\.\d+\.self_attn\.(q|k)_proj": 3,
        "q_proj": 4,
        r"model\.layers\.2\.self_attn\.q_proj": 5,
        "proj": 6,
        r"layers\.[0-9]+\.q_proj": 8,
    }
    ranks = Ranks({"r": 7, "rank_pattern": patterns})
    parts = ("self_attn.q_proj", "self_attn.v_proj", "q_proj", "mlp.experts.down_proj", "xq_proj", "proj")
    names = [f"model.layers.{layer}.{part}" for layer in (1, 2, 12) for part in parts] + ["q_proj", "model"]
    for name in names:
        assert ranks.of(name) == patterns.get(get_pattern_key(patterns.keys(), name), 7), name
    assert {ranks.of(name) for name in names} >= {1, 2, 3, 4, 6, 7}


def test_thousands_of_patterns_take_no_time(tmp_path: Path) -> None:
    patterns = {f"model.layers.{number}.mlp.experts.{number}.down_proj": 4 for number in range(4000)}
    config = read_adapter_config(write(tmp_path / "adapter", {**GOOD, "rank_pattern": patterns}))
    seen = watch(lambda: [Ranks(config).of(f"{name}.x") for name in list(patterns)[:200]], tmp_path / "scratch")
    assert seen.code == 0
    assert seen.seconds < 10


SPOILED: dict[str, Callable[[Path], object]] = {
    "another rank": lambda folder: change(folder, r=10**9),
    "other library": lambda folder: change(folder, megatron_core=NEVER_IMPORTED, megatron_config={"x": 1}),
    "other method": lambda folder: change(folder, peft_type="XLORA", adapters={"0": "../../decoy"}),
    "pattern": lambda folder: change(folder, rank_pattern={"(a+)+$": 4}),
    "nested": lambda folder: (folder / "adapter_config.json").write_text("[" * 10**5),
    "linked weights": lambda folder: relink(folder / "adapter_model.safetensors"),
    "NaN": lambda folder: spoil(folder / "adapter_model.safetensors"),
    "token": lambda folder: change(folder, trainable_token_indices=[2**23]),
    "a new key": lambda folder: change(folder, reads_also="/etc/passwd"),
}


def change(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def relink(path: Path) -> None:
    path.rename(path.parents[2] / "elsewhere.safetensors")
    path.symlink_to(path.parents[2] / "elsewhere.safetensors")


def spoil(path: Path) -> None:
    held = load_file(path)
    first = next(iter(held))
    save_file({**held, first: held[first] * torch.nan}, path)


VERBS = {
    "generate": ["generate", "run", "hello"],
    "merge": ["merge", "run", "--output", "out"],
    "convert": ["convert", "run", "--to", "per-expert"],
    "push": ["push", "run", "owner/name", "--dry-run"],
    "chat": ["chat", "run", "--quiet"],
}
FAST = {("generate", "pattern"), ("merge", "other library"), ("push", "linked weights")}


@pytest.mark.parametrize(
    ("verb", "how"),
    [
        pytest.param(verb, how, marks=[] if (verb, how) in FAST else pytest.mark.slow)
        for verb in VERBS
        for how in SPOILED
    ],
)
def test_a_verb_refuses_an_adapter_in_somebody_elses_run(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, how: str
) -> None:
    monkeypatch.chdir(work)
    (work / "run/finished.json").unlink()  # the digests in it could be made to fit
    SPOILED[how](work / "run/adapter")
    seen = watch_command(VERBS[verb], tmp_path / "scratch")
    cache = Path(os.environ["TUNE_CACHE"])
    elsewhere = work / "elsewhere.safetensors"
    seen.assert_inside(work / "run", work / "out", tmp_path / "scratch", cache, untouched=[elsewhere])
    assert NEVER_IMPORTED not in seen.imported
    assert not (work / "out").exists()
    if verb == "push" and how in ("NaN", "token", "a new key"):  # nothing of the weights is read there
        assert seen.code == 0, seen.said
        return
    assert seen.code == 2, seen.said
    assert "Traceback" not in seen.said
    assert len(seen.said.splitlines()) == 1, seen.said
    assert seen.grown < 2**29


def test_no_room_is_made_for_a_rank_that_no_matrix_has(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work)
    command = ["train", "recipe.yaml", "output=new", "adapter.rank=1000000000", "--quiet"]
    seen = watch_command(command, tmp_path / "scratch")
    seen.assert_refused("adapter.rank: 1000000000 is more than", "has rows or columns", grown=2**29)


@pytest.mark.parametrize("how", [pytest.param(how, marks=[] if how == "another rank" else pytest.mark.slow)
                                 for how in SPOILED])  # fmt: skip
def test_a_training_does_not_start_from_it(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.chdir(work)
    shutil.copytree(work / "run/adapter", work / "old/inner")
    SPOILED[how](work / "old/inner")
    command = ["train", "recipe.yaml", "output=new", "adapter.start_from=old/inner", "--quiet"]
    seen = watch_command(command, tmp_path / "scratch")
    cache = Path(os.environ["TUNE_CACHE"])
    seen.assert_inside(work / "new", tmp_path / "scratch", cache, tmp_path / "state")
    assert NEVER_IMPORTED not in seen.imported
    assert seen.code == 2, seen.said
    assert len(seen.said.splitlines()) == 1, seen.said
    assert not (work / "new/adapter").exists()
