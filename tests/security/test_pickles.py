"""No pickle is read, wherever it lies, whatever it is called and whichever verb meets it."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cli.conftest import write_recipe
from tests.hub import standing_in
from tests.security.tripwire import FORMS, NAMES, Bomb, archive, assert_harmless, marker_of, plant, raw, run, slow

TRAIN = ("train", "recipe.yaml", "output=new", "--quiet")
RESUME = ("train", "recipe.yaml", "train.max_steps=3", "--resume", "--quiet")
CHECK = ("check", "recipe.yaml", "--quiet")
PREVIEW = ("preview", "recipe.yaml", "-n", "1")
GENERATE = ("generate", "run", "hi", "--max-new-tokens", "1")
MERGE = ("merge", "run", "--output", "out", "--quiet")
PROVE = ("merge", "run", "--prove", "--quiet")
CONVERT = ("convert", "run", "--to", "per-expert")
PUSH = ("push", "run", "me/name", "--dry-run")
PUSH_MERGED = (*PUSH, "--merged")
SPEAK_MERGED = ("generate", "run/merged", "hi", "--max-new-tokens", "1")
OF_THE_BASE = (TRAIN, RESUME, CHECK, GENERATE, MERGE)
"""What reads the base's weights, or says whether they can be read."""


# The tripwire itself.


@pytest.mark.parametrize("form", FORMS)
def test_a_bomb_goes_off_when_it_is_read(form: str, tmp_path: Path) -> None:
    plant(tmp_path, ["x.bin"], form)
    if form == "archive":
        torch.load(tmp_path / "x.bin", weights_only=False)
    else:
        pickle.loads((tmp_path / "x.bin").read_bytes())
    assert marker_of(tmp_path).is_dir()


def test_the_tripwire_sees_a_pickle_that_is_read(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tune.data.cache

    plant(work, ["optimizer.pt"], "raw")

    def careless() -> Path:
        with open(work / "optimizer.pt", "rb") as file:
            pickle.load(file)
        return work

    monkeypatch.setattr(tune.data.cache, "cache_folder", careless)
    outcome = run(work, *CHECK)
    assert outcome.opened == ("optimizer.pt", "unpickled")
    assert marker_of(work).is_dir()


# Bases.


def only_pickles(base: Path) -> str:
    (base / "model.safetensors").unlink()
    plant(base, ["pytorch_model.bin", "training_args.bin"])
    return "pytorch_model.bin"


def pickled_shards(base: Path) -> str:
    (base / "model.safetensors").unlink()
    plant(base, ["pytorch_model-00001-of-00002.bin"])
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model-00001-of-00002.bin"}}
    (base / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return "pytorch_model-00001-of-00002.bin"


def safe_index_of_pickles(base: Path) -> str:
    """An index of safetensors, by its name, whose shards are pickles."""
    shard = pickled_shards(base)
    (base / "pytorch_model.bin.index.json").rename(base / "model.safetensors.index.json")
    return shard


def named_in_the_config(base: Path) -> str:
    """transformers takes one name of a pickle here."""
    plant(base, ["adapter_model.bin"])
    change_config(base, transformers_weights="adapter_model.bin")
    return "'adapter_model.bin'"


def an_adapter_beside(base: Path) -> str:
    """transformers would look for an adapter in the base's folder, and put it in."""
    plant(base, ["adapter_model.bin"])
    (base / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}))
    return "holds an adapter (adapter_config.json)"


def disguised(form: str) -> Callable[[Path], str]:
    def prepare(base: Path) -> str:
        plant(base, ["model.safetensors"], form)
        return "model.safetensors is a Python pickle"

    return prepare


def disguised_shard(base: Path) -> str:
    (base / "model.safetensors").unlink()
    plant(base, ["model-00001-of-00001.safetensors"])
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    return "model-00001-of-00001.safetensors is a Python pickle"


def change_config(base: Path, **changes: object) -> None:
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


BASES = [
    (only_pickles, TRAIN),
    (safe_index_of_pickles, TRAIN),
    (named_in_the_config, TRAIN),
    (an_adapter_beside, TRAIN),
    (disguised("archive"), CHECK),
    (disguised_shard, CHECK),
]
MORE_BASES = [
    (prepare, verb)
    for prepare in (only_pickles, pickled_shards, safe_index_of_pickles, named_in_the_config, *map(disguised, FORMS))
    for verb in OF_THE_BASE
]


@pytest.mark.parametrize(
    ("prepare", "verb"), [*BASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_BASES)]
)
def test_a_pickled_base_is_refused_by_its_file(
    prepare: Callable[[Path], str], verb: tuple[str, ...], work: Path
) -> None:
    name = prepare(work / "base")
    assert_harmless(work, run(work, *verb), 2, name)


@pytest.mark.parametrize(
    "verb",
    [TRAIN, MERGE, *slow(RESUME, CHECK, PREVIEW, GENERATE, PROVE, PUSH, PUSH_MERGED)],
)
def test_pickles_beside_a_bases_safetensors_are_not_opened(verb: tuple[str, ...], work: Path) -> None:
    """An older form of the same weights, or what a Trainer left: nothing looks for them, so they are no danger."""
    plant(work / "base")
    assert_harmless(work, run(work, *verb), 0)


@pytest.mark.parametrize("verb", [PREVIEW, *slow(PUSH)])
def test_what_does_not_need_the_weights_does_not_look_for_them(verb: tuple[str, ...], work: Path) -> None:
    only_pickles(work / "base")
    assert_harmless(work, run(work, *verb), 0)


def test_a_tokenizer_that_is_a_pickle_is_none(work: Path) -> None:
    plant(work / "base", ["tokenizer.json"], "raw")
    assert_harmless(work, run(work, *CHECK), 2, "base: its tokenizer cannot be read")


def test_a_pickled_base_on_the_hub_is_refused_before_it_is_fetched(work: Path) -> None:
    only_pickles(work / "base")
    write_recipe(work, model__base="owner/tiny")
    with standing_in({"owner/tiny": work / "base"}, {}) as hub:
        outcome = run(work, *TRAIN, hub=hub)
        assert_harmless(work, outcome, 2, "owner/tiny", "pytorch_model.bin")
        assert hub.asked
        assert not [asked for asked in hub.asked if asked.endswith(".bin")]


@pytest.mark.parametrize("prepare", [disguised("archive"), *slow(safe_index_of_pickles, an_adapter_beside)])
def test_a_base_on_the_hub_is_held_to_the_same(prepare: Callable[[Path], str], work: Path) -> None:
    name = prepare(work / "base")
    write_recipe(work, model__base="owner/tiny")
    with standing_in({"owner/tiny": work / "base"}, {}) as hub:
        assert_harmless(work, run(work, *TRAIN, hub=hub), 2, name)


# Adapters to start from.


@pytest.fixture
def trainers(work: Path) -> Path:
    """A checkpoint folder as a Trainer with PEFT leaves it: safetensors, and its own state in pickles."""
    old = work / "old"
    old.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (old / name).write_bytes((work / "run/adapter" / name).read_bytes())
    plant(old, [name for name in NAMES if name != "adapter_model.bin"])
    write_recipe(work, adapter__start_from="old")
    return old


@pytest.mark.parametrize("verb", [TRAIN, CHECK])
def test_a_trainers_checkpoint_is_started_from_without_its_pickles(
    verb: tuple[str, ...], work: Path, trainers: Path
) -> None:
    plant(trainers, ["adapter_model.bin"])
    assert_harmless(work, run(work, *verb), 0)


@pytest.mark.parametrize("verb", [TRAIN, CHECK])
def test_a_pickled_adapter_is_refused_by_its_file(verb: tuple[str, ...], work: Path, trainers: Path) -> None:
    (trainers / "adapter_model.safetensors").unlink()
    plant(trainers, ["adapter_model.bin"])
    assert_harmless(work, run(work, *verb), 2, "adapter_model.bin", "safetensors")


@pytest.mark.parametrize("form", ["raw", *slow("text", "archive")])
def test_a_disguised_adapter_is_refused(form: str, work: Path, trainers: Path) -> None:
    plant(trainers, ["adapter_model.safetensors"], form)
    assert_harmless(work, run(work, *TRAIN), 2, "old/adapter_model.safetensors", "a Python pickle")


def test_a_pickled_adapter_on_the_hub_is_not_fetched(work: Path, trainers: Path) -> None:
    (trainers / "adapter_model.safetensors").unlink()
    plant(trainers, ["adapter_model.bin"])
    write_recipe(work, adapter__start_from="owner/old")
    with standing_in({"owner/old": trainers}, {}) as hub:
        assert_harmless(work, run(work, *TRAIN, hub=hub), 2, "owner/old", "adapter_model.safetensors", "pickled")
        assert not [asked for asked in hub.asked if asked.endswith(".bin")]


# Runs.

OF_A_CHECKPOINT = [
    RESUME,
    ("generate", "run/checkpoints/step-000002", "hi"),
    ("train", "recipe.yaml", "output=new", "adapter.start_from=run/checkpoints/step-000002"),
    *slow(
        ("merge", "run/checkpoints/step-000002", "--output", "out"),
        ("convert", "run/checkpoints/step-000002", "--to", "per-expert"),
        ("push", "run/checkpoints/step-000002", "me/name", "--dry-run"),
    ),
]


@pytest.mark.parametrize("verb", OF_A_CHECKPOINT)
def test_a_pickle_in_a_checkpoint_of_ours_is_foreign(verb: tuple[str, ...], work: Path) -> None:
    plant(work / "run/checkpoints/step-000002", ["optimizer.pt"])
    assert_harmless(work, run(work, *verb), 2, "run/checkpoints/step-000002/optimizer.pt", "Remove it")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != ".metadata"])
def test_so_is_one_of_any_name(name: str, work: Path) -> None:
    plant(work / "run/checkpoints/step-000002", [name])
    assert_harmless(work, run(work, *RESUME), 2, f"run/checkpoints/step-000002/{name}")


@pytest.mark.parametrize("verb", [CONVERT, *slow(GENERATE, MERGE, PROVE, PUSH)])
def test_a_pickle_in_a_runs_adapter_is_foreign(verb: tuple[str, ...], work: Path) -> None:
    plant(work / "run/adapter", ["adapter_model.bin"])
    assert_harmless(work, run(work, *verb), 2, "run/adapter/adapter_model.bin", "Remove it")


@pytest.mark.parametrize("name", ["optimizer.safetensors", *slow("adapter_model.safetensors")])
def test_a_disguised_file_of_a_checkpoint_is_refused_though_its_manifest_was_made_to_fit(name: str, work: Path) -> None:
    folder = work / "run/checkpoints/step-000002"
    plant(folder, [name])
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert_harmless(work, run(work, *RESUME), 2, f"step-000002/{name}", "a Python pickle")


@pytest.mark.parametrize(
    ("verb", "code"), [(SPEAK_MERGED, 2), pytest.param(PROVE, 3, marks=pytest.mark.slow), (PUSH_MERGED, 2)]
)
def test_a_merged_model_whose_weights_became_a_pickle_is_none(verb: tuple[str, ...], code: int, work: Path) -> None:
    (work / "run/merged/model.safetensors").unlink()
    plant(work / "run/merged")
    assert_harmless(work, run(work, *verb), code, "run/merged")


@pytest.mark.parametrize("verb", [PUSH_MERGED, pytest.param(SPEAK_MERGED, marks=pytest.mark.slow)])
def test_pickles_beside_a_merged_model_are_neither_opened_nor_published(verb: tuple[str, ...], work: Path) -> None:
    plant(work / "run/merged")
    outcome = run(work, *verb)
    assert_harmless(work, outcome, 0)
    assert not [name for name in NAMES if name in outcome.said]


# Data, and what is kept of it.


@pytest.mark.parametrize("ending", [".pkl", ".npy", *slow(".pt", ".pth", ".bin", ".ckpt", ".npz", ".joblib")])
def test_a_pickle_is_no_data(ending: str, work: Path) -> None:
    (work / f"rows{ending}").write_bytes(archive(marker_of(work)))
    outcome = run(work, "check", "recipe.yaml", f"data.train=rows{ending}", watched=[])
    assert_harmless(work, outcome, 2, f"rows{ending}", "is not read")


@pytest.mark.parametrize("ending", [".jsonl", *slow(".json", ".csv", ".parquet", ".arrow")])
def test_a_pickle_under_another_name_is_not_read_as_one(ending: str, work: Path) -> None:
    (work / f"rows{ending}").write_bytes(raw(marker_of(work)))
    outcome = run(work, "check", "recipe.yaml", f"data.train=rows{ending}", watched=[])
    assert_harmless(work, outcome, 2, f"rows{ending}")


def test_pickles_beside_rows_are_not_opened(work: Path) -> None:
    (work / "rows").mkdir()
    (work / "train.jsonl").rename(work / "rows/train.jsonl")
    plant(work / "rows")
    assert_harmless(work, run(work, "check", "recipe.yaml", "data.train=rows"), 0)


@pytest.mark.parametrize("kind", ["arrow", *slow("parquet")])
def test_a_column_type_that_is_a_pickle_is_not_unpickled(kind: str, work: Path) -> None:
    """Arrow's types of Python's own were saved as pickles, in the schema."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": raw(marker_of(work)),
    }
    names = ("instruction", "input", "output")
    fields = [pa.field(name, pa.string(), metadata=metadata if name == "output" else None) for name in names]
    table = pa.table([[f"{name} {row}" for row in range(8)] for name in names], schema=pa.schema(fields))
    if kind == "arrow":
        with pa.OSFile(str(work / "rows.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        pq.write_table(table, work / "rows.parquet")
    assert_harmless(work, run(work, "check", "recipe.yaml", f"data.train=rows.{kind}"), 0)


def test_a_pickle_in_the_cache_of_encoded_rows_is_written_over(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNE_CACHE", str(work / "cache"))
    assert run(work, *CHECK).code == 0
    (entry,) = (path.parent for path in (work / "cache").rglob("ids.npy"))
    objects = np.empty(1, dtype=object)
    objects[0] = Bomb(marker_of(entry))
    np.save(entry / "ids.npy", objects, allow_pickle=True)
    facts = json.loads((entry / "facts.json").read_text())
    facts["sizes"]["ids.npy"] = (entry / "ids.npy").stat().st_size
    (entry / "facts.json").write_text(json.dumps(facts))
    assert_harmless(work, run(work, *CHECK), 0)
    assert np.load(entry / "ids.npy", allow_pickle=False).dtype == np.dtype("<i4")
