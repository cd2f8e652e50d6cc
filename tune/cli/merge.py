"""`tune merge`.

Adds a run's adapter to its base and writes an ordinary model folder: the base's own safetensors files with the same
names, types and shards, the tokenizer, the chat template that trained, and a generation config that stops where
training did. Anything that loads a Hugging Face model loads it, without PEFT. One matrix is in memory at a time, so
the machine needs room on its disk, not in its memory. Tokens that `data.add_tokens` added make the embedding and the
output head longer by their rows, and the `vocab_size` in `config.json` larger.

`--base original`, the default, adds to the base's own weights. A 4-bit run has never seen those: it was trained on
their 4-bit form, and the adapter may have learned to make up for it. `--base quantized` merges into the 4-bit form
instead (unpacked again, in the base's type): exactly the function that was trained. The proof reports how far apart
the two are on your prompts, so that you can choose.

Every merge ends in a proof, written to `merge-proof.json`: each tensor is read back and held against the base and
stock PEFT's own adapter; the logits of base and adapter are compared with the merged model's on the run's held-out
prompts; tokenizer and chat template must give the token ids that training saw. A bound that is not kept ends with exit
code 3 and a file named UNPROVEN beside the weights. `--prove` proves a merge that is there once more, after it was
copied, say, or when a file of it is in doubt.

A merge that was killed goes on where it stopped when the same command is given again. A folder that exists is never
written into.

[What a merge proves](merge-proof.md) says what is compared and where the bounds come from.

## Exit codes

- 3: The proof failed. The weights are there, with UNPROVEN and the reasons beside them.

## Example

```
$ tune merge runs/quickstart
base original, 1 file, 272 tensors
merged 210 matrices in float32, rounded once to BF16
proving the weights: 1.1 s
proving the logits: 20.5 s

proof        the merged model is the trained model
  weights    210 tensors are base plus adapter, rounded once; the other 62 are the base's
  logits     max |Δ| 0.32 (bound 0.49), mean KL 7.3e-05 (bound 0.00011), top-1 99.53% (bound 98.83%)
             over 866 tokens of 10 prompts from the held-out data
  tokenizer  4 of 4 dialogues become the tokens that trained
4-bit base   with the adapter is what trained, and another model than this one: max |Δ| 14,
             mean KL 0.24, top-1 81.90%. --base quantized merges into that one instead
loss         2.1663 as trained, 2.1723 merged, on those prompts
merged       runs/quickstart/merged
next         tune generate runs/quickstart/merged "your prompt"
```
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tune.cli.own_code import tell_own_code
from tune.cli.program import command
from tune.errors import RunError, did_you_mean
from tune.export.place import check_free, find_output
from tune.folder import folder_of

if TYPE_CHECKING:
    from tune.export.subject import Base

BASES = ("original", "quantized")


def merge(run: str, output: str | None, base: str, prove: bool, quiet: bool) -> None:
    """Merge and prove, or only prove, and end with the figures and what to type next."""
    if base not in BASES:
        raise RunError(f"--base: there is no {base!r}. Write original or quantized.{did_you_mean(base, BASES)}")
    if output == "":
        raise RunError("--output: is empty. Give the name of a new folder.")
    place = Path(output).expanduser() if output is not None else find_output(run)
    found = folder_of(run)[0]  # a wrong name is told before anything is loaded
    if not prove:
        check_free(place)
    tell_own_code(found)

    from tune.cli.progress import ConsoleProgress, QuietProgress
    from tune.export.merge import merge as run_merge
    from tune.export.merge import prove_again

    progress = QuietProgress() if quiet else ConsoleProgress()
    try:
        merged = prove_again(run, output, progress) if prove else run_merge(run, output, cast("Base", base), progress)
    finally:
        progress.close()
    if not quiet:
        _summarise(merged.folder, merged.proof.content)


def _summarise(folder: Path, proof: dict[str, Any]) -> None:
    weights, logits, words = (proof["bounded"][part] for part in ("weights", "logits", "tokenizer"))
    largest, divergence, agreement = (logits[name] for name in ("max_abs_difference", "mean_kl", "top1_agreement"))
    prompts, losses = proof["prompts"], proof["reported"].get("loss")
    base = "base" if proof["base"] == "original" else "4-bit base"
    print("\nproof        the merged model is the trained model")
    print(
        f"  weights    {weights['adapted']} tensors are {base} plus adapter, rounded once; "
        f"the other {weights['tensors'] - weights['adapted']} are the {base}'s"
    )
    print(
        f"  logits     max |Δ| {largest['figure']:.2g} (bound {largest['bound']:.2g}), "
        f"mean KL {divergence['figure']:.2g} (bound {divergence['bound']:.2g}), "
        f"top-1 {agreement['figure']:.2%} (bound {agreement['bound']:.2%})"
    )
    print(f"             over {logits['positions']:,} tokens of {prompts['count']} prompts from the {prompts['from']}")
    print(f"  tokenizer  {words['equal']} of {words['dialogues']} dialogues become the tokens that trained")
    between = proof["reported"].get("trained_base")
    if between:
        print(
            f"4-bit base   with the adapter is what trained, and another model than this one: max |Δ| "
            f"{between['max_abs_difference']:.2g},\n             mean KL {between['mean_kl']:.2g}, top-1 "
            f"{between['top1_agreement']:.2%}. --base quantized merges into that one instead"
        )
    if losses:
        trained = losses.get("trained", losses["adapter"])
        print(f"loss         {trained:.4f} as trained, {losses['merged']:.4f} merged, on those prompts")
    print(f"merged       {folder}")
    print(f'next         {command("generate", str(folder))} "your prompt"')
