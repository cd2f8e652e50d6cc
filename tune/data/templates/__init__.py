"""How conversations are written as prompts: one small file a template, and one line here."""

from __future__ import annotations

from tune.data.templates.alpaca import Alpaca
from tune.data.templates.chatml import ChatML
from tune.data.templates.codellama import CodeLlama
from tune.data.templates.falcon import Falcon
from tune.data.templates.koala import Koala
from tune.data.templates.llama_2 import Llama2
from tune.data.templates.mistral import MistralV1
from tune.data.templates.mistral_v3 import MistralV2, MistralV3
from tune.data.templates.plain import Plain
from tune.data.templates.segment import Segment, Template
from tune.data.templates.vicuna import Vicuna
from tune.data.templates.zephyr import Zephyr

__all__ = ["TEMPLATES", "Segment", "Template"]

TEMPLATES: dict[str, Template] = {
    "alpaca": Alpaca(),
    "vicuna": Vicuna(),
    "koala": Koala(),
    "mistral-v1": MistralV1(),
    "mistral-v2": MistralV2(),
    "mistral-v3": MistralV3(),
    "llama-2": Llama2(),
    "codellama": CodeLlama(),
    "zephyr": Zephyr(),
    "chatml": ChatML(),
    "falcon": Falcon(),
    "plain": Plain(),
}
