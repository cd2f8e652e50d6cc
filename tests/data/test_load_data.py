"""From a recipe to examples and a report: what is kept, dropped, refused, counted and held out."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import yaml

from tests.data.conftest import fixture_path
from tune.data.batches import Order
from tune.data.examples import Examples
from tune.data.held_out import hold_out
from tune.data.load import load_data
from tune.errors import DataError
from tune.recipe.load import load_recipe


@pytest.fixture(scope="module")
def tokenizer():
    from tune.data.tokenizer import load_tokenizer

    return load_tokenizer(str(fixture_path("models/stories260K-mistral")))


@pytest.fixture(autouse=True)
def _nothing_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def recipe(tmp_path):
    """A recipe over rows; each source is (name, rows) or (name, rows, options)."""

    def make(*sources, **data):
        listed = []
        for name, rows, *options in sources:
            path = tmp_path / name
            if rows is not None:
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            listed.append({"path": str(path), **(options[0] if options else {})})
        return load_recipe({"model": {"base": "x"}, "data": {"train": listed, **data}, "output": str(tmp_path / "run")})

    return make


def alpaca(*numbers: int) -> list[dict[str, str]]:
    return [{"instruction": f"Say {n}.", "output": f"It is {n}, I say."} for n in numbers]


def texts(examples: Examples, tokenizer, *, trained: bool = False) -> list[str]:
    found = []
    for index in range(len(examples)):
        ids, mask = examples.example(index)
        found.append(tokenizer.decode(ids[mask] if trained else ids))
    return found


def problems(recipe, tokenizer) -> list[str]:
    with pytest.raises(DataError) as caught:
        load_data(recipe, tokenizer)
    return caught.value.problems


def test_examples_follow_the_sources_and_are_trained_on_their_answers(recipe, tokenizer):
    answer = "Ho, I say. " * 9 + "Ho."
    chat = [{"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": answer}]}]
    data = load_data(recipe(("a.jsonl", alpaca(1, 2)), ("b.jsonl", chat, {"template": "vicuna"})), tokenizer)
    train = data.train
    assert len(train) == 3
    assert train.source.tolist() == [0, 0, 1]
    assert [where.rpartition("/")[2] for where in map(train.where, range(3))] == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1"]
    assert texts(train, tokenizer, trained=True) == ["It is 1, I say.</s>", "It is 2, I say.</s>", f"{answer}</s>"]
    assert texts(train, tokenizer)[2].endswith(f"USER: Hi? ASSISTANT: {answer}</s>")
    assert (*(part.dtype for part in train.example(0)), train.source.dtype) == (np.int32, np.bool_, np.int32)
    assert (train.lengths.dtype, train.trained_counts.dtype, train.digests.dtype) == (np.int64, np.int64, np.uint64)
    assert train.digests.shape == (3, 2)
    assert train.lengths.sum() == train.tokens == data.report.train_tokens
    assert train.lengths.tolist() == [len(train.example(i)[0]) for i in range(3)]
    assert train.largest_id == max(train.example(i)[0].max() for i in range(3))
    assert train.trained_counts.tolist() == [int(train.example(i)[1].sum()) for i in range(3)]
    first, second = data.report.sources
    assert (first.format, first.template, first.rows, first.examples) == ("alpaca", "alpaca", 2, 2)
    assert (second.format, second.template, second.tokens) == ("messages", "vicuna", train.lengths[2])
    assert second.trained == train.trained_counts[2]
    assert first.length_max == train.lengths[:2].max()
    assert data.eval is None
    (warning,) = data.report.warnings()
    assert "several templates (alpaca, vicuna)" in warning
    assert "for whoever asks it: alpaca. data.template" in warning


def test_the_template_that_every_source_uses_is_the_one_that_is_saved(recipe, tokenizer):
    vicuna = {"template": "vicuna"}
    data = load_data(recipe(("a.jsonl", alpaca(1, 2), vicuna), ("b.jsonl", alpaca(3), vicuna)), tokenizer)
    assert data.template.name == "vicuna"
    assert data.report.warnings() == []
    mixed = (("a.jsonl", alpaca(1, 2), vicuna), ("b.jsonl", alpaca(3), {"template": "koala"}))
    data = load_data(recipe(*mixed), tokenizer)
    assert data.template.name == "alpaca"
    assert "alpaca, by which no example of them is written" in data.report.warnings()[0]


def test_files_that_no_example_came_of_are_named(recipe, tokenizer, tmp_path):
    made = recipe(("d", None), on_bad="drop")
    (tmp_path / "d").mkdir()
    for name, rows in (("a.jsonl", alpaca(*range(9))), ("b.jsonl", [{"x": 1}]), ("c.jsonl", [{"y": 1}])):
        (tmp_path / "d" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for start in ("fresh", "cached"):
        warnings = load_data(made, tokenizer).report.warnings()
        assert [w for w in warnings if "not one example came of" in w and "b.jsonl, " in w and "c.jsonl. " in w], start
    (tmp_path / "d" / "b.jsonl").unlink()
    (tmp_path / "d" / "c.jsonl").write_text(json.dumps(alpaca(20)[0]) + "\n")
    assert load_data(made, tokenizer).report.warnings() == []


def test_train_on(recipe, tokenizer):
    turns = [("user", "a b"), ("assistant", "one"), ("user", "c d"), ("assistant", "two")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in turns]}]
    both, last, all_of_it = (
        load_data(recipe(("a.jsonl", rows), template="vicuna", train_on=which), tokenizer).train
        for which in ("responses", "last_response", "all")
    )
    assert texts(both, tokenizer, trained=True) == ["one</s> two</s>"]
    assert texts(last, tokenizer, trained=True) == ["two</s>"]
    assert all_of_it.example(0)[1].tolist() == [False] + [True] * (all_of_it.tokens - 1)


def test_the_recipes_system_prompt_is_for_rows_without_one(recipe, tokenizer):
    rows = [*alpaca(1), {**alpaca(2)[0], "system": "Own."}]
    first, second = texts(load_data(recipe(("a.jsonl", rows), system="Ours."), tokenizer).train, tokenizer)
    assert "Ours.\n\n### Instruction:\nSay 1." in first
    assert "Own.\n\n### Instruction:\nSay 2." in second
    assert "Below is" not in first + second


def test_bad_rows_are_shown_three_at_a_time_with_their_count(recipe, tokenizer):
    empty = {"instruction": "x", "output": ""}
    rows = [*alpaca(1), empty, [1], empty, empty, *alpaca(2)]
    said = problems(recipe(("a.jsonl", rows)), tokenizer)
    assert len(said) == 4
    assert [line.rpartition("/")[2] for line in said[:3]] == [
        "a.jsonl:2: the answer is empty",
        "a.jsonl:3: is no object but [1]",
        "a.jsonl:4: the answer is empty",
    ]
    assert said[3] == "4 rows cannot be used. Mend the data, or set data.on_bad: drop."
    data = load_data(recipe(("a.jsonl", rows), on_bad="drop"), tokenizer)
    assert len(data.train) == 2
    assert data.report.sources[0].dropped_bad == 4
    assert "4 of 6 rows are dropped" in data.report.warnings()[0]


def test_turns_that_the_template_cannot_write_are_bad_rows(recipe, tokenizer):
    rows = [{"messages": [{"role": "assistant", "content": "x"}]}, *alpaca()]
    said = problems(recipe(("a.jsonl", rows), template="vicuna"), tokenizer)
    assert "a.jsonl:1: turn 1 is assistant's where template vicuna has user's" in said[0]
    assert said[1].startswith("1 row cannot be used. Mend the data")


def test_the_wrong_format_names_the_right_one(recipe, tokenizer):
    said = problems(recipe(("a.jsonl", alpaca(1, 2), {"format": "sharegpt"})), tokenizer)
    assert len(said) == 1
    assert "its rows are not sharegpt (" in said[0]
    assert "They fit format: alpaca." in said[0]


def test_auto_says_the_columns_when_nothing_fits(recipe, tokenizer):
    rows = [{"instruction": "x", "reply": "y"}]
    said = problems(recipe(("a.jsonl", rows)), tokenizer)
    assert "no format fits its rows (columns seen: instruction, reply)" in said[0]
    data = load_data(recipe(("a.jsonl", rows, {"columns": {"output": "reply"}})), tokenizer)
    assert data.report.sources[0].format == "alpaca"
    wrong = {"columns": {"answer": "reply"}, "format": "alpaca"}
    assert (
        "columns: names 'answer', which format alpaca does not have"
        in problems(recipe(("a.jsonl", rows, wrong)), tokenizer)[0]
    )


def test_long_examples_are_cut_dropped_or_refused(recipe, tokenizer):
    rows = [*alpaca(1), {"instruction": "Tell.", "output": "once upon a time " * 40}]
    whole = load_data(recipe(("a.jsonl", rows)), tokenizer).train
    limit = int(whole.lengths[1]) - 5
    cut = load_data(recipe(("a.jsonl", rows), max_length=limit), tokenizer)
    assert cut.train.lengths.tolist() == [whole.lengths[0], limit]
    assert cut.train.example(1)[0].tolist() == whole.example(1)[0][:limit].tolist()
    assert cut.train.example(1)[0][-1] != tokenizer.eos_token_id
    assert cut.report.sources[0].truncated == 1
    assert any("50% of the examples are cut" in warning for warning in cut.report.warnings())
    dropped = load_data(recipe(("a.jsonl", rows), max_length=limit, on_long="drop"), tokenizer)
    assert len(dropped.train) == 1
    assert dropped.report.sources[0].dropped_long == 1
    said = problems(recipe(("a.jsonl", rows), max_length=limit, on_long="error"), tokenizer)
    assert f"a.jsonl:2: is longer than data.max_length ({limit} tokens)" in said[0]


def test_rows_with_nothing_to_train_on_are_refused_or_dropped(recipe, tokenizer):
    rows = [*alpaca(1), {"instruction": "long " * 200, "output": "short"}]
    limit = 250
    said = problems(recipe(("a.jsonl", rows), max_length=limit), tokenizer)
    assert "a.jsonl:2: nothing of it is trained on" in said[0]
    assert len(said) == 2
    assert said[1].startswith("rows with nothing to train on: 1.")
    data = load_data(recipe(("a.jsonl", rows), max_length=limit, on_bad="drop"), tokenizer)
    assert (len(data.train), data.report.sources[0].dropped_untrained) == (1, 1)
    assert data.report.sources[0].truncated == 0
    left = problems(recipe(("a.jsonl", rows[1:]), max_length=limit, on_bad="drop"), tokenizer)
    assert left == [
        "data.train: no row is left (dropped: 1 whose prompt alone is longer than data.max_length 250). "
        f"Raise data.max_length; the longest row has {data.report.sources[0].length_max} tokens."
    ]


def test_what_became_of_the_rows_is_said_when_none_is_left(recipe, tokenizer):
    silent = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}]
    rows = [*silent, *silent, {"messages": []}]
    options = {"template": "vicuna", "on_bad": "drop"}
    assert problems(recipe(("a.jsonl", rows), **options), tokenizer) == [
        "data.train: no row is left (dropped: 2 with nothing to train on, 1 that cannot be used). "
        "Without data.on_bad: drop, the first of them are shown."
    ]
    long = problems(recipe(("a.jsonl", alpaca(1, 2)), max_length=8, on_long="drop"), tokenizer)
    assert long[0].startswith("data.train: no row is left (dropped: 2 longer than data.max_length 8). Raise data.max_")


def test_lengths_are_those_before_the_cut(recipe, tokenizer):
    rows = [{"instruction": "x", "output": "a " * n} for n in range(1, 101)]
    whole = load_data(recipe(("a.jsonl", rows)), tokenizer)
    lengths = sorted(whole.train.lengths.tolist())
    for on_long, truncated in (("truncate", 60), ("drop", 0)):
        cut = load_data(recipe(("a.jsonl", rows), max_length=lengths[39], on_long=on_long), tokenizer)
        source = cut.report.sources[0]
        assert (source.length_p50, source.length_p95, source.length_max) == (lengths[49], lengths[94], lengths[99])
        assert source.truncated == truncated
    cut = load_data(recipe(("a.jsonl", rows), max_length=lengths[39]), tokenizer)
    assert cut.report.warnings()[0].endswith(
        f"60% of the examples are cut at data.max_length ({lengths[39]}). "
        f"data.max_length={lengths[94]} would keep 95% whole."
    )
    kept = load_data(recipe(("a.jsonl", rows), max_length=lengths[94]), tokenizer)
    assert (kept.train.cut.sum(), kept.report.sources[0].truncated) == (5, 5)


def test_rows_of_one_line_are_counted_each(recipe, tokenizer, tmp_path):
    rows = [*alpaca(1), {"instruction": "x", "output": "a " * 90}]
    made = recipe(("a.json", None))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    limit = int(load_data(made, tokenizer).train.lengths[1]) - 1
    cut = load_data(recipe(("a.json", None), max_length=limit), tokenizer)
    assert cut.train.where(0) == cut.train.where(1)
    assert cut.train.cut.tolist() == [False, True]
    assert cut.train.select(np.array([1])).cut.tolist() == [True]
    assert cut.report.sources[0].truncated == 1


def test_a_weight_that_leaves_no_row_is_refused(recipe, tokenizer):
    one, other = ("a.jsonl", alpaca(1, 2, 3), {"weight": 0.1}), ("b.jsonl", alpaca(4, 5))
    for sources, index in (((one,), 0), ((other, one), 1)):
        (said,) = problems(recipe(*sources), tokenizer)
        assert said.startswith(f"data.train[{index}].weight: leaves none of its 3 examples in an epoch (0.1). ")
        least = float(said.partition("at least ")[2].partition(",")[0])
        assert said.endswith("a.jsonl.")
        mended = recipe(*sources[:-1], ("a.jsonl", alpaca(1, 2, 3), {"weight": least}))
        order = Order(load_data(mended, tokenizer).train.source, tuple(s.weight for s in mended.data.train), 8, 0)
        assert order.epoch_length == 2 * index + 1
    load_data(recipe(("a.jsonl", alpaca(1, 2, 3), {"weight": 0.2})), tokenizer)


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"problem": "x", "solution": "y"}, "{instruction: problem, output: solution}"),
        ({"Prompt": "x", "completion": "y"}, "{prompt: Prompt}"),
        ({"instruction": "x", "reply": "y"}, "{output: reply}"),
        ({"problem": "x", "context": "c", "reply": "y"}, "{question: problem, answer: reply}"),
        ({"dialog": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, "{messages: dialog}"),
        ({"turns": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}, "{conversations: turns}"),
    ],
)
def test_the_map_of_columns_that_is_near_is_shown_and_works(recipe, tokenizer, row, columns):
    (said,) = problems(recipe(("a.jsonl", [row])), tokenizer)
    assert f"Try columns: {columns} of the source." in said
    assert "Formats:" not in said  # the remedy is known
    mended = recipe(("a.jsonl", [row], {"columns": yaml.safe_load(columns)}), template="vicuna")
    assert len(load_data(mended, tokenizer).train) == 1


def test_a_map_that_lacks_a_column_is_completed(recipe, tokenizer):
    rows = [{"problem": "x", "reply": "y"}]
    for options in ({}, {"format": "alpaca"}):
        (said,) = problems(recipe(("a.jsonl", rows, {"columns": {"output": "reply"}, **options})), tokenizer)
        assert "Try columns: {output: reply, instruction: problem} of the source." in said


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("koala_test_set.jsonl", "Its rows hold prompts (column 'prompt') and no answers"),
        ("vicuna-bench-questions.jsonl", "Its rows hold prompts (column 'turns') and no answers"),
    ],
)
def test_rows_of_other_kinds_are_named_plainly(recipe, tokenizer, name, words):
    made = load_recipe({"model": {"base": "x"}, "data": {"train": str(fixture_path(f"data/{name}"))}, "output": "x"})
    assert words in problems(made, tokenizer)[0]


def test_a_path_keeps_its_letters_and_a_sentence_one_full_stop(recipe, tokenizer):
    turns = [{"role": "usr", "content": "x"}, {"role": "assistant", "content": "y"}]
    (said,) = problems(recipe(("s.jsonl", [{"messages": turns}])), tokenizer)
    assert "/s.jsonl:1: turn 1: unknown role 'usr'; roles here are system, user, assistant, tool. Did you mean" in said
    assert "The first: /" in said
    assert ".." not in said
    assert "?." not in said
    (said,) = problems(recipe(("s.jsonl", [3])), tokenizer)
    assert ": none of its rows (1) can be read. The first: /" in said
    assert said.endswith("s.jsonl:1: is no object but 3.")


def test_held_out_examples_stay_held_out_when_rows_are_added(recipe, tokenizer):
    numbers = list(range(120))
    few = load_data(recipe(("a.jsonl", alpaca(*numbers[:60])), eval=0.2), tokenizer)
    many = load_data(recipe(("a.jsonl", alpaca(*reversed(numbers))), eval=0.2), tokenizer)
    held, more = set(texts(few.eval, tokenizer)), set(texts(many.eval, tokenizer))
    assert 4 <= len(held) <= 22
    assert held < more
    assert not more & set(texts(few.train, tokenizer))
    assert len(few.train) + len(few.eval) == 60
    other = load_data(
        recipe(("a.jsonl", alpaca(*numbers[:60])), eval=0.2).model_copy(update={"train": seeded(7)}), tokenizer
    )
    assert set(texts(other.eval, tokenizer)) != held


def seeded(seed: int):
    from tune.recipe.schema import Train

    return Train(seed=seed)


def test_duplicates_are_counted_and_fall_on_one_side(recipe, tokenizer):
    data = load_data(recipe(("a.jsonl", alpaca(*range(30)) * 2), eval=0.3), tokenizer)
    train, held = texts(data.train, tokenizer), texts(data.eval, tokenizer)
    assert not set(train) & set(held)
    assert data.report.shared == 0
    assert data.report.duplicates == len(train) - len(set(train)) == len(train) // 2
    assert data.report.sources[0].duplicates == 30


def test_the_training_part_is_never_empty():
    one = Examples.of([range(10)], [[number > 3 for number in range(10)]])
    assert hold_out(one, 0.999999, 0) == (one, None)
    two = one.select(np.array([0, 0]))
    assert hold_out(two, 0.999999, 0) == (two, None)


def test_held_out_sources_and_what_they_share_with_training(recipe, tokenizer, tmp_path):
    path = tmp_path / "held.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in alpaca(3, 4, 9)))
    data = load_data(recipe(("a.jsonl", alpaca(1, 2, 3, 4)), eval=[str(path)]), tokenizer)
    assert (len(data.train), len(data.eval), data.report.shared) == (4, 3, 2)
    assert data.eval.source.tolist() == [0, 0, 0]
    assert [source.part for source in data.report.sources] == ["train", "eval"]
    assert any("2 of 3 held-out examples are in the training data" in w for w in data.report.warnings())


def test_a_fraction_that_picks_nothing_is_said(recipe, tokenizer):
    data = load_data(recipe(("a.jsonl", alpaca(1, 2)), eval=0.0001), tokenizer)
    assert data.eval is None
    assert any("nothing is held out" in warning for warning in data.report.warnings())


def test_a_small_trained_share_is_said(recipe, tokenizer):
    rows = [{"instruction": "word " * 400, "output": "yes"}]
    assert any(
        "only" in w and "of the tokens are trained on" in w
        for w in load_data(recipe(("a.jsonl", rows)), tokenizer).report.warnings()
    )


def test_answers_without_an_end_are_said(recipe, tokenizer, tmp_path):
    path = tmp_path / "endless.jinja"
    path.write_text(
        "{{ bos_token }}{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    data = load_data(recipe(("a.jsonl", alpaca(1, 2)), template=str(path)), tokenizer)
    assert any("2 training examples end without an end-of-turn token" in w for w in data.report.warnings())


def test_the_fingerprint_is_of_the_content(recipe, tokenizer):
    def of(*sources, **data) -> str:
        return load_data(recipe(*sources, **data), tokenizer).fingerprint

    first = of(("a.jsonl", alpaca(1, 2)))
    assert len(first) == 64
    assert first == of(("b.jsonl", alpaca(1, 2)))
    assert len({first, of(("a.jsonl", alpaca(2, 1))), of(("a.jsonl", alpaca(1, 2)), train_on="all")}) == 3


def test_progress_reaches_the_total(recipe, tokenizer, monkeypatch):
    monkeypatch.setattr("tune.data.reading.CHUNK", 3)
    calls = []
    load_data(
        recipe(("a.jsonl", alpaca(*range(5))), ("b.jsonl", alpaca(7))), tokenizer, lambda *call: calls.append(call)
    )
    assert calls == [(5, 0), (6, 0)]


def test_select_and_chunks_change_nothing(recipe, tokenizer, monkeypatch):
    made = recipe(("a.jsonl", alpaca(*range(20))))
    whole = load_data(made, tokenizer)
    monkeypatch.setattr("tune.data.reading.CHUNK", 3)
    monkeypatch.setattr("tune.data.reading.LOOKED_AT", 2)
    assert load_data(made, tokenizer, cached=False).fingerprint == whole.fingerprint
    order = np.array([4, 0, 19, 4])
    chosen = whole.train.select(order)
    for position, index in enumerate(order):
        for ours, theirs in zip(chosen.example(position), whole.train.example(index), strict=True):
            assert ours.tolist() == theirs.tolist()
    assert [chosen.where(i) for i in range(4)] == [whole.train.where(i) for i in order]


@pytest.mark.parametrize(
    ("name", "options", "rows", "fmt"),
    [
        ("sharegpt-identity.json", {}, 500, "sharegpt"),
        ("gpteacher-roleplay.json", {"columns": {"output": "response"}}, 300, "alpaca"),
    ],
)
def test_real_data_is_read(tokenizer, name, options, rows, fmt):
    source = {"path": str(fixture_path(f"data/{name}")), "limit": 300 if rows == 300 else None, **options}
    made = load_recipe({"model": {"base": "x"}, "data": {"train": [source], "on_bad": "drop"}, "output": "x"})
    report = load_data(made, tokenizer).report.sources[0]
    assert (report.rows, report.format) == (rows, fmt)
    assert report.examples + report.dropped_bad + report.dropped_untrained == rows
    assert report.examples > 0.95 * rows


def test_all_overrides_what_turns_say_and_counts_are_said_in_the_singular(recipe, tokenizer):
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    rows = [
        {"messages": [*turns, turns[0], {**turns[1], key: value}]} for key, value in (("weight", 0), ("train", False))
    ]
    for row in rows:
        by_default, everything = (
            load_data(recipe(("a.jsonl", [row]), template="vicuna", train_on=train_on), tokenizer).report
            for train_on in ("responses", "all")
        )
        assert 0 < by_default.train_trained < by_default.train_tokens - 1
        assert everything.train_trained == everything.train_tokens - 1
    pair = {"prompt": turns, "completion": [turns[0], turns[1]]}
    report = load_data(recipe(("a.jsonl", [pair]), template="vicuna", train_on="all"), tokenizer).report
    assert report.train_trained == report.train_tokens - 1
    (said,) = [w for w in replace(report, unended=1).warnings() if "end-of-turn" in w]
    assert said.startswith("1 training example ends without an end-of-turn token")


def test_the_end_of_a_cut_example_is_not_learnt(recipe, tokenizer):
    whole = load_data(recipe(("a.jsonl", alpaca(1))), tokenizer).train
    ids, trained = whole.example(0)
    assert ids[-1] == tokenizer.eos_token_id
    assert trained[-1]
    cut, _ = load_data(recipe(("a.jsonl", alpaca(1)), max_length=len(ids) - 1), tokenizer).train.example(0)
    assert cut.tolist() == ids[:-1].tolist()
