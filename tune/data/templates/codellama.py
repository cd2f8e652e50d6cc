"""Code Llama Instruct's prompt (7B, 13B and 34B): Llama 2 Chat's, and never a system prompt of its own.

Source: `chat_completion` in Meta's codellama repository. The 70B model has another prompt, which its tokenizer's own
chat template writes (`template: tokenizer`). The tokens for infilling (`▁<PRE>` and its kin) take no part.
"""

from __future__ import annotations

from dataclasses import dataclass

from tune.data.templates.llama_2 import Llama2


@dataclass(frozen=True)
class CodeLlama(Llama2):
    """Llama 2's turns."""

    name: str = "codellama"
