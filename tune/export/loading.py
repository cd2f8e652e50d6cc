"""How a published adapter or model is loaded, as code that runs when it is copied."""

from __future__ import annotations

from tune.export.facts import Facts
from tune.export.prompt import QUESTION

_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank."""


def adapter_loading(facts: Facts) -> str:
    """The section's text for an adapter: PEFT, transformers, vLLM."""
    place = facts.repo or "PATH/TO/THIS/FOLDER"
    base = facts.base or f"PATH/TO/{'THE/BASE' if facts.base_words == 'unknown' else facts.base_words}"
    with_peft = [
        *_imports(facts, "from peft import PeftModel"),
        *_load(facts, "base", base),
        *_resize(facts),
        f'model = PeftModel.from_pretrained(base, "{place}")',
        *_ask(facts, place),
    ]
    if facts.added:
        # transformers' own load_adapter leaves such rows out in some versions, and says so in a table of keys at most.
        return (
            f"With PEFT:\n\n{_block('python', with_peft)}\n\nThe rows of its own tokens are read by PEFT alone: not by "
            "vLLM, and not by every version of transformers' `load_adapter`. For those, merge it into the base (`tune "
            "merge`) and use the merged model."
        )
    with_transformers = [
        *_imports(facts),
        *_load(facts, "model", base),
        f'model.load_adapter("{place}")',
        *_ask(facts, place),
    ]
    parts = [
        "With PEFT:",
        _block("python", with_peft),
        "With transformers alone (PEFT must be installed):",
        _block("python", with_transformers),
    ]
    return "\n\n".join([*parts, *_serving(facts, place, base)])


def _serving(facts: Facts, place: str, base: str) -> list[str]:
    """vLLM over the base, with what is to be known about it."""
    name = (facts.repo or "x/adapter").partition("/")[2]
    adapter = facts.recipe.adapter
    highest = max([adapter.rank, *adapter.ranks.values()])
    rank = next((allowed for allowed in _VLLM_RANKS if allowed >= highest), highest)
    fetch = [f"hf download {place} chat_template.jinja --local-dir ."] if facts.repo else []
    serve = [
        *fetch,
        f"vllm serve {base} --enable-lora --lora-modules {name}={place} --max-lora-rank {rank} \\",
        f"    --chat-template {'chat_template.jinja' if facts.repo else place + '/chat_template.jinja'}",
    ]
    parts = [
        f"With vLLM, where the adapter is the model named `{name}`:",
        _block("bash", serve),
    ]
    if facts.recipe.model.quantization == "nf4":
        parts.append(
            "It was trained over the base in NF4, and the code above loads it so. vLLM serves the base in 16 bits, "
            "which is another model than the one that was adapted; `--quantization bitsandbytes` is nearer."
        )
    return parts


def merged_loading(facts: Facts) -> str:
    """The section's text for a merged model: transformers, PEFT for the adapter beside it, vLLM."""
    place = facts.repo or "PATH/TO/THIS/FOLDER"
    code = ", trust_remote_code=True" if facts.recipe.model.trust_remote_code else ""
    with_transformers = [
        "import torch",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{place}", dtype="auto"{code})',
        *_ask(facts, place),
    ]
    parts = [
        "With transformers:",
        _block("python", with_transformers),
        "With vLLM:",
        _block("bash", [f"vllm serve {place}"]),
    ]
    if facts.repo and facts.base:
        with_peft = [
            *_imports(facts, "from peft import PeftModel"),
            *_load(facts, "base", facts.base),
            *_resize(facts),
            f'model = PeftModel.from_pretrained(base, "{place}", subfolder="adapter")',
            *_ask(facts, place),
        ]
        parts += ["The adapter alone is in `adapter/`. With PEFT, over the base:", _block("python", with_peft)]
    return "\n\n".join(parts)


def _block(language: str, lines: list[str]) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def _imports(facts: Facts, *more: str) -> list[str]:
    classes = "AutoModelForCausalLM, AutoTokenizer"
    if facts.recipe.model.quantization == "nf4":
        classes += ", BitsAndBytesConfig"
    return ["import torch", *more, f"from transformers import {classes}", ""]


def _load(facts: Facts, variable: str, base: str) -> list[str]:
    """The lines that load the base as it was trained over."""
    model = facts.recipe.model
    code = ", trust_remote_code=True" if model.trust_remote_code else ""
    if model.quantization == "none":
        return [f'{variable} = AutoModelForCausalLM.from_pretrained("{base}", dtype=torch.{model.dtype}{code})']
    return [
        "nf4 = BitsAndBytesConfig(",
        '    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,',
        f"    bnb_4bit_compute_dtype=torch.{model.dtype},",
        ")",
        f"{variable} = AutoModelForCausalLM.from_pretrained(",
        f'    "{base}", dtype=torch.{model.dtype}, quantization_config=nf4{code}',
        ")",
    ]


def _resize(facts: Facts) -> list[str]:
    """The line that makes room for the rows of added tokens."""
    if facts.resize_to is None:
        return []
    return [f"base.resize_token_embeddings({facts.resize_to}, mean_resizing=False)  # the adapter fills the new rows"]


def _ask(facts: Facts, place: str) -> list[str]:
    """The lines that ask a question with the template that trained."""
    system = facts.recipe.data.system
    messages = [f'{{"role": "user", "content": "{QUESTION}"}}']
    if system:
        messages.insert(0, f'{{"role": "system", "content": {system!r}}}')
    stop = facts.prompt.stop if facts.prompt is not None else None
    ends = f", eos_token_id=tokenizer.convert_tokens_to_ids({stop!r})" if stop else ""
    return [
        f'tokenizer = AutoTokenizer.from_pretrained("{place}")',
        f"messages = [{', '.join(messages)}]",
        "ids = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
        ")",
        f"out = model.generate(**ids.to(model.device), max_new_tokens=100, do_sample=False{ends})",
        'print(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
