"""Bases and adapters that cannot be trained: what is wrong with the folder, the files in it, or the Hub."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.cli.mistakes import Mistake, assert_refused, change_json, cut_in_half, mistake, remove, write

CONFIG, WEIGHTS = "base/config.json", "base/model.safetensors"


def config(**changes: object):
    return change_json(CONFIG, **changes)


def pickle_weights(work: Path) -> None:
    (work / WEIGHTS).rename(work / "base/pytorch_model.bin")


def pickle_adapter(work: Path) -> None:
    (work / "old/adapter_model.safetensors").rename(work / "old/adapter_model.bin")


def lose_a_shard(work: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(work / WEIGHTS)
    (work / WEIGHTS).unlink()
    names = sorted(tensors)
    files = {name: f"model-0000{1 if name in names[:5] else 2}-of-00002.safetensors" for name in names}
    here = {name: tensors[name] for name in names[:5]}
    save_file(here, work / "base/model-00001-of-00002.safetensors", metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (work / "base/model.safetensors.index.json").write_text(json.dumps(index))


def lose_tensors(work: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor for name, tensor in load_file(work / WEIGHTS).items() if "q_proj" not in name}
    save_file(tensors, work / WEIGHTS, metadata={"format": "pt"})


def other_tokenizer(work: Path) -> None:
    from tests.tiny import write_model

    for name in ("config.json", "model.safetensors"):
        (work / "base" / name).unlink()
    write_model(work / "small", "mistral", vocab_size=300)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(work / "small" / name, work / "base")
    shutil.rmtree(work / "small")


BASES = [
    mistake("missing", "model.base: ./bse does not exist", "Did you mean 'base'?", model__base="./bse"),
    mistake(
        "missing folder in a folder",
        "models/tinny",
        "Did you mean 'tiny'?",
        prepare=write("models/tiny/config.json", "{}"),
        model__base="models/tinny",
    ),
    mistake("a file", "model.base: train.jsonl is a file", model__base="train.jsonl"),
    mistake("neither path nor hub id", "a b/c", "OWNER/NAME", model__base="a b/c"),
    mistake(
        "hub while offline", "someone/some-model", "HF_HUB_OFFLINE", "go online once", model__base="someone/some-model"
    ),
    mistake("config missing", "base holds no config.json", prepare=remove(CONFIG)),
    mistake("config broken", "base/config.json:2: is not valid JSON", prepare=write(CONFIG, '{"model_type":\n')),
    mistake("config not text", "base/config.json cannot be read", prepare=write(CONFIG, b'{"a": "\xff"}')),
    mistake("config a list", "base/config.json has no model_type", prepare=write(CONFIG, "[1]")),
    mistake("model type missing", "base/config.json has no model_type", prepare=config(model_type=None)),
    mistake("model type unknown", "'mistrall'", "Did you mean 'mistral'?", prepare=config(model_type="mistrall")),
    mistake("encoder", "base is a bert model", "Mistral-7B", prepare=config(model_type="bert")),
    mistake("encoder and decoder", "base is a t5 model", "Mistral-7B", prepare=config(model_type="t5")),
    mistake(
        "code of its own", "model.trust_remote_code", prepare=config(model_type="own", auto_map={"AutoConfig": "own.C"})
    ),
    mistake("size no number", "hidden_size", "(value: 'big')", prepare=config(hidden_size="big")),
    mistake("activation unknown", "'sliu'", "config.json of base", prepare=config(hidden_act="sliu")),
    mistake("no layers", "base has no linear layers", prepare=config(num_hidden_layers=0)),
    mistake(
        "already quantised",
        "base is already quantised",
        "model.quantization: nf4",
        prepare=config(quantization_config={"quant_method": "gptq", "bits": 4}),
    ),
    mistake(
        "mixture of experts",
        "mixture of experts of a kind (phimoe)",
        "mixtral",
        prepare=config(model_type="phimoe", num_local_experts=4),
    ),
    mistake("only pickles", "(pytorch_model.bin)", "Convert them to safetensors", prepare=pickle_weights),
    mistake("no weights", "base holds no .safetensors", prepare=remove(WEIGHTS)),
    mistake("weights cut", "weights of base cannot be read", "incomplete", prepare=cut_in_half(WEIGHTS)),
    mistake("weights empty", "weights of base cannot be read", prepare=write(WEIGHTS, b"")),
    mistake("shard missing", "model-00002-of-00002.safetensors", prepare=lose_a_shard),
    mistake("tensors missing", "lacks 2 tensors", "q_proj", prepare=lose_tensors),
    mistake("layers missing", "lacks", "model.layers.2", prepare=config(num_hidden_layers=3)),
    mistake(
        "packed weights of another shape",
        "wrong shape for 6 tensors",
        "mlp.down_proj",
        prepare=config(intermediate_size=96),
    ),
    mistake(
        "weights of another shape",
        "wrong shape for 6 tensors",
        "mlp.down_proj",
        prepare=config(intermediate_size=96),
        model__quantization="none",
    ),
    mistake("heads that do not fit", "wrong shape", "self_attn", prepare=config(num_attention_heads=5)),
    mistake("no tokenizer", "base: has no tokenizer", "Copy", prepare=remove("base/tokenizer*")),
    mistake("tokenizer cut", "base: its tokenizer cannot be read", prepare=cut_in_half("base/tokenizer.json")),
    mistake("tokenizer of another model", "300 embeddings", prepare=other_tokenizer),
    *(
        mistake(
            f"tokens added to another model's tokenizer, {verb}",
            "before any is added",
            "300 embeddings",
            prepare=other_tokenizer,
            arguments=(verb, "recipe.yaml"),
            data__template="chatml",
            data__add_tokens=True,
        )
        for verb in ("train", "check")
    ),
]

ADAPTERS = [
    mistake("target names nothing", "adapter.targets: 'q_porj'", "Did you mean 'q_proj'?", adapter__targets=["q_porj"]),
    mistake("target is the head", "'lm_head'", "q_proj", adapter__targets=["lm_head"]),
    mistake("target of a mixture", "experts", adapter__targets=["experts"]),
    mistake("rank of nothing", "adapter.ranks: 'q_prj'", "'q_proj'", adapter__ranks={"q_prj": 8}),
    mistake("exclusion of nothing", "adapter.exclude: 'q_prj'", "'q_proj'", adapter__exclude=["q_prj"]),
    mistake(
        "everything excluded",
        "adapter.exclude: leaves nothing",
        adapter__targets=["q_proj"],
        adapter__exclude=["q_proj"],
    ),
    mistake("start missing", "adapter.start_from: ./old does not exist", adapter__start_from="./old"),
    mistake("start a file", "adapter.start_from: train.jsonl is a file", adapter__start_from="train.jsonl"),
    mistake("start no adapter", "adapter.start_from: base holds no adapter_config.json", adapter__start_from="base"),
    mistake("start at the hub while offline", "adapter.start_from: a/b", "HF_HUB_OFFLINE", adapter__start_from="a/b"),
]

STARTS = [
    mistake("of another rank", "its r is 4", "Set adapter.rank: 4", adapter__rank=8),
    mistake("of other targets", "down_proj", "adapter.targets", adapter__targets=["q_proj"]),
    mistake("a pickle", "pickled one", "safetensors", prepare=pickle_adapter),
    mistake("cut", "old: the adapter cannot be read", prepare=cut_in_half("old/adapter_model.safetensors")),
    mistake("with a broken config", "old: the adapter cannot be read", prepare=write("old/adapter_config.json", "[1]")),
    mistake("with DoRA", "old: uses DoRA", prepare=change_json("old/adapter_config.json", use_dora=True)),
]


@pytest.mark.parametrize("wrong", [*BASES, *ADAPTERS])
def test_refused(wrong: Mistake, work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert_refused(wrong, work, capfd)


@pytest.mark.parametrize("wrong", STARTS)
def test_an_adapter_to_start_from_is_refused(
    wrong: Mistake, work: Path, finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished / "run/adapter", work / "old")
    wrong.settings.setdefault("adapter__start_from", "old")
    assert_refused(wrong, work, capfd)


HUB = {
    "gated/closed": (403, "GatedRepo"),
    "gated/anonymous": (401, "GatedRepo"),
    "someone/nothing": (404, "RepoNotFound"),
    "someone/private": (401, ""),
    "someone/branchless": (404, "RevisionNotFound"),
    "someone/empty": (404, "EntryNotFound"),
    "someone/forbidden": (403, ""),
}
"""What the stand-in of the Hub answers for each model: status and X-Error-Code."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """A Hub on this machine that huggingface_hub's own client asks; yields the requests it got."""
    from huggingface_hub import constants

    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/":  # is there a Hub at all?
                self.send_response(200)
                self.end_headers()
                return
            asked.append(self.path)
            repo = "/".join(self.path.removeprefix("/api/models").strip("/").split("/")[:2])
            status, code = HUB.get(repo, (404, "EntryNotFound"))
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", "the Hub's own words")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *arguments: object) -> None:
            """Nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "wrong",
    [
        mistake("gated", "gated", "https://huggingface.co/gated/closed", "`hf auth login`", model__base="gated/closed"),
        mistake(
            "gated and no token",
            "Accept its terms at https://huggingface.co/gated/anonymous",
            "HF_TOKEN",
            model__base="gated/anonymous",
        ),
        mistake("unknown", "someone/nothing is neither here nor a model on the Hub", model__base="someone/nothing"),
        mistake("private", "someone/private", "HF_TOKEN", model__base="someone/private"),
        mistake(
            "revision unknown", "someone/branchless has no revision", "tree/main", model__base="someone/branchless"
        ),
        mistake("without config", "someone/empty on the Hub holds no config.json", model__base="someone/empty"),
        mistake("forbidden", "refused access to someone/forbidden (403)", model__base="someone/forbidden"),
        mistake("adapter unknown", "adapter.start_from: someone/nothing", adapter__start_from="someone/nothing"),
        mistake(
            "adapter empty",
            "someone/empty on the Hub holds no adapter_config.json",
            adapter__start_from="someone/empty",
        ),
    ],
)
def test_what_the_hub_refuses(wrong: Mistake, work: Path, hub: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    message = assert_refused(wrong, work, capfd)
    assert hub, "the Hub was never asked"
    assert all("config.json" in path or "adapter_model" in path for path in hub), "more than a config was asked for"
    assert "127.0.0.1" not in message
