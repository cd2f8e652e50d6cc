"""How conversations are written as prompts: one small file a template, and one line here."""

from __future__ import annotations

from tune.data.templates.alpaca import Alpaca
from tune.data.templates.chatml import ChatML
from tune.data.templates.mistral import MistralV1, MistralV3
from tune.data.templates.segment import Segment, Template
from tune.data.templates.vicuna import Vicuna

__all__ = ["TEMPLATES", "Segment", "Template"]

TEMPLATES: dict[str, Template] = {
    "alpaca": Alpaca(),
    "vicuna": Vicuna(),
    "mistral-v1": MistralV1(),
    "mistral-v3": MistralV3(),
    "chatml": ChatML(),
}
