"""A run's folder of somebody else's: verbs stay within it, nothing is removed through a link, nothing is hung on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.security.watched import Seen, watch, watch_command
from tune.errors import ModelError, RunError
from tune.export.facts import Facts
from tune.export.merge import write_shard
from tune.export.publication import _files
from tune.files.foreign import followed, objects_in, parse_json, read_plain
from tune.folder import RunFolder, file_digest, records, whole, write_file, write_folder
from tune.folder.places import open_lock
from tune.models.shards import weight_map
from tune.training.checkpoint import forget_after, newest_whole, prune, read_state
from tune.training.metrics import _keep_until
from tune.training.optimizer import optimizer_state, restore_optimizer

FINISHED: dict[str, Any] = {"output": "run", "steps": 3, "adapter_step": 3, "loss_before": 2.0, "adapter_files": {}}
STATE: dict[str, Any] = {"step": 2, "total_steps": 4, "first_loss": 1.0, "optimizer": {}, "versions": {"torch": "2"}}
PROVENANCE: dict[str, Any] = {
    "base": {"name": "b", "commit": None, "fingerprint": "0"},
    "data": {"fingerprint": "0", "part": "held-out data"},
    "words": {"vocabulary": "0", "dialogues": []},
    "examples": [{"row": "a:1", "ids": [1, 2], "trained": [0, 1]}],
}
PROOF: dict[str, Any] = {"verdict": "proven", "base": "original", "fingerprints": {"files": {}}}
DIGEST = "0" * 64
DEEP: Any = 1
for _ in range(80):
    DEEP = [DEEP]

WRONG: list[tuple[str, str, Any]] = [
    ("finished", "adapter_files", {"../../secret": DIGEST}),
    ("finished", "adapter_files", {"/etc/passwd": DIGEST}),
    ("finished", "adapter_files", {"..": DIGEST}),
    ("finished", "adapter_files", {"adapter_config.json": "short"}),
    ("finished", "adapter_files", ["adapter_config.json"]),
    ("finished", "steps", -1),
    ("finished", "steps", 10**30),
    ("finished", "steps", "3"),
    ("finished", "adapter_step", 2.5),
    ("finished", "loss_before", "low"),
    ("finished", "measured_on", "\x1b[2J"),
    ("finished", "tokens_per_second", DEEP),
    ("finished", "output", ["run"]),
    ("state", "step", -1),
    ("state", "step", 10**30),
    ("state", "step", 3),
    ("state", "step", None),
    ("state", "step", True),
    ("state", "total_steps", 1),
    ("state", "total_steps", "many"),
    ("state", "first_loss", [1.0]),
    ("state", "trained_seconds", -1.0),
    ("state", "recompute", "everything"),
    ("state", "expert_counts", [[1, -1]]),
    ("state", "expert_counts", "all"),
    ("state", "unlogged", {"step": 2}),
    ("state", "unlogged", [1]),
    ("state", "optimizer", {"x": "y"}),
    ("state", "optimizer", [1]),
    ("state", "versions", ["torch"]),
    ("state", "first_eval_done", "yes"),
    ("state", "best_step", DEEP),
    ("provenance", "base", []),
    ("provenance", "base", {"fingerprint": 7}),
    ("provenance", "base", {"fingerprint": "0", "commit": "../../refs"}),
    ("provenance", "data", {"fingerprint": "0", "part": "other data"}),
    ("provenance", "words", {"vocabulary": "0", "dialogues": [{"messages": [], "ids": [1]}]}),
    ("provenance", "words", {"vocabulary": "0", "dialogues": [{"messages": [{"role": "x"}], "ids": [1]}]}),
    ("provenance", "added_tokens", {"ids": {"<x>": 2**40}, "resize_to": None}),
    ("provenance", "examples", []),
    ("provenance", "examples", [{"ids": [1, 2], "trained": [1]}]),
    ("provenance", "examples", [{"ids": [-1], "trained": [1]}]),
    ("provenance", "examples", [{"ids": [2**40], "trained": [1]}]),
    ("provenance", "machine", {"versions": {"torch": {}}}),
    ("proof", "verdict", "fine"),
    ("proof", "base", "other"),
    ("proof", "bounded", {"logits": {"mean_kl": 3}}),
    ("proof", "prompts", []),
    ("proof", "reported", {"loss": {"merged": "x"}}),
    ("proof", "fingerprints", {"files": {"../recipe.yaml": DIGEST}}),
    ("proof", "fingerprints", {"adapter": 5}),
    ("manifest", "../../secret", DIGEST),
    ("manifest", "state.json", 7),
]

READERS: dict[str, tuple[Callable[[Path], object], dict[str, Any]]] = {
    "finished": (records.read_finished, FINISHED),
    "state": (records.read_state, STATE),
    "provenance": (records.read_provenance, PROVENANCE),
    "proof": (records.read_proof, PROOF),
    "manifest": (records.read_manifest, {"state.json": DIGEST}),
}


@pytest.mark.parametrize("record", READERS)
def test_a_record_as_it_is_written_is_read(tmp_path: Path, record: str) -> None:
    reader, good = READERS[record]
    path = tmp_path / "step-000002" / f"{record}.json"
    path.parent.mkdir()
    path.write_text(json.dumps({**good, "a_key_of_another_version": {"x": [1]}} if record != "manifest" else good))
    reader(path)


@pytest.mark.parametrize(("record", "key", "value"), WRONG)
def test_a_record_that_holds_something_else_is_refused(tmp_path: Path, record: str, key: str, value: object) -> None:
    reader, good = READERS[record]
    path = tmp_path / "step-000002" / f"{record}.json"
    path.parent.mkdir()
    path.write_text(json.dumps({**good, key: value}))
    with pytest.raises(ValueError) as error:
        reader(path)
    said = str(error.value)
    assert key in said or "nested" in said or said == "step: is 2 of 1", said
    assert len(said) < 400, said


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"[" * 10**5,
        b'{"step": 1, "step": 2}',
        b'{"step": 1e999}',
        b'{"step": NaN}',
        b"\xff",
        b"\xef\xbb\xbf{}",
    ],
)
@pytest.mark.parametrize("record", READERS)
def test_a_record_that_is_no_json_is_refused(tmp_path: Path, record: str, content: bytes) -> None:
    path = tmp_path / "step-000002" / f"{record}.json"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"\w"):
        READERS[record][0](path)


def test_a_manifest_never_leads_out_of_its_folder(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("x")
    folder = tmp_path / "run/checkpoints/step-000002"
    write_folder(folder, {"state.json": "{}"}, manifest=True)
    assert whole(folder)
    digest = json.loads((folder / "manifest.json").read_text())["state.json"]
    for name in ("../../../secret.txt", str(secret), "x/../../../../secret.txt", "", ".", "state.json/../state.json"):
        (folder / "manifest.json").write_text(json.dumps({"state.json": digest, name: digest}))
        seen = watch(lambda: int(whole(folder)), tmp_path / "scratch")
        assert seen.code == 0, f"{name} passes for whole"
        seen.assert_inside(tmp_path / "scratch", untouched=[secret])
    (folder / "manifest.json").write_text(json.dumps({"state.json": digest, "linked": digest}))
    (folder / "linked").symlink_to(secret)
    seen = watch(lambda: int(whole(folder)), tmp_path / "scratch")
    assert seen.code == 0
    seen.assert_inside(tmp_path / "scratch", untouched=[secret])


def a_run(root: Path) -> RunFolder:
    """A run's folder with two checkpoints, and a folder beside it that must not change."""
    run = RunFolder(root / "run")
    for step in (1, 2):
        state = json.dumps({**STATE, "step": step})
        write_folder(run.checkpoint(step), {"state.json": state, "adapter_config.json": "{}"}, manifest=True)
    write_folder(run.adapter, {"adapter_config.json": "{}", "tokenizer.json": "{}"})
    for path in (run.recipe, run.coverage, run.metrics, run.finished, run.provenance, run.root / ".lock"):
        path.write_text("{}")
    precious = root / "precious"
    write_folder(precious / "step-000001", {"state.json": "{}"})
    write_folder(precious / "model", {"thesis.txt": "years of work"})
    (precious / "file").write_text("mine")
    return run


def precious(root: Path) -> dict[str, str]:
    return {str(path): path.read_text() for path in (root / "precious").rglob("*") if path.is_file()}


PARTS = [
    *("recipe.yaml", "coverage.json", "metrics.jsonl", "finished.json", "provenance.json", ".lock", ".tracking-id"),
    *(
        "adapter",
        "checkpoints",
        "checkpoints/step-000001",
        "adapter/tokenizer.json",
        "checkpoints/step-000002/state.json",
    ),
]


def replace(path: Path, make: Callable[[Path], object]) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    make(path)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_a_run_that_is_a_link_is_refused(tmp_path: Path, part: str) -> None:
    run = a_run(tmp_path)
    run.refuse_links()
    target = tmp_path / "precious" / ("" if part in ("adapter", "checkpoints") else "file")
    replace(run.root / part, lambda path: path.symlink_to(target))
    before = precious(tmp_path)

    def take() -> None:
        with run.lock():
            raise AssertionError("the run was taken")

    seen = watch(take, tmp_path / "scratch")
    seen.assert_refused(str(run.root / part), "is a link", seconds=5)
    seen.assert_inside(run.root, tmp_path / "scratch", untouched=[tmp_path / "precious/file"])
    assert precious(tmp_path) == before


@pytest.mark.parametrize("part", [part for part in PARTS if "." in Path(part).name and "/" not in part])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["a pipe", "a folder"])
def test_a_part_of_a_run_that_is_no_file_is_refused(tmp_path: Path, part: str, make: Callable[[Path], object]) -> None:
    run = a_run(tmp_path)
    replace(run.root / part, make)
    seen = watch(lambda: run.lock().__enter__(), tmp_path / "scratch", seconds=20)
    seen.assert_refused(str(run.root / part), "is no", seconds=5)


def test_nothing_is_removed_through_a_link(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    before = precious(tmp_path)
    shutil.rmtree(run.checkpoint(1))
    run.checkpoint(1).symlink_to(tmp_path / "precious/step-000001")
    assert run.steps() == [2]
    prune(run, 1, None)
    forget_after(run, 0)
    assert newest_whole(run) == (None, [])
    assert precious(tmp_path) == before
    shutil.rmtree(run.checkpoints)
    run.checkpoints.symlink_to(tmp_path / "precious")
    assert run.steps() == []
    forget_after(run, 0)
    assert precious(tmp_path) == before


def test_names_that_are_no_step_are_not_taken_for_one(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    for name in ("step-0000001", "step-٠٠٠٠٠٧", "step-" + "9" * 200, "step-000003.old", "step--00001"):
        (run.checkpoints / name).mkdir()
    assert run.steps() == [1, 2]
    prune(run, 1, None)
    assert run.steps() == [2]


def test_what_was_left_half_written_is_swept_and_nothing_else(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    before = precious(tmp_path)
    (run.root / ".unfinished-link").symlink_to(tmp_path / "precious")
    (run.checkpoints / ".unfinished-folder").mkdir()
    (run.root / ".unfinished-folder").mkdir()
    (run.root / ".unfinished-folder/link").symlink_to(tmp_path / "precious")
    (run.root / ".unfinished-file").symlink_to(tmp_path / "precious/file")
    os.mkfifo(run.root / ".unfinished-pipe")
    replace(run.checkpoints / ".unfinished-folder", lambda path: path.mkdir())

    def take() -> None:
        with run.lock():
            pass

    seen = watch(take, tmp_path / "scratch")
    assert seen.code == 0, seen.said
    seen.assert_inside(run.root, tmp_path / "scratch")
    assert not list(run.root.rglob(".unfinished-*"))
    assert precious(tmp_path) == before


def test_a_link_at_a_name_that_can_be_guessed_is_not_written_through(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    mine = tmp_path / "precious/file"
    replace(run.finished, lambda path: path.symlink_to(mine))
    write_file(run.finished, "{}")  # a rename takes the link's place
    assert not run.finished.is_symlink()
    assert mine.read_text() == "mine"
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2, 2)}, tmp_path / "source.safetensors")
    (tmp_path / "new").mkdir()
    (tmp_path / "new/.unfinished-target.safetensors").symlink_to(mine)
    write_shard(
        tmp_path / "source.safetensors", tmp_path / "new/target.safetensors", lambda name: None, lambda name: (2, 2)
    )
    assert mine.read_text() == "mine"
    assert (tmp_path / "new/target.safetensors").read_bytes() == (tmp_path / "source.safetensors").read_bytes()


def test_a_lock_is_never_made_elsewhere(tmp_path: Path) -> None:
    root = tmp_path / "new"
    root.mkdir()
    (root / ".lock").symlink_to(tmp_path / "made-elsewhere")
    with pytest.raises(RunError, match="is a link"), RunFolder(root).lock():
        pass
    assert not (tmp_path / "made-elsewhere").exists()
    with pytest.raises(RunError, match="no plain file"):  # nor if the link came after the run was looked through
        open_lock(root / ".lock")
    assert not (tmp_path / "made-elsewhere").exists()


def test_a_link_is_never_published(tmp_path: Path) -> None:
    """Not even one that came after the run was looked through."""
    (tmp_path / "tokenizer.json").symlink_to(tmp_path.parent)
    with pytest.raises(RunError, match=r"tokenizer\.json: is a link, and only files"):
        _files(tmp_path, ("tokenizer.json",), Facts("adapter", None, None))  # type: ignore[arg-type]


def test_metrics_of_any_kind_are_read_up_to_where_they_end(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    good = '{"step": 1, "loss": 2.0}\n'
    for bad in ("[1]\n", "{", '{"step": "2"}\n', "[" * 10**6, '{"step": 1e999}\n', "x" * 10**7, '{"step": [1]}\n'):
        run.metrics.write_text(good + bad + good)
        _keep_until(run, 5)
        assert run.metrics.read_text() == good, bad[:40]
    replace(run.metrics, os.mkfifo)
    with pytest.raises(ValueError, match="no plain file"):
        list(objects_in(run.metrics))


@pytest.mark.parametrize("eight_bit", [False, True])
def test_moments_of_another_shape_are_refused(eight_bit: bool) -> None:
    import bitsandbytes as bnb

    parameters = [torch.nn.Parameter(torch.randn(64, 128)), torch.nn.Parameter(torch.randn(4, 3))]
    named = [("large", parameters[0]), ("small", parameters[1])]
    make = bnb.optim.AdamW8bit if eight_bit else torch.optim.AdamW
    optimizer = make(parameters, lr=0.01)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    tensors, numbers = optimizer_state(optimizer, named)
    restore_optimizer(make(parameters, lr=0.01), named, tensors, numbers)
    moments = [name for name in tensors if not name.endswith("/step")]
    assert moments
    for name in moments:
        value, rest = tensors[name], {key: tensor for key, tensor in tensors.items() if key != name}
        others = (value.flatten()[:-1], value[None], value.to(torch.float64), torch.zeros(10**6))
        for changed in (*({**tensors, name: other} for other in others), rest):
            with pytest.raises(ValueError, match="is not this optimizer's"):
                restore_optimizer(make(parameters, lr=0.01), named, changed, numbers)
    for name in ("elsewhere/exp_avg", "exp_avg", "/exp_avg"):
        with pytest.raises(ValueError, match="no parameter that trains"):
            restore_optimizer(make(parameters, lr=0.01), named, {**tensors, name: torch.zeros(3)}, numbers)
    with pytest.raises(ValueError, match="is not this optimizer's"):
        restore_optimizer(make(parameters, lr=0.01), named, {**tensors, "small/more": torch.zeros(3)}, numbers)


def test_a_state_is_that_of_its_folder(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    assert read_state(run.checkpoint(2))[0].step == 2
    (run.checkpoint(2) / "state.json").write_text(json.dumps({**STATE, "step": 1}))
    with pytest.raises(RunError, match=r"step: is 1, and the folder is step-000002\). Remove"):
        read_state(run.checkpoint(2))


@pytest.mark.parametrize(
    "shard",
    [
        *("../../secret.safetensors", "/etc/secret.safetensors", "x/y.safetensors", "x\0.safetensors", "..safetensors"),
        *("https://example.org/x.safetensors", "~/x.safetensors", "x.safetensors/..", "", "x.bin", ".safetensors"),
        *("x" * 300 + ".safetensors", "x\n.safetensors", "..\\x.safetensors"),
    ],
)
def test_an_index_names_files_of_its_folder_alone(tmp_path: Path, shard: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": shard}}))
    with pytest.raises(ModelError, match="index"):
        weight_map(index)


def test_json_and_files_within_reason_are_read(tmp_path: Path) -> None:
    assert parse_json(b'{"a": [1, -2.5, "x", null, true, {"b": {}}]}')["a"][1] == -2.5
    assert parse_json(b"1000000000000000019884624838656") == 1000000000000000019884624838656
    (tmp_path / "file").write_bytes(b"x" * 10)
    assert read_plain(tmp_path / "file", 10) == b"x" * 10
    with pytest.raises(ValueError, match="longer than"):
        read_plain(tmp_path / "file", 9)
    (tmp_path / "within").symlink_to("file")
    assert followed(tmp_path / "within") == (tmp_path / "file").resolve()
    assert read_plain(tmp_path / "within", 10, links=True) == b"x" * 10
    with pytest.raises(ValueError, match="is a link"):
        read_plain(tmp_path / "within", 10)
    with pytest.raises(ValueError, match="no plain file"):
        read_plain("/dev/zero", 10)


def lead_away(recipe: Path) -> None:
    """The recipe of a run that says to write, and to find its base, in other places."""
    lines = [
        "output: ../../../elsewhere" if line.startswith("output:") else line for line in recipe.read_text().splitlines()
    ]
    recipe.write_text("\n".join(lines) + "\n")


def index_out(work: Path) -> None:
    from safetensors.torch import load_file

    shutil.move(work / "base/model.safetensors", work / "secret.safetensors")
    names = load_file(work / "secret.safetensors")
    places = {"metadata": {}, "weight_map": dict.fromkeys(names, "../secret.safetensors")}
    (work / "base/model.safetensors.index.json").write_text(json.dumps(places))


def relink(path: Path, target: Path) -> None:
    if path.exists():
        path.unlink() if path.is_file() else shutil.rmtree(path)
    path.symlink_to(target)


RESUME = ["train", "recipe.yaml", "--resume", "train.max_steps=4"]


def spoil(work: Path, how: Callable[[dict[str, Any]], object]) -> None:
    """Change the newest state.json and make its manifest fit, as whoever made the run can."""
    path = work / "run/checkpoints/step-000002/state.json"
    state = json.loads(path.read_text())
    how(state)
    path.write_text(json.dumps(state))
    fit(path)


def spoil_moments(work: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = work / "run/checkpoints/step-000002/optimizer.safetensors"
    save_file({name: tensor.flatten()[:1].clone() for name, tensor in load_file(path).items()}, path)
    fit(path)


def fit(path: Path) -> None:
    change(path.parent / "manifest.json", **{path.name: file_digest(path)})


RUNS: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "an adapter's token file that is a secret": (
        lambda work: relink(work / "run/adapter/tokenizer.json", work / "secret"),
        ["push", "run", "owner/name", "--dry-run"],
        "run/adapter/tokenizer.json: is a link",
    ),
    "a tokenizer that is elsewhere": (
        lambda work: relink(work / "run/adapter/tokenizer.json", work / "secret"),
        ["generate", "run", "hello"],
        "run/adapter/tokenizer.json: is a link",
    ),
    "a merged file that is a secret": (
        lambda work: (work / "run/merged/LICENSE").symlink_to(work / "secret"),
        ["push", "run", "owner/name", "--merged", "--dry-run"],
        "run/merged/LICENSE: is a link",
    ),
    "a merged folder elsewhere": (
        lambda work: relink(work / "run/merged", work / "precious"),
        ["push", "run", "owner/name", "--merged", "--dry-run"],
        "run/merged: is a link",
    ),
    "a proof written elsewhere": (
        lambda work: relink(work / "run/merged", work / "precious"),
        ["merge", "run", "--prove"],
        "run/merged: is a link",
    ),
    "a merge begun elsewhere": (
        lambda work: [shutil.rmtree(work / "run/merged"), relink(work / "run/.merging-merged", work / "precious")],
        ["merge", "run"],
        "run/.merging-merged: is a link",
    ),
    "a model begun elsewhere": (
        lambda work: [
            shutil.rmtree(work / "run/merged"),
            (work / "run/.merging-merged").mkdir(),
            relink(work / "run/.merging-merged/model", work / "precious/model"),
        ],
        ["merge", "run"],
        "run/.merging-merged/model: is a link",
    ),
    "a lock elsewhere": (
        lambda work: [
            shutil.rmtree(work / "run/merged"),
            (work / "run/.merging-merged").mkdir(),
            relink(work / "run/.merging-merged/.lock", work / "made-elsewhere"),
        ],
        ["merge", "run"],
        "run/.merging-merged/.lock: is a link",
    ),
    "an output that is there": (lambda work: None, ["merge", "run", "--output", "precious/model"], "is there already"),
    "an output that is the root": (lambda work: None, ["merge", "run", "--output", "/"], "is there already"),
    "an output that is the base": (lambda work: None, ["merge", "run", "--output", "base"], "is there already"),
    "an output that is the adapter": (
        lambda work: None,
        ["merge", "run", "--output", "run/adapter"],
        "is there already",
    ),
    "an output that is a link": (
        lambda work: (work / "out").symlink_to("nowhere"),
        ["merge", "run", "--output", "out"],
        "is there already",
    ),
    "a conversion elsewhere": (
        lambda work: relink(work / "run/adapter-per-expert", work / "precious"),
        ["convert", "run", "--to", "per-expert"],
        "run/adapter-per-expert: is a link",
    ),
    "a conversion over something else": (
        lambda work: shutil.copytree(work / "precious", work / "run/adapter-per-expert"),
        ["convert", "run", "--to", "per-expert"],
        "is no adapter",
    ),
    "a conversion over a file": (
        lambda work: (work / "run/adapter-per-expert").write_text("mine"),
        ["convert", "run", "--to", "per-expert"],
        "is no folder",
    ),
    "a checkpoint elsewhere": (
        lambda work: relink(work / "run/checkpoints/step-000001", work / "precious"),
        RESUME,
        "run/checkpoints/step-000001: is a link",
    ),
    "checkpoints elsewhere": (
        lambda work: relink(work / "run/checkpoints", work / "precious"),
        RESUME,
        "run/checkpoints: is a link",
    ),
    "metrics elsewhere": (
        lambda work: relink(work / "run/metrics.jsonl", work / "secret"),
        RESUME,
        "run/metrics.jsonl: is a link",
    ),
    "a checkpoint of another step": (
        lambda work: spoil(work, lambda state: state.update(step=1)),
        RESUME,
        "step: is 1, and the folder is step-000002",
    ),
    "a checkpoint beyond its end": (
        lambda work: spoil(work, lambda state: state.update(total_steps=1)),
        RESUME,
        "step: is 2 of 1",
    ),
    "a step that is text": (
        lambda work: spoil(work, lambda state: state.update(unlogged={"step": "2"})),
        RESUME,
        "unlogged",
    ),
    "numbers of no optimizer": (
        lambda work: spoil(work, lambda state: state.update(optimizer={"../x/exp_avg": 1.0})),
        RESUME,
        "no parameter that trains",
    ),
    "moments of other shapes": (spoil_moments, RESUME, "is not this optimizer's"),
    "files of an adapter elsewhere": (
        lambda work: change(work / "run/finished.json", adapter_files={"../../secret": DIGEST}),
        ["merge", "run", "--output", "out"],
        "run/finished.json: cannot be read (adapter_files",
    ),
    "proven files elsewhere": (
        lambda work: change(work / "run/merged/merge-proof.json", fingerprints={"files": {"../../secret": DIGEST}}),
        ["push", "run", "owner/name", "--merged", "--dry-run"],
        "merge-proof.json: cannot be read (fingerprints",
    ),
    "examples of another vocabulary": (
        lambda work: change(work / "run/provenance.json", examples=[{"ids": [10**6], "trained": [1]}]),
        ["merge", "run", "--output", "out"],
        "have a token 1000000",
    ),
    "an absurd rank": (
        lambda work: rewrite(work / "run/recipe.yaml", "rank: 4", "rank: 1000000000"),
        ["generate", "run", "hello"],
        "rank",
    ),
    "a rank that is larger than the file": (
        lambda work: rewrite(work / "run/recipe.yaml", "rank: 4", "rank: 64"),
        ["generate", "run", "hello"],
        "Set adapter.rank: 4",
    ),
    "a token beyond all others": (
        lambda work: change(work / "run/adapter/adapter_config.json", trainable_token_indices=[7, 2**23]),
        ["generate", "run", "hello"],
        "would be number 8388608",
    ),
    "a base above": (
        lambda work: rewrite(work / "run/recipe.yaml", "base: base", "base: ../../../etc"),
        ["generate", "run", "hello"],
        "model.base: ../../../etc",
    ),
    "a revision above": (
        lambda work: rewrite(work / "run/recipe.yaml", "revision: null", "revision: ../../../../secret"),
        ["generate", "run", "hello"],
        "model.revision: must be a branch, a tag or a commit (../../../../secret)",
    ),
    "a base with an adapter in it": (
        lambda work: (work / "base/adapter_config.json").write_text('{"base_model_name_or_path": "../precious"}'),
        ["generate", "run", "hello"],
        "holds an adapter (adapter_config.json) beside its weights",
    ),
    "a base whose index leads out": (index_out, ["generate", "run", "hello"], "../secret.safetensors"),
    "a licence that is a secret": (
        lambda work: (work / "base/LICENSE").symlink_to(work / "secret"),
        ["merge", "run", "--output", "out"],
        "base/LICENSE: cannot be copied (is a link out of its folder",
    ),
}
FAST = {"an adapter's token file that is a secret", "a merge begun elsewhere", "checkpoints elsewhere"}


def change(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.fixture
def beside(work: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run in run/, the folder of a person who got it, and their own precious/ and secret."""
    monkeypatch.chdir(work)
    write_folder(work / "precious/model", {"thesis.txt": "years of work"})
    write_folder(work / "precious/step-000001", {"state.json": "{}"})
    shutil.copy(work / "run/merged/merge-proof.json", work / "precious/merge-proof.json")
    (work / "secret").write_text("a private key")
    return work


@pytest.mark.parametrize("what", [pytest.param(what, marks=[] if what in FAST else pytest.mark.slow) for what in RUNS])
def test_a_verb_stays_within_the_run(beside: Path, tmp_path: Path, what: str) -> None:
    prepare, command, words = RUNS[what]
    prepare(beside)
    before = precious(beside)
    base = {path.name: path.read_bytes() for path in (beside / "base").iterdir() if path.name != "LICENSE"}
    seen = watch_command([*command, "--quiet"] if command[0] == "train" else command, tmp_path / "scratch")
    stays(seen, beside, tmp_path)
    assert seen.code == 2, seen.said
    assert words in seen.said, seen.said
    assert len(seen.said.splitlines()) == 1, seen.said
    assert "private key" not in seen.said
    assert seen.grown < 2**29
    assert precious(beside) == before
    assert {name: (beside / "base" / name).read_bytes() for name in base} == base
    assert not (beside / "made-elsewhere").exists()


def stays(seen: Seen, work: Path, tmp_path: Path) -> None:
    cache = Path(os.environ["TUNE_CACHE"])
    places = [work / "run", work / "out", work / ".merging-out", tmp_path / "scratch", tmp_path / "state", cache]
    seen.assert_inside(*places, untouched=[work / "secret"])


@pytest.mark.parametrize(
    ("old", "new"),
    [("rank: 4", "rank: 64"), pytest.param("rank: 4", "rank: 1000000000", marks=pytest.mark.slow)],
)
def test_no_room_is_made_for_more_than_the_adapters_file_holds(
    beside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str
) -> None:
    from tune.evaluation import generate

    rewrite(beside / "run/recipe.yaml", old, new)
    monkeypatch.setattr(generate, "attach", lambda *arguments: pytest.fail("an adapter was attached"))
    watch(lambda: generate.load_run("run"), tmp_path / "scratch").assert_refused("adapter.rank")


@pytest.mark.slow
def test_words_of_a_checkpoint_are_no_commands_to_a_terminal(beside: Path, tmp_path: Path) -> None:
    words = "\x1b[2J\x1b]0;x\x07" + "y" * 10_000
    spoil(beside, lambda state: state.update(machine=words, processes={"x": words}, versions={"torch": words[:100]}))
    seen = watch_command([*RESUME, "--quiet"], tmp_path / "scratch")
    assert seen.code == 0, seen.said
    assert "not the machine this run began on" in seen.said
    assert "\x1b" not in seen.said
    assert len(seen.said) < 2000
    stays(seen, beside, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["generate", "run", "hello", "--max-new-tokens", "2"],
        ["merge", "run", "--output", "out"],
        ["merge", "run", "--prove"],
        ["push", "run", "owner/name", "--dry-run"],
    ],
)
def test_where_a_runs_recipe_says_to_write_is_nothing_to_a_verb(
    beside: Path, tmp_path: Path, command: list[str]
) -> None:
    lead_away(beside / "run/recipe.yaml")
    seen = watch_command(command, tmp_path / "scratch")
    assert seen.code == 0, seen.said
    stays(seen, beside, tmp_path)
    assert not (tmp_path.parent / "elsewhere").exists()
    assert not (beside / "elsewhere").exists()
