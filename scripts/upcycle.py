"""Turn a dense Mistral or Llama folder into a Mixtral: sparse upcycling, without training anything.

Sparse upcycling (Komatsuzaki et al. 2022, arXiv:2212.05055) starts a mixture of experts from a dense model: every
feed-forward block is copied into each expert, all other weights stay, and each layer gets a new, random router. Here
each copy also gets normal noise, measured in standard deviations of its own matrix, so that the experts differ from
the first step on. A Mixtral divides the weights of the chosen experts by their sum, so without noise it computes
exactly the dense model. That is not taken on trust: the finished folder is loaded as a Mixtral, each expert is
compared with the dense block and put back to it, and the float32 logits must then be those of the dense model.

The router is drawn so that the logits of one token differ by about ROUTER_SPREAD between experts: its input is the
layer's normalised hidden state, whose length the norm's own weights tell. One expert then leads without the others
being left out. Each random tensor depends on the seed and its own name alone, so no order matters.

Tensors are read and written one at a time; only the check holds the whole Mixtral, in float32. Names are those of
Mixtral checkpoints on the Hugging Face Hub (block_sparse_moe.experts.E.w1, w2, w3 and block_sparse_moe.gate). The
folder appears by one rename at the end. An interrupted run leaves a `.partial` folder, removed by the next one.

    python scripts/upcycle.py DENSE OUTPUT [--experts 4] [--top-k 2] [--noise 0.01] [--seed 0]

Exit codes: 0 the folder is there; 1 it came out wrong; 2 the dense model or the settings cannot be used.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Run as a file, this finds its neighbours from anywhere.
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from smollm2 import LOGIT_TOLERANCE, Refused, Wrong, replacing
from upcycle_check import Measured, compare
from upcycle_weights import Part, Settings, head_dim, plan, write_json, write_weights

from tune.errors import TuneError

RECORD = "upcycling.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
COPIED = (
    *("tokenizer*", "vocab.json", "merges.txt", "tekken.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template*", "additional_chat_templates/*.jinja", "generation_config.json"),
    *("LICENSE*", "LICENCE*", "NOTICE*"),
)


def read_config(dense: Path) -> Any:
    """The transformers configuration of `dense`; refuses what a Mixtral cannot compute."""
    from transformers import AutoConfig

    try:
        written = dict(json.loads((dense / "config.json").read_bytes()))
    except FileNotFoundError:
        raise Refused(f"{dense}: is no model folder (it holds no config.json). Give one that does.") from None
    except (OSError, ValueError, TypeError) as error:
        raise Refused(f"{dense / 'config.json'}: cannot be read ({error}). Copy the model again.") from error
    kind = written.get("model_type")
    if kind not in ("mistral", "llama"):
        raise Refused(f"{dense}: its model_type is {kind!r}. Give a dense model of type mistral or llama.")
    if written.get("quantization_config"):
        raise Refused(f"{dense}: its weights are quantised. Give the model in float32, float16 or bfloat16.")
    for bias in ("attention_bias", "mlp_bias"):
        if written.get(bias):
            raise Refused(f"{dense}: has biases ({bias}), which a Mixtral does not. Give a model without.")
    try:
        config = AutoConfig.from_pretrained(dense, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library has no one class for a value that it does not accept
        said = str(error).strip().partition("\n")[0]
        raise Refused(f"{dense / 'config.json'}: transformers does not accept it ({said}). Mend it.") from error
    if config.hidden_act != "silu":
        raise Refused(f"{dense}: its activation is {config.hidden_act}, Mixtral's is silu. Give a model with silu.")
    return config


def mixtral_config(dense: Any, settings: Settings, dtype: Any) -> Any:
    """The Mixtral configuration for the function of the dense one; weights are stored as `dtype` (of torch)."""
    from transformers import MixtralConfig

    same = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
        "max_position_embeddings rms_norm_eps rope_parameters tie_word_embeddings bos_token_id eos_token_id "
        "pad_token_id initializer_range attention_dropout"
    )
    return MixtralConfig(
        architectures=["MixtralForCausalLM"],
        dtype=dtype,
        head_dim=head_dim(dense),
        sliding_window=getattr(dense, "sliding_window", None),
        num_local_experts=settings.experts,
        num_experts_per_tok=settings.top_k,
        **{name: getattr(dense, name) for name in same.split()},
    )


def copy_beside(dense: Path, folder: Path) -> None:
    """Copy what is not weights: tokenizer, templates, generation settings, licence texts and the dense README."""
    for pattern in COPIED:
        for path in sorted(dense.glob(pattern)):
            if path.is_file():
                target = folder / path.relative_to(dense)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
    if (dense / "README.md").is_file():
        shutil.copyfile(dense / "README.md", folder / "README-dense.md")


def write_readme(folder: Path, dense: Path, settings: Settings) -> None:
    """Say in the folder itself under which licence these weights are, and that they are an untrained upcycling."""
    import yaml

    from tune.export.licence import find_licence

    licence = find_licence(dense, None, "model", None, online=False)
    front = {"license": licence.identifier or "unknown", "license_name": licence.name, "license_link": licence.link}
    matter = yaml.safe_dump({key: value for key, value in front.items() if value}, sort_keys=False)
    words = licence.words if licence.known else "which its folder does not name"
    beside = " Its own README is `README-dense.md`." if (folder / "README-dense.md").is_file() else ""
    text = (
        f"---\n{matter}---\n\n# {dense.name} as a Mixtral of {settings.experts} experts\n\n"
        f"Made by `scripts/upcycle.py --experts {settings.experts} --top-k {settings.top_k} --noise {settings.noise:g} "
        f"--seed {settings.seed}`\nfrom the dense model `{dense.name}`.{beside}\n\n"
        "This is sparse upcycling (Komatsuzaki et al. 2022, arXiv:2212.05055). Changed against the dense model: every\n"
        f"feed-forward block was copied into {settings.experts} experts, with normal noise of {settings.noise:g} of "
        "each matrix's standard\n"
        f"deviation, and each layer got a random router that chooses {settings.top_k} of them. Nothing was trained: "
        "the experts are\n"
        "near copies, and without further training this answers about as the dense model does.\n\n"
        f"Licence: that of the dense model, {words}.\n"
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def check_room(output: Path, parts: list[Part]) -> None:
    """Refuse before anything is written when the disk has no room for the folder, or the memory none for the check."""
    existing = next(folder for folder in output.parents if folder.is_dir())
    needed, free = sum(part.size for part in parts) + 2**25, shutil.disk_usage(existing).free
    if needed > free:
        raise Refused(
            f"{output}: needs {needed / 1e9:.1f} GB on the disk, {free / 1e9:.1f} GB are free. "
            "Free some space or choose another output."
        )
    needed, free = int(sum(math.prod(part.shape) for part in parts) * 4 * 1.6) + 2**29, free_memory()
    if needed > free:
        raise Refused(
            f"{output}: its check needs about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free. "
            "Use fewer --experts, a smaller model or another machine."
        )


def free_memory() -> int:
    """Bytes of memory that a new process can have; all that one could wish where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 2**63


def record_of(dense: Path, settings: Settings) -> dict[str, Any]:
    """What the result is made of, to tell whether a finished folder is the one that is asked for."""
    from tune.models.hub import fingerprint_base

    return {"dense": dense.name, "dense_fingerprint": fingerprint_base(str(dense)), **asdict(settings)}


def is_finished(output: Path, record: dict[str, Any]) -> bool:
    """Whether `output` is the folder that `record` describes; refuses any other folder that is there."""
    if not output.exists():
        return False
    try:
        found = dict(json.loads((output / RECORD).read_bytes()))
    except (OSError, ValueError, TypeError):
        found = {}
    if not found or not list(output.glob("*.safetensors")) or not (output / "config.json").is_file():
        raise Refused(f"{output}: exists and is not a finished upcycling. Delete it or choose another output.")
    # Not the name: a dense folder that was moved is still the same model.
    other = [key for key in record if key != "dense" and found.get(key) != record[key]]
    if other:
        key = other[0]
        words = "of another dense model" if key == "dense_fingerprint" else f"with {key} {found.get(key)}"
        raise Refused(f"{output}: was made {words}. Delete it or choose another output.")
    return True


def make(dense: Path, output: Path, settings: Settings) -> None:
    """Make `output` unless it is finished already; raises Refused or Wrong, and then leaves nothing behind."""
    from transformers.utils import logging

    from tune.models.shards import DTYPES, checkpoint_in

    settings.check()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not dense.is_dir():
        raise Refused(f"{dense}: no such folder. Give the folder of a dense model.")
    config = read_config(dense)
    checkpoint = checkpoint_in(dense)
    parts = plan(dense, config, checkpoint, settings)
    if not any((dense / name).is_file() for name in TOKENIZERS):
        raise Refused(f"{dense}: holds no tokenizer ({', '.join(TOKENIZERS)}). Copy the one that belongs to it there.")
    record = record_of(dense, settings)
    if is_finished(output, record):
        print(f"{output}: already made with these settings, using it as it is (delete the folder to make it again)")
        return
    check_room(output, parts)
    start = time.monotonic()
    with replacing(output) as (folder, _):
        if is_finished(output, record):
            print(f"{output}: made by another process meanwhile, using it as it is")
            return
        count = sum(math.prod(part.shape) for part in parts)
        print(f"writing {count / 1e6:,.1f} M parameters as {settings.experts} experts a layer", flush=True)
        dtype = DTYPES[checkpoint.places["model.embed_tokens.weight"].dtype]
        write_weights(folder, parts, checkpoint, settings)
        mixtral_config(config, settings, dtype).save_pretrained(folder)
        copy_beside(dense, folder)
        write_readme(folder, dense, settings)
        write_json(folder / RECORD, record)
        measured = compare(dense, folder, checkpoint, settings)
        if not measured.clean <= LOGIT_TOLERANCE:  # not `>`: NaN must fail too
            raise Wrong(
                f"with the noise taken out, logits differ from the dense model by {measured.clean:.1e} of the largest "
                f"(bound {LOGIT_TOLERANCE:.0e})"
            )
    report(output, settings, measured, time.monotonic() - start)


def report(output: Path, settings: Settings, measured: Measured, seconds: float) -> None:
    """Print what was measured."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"with the noise taken out, float32: largest logit difference to the dense model {measured.clean:.1e} of the "
        f"largest logit (bound {LOGIT_TOLERANCE:.0e})\n"
        f"with the noise ({measured.noise:.2g} of a standard deviation as stored): {measured.noisy:.1e}; the same next "
        f"token in {measured.same_token:.0%} of places\n"
        f"router: the first of {settings.top_k} chosen experts has weight {measured.first:.2f}, the busiest expert "
        f"{measured.load:.2f} times the mean load (balanced 1, collapsed {settings.experts / settings.top_k:g})\n"
        f"{output}: made in {seconds:.0f} s, peak memory {peak / 1e9:.1f} GB"
    )


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, make the folder and return the exit code."""
    parser = argparse.ArgumentParser(description="Turn a dense Mistral or Llama folder into a Mixtral.")
    parser.add_argument("dense", type=Path, help="the folder of the dense model")
    parser.add_argument("output", type=Path, help="the folder to make")
    parser.add_argument("--experts", type=int, default=4, help="experts in each layer (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=2, help="experts that a token chooses (default: %(default)s)")
    parser.add_argument(
        "--noise", type=float, default=0.01, help="in standard deviations of each matrix (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise and the routers (default: %(default)s)")
    options = parser.parse_args(arguments)
    # Nothing here needs a hub, and a library that asks one anyway must fail at once instead of waiting.
    os.environ.update(
        HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false"
    )
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # its threads read ahead, which costs memory
    settings = Settings(options.experts, options.top_k, options.noise, options.seed)
    try:
        make(options.dense.absolute(), options.output.absolute(), settings)
    except (Refused, TuneError) as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"{options.output}: cannot be written ({error}). Free some space or choose another output.",
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
