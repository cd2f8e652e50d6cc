"""Recipes and command lines that cannot be meant: told in one line, before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.mistakes import TRAIN, Mistake, assert_refused, mistake, write

RECIPES = [
    mistake("missing", "recip.yaml", "Did you mean 'recipe.yaml'?", arguments=("train", "recip.yaml")),
    mistake("shipped one named", "`tune recipes quickstart --copy`", arguments=("train", "quickstart")),
    mistake("a folder", "base", "is a folder", arguments=("train", "base")),
    mistake("empty", "recipe.yaml:1: is empty", "`tune recipes`", prepare=write("recipe.yaml", "")),
    mistake("not YAML", "recipe.yaml:2", "not valid YAML", prepare=write("recipe.yaml", "model: {base: x\n")),
    mistake("a tab", "recipe.yaml:2", "Indent with spaces", prepare=write("recipe.yaml", "model:\n\tbase: x\n")),
    mistake("a list", "recipe.yaml:1: is a list", prepare=write("recipe.yaml", "- a\n- b\n")),
    mistake("binary", "recipe.yaml:1", prepare=write("recipe.yaml", b"\x00\x01\xff\xfe" * 50)),
    mistake(
        "required keys missing",
        "recipe.yaml:1: model.base: is missing",
        "data.train: is missing",
        prepare=write("recipe.yaml", "output: x\n"),
        lines=2,
    ),
    mistake("unknown section", "modle", "Did you mean 'model'?", modle__base="x"),
    mistake("unknown key of model", "recipe.yaml:4: model.dtpye", "Did you mean 'dtype'?", model__dtpye="float32"),
    mistake("unknown key of adapter", "adapter.rnak", "Did you mean 'rank'?", adapter__rnak=4),
    mistake("unknown key of router", "router.balance", "Did you mean 'balance_loss'?", router__balance=4),
    mistake("unknown key of data", "data.templte", "Did you mean 'template'?", data__templte="alpaca"),
    mistake("unknown key of train", "train.epoch", "Did you mean 'epochs'?", train__epoch=1),
    mistake("unknown key of tracking", "tracking.projct", "Did you mean 'project'?", tracking__projct="x"),
    mistake("unknown key of push", "push.privat", "Did you mean 'private'?", push__privat=True),
    mistake(
        "unknown key of a source",
        "data.train[0].fromat",
        "Did you mean 'format'?",
        data__train=[{"path": "train.jsonl", "fromat": "alpaca"}],
    ),
    mistake("another framework's key", "lora_r", "Here it is adapter.rank", lora_r=8),
    mistake("another framework's section", "model.load_in_4bit", "model.quantization", model__load_in_4bit=True),
    mistake("another framework's value", "train.optimizer", "Write adamw.", train__optimizer="adamw_torch"),
    mistake("wrong type in model", "model.quantization", "(nf5)", "Did you mean 'nf4'?", model__quantization="nf5"),
    mistake("wrong type in adapter", "adapter.rank", "whole number (four)", "default is 16", adapter__rank="four"),
    mistake("wrong type in router", "router.balance_loss", "(much)", router__balance_loss="much"),
    mistake("wrong type in data", "data.max_length", "(long)", data__max_length="long"),
    mistake("wrong type in train", "train.learning_rate", "a number (fast)", train__learning_rate="fast"),
    mistake("wrong type in tracking", "tracking.to", "Did you mean 'wandb'?", tracking__to="wandbb"),
    mistake("wrong type in push", "push.repo", "OWNER/NAME", "(nobody)", push__repo="nobody"),
    mistake("wrong type of output", "output", "must be text", output=["run"]),
    mistake(
        "value for a section",
        "train: is a section",
        "Put keys under it",
        prepare=write("recipe.yaml", "train: 3\nmodel: {base: base}\ndata: {train: train.jsonl}\n"),
    ),
    mistake("rank below its range", "adapter.rank", "at least 1 (0)", adapter__rank=0),
    mistake("dropout above its range", "adapter.dropout", "below 1 (1.5)", adapter__dropout=1.5),
    mistake("rate not finite", "train.learning_rate", "(nan)", train__learning_rate="nan"),
    mistake("patience without held-out data", "train.patience", "Set data.eval", train__patience=2),
    mistake("warm-up longer than the training", "train.warmup", "max_steps is 2", train__warmup=10),
    mistake("publishing to nowhere", "push.merged", "Set push.repo", push__merged=True),
    mistake("every target excluded", "adapter.exclude", "(attention, mlp)", adapter__exclude=["attention", "mlp"]),
    mistake("template unknown", "data.template", "(alpaka)", "Did you mean 'alpaca'?", data__template="alpaka"),
    mistake("a token in the recipe", "push.hub_token", "HF_TOKEN", push__hub_token="hf_" + "x" * 30),
]

OVERRIDES = [
    mistake("without a value", "train.seed (command line)", "key=value", arguments=(*TRAIN, "train.seed")),
    mistake(
        "unknown", "train.learning_rte=1", "Did you mean 'learning_rate'?", arguments=(*TRAIN, "train.learning_rte=1")
    ),
    mistake("wrong", "train.learning_rate=fast", "a number (fast)", arguments=(*TRAIN, "train.learning_rate=fast")),
    mistake("not YAML", "adapter.targets=[q_proj", "not valid YAML", arguments=(*TRAIN, "adapter.targets=[q_proj")),
    mistake("over a section", "model=3", "is a section", arguments=(*TRAIN, "model=3")),
]

USAGE = [
    mistake("verb unknown", "tune: No such command 'trian'. Did you mean 'train'?", arguments=("trian",)),
    mistake("recipe left out", "tune train: Missing argument 'RECIPE'", "`tune train --help`", arguments=("train",)),
    mistake("option unknown", "tune train", "--resum", "--resume", arguments=(*TRAIN, "--resum")),
    mistake("option of a verb in front", "tune", "--resume", arguments=("--resume", *TRAIN)),
    mistake("prompt left out", "tune generate: Missing argument 'PROMPT'", arguments=("generate", "run")),
    mistake("option out of range", "--max-new-tokens", arguments=("generate", "run", "hi", "--max-new-tokens", "0")),
    mistake("option of the wrong type", "'-n'", arguments=("preview", "recipe.yaml", "-n", "few")),
    mistake("shipped recipe unknown", "quikstart", "Did you mean 'quickstart'?", arguments=("recipes", "quikstart")),
    mistake("copy of nothing", "--copy", "quickstart", arguments=("recipes", "--copy")),
    mistake(
        "copy over a file",
        "quickstart.yaml: exists already",
        arguments=("recipes", "quickstart", "--copy"),
        prepare=write("quickstart.yaml", "mine"),
    ),
]


@pytest.mark.parametrize("wrong", [*RECIPES, *OVERRIDES, *USAGE])
def test_refused(wrong: Mistake, work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    message = assert_refused(wrong, work, capfd)
    assert "hf_x" not in message, "a token was repeated"
    assert not (work / "run").exists()


def test_a_misspelt_key_is_told_by_every_verb_that_reads_a_recipe(
    work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    messages = set()
    for verb in ("train", "check", "preview"):
        wrong = mistake(verb, "train.epoch", arguments=(verb, "recipe.yaml"), train__epoch=1).values[0]
        messages.add(assert_refused(wrong, work, capfd))
    assert len(messages) == 1
