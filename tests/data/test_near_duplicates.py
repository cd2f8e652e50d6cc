"""Near copies: found wherever one word differs, and never made of what the template writes."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import numpy as np
import pytest

from tune.data.conversation import Conversation, Message
from tune.data.encode import Encoded, Encoder
from tune.data.examples import Examples
from tune.data.near_duplicates import NearCopies, find_near_copies
from tune.data.shingles import Shingles, template_shingles
from tune.data.templates import TEMPLATES
from tune.data.templates.resolve import resolve_template

WORDS = ("lamp", "keeper", "tide", "harbour", "fog", "gull", "stair", "oil", "wick", "storm", "rope", "bell", "beacon")


def write(tokenizer, rows: list[tuple[str, str]], template: str = "alpaca", system: str | None = None) -> Examples:
    """Encode rows of (question, answer) as training does."""
    bound = resolve_template(template, tokenizer)
    opening = [Message("system", system)] if system else []
    prompts = [bound.segments(Conversation((*opening, Message("user", q), Message("assistant", a)))) for q, a in rows]
    encoded = Encoder(tokenizer).encode(prompts)
    assert all(isinstance(e, Encoded) for e in encoded)
    return Examples.of([e.ids for e in encoded], [np.array(e.trained, dtype=bool) for e in encoded])


def text(draw: random.Random, words: int) -> str:
    return " ".join(f"{draw.choice(WORDS)}{draw.randrange(100)}" for _ in range(words))


def changed(words: str, draw: random.Random) -> str:
    """One word of a text replaced."""
    listed = words.split()
    listed[draw.randrange(len(listed))] = "quite"
    return " ".join(listed)


def copies(found: np.ndarray) -> dict[int, int]:
    return {int(i): int(found[i]) for i in np.flatnonzero(found >= 0)}


def found_in(tokenizer, examples: Examples, template: str = "alpaca", system: str | None = None) -> NearCopies:
    around = template_shingles(resolve_template(template, tokenizer), tokenizer, system)
    return find_near_copies(examples, around=around)


@pytest.mark.parametrize("count", [2, 8, 400])
@pytest.mark.parametrize("template", ["alpaca", "vicuna", "mistral-v1", "plain"])
def test_one_template_makes_no_copies_of_short_rows(mistral_v1, template, count):
    if template not in TEMPLATES:
        pytest.skip(f"there is no template {template}")
    draw = random.Random(count)
    rows = [(f"What is {n} + {draw.randrange(100)}?", f"{draw.randrange(200)}") for n in range(count)]
    rows += [(f"Is a {draw.choice(WORDS)} larger than {n} steps?", "Yes.") for n in range(count)]
    examples = write(mistral_v1, rows, template)
    assert copies(found_in(mistral_v1, examples, template).train) == {}


def test_what_stands_around_every_text_would_else_be_the_similarity(mistral_v1):
    system = text(random.Random(9), 60)
    examples = write(mistral_v1, [("Is fog wet?", "Yes."), ("Does oil burn?", "Yes.")], system=system)
    assert copies(find_near_copies(examples).train) == {1: 0}
    assert copies(found_in(mistral_v1, examples, system=system).train) == {}


@pytest.mark.parametrize("template", ["alpaca", "vicuna", "mistral-v1"])
def test_a_word_changed_in_a_long_text_is_always_found(mistral_v1, template):
    draw = random.Random(1)
    rows = [(text(draw, 40), text(draw, 40)) for _ in range(150)]
    near = []
    for n, (question, answer) in enumerate(rows):
        near.append((changed(question, draw), answer) if n % 2 else (question, changed(answer, draw)))
    found = found_in(mistral_v1, write(mistral_v1, rows + near, template), template)
    assert copies(found.train) == {150 + n: n for n in range(150)}
    assert found.complete


def test_many_copies_of_one_row_are_all_found(mistral_v1):
    draw = random.Random(2)
    question, answer = text(draw, 20), text(draw, 200)
    rows = [(question, answer)] + [(question, changed(answer, draw)) for _ in range(300)]
    different = len(set(rows)) - 1
    assert len(copies(found_in(mistral_v1, write(mistral_v1, rows)).train)) == different > 100


def test_a_system_prompt_that_many_rows_share_is_no_similarity(mistral_v1):
    draw = random.Random(3)
    system = text(draw, 60)
    rows = [(text(draw, 6), draw.choice(["Yes.", "No."])) for _ in range(200)]
    examples = write(mistral_v1, rows, system=system)
    assert copies(found_in(mistral_v1, examples).train) == {}
    few = write(mistral_v1, rows[:5], system=system)
    assert copies(found_in(mistral_v1, few, system=system).train) == {}


def test_other_answers_to_one_long_prompt_are_no_copies(mistral_v1):
    draw = random.Random(4)
    page = text(draw, 120)
    rows = [(f"{page} Where is the {word}?", text(draw, 5)) for word in WORDS]
    assert copies(found_in(mistral_v1, write(mistral_v1, rows)).train) == {}


def test_a_copy_is_found_among_others_on_the_same_text(mistral_v1):
    draw = random.Random(10)
    page = text(draw, 120)
    rows = [(page, text(draw, 10)) for _ in range(10)]
    near = [(changed(page, draw), answer) for _, answer in reversed(rows)]
    found = found_in(mistral_v1, write(mistral_v1, rows + near))
    assert copies(found.train) == {10 + n: 9 - n for n in range(10)}


def test_what_is_trained_on_is_never_left_out_for_being_common(mistral_v1):
    draw = random.Random(11)
    system = text(draw, 60)
    rows = [(text(draw, 6), text(draw, 6)) for _ in range(200)]
    copied = [("Say it.", system), ("Say it.", changed(system, draw))]
    first, second = write(mistral_v1, rows, system=system), write(mistral_v1, copied)
    pairs = [part.example(i) for part in (first, second) for i in range(len(part))]
    examples = Examples.of([ids.tolist() for ids, _ in pairs], [mask.tolist() for _, mask in pairs])
    assert copies(found_in(mistral_v1, examples).train) == {201: 200}


def test_a_row_that_repeats_itself_does_not_make_its_words_common(mistral_v1):
    draw = random.Random(12)
    phrase = text(draw, 10)
    rows = [(text(draw, 6), text(draw, 6)) for _ in range(150)]
    rows += [(f"{phrase} " * 150 + ending, "Yes, it does.") for ending in ("Why?", "When?")]
    assert copies(found_in(mistral_v1, write(mistral_v1, rows)).train) == {151: 150}


def test_answers_are_compared_each_by_itself():
    draw = np.random.default_rng(13)
    prompts = draw.integers(100, 3000, (20, 60)).tolist()
    ids = [[*prompt, 7, 8, 9] for prompt in prompts] + [[*prompt, 7, 8, 20 + n] for n, prompt in enumerate(prompts)]
    masks = [[False] * 60 + [True] * 3] * 40
    # Two of four pairs of neighbours agree: (start, 7) and (7, 8).
    assert copies(find_near_copies(Examples.of(ids, masks)).train) == {20 + n: n for n in range(20)}


def test_equal_rows_are_not_counted_again(mistral_v1):
    draw = random.Random(5)
    row = (text(draw, 30), text(draw, 30))
    near = (row[0], changed(row[1], draw))
    examples = write(mistral_v1, [row, row, near, near, row])
    assert copies(found_in(mistral_v1, examples).train) == {2: 0}
    other = (text(draw, 30), text(draw, 30))
    examples = write(mistral_v1, [other, other, row, near])
    assert copies(found_in(mistral_v1, examples).train) == {3: 2}


def test_held_out_rows_are_compared_with_training_and_among_themselves(mistral_v1):
    draw = random.Random(6)
    rows = [(text(draw, 30), text(draw, 30)) for _ in range(12)]
    train = write(mistral_v1, rows[:10])
    held_out = [rows[3], (rows[4][0], changed(rows[4][1], draw)), rows[10], (changed(rows[10][0], draw), rows[10][1])]
    around = template_shingles(resolve_template("alpaca", mistral_v1), mistral_v1)
    found = find_near_copies(train, write(mistral_v1, [*held_out, held_out[1]]), around)
    assert copies(found.train) == {}
    assert copies(found.eval) == {3: 2}
    assert copies(found.shared) == {1: 4, 4: 4}


def by_hand(examples: Examples) -> set[int]:
    """The definition, one pair after the other."""
    sets, answers = [], []
    for i in range(len(examples)):
        ids, trained = examples.example(i)
        sets.append({tuple(ids[k : k + 5]) for k in range(len(ids) - 4)})
        said = [None, *ids[trained].tolist()]
        answers.append(set(pairwise(said)))
    near = set()
    for a, b in combinations(range(len(examples)), 2):
        alike = len(sets[a] & sets[b]) / len(sets[a] | sets[b])
        same = len(answers[a] & answers[b]) / len(answers[a] | answers[b])
        if alike >= 0.8 and same >= 0.5:
            near.add(b)
    return near


def test_it_is_what_the_definition_says():
    draw = np.random.default_rng(7)
    ids, masks = [], []
    for _ in range(60):
        length = int(draw.integers(5, 120))
        ids.append(draw.integers(0, 3000, length))
        masks.append(draw.random(length) < 0.5)
    for n in range(60):
        copied, mask = ids[n].copy(), masks[n].copy()
        for place in draw.integers(0, len(copied), draw.integers(1, 3)):
            copied[place] = 3000 + n
        ids.append(copied)
        masks.append(mask if n % 3 else ~mask)
    for mask in masks:
        mask[-1] = True
    examples = Examples.of([i.tolist() for i in ids], [m.tolist() for m in masks])
    wanted = by_hand(examples)
    assert len(wanted) > 10
    assert set(copies(find_near_copies(examples).train)) == wanted


def test_shingles_never_reach_over_the_end_of_an_example():
    lengths = [7, 1, 4, 5, 2, 9]
    encodings = [(np.arange(n, dtype=np.int32), np.arange(n) == n - 1) for n in lengths]
    shingles = Shingles.of(encodings)
    assert np.bincount(shingles.owners, minlength=6).tolist() == [3, 0, 0, 1, 0, 5]
    assert shingles.trained.tolist() == [False, False, True, True, False, False, False, False, True]
    alone = np.concatenate([Shingles.of([e]).hashes for e in encodings])
    assert np.array_equal(shingles.hashes, alone)


@pytest.mark.parametrize("ids", [[[1]], [[1], [2, 3]], [[1, 2, 3, 4], [1, 2, 3, 4, 5]]])
def test_examples_too_short_to_compare_are_left_alone(ids):
    examples = Examples.of(ids, [[True] * len(i) for i in ids])
    found = find_near_copies(examples, examples)
    assert copies(found.train) == copies(found.eval) == copies(found.shared) == {}


def test_a_search_that_would_not_end_says_that_it_is_not_complete(monkeypatch, mistral_v1):
    import tune.data.near_duplicates as module

    monkeypatch.setattr(module, "_MOST_COMPARED", 3)
    draw = random.Random(8)
    rows = [(text(draw, 30), text(draw, 30)) for _ in range(20)]
    found = found_in(mistral_v1, write(mistral_v1, rows + [(q, changed(a, draw)) for q, a in rows]))
    assert not found.complete
