"""Tokenizers and generated dialogues for the tests of the data."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tune.data.conversation import Conversation, Message

FIXTURES = Path(__file__).resolve().parents[3] / "shared" / "fixtures"
CHATML_OWN = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

PIECES = (
    "Hello",
    "hi there",
    "What is 2 + 2?",
    "naïve Ærøskøbing",
    "你好，世界",
    "🙂👩‍👩‍👧",
    "line one\nline two",
    "\n\n",
    "  ",
    "a  b   c",
    "def f(x):\n    return x",
    "[INST]",
    "[/INST]",
    "<s>",
    "</s>",
    "<|im_start|>user",
    "<unk>",
    "▁",
    "\t",
    "e\u0301",
    "### Response:",
    "USER:",
    "{{ x }}",
    "'quoted' \"twice\"",
)
LOOKALIKES = (
    *("[TOOL_CALLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "<<SYS>>\nx\n<</SYS>>", "<|im_end|>", "<|endoftext|>"),
    *("<|system|>", "<|user|>\n", "<|assistant|>", "GPT:", "BEGINNING OF CONVERSATION:", "User: a\n\nAssistant: b"),
    *("\r\n", "\n\n\n", "[/INST] ", " </s>", "<s>[INST]", "{% generation %}", "{{ eos_token }}"),
)
"""What templates write, as somebody may write it in a message."""
PLAIN_PIECES = tuple(piece for piece in PIECES if "<" not in piece and "[" not in piece)


def dialogues(
    count: int, *, pieces: tuple[str, ...] = PIECES, seed: int = 0, inputs: bool = False
) -> list[Conversation]:
    """Alternating dialogues of one to four answers, with all kinds of white space at the ends of turns."""
    rng = random.Random(seed)

    def text() -> str:
        words = rng.choices(pieces, k=rng.randint(1, 4))
        body = rng.choice(("", " ", "  ", "\n")) + rng.choice((" ", "", "\n")).join(words)
        body += rng.choice(("", "", " ", "  ", "\n", " \n"))
        return body if body.strip() else body + "x"

    made = []
    for _ in range(count):
        messages = [Message("system", text())] if rng.random() < 0.4 else []
        for _ in range(rng.randint(1, 4)):
            given = text() if inputs and rng.random() < 0.3 else None
            messages += [Message("user", text(), input=given), Message("assistant", text())]
        made.append(Conversation(tuple(messages)))
    return made


def as_dicts(conversation: Conversation) -> list[dict]:
    """The messages as a chat template gets them."""
    return [
        {"role": m.role, "content": m.content, **({"input": m.input} if m.input else {}), **m.extra}
        for m in conversation.messages
    ]


def fixture_path(name: str) -> Path:
    path = FIXTURES / name
    if not path.exists():
        pytest.skip(f"the fixture {name} is absent")
    return path


def _load(name: str):
    from tune.data.tokenizer import load_tokenizer

    return load_tokenizer(str(fixture_path(name)))


@pytest.fixture(scope="session")
def mistral_v1():
    return _load("tokenizers/mistral-v1")


@pytest.fixture(scope="session")
def mistral_v2(tmp_path_factory):
    """The first Mistral tokenizer with control tokens: a bare SentencePiece model, which is converted here."""
    from importlib.resources import files

    from tune.data.tokenizer import load_tokenizer

    package = pytest.importorskip("mistral_common")
    folder = tmp_path_factory.mktemp("mistral-v2")
    source = files(package) / "data" / "mistral_instruct_tokenizer_240216.model.v2"
    (folder / "tokenizer.model").write_bytes(source.read_bytes())
    return load_tokenizer(str(folder))


@pytest.fixture(scope="session")
def mistral_v3():
    return _load("tokenizers/mistral-v3")


@pytest.fixture(scope="session")
def metaspace_v3():
    """The v3 tokenizer as later conversions write it: a space before the first text only."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads((fixture_path("tokenizers/mistral-v3") / "tokenizer.json").read_text())
    state["normalizer"] = None
    state["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    backend = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def chatml():
    """A small byte-level tokenizer with ChatML's tokens and a chat template of its own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*PIECES, "user assistant system Hello there, the answer is 4"] * 4, trainer)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<|im_start|>", "<|im_end|>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML_OWN
    return tokenizer
