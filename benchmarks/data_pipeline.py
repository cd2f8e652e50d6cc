"""From a file of rows to packed rows of tokens on a CPU: this project beside TRL, in one run.

The rows are Alpaca's in form and length, written here from a list of words, the same in every run. Ours is `load_data`
from nothing, masks, report and cache included, and then the packed rows of every step of an epoch. TRL is its own
`SFTTrainer._prepare_dataset`, with packing, once on the same prompts as prompt and completion, which gives it masks,
and once as plain text, which is its shortest way and has none. Each measurement is a process of its own, all methods
in turn in every round, so that peaks do not mix and noise falls on all. Libraries are imported before the clock starts.
Both begin with the file; TRL's `own_seconds` are those of its preparation alone, without reading the rows and writing
the prompts, which ours has to do as well.

    python benchmarks/data_pipeline.py [--rows 52000] [--rounds 3] [--tokenizer FOLDER] [--output FILE]
    python benchmarks/data_pipeline.py --memory [--rows 2000000]

Prints a JSON list and, with --output, writes it. `cached` is a second start, whose `process_seconds` count from the
interpreter's start, imports included. Seconds are medians over rounds, and a ratio is the median over rounds of the
ratio within a round; CPU seconds hold on a busy machine too. Peak bytes are the process's largest resident set,
interpreter and libraries included. --memory is ours alone, on rows of 50 to 100 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TOKENIZER = ROOT.parent / "shared" / "fixtures" / "tokenizers" / "mistral-v1"
METHODS = ["ours", "cached", "trl prompt-completion", "trl text"]
# Ours beside the whole of TRL's way, and beside its own part of it alone.
RATIOS = [
    ("seconds", "seconds"),
    ("cpu_seconds", "cpu_seconds"),
    ("seconds", "own_seconds"),
    ("cpu_seconds", "own_cpu_seconds"),
    ("peak_bytes", "peak_bytes"),
]
MAX_LENGTH, BATCH, ROW_TOKENS = 2048, 128, 4096
WORDS = """the of and to a in is that it for as with on are this be by or from at not have an which can their has more
one about other into some time these two also most new over such work after many used first people between years water
use made where through world state under group while system three number may house different place great small large
often public early school during second life part found long right hand high always family local main service example
reason process power level important community including available several change problem develop material science
language measure provide history question answer describe explain following sentence paragraph story character energy
temperature environment government information research technology organisation relationship communication
responsibility understanding particularly approximately extraordinary sustainable photosynthesis algorithm variable
function array customer budget recipe garden mountain river bicycle engine market theatre novel painter orchestra
volcano astronomy chemistry democracy economy insurance vaccine molecule kangaroo lighthouse umbrella"""


def write_rows(path: Path, count: int, short: bool) -> None:
    """Write Alpaca's rows: with `short` few words each, else with lengths spread like Stanford Alpaca's."""
    draw, listed = random.Random(0), WORDS.split()
    pool = draw.choices(listed, [1 / (rank + 3) for rank in range(len(listed))], k=200_000)

    def words(count: int, end: str) -> str:
        start = draw.randrange(len(pool) - count)
        text = " ".join(pool[start : start + count])
        return f"{text[0].upper()}{text[1:]} {draw.randrange(10_000)}{end}"

    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            row = {"instruction": words(draw.randint(5, 15), "."), "input": "", "output": ""}
            if short:
                row["output"] = words(draw.randint(4, 14), ".")
            else:
                row["input"] = words(draw.randint(2, 30), "") if draw.random() < 0.4 else ""
                sentences = max(1, min(40, round(draw.lognormvariate(1.0, 0.9))))
                row["output"] = "\n".join(words(draw.randint(6, 18), ".") for _ in range(sentences))
            file.write(json.dumps(row) + "\n")


def recipe_of(path: Path) -> Any:
    from tune.recipe.load import load_recipe

    data = {"train": str(path), "template": "alpaca", "max_length": MAX_LENGTH}
    return load_recipe({"model": {"base": "x"}, "data": data, "train": {"batch_size": BATCH}, "output": "unused"})


def pack_an_epoch(data: Any) -> dict[str, Any]:
    from tune.data.batches import Order, pack

    lengths = data.train.lengths
    order = Order(data.train.source, (1.0,), BATCH, 0)
    rows = sum(len(pack(order.step(step), lengths, ROW_TOKENS)) for step in range(order.steps_per_epoch))
    return {"packed_rows": rows, "tokens": int(lengths.sum()), "trained": int(data.train.trained_counts.sum())}


def ours(path: Path, tokenizer: str, packs: bool) -> Callable[[], dict[str, Any]]:
    from tune.data.load import load_data
    from tune.data.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer)

    def work() -> dict[str, Any]:
        data = load_data(recipe_of(path), loaded)
        return pack_an_epoch(data) if packs else {"tokens": data.report.train_tokens}

    return work


def trl(path: Path, tokenizer: str, masked: bool) -> Callable[[], dict[str, Any]]:
    import datasets
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from tune.data.conversation import Conversation, Message
    from tune.data.templates import TEMPLATES

    datasets.disable_progress_bars()
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    template = TEMPLATES["alpaca"].bind(loaded)

    def prompts(row: dict[str, str]) -> dict[str, str]:
        user = Message("user", row["instruction"], input=row["input"] or None)
        segments = template.segments(Conversation((user, Message("assistant", row["output"]))))
        # The tokenizer writes the first token itself, and TRL the last.
        prompt, completion = segments[-3].text, segments[-2].text
        return {"prompt": prompt, "completion": completion} if masked else {"text": prompt + completion}

    def work() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as cache:
            dataset = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
            dataset = dataset.map(prompts, remove_columns=dataset.column_names)
            # The trainer's preparation of data needs a tokenizer and two settings of the trainer, and no model.
            trainer = SFTTrainer.__new__(SFTTrainer)
            trainer._tokenizer, trainer.chat_template, trainer.completion_only_loss = loaded, None, masked
            settings = {"packing": True, "max_length": ROW_TOKENS, "shuffle_dataset": True, "bf16": False}
            config = SFTConfig(cache, use_cpu=True, **settings)
            started, cpu_started = time.perf_counter(), time.process_time()
            packed = trainer._prepare_dataset(dataset, loaded, config, True, None, "train")
            own = {"own_seconds": time.perf_counter() - started, "own_cpu_seconds": time.process_time() - cpu_started}
            lengths = [sum(row) for row in packed["seq_lengths"]]
        return {"packed_rows": len(lengths), "tokens": sum(lengths), **own}

    return work


def measure(method: str, path: Path, tokenizer: str) -> dict[str, Any]:
    """Do the work once in this process and return what it took."""
    if method.startswith("trl"):
        work = trl(path, tokenizer, masked=method == "trl prompt-completion")
    else:
        work = ours(path, tokenizer, packs=method == "ours")
    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    started, cpu_started = time.perf_counter(), time.process_time()
    done = work()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak, "before_bytes": imported, **done}


def in_a_process(method: str, path: Path, tokenizer: str, cache: Path) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", __file__, "--method", method, "--data", str(path)]
    environment = {**os.environ, "TUNE_CACHE": str(cache), "HF_HOME": str(cache / "hf"), "HF_HUB_OFFLINE": "1"}
    # Whatever runs this may have switched off what both sides have: tokenizers' own threads.
    environment.pop("TOKENIZERS_PARALLELISM", None)
    started = time.perf_counter()
    done = subprocess.run(
        [*command, "--tokenizer", tokenizer], check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    )
    seconds = time.perf_counter() - started
    return {**json.loads(done.stdout.splitlines()[-1]), "process_seconds": seconds}


def rounds_of(methods: list[str], rounds: int, path: Path, tokenizer: str) -> dict[str, list[dict[str, Any]]]:
    """Every method once a round; `cached` starts on what `ours` left behind."""
    measured: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            for method, results in measured.items():
                results.append(in_a_process(method, path, tokenizer, Path(cache)))
                print(f"{method}: {results[-1]}", file=sys.stderr)
    return measured


def summary(measured: dict[str, list[dict[str, Any]]], rows: int, tokenizer: str, benchmark: str) -> list[Any]:
    from importlib.metadata import version

    libraries = ("tokenizers", "transformers", "datasets", "numpy", *(["trl"] if "trl text" in measured else []))
    versions = {**{name: version(name) for name in libraries}, "python": platform.python_version()}
    listed = []
    for method, results in measured.items():
        entry: dict[str, Any] = {
            "benchmark": benchmark,
            "method": method,
            "against": [name for name in measured if name.startswith("trl")] if method == "ours" else [],
            "rows": rows,
            "tokenizer": Path(tokenizer).name,
            "device": f"{platform.machine()} CPU, {os.cpu_count()} cores",
            "versions": versions,
            "tokens": results[0]["tokens"],
            "packed_rows": results[0].get("packed_rows"),
        }
        for key in ("seconds", "cpu_seconds", "own_seconds", "own_cpu_seconds", "process_seconds"):
            if key in results[0]:
                entry[key] = round(statistics.median(result[key] for result in results), 3)
                entry[f"{key}_all"] = [round(result[key], 3) for result in results]
        entry["rows_per_second"] = round(rows / entry["seconds"], 1)
        for key in ("peak_bytes", "before_bytes"):
            entry[key] = int(statistics.median(result[key] for result in results))
        for other in entry["against"]:
            for key, theirs in RATIOS:
                pairs = zip(results, measured[other], strict=True)
                ratio = statistics.median(result[key] / against[theirs] for result, against in pairs)
                entry[f"{key}_over_{other.replace(' ', '_')}_{theirs}"] = round(ratio, 3)
        listed.append(entry)
    return listed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, help="52,000, or 2,000,000 with --memory")
    parser.add_argument("--rounds", type=int, help="3, or 1 with --memory")
    parser.add_argument("--memory", action="store_true", help="ours alone, on many short rows")
    parser.add_argument("--tokenizer", default=str(TOKENIZER), help="a folder with tokenizer.json")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.method:
        print(json.dumps(measure(options.method, options.data, options.tokenizer)))
        return
    rows = options.rows or (2_000_000 if options.memory else 52_000)
    rounds = options.rounds or (1 if options.memory else 3)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, rows, short=options.memory)
        methods = METHODS[:2] if options.memory else METHODS
        measured = rounds_of(methods, rounds, path, options.tokenizer)
    benchmark = "data_memory" if options.memory else "data_pipeline"
    text = json.dumps(summary(measured, rows, options.tokenizer, benchmark), indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
