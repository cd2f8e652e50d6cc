"""Tiny random models of every family, written to disk as a user would have them, with a small tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCABULARY = 384

SIZES: dict[str, dict[str, Any]] = {
    "mistral": {"intermediate_size": 128, "num_key_value_heads": 2, "sliding_window": None},
    "mixtral": {"intermediate_size": 128, "num_key_value_heads": 2, "num_local_experts": 4, "sliding_window": None},
    "olmoe": {"intermediate_size": 128, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 128,
    },
    "qwen3_moe": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
    },
    "llama": {"intermediate_size": 128, "num_key_value_heads": 2},
    "falcon": {"multi_query": True, "new_decoder_architecture": False, "alibi": False},
    "bloom": {},
}


def write_tokenizer(folder: Path, chat_template: str | None = None) -> None:
    """A byte-level BPE over a few English words, with <s> and </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    text = "Below is an instruction that describes a task. Write a response that completes the request. "
    tokenizer.train_from_iterator([text * 3, "### Instruction:\n### Response:\n### Input:\n" * 3], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = chat_template
    fast.save_pretrained(folder)


def write_model(folder: Path, family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Path:
    """Write a random model of `family` with hidden size 64 and two layers; `changes` go into its config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
        **SIZES.get(family, {}),
        **changes,
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # the usual 0.02 leaves logits so flat that differences would hide in them
                parameter.normal_(0, 0.08)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def dequantized_twin(base: Any, path: Path) -> Any:
    """A stock float32 transformers model that holds the dequantised weights of a model loaded by us."""
    import bitsandbytes as bnb
    from transformers import AutoModelForCausalLM

    from tune.kernels.nf4_linear import dequantize
    from tune.models.experts import STACKS, NF4Experts

    stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ours = dict(base.named_modules())
    for name, module in stock.named_modules():
        twin = ours.get(name)  # packed experts have no module for their activation
        if isinstance(twin, bnb.nn.Linear4bit):
            with torch.no_grad():
                module.weight.copy_(dequantize(twin.weight, twin.weight.quant_state, torch.float32))
        if isinstance(twin, NF4Experts):
            with torch.no_grad():
                for stack in STACKS:
                    packed = getattr(twin, stack)
                    getattr(module, stack).copy_(dequantize(packed, packed.quant_state, torch.float32))
    return stock.eval()
