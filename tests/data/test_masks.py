"""Which tokens are trained on, where segments end anywhere."""

from __future__ import annotations

import random
from bisect import bisect_left
from itertools import pairwise

from tests.data.conftest import PIECES, dialogues
from tune.data.encode import Encoder, _first_from
from tune.data.templates.resolve import resolve_template
from tune.data.templates.segment import Segment


def cut_anywhere(seed: int) -> list[Segment]:
    """Text in segments that end anywhere, within words and within characters of several code points."""
    draw = random.Random(seed)
    text = " ".join(draw.choices(PIECES, k=6)) + "e\u0301🙂👩‍👩‍👧你"
    edges = sorted({0, len(text), *(draw.randrange(len(text)) for _ in range(4))})
    return [Segment(text[start:end], trained=index % 2 == 1) for index, (start, end) in enumerate(pairwise(edges))]


def test_masks_are_those_of_the_offsets(mistral_v1, metaspace_v3, chatml):
    """A token is trained when it starts inside a trained segment, found without a list of all offsets."""
    for tokenizer, name in ((mistral_v1, "mistral-v1"), (metaspace_v3, "vicuna"), (chatml, "vicuna")):
        template = resolve_template(name, tokenizer)
        encoder = Encoder(tokenizer)
        prompts = [template.segments(conversation) for conversation in dialogues(60, seed=5)]
        prompts += map(cut_anywhere, range(100))
        looked_at = 0
        for prompt, encoded in zip(prompts, encoder.encode(prompts), strict=True):
            expected = bytearray()
            for part in encoder._parts(prompt):
                if not hasattr(part, "spans"):
                    expected.append(part.trained)
                    continue
                backend = encoder._later if part.continues else encoder._first
                for start, _ in backend.encode(part.text, add_special_tokens=False).offsets:
                    expected.append([trained for begin, trained in part.spans if begin <= start][-1])
                looked_at += len(part.spans) > 1
            if expected:
                expected[0] = 0
            assert encoded.trained == expected
        assert looked_at > 100


def test_the_first_token_from_a_character_on_is_that_of_a_search():
    """Also where tokens stand for no character, several for one, or one for several."""

    class Encoding:
        def __init__(self, offsets):
            self.offsets = offsets

        def token_to_chars(self, token):
            return self.offsets[token]

        def char_to_token(self, place):
            return next((i for i, (start, end) in enumerate(self.offsets) if start <= place < end), None)

    draw = random.Random(0)
    for _ in range(500):
        offsets, place = [], 0
        for _ in range(draw.randint(1, 6)):
            end = place + draw.choice((0, 1, 1, 2, 3))
            offsets += [(place, end)] * draw.choice((1, 1, 1, 2))
            place = end + draw.choice((0, 0, 0, 1))
        for start in range(1, place + 1):
            assert _first_from(Encoding(offsets), len(offsets), start) == bisect_left(offsets, (start, -1))


def test_a_character_of_which_the_tokenizer_keeps_nothing_ends_no_answer():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    backend.normalizer = normalizers.Replace("_", "")
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=backend))
    prompts = [
        [Segment("a b "), Segment("_ a b", trained=True)],
        [Segment("a b"), Segment("_", trained=True), Segment(" a b")],
        [Segment("a b"), Segment(" _", trained=True)],
    ]
    masks = [list(encoded.trained) for encoded in encoder.encode(prompts)]
    assert masks == [[0, 0, 1, 1], [0, 0, 0, 0], [0, 0]]
