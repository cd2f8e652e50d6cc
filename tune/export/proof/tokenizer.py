"""The tokenizer part of a proof: stock transformers, given the merged folder alone, writes the ids that trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tune.data.hub import one_line
from tune.data.templates import sandbox
from tune.data.templates.jinja_writing import JinjaWriting
from tune.data.tokenizer import vocabulary_digest
from tune.export.subject import Subject
from tune.export.words import answer_ends


def check_tokenizer(subject: Subject, folder: Path, reasons: list[str]) -> dict[str, Any]:
    """Compare vocabulary, chat template and the ids of dialogues; add to `reasons` what is wrong."""
    from transformers import AutoTokenizer, GenerationConfig

    words = subject.provenance["words"]
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=subject.trusts(folder))
        vocabulary = vocabulary_digest(tokenizer)
        generation = GenerationConfig.from_pretrained(str(folder)).eos_token_id
        written = [_ids(tokenizer, dialogue["messages"]) for dialogue in words["dialogues"]]
    # A broken tokenizer or template raises what its library likes; here each is one more way to fail.
    except Exception as error:
        reasons.append(f"tokenizer: transformers cannot use the merged folder's ({one_line(error)})")
        return {"dialogues": len(words["dialogues"]), "equal": 0}
    if vocabulary != words["vocabulary"]:
        reasons.append("tokenizer: its vocabulary is not the one that trained")
    if tokenizer.chat_template != subject.chat_template:
        reasons.append("tokenizer: the chat template is not the one that trained")
    stops = answer_ends(subject, None)
    if not set(_listed(stops)) <= set(_listed(generation)):
        reasons.append(f"tokenizer: generation_config.json ends answers at {generation}, and training at {stops}")
    different = [
        dialogue["messages"][0]["content"]
        for dialogue, ids in zip(words["dialogues"], written, strict=True)
        if ids != dialogue["ids"]
    ]
    if different:
        reasons.append(
            f"tokenizer: {len(different)} of {len(written)} dialogues become other tokens than in training, such as "
            f"the one that begins {different[0]!r}"
        )
    return {
        "dialogues": len(written),
        "equal": len(written) - len(different),
        "vocabulary": vocabulary,
    }


def _listed(ids: int | list[int] | None) -> list[int]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def _ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    # transformers renders in this process, so the template has to come to an end elsewhere first.
    sandbox.plain(JinjaWriting("of the merged folder", tokenizer.chat_template, tokenizer.special_tokens_map), messages)
    return [int(id) for id in tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]]
