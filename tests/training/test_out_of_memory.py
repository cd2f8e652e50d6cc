"""Memory that runs out costs time and no step: what is done again in less memory is the same to the bit."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.ranks import finish, start_work
from tests.tiny import write_model
from tests.training.jobs import tiny_recipe, write_rows
from tests.training.processes import fork, wait
from tune.cli.main import _run
from tune.errors import RecipeError
from tune.folder import RunFolder
from tune.planning.memory import RowPlan, keep_automatic, smaller
from tune.progress import Progress
from tune.recipe.schema import Train
from tune.run import train
from tune.training import step, trainer
from tune.training.out_of_memory import Shortage, is_out_of_memory

CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
SLOW = pytest.mark.slow
TIMES = ("tokens_per_second", "memory_bytes")
LONGEST = 150
"""Tokens of the longest example of `tiny_recipe`'s training data; a test below holds it to that."""


class Heard(Progress):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.warnings: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def adapter(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def logged(run: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key not in TIMES} for entry in entries]


def state(run: Path, number: int) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RunFolder(run).checkpoint(number) / "state.json").read_text())
    return content


def allocator(monkeypatch: pytest.MonkeyPatch, fits: Callable[[Any, int], bool]) -> list[int]:
    """Let the last layer of a model fail to allocate for a row unless `fits(model, tokens)`; return those rows.

    By then the row has activations, and a mixture's first layer has routed it.
    """
    failed: list[int] = []

    def failing(plain: Callable[..., Any]) -> Callable[..., Any]:
        def loss(model: Any, row: Any) -> Any:
            result = plain(model, row)
            if not fits(model, row.ids_1T.shape[1]):
                failed.append(row.ids_1T.shape[1])
                raise RuntimeError(f"{CPU} 1048576 bytes. Error code 12 (Cannot allocate memory)")
            return result

        return loss

    for name in ("row_loss", "row_loss_and_router_logits"):
        monkeypatch.setattr(step, name, failing(getattr(step, name)))
    return failed


def up_to(tokens: int) -> Callable[[Any, int], bool]:
    return lambda model, row: row <= tokens


def all_but_the_second_above(tokens: int) -> Callable[[Any, int], bool]:
    """A longer row fits once: when the next one does not, the step has gradients, counts and drawn masks already."""
    long = 0

    def fits(model: Any, row: int) -> bool:
        nonlocal long
        long += row > tokens
        return row <= tokens or long < 2

    return fits


def test_the_longest_example_is_as_long_as_the_tests_below_take_it_for(tmp_path: Path) -> None:
    from tune.data.load import load_data
    from tune.data.tokenizer import load_tokenizer

    recipe = tiny_recipe(tmp_path)
    assert int(load_data(recipe, load_tokenizer(recipe.model.base)).train.lengths.max()) == LONGEST


@pytest.mark.parametrize("family", [pytest.param("mistral", marks=SLOW), "mixtral"])
def test_a_step_done_again_is_the_step_of_shorter_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Dropout's masks and the experts' counts are those of a run that had such rows from the start."""
    changes = {"adapter__dropout": 0.2, "train__max_steps": 4, "train__save_every": 2}
    if family == "mixtral":
        changes |= {"adapter__targets": ["attention", "experts"], "router__balance_loss": 1.0}
    failed, heard = allocator(monkeypatch, all_but_the_second_above(300)), Heard()
    train(tiny_recipe(tmp_path, family, train__micro_batch_tokens=500, **changes), progress=heard)
    assert len(failed) == 1, "later steps have the shorter rows from the start"
    assert 300 < failed[0] <= 500
    (warning,) = [line for line in heard.warnings if "memory" in line]
    shorter = state(tmp_path / "run", 4)["row_tokens"]
    assert shorter == max(LONGEST, failed[0] // 2)
    assert f"memory ran out at a row of {failed[0]} tokens" in warning
    assert f"rows of at most {shorter} tokens" in warning
    again = tiny_recipe(
        tmp_path, family, output=tmp_path / "again", **{**changes, "train__micro_batch_tokens": shorter}
    )
    train(again)
    assert adapter(tmp_path / "run") == adapter(tmp_path / "again")
    assert logged(tmp_path / "run") == logged(tmp_path / "again")


def test_the_first_steps_are_those_of_the_longer_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only from the step that did not fit are rows shorter; what is done before is not touched."""
    changes = {"adapter__dropout": 0.2, "train__max_steps": 4, "train__save_every": 2}
    train(tiny_recipe(tmp_path, output=tmp_path / "long", train__micro_batch_tokens=500, **changes))
    steps_done = 0
    plain = trainer.Trainer._one_step

    def counted(self: trainer.Trainer) -> dict[str, Any]:
        nonlocal steps_done
        entry = plain(self)
        steps_done += 1
        return entry

    monkeypatch.setattr(trainer.Trainer, "_one_step", counted)
    allocator(monkeypatch, lambda model, row: steps_done < 2 or row <= 300)
    train(tiny_recipe(tmp_path, train__micro_batch_tokens=500, **changes))
    first, second = (logged(tmp_path / name) for name in ("long", "run"))
    assert first[:2] == second[:2]
    assert first[2]["loss"] != second[2]["loss"], "the masks depend on the rows"
    assert (state(tmp_path / "run", 2)["row_tokens"], state(tmp_path / "run", 2)["shortened_from"]) == (500, 0)
    assert state(tmp_path / "run", 4)["shortened_from"] == 500


@pytest.mark.parametrize("written", [pytest.param("auto", marks=SLOW), 500])
def test_a_resume_keeps_the_shorter_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str | int) -> None:
    changes = {"train__micro_batch_tokens": written, "adapter__dropout": 0.2, "train__save_every": 2}
    monkeypatch.setattr("tune.planning.memory.CPU_ROW_TOKENS", 500)
    failed = allocator(monkeypatch, up_to(300))
    run, first = RunFolder(tmp_path / "run"), {**changes, "train__max_steps": 4}
    train(tiny_recipe(tmp_path, **first))
    whole = adapter(run.root)
    run.finished.unlink()
    shutil.rmtree(run.checkpoint(4))
    failed.clear()
    train(tiny_recipe(tmp_path, **first), resume=True)
    assert failed == [], "the resumed run tried the long rows again"
    assert adapter(run.root) == whole
    # Another length in the recipe is a wish of its own.
    monkeypatch.undo()
    heard = Heard()
    longer = {**changes, "train__max_steps": 6, "train__micro_batch_tokens": 470}
    train(tiny_recipe(tmp_path, **longer), resume=True, progress=heard)
    assert "rows of 470 tokens" in heard.lines
    assert (state(run.root, 6)["row_tokens"], state(run.root, 6)["shortened_from"]) == (470, 0)


def recomputing(model: Any) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_rows_as_short_as_the_longest_example_are_recomputed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"adapter__dropout": 0.2, "train__max_steps": 3, "train__save_every": 1, "train__keep": 3}
    heard = Heard()
    with monkeypatch.context() as patch:
        failed = allocator(patch, lambda model, row: recomputing(model))
        train(tiny_recipe(tmp_path, train__micro_batch_tokens=500, **changes), progress=heard)
    assert len(failed) >= 2
    assert failed[-1] <= LONGEST < failed[0]
    assert [line for line in heard.warnings if "recomputation" in line] == [heard.warnings[-1]]
    last = state(tmp_path / "run", 3)
    assert last["recompute"] == "full"
    again = {"train__micro_batch_tokens": last["row_tokens"], "train__recompute": "full"}
    train(tiny_recipe(tmp_path, output=tmp_path / "again", **changes, **again))
    assert adapter(tmp_path / "run") == adapter(tmp_path / "again")
    assert logged(tmp_path / "run") == logged(tmp_path / "again")


@pytest.mark.parametrize(
    ("changes", "words", "absent"),
    [
        ({"train__recompute": "none"}, ["Set train.recompute: full and go on with --resume", "adamw_8bit"], ["nf4"]),
        pytest.param(
            {"train__recompute": "full", "model__quantization": "none", "train__optimizer": "adamw_8bit"},
            ["model.quantization: nf4", "Lower data.max_length"],
            ["train.recompute", "train.optimizer"],
            marks=SLOW,
        ),
    ],
)
def test_a_longest_example_that_does_not_fit_ends_the_run_with_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, changes: dict[str, Any], words: list[str],
    absent: list[str],
) -> None:  # fmt: skip
    tiny_recipe(tmp_path, train__micro_batch_tokens=500, train__max_steps=5, train__save_every=2, **changes)
    done = 0
    plain = trainer.Trainer._one_step

    def counted(self: trainer.Trainer) -> dict[str, Any]:
        nonlocal done
        entry = plain(self)
        done += 1
        return entry

    monkeypatch.setattr(trainer.Trainer, "_one_step", counted)
    allocator(monkeypatch, lambda model, row: done < 3 or row < 100)
    assert _run(["train", str(tmp_path / "recipe.yaml"), "--quiet"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "Traceback" not in said
    assert re.search(r"a row of \d+ tokens, and no row can be shorter", said)
    assert re.search(r"about [\d.]+ kB for weights, [\d.]+ kB for adapter and optimizer, [\d.]+ [kM]B for act", said)
    assert "there are" in said
    assert "on this cpu" in said
    assert "Step 3 is saved." in said
    assert all(word in said for word in words)
    assert not any(word in said for word in absent)
    assert RunFolder(tmp_path / "run").steps() == [2, 3], "step 3 was saved for the sake of this message alone"
    monkeypatch.undo()
    assert _run(["train", str(tmp_path / "recipe.yaml"), "--quiet", "--resume"]) == 0


def test_an_evaluation_is_done_again_in_shorter_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = {"data__eval": [str(tmp_path / "eval.jsonl")], "train__eval_every": 2, "train__max_steps": 4}
    train(tiny_recipe(tmp_path, output=tmp_path / "plain", **held_out))
    plain, failed, heard = trainer.row_loss, [], Heard()

    def failing(model: Any, row: Any) -> torch.Tensor:
        if row.ids_1T.shape[1] > 300:
            failed.append(row.ids_1T.shape[1])
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return plain(model, row)

    monkeypatch.setattr(trainer, "row_loss", failing)
    train(tiny_recipe(tmp_path, **held_out), progress=heard)
    assert len(failed) == 1, "the evaluation ends at the first row that does not fit, and the next has shorter ones"
    assert sum("memory ran out" in line for line in heard.warnings) == 1
    losses, expected = ([entry["eval_loss"] for entry in logged(tmp_path / name)[1::2]] for name in ("run", "plain"))
    assert losses == pytest.approx(expected, rel=1e-5)


def test_an_evaluation_that_never_fits_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(model: Any, row: Any) -> torch.Tensor:
        raise MemoryError

    monkeypatch.setattr(trainer, "row_loss", failing)
    with pytest.raises(RecipeError, match=r"memory ran out at a row .* No step was done\."):
        train(tiny_recipe(tmp_path, data__eval=[str(tmp_path / "eval.jsonl")], train__max_steps=4))


def test_what_a_failed_row_held_is_free_when_the_step_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, held, alive = step.row_loss, [], []

    def failing(model: Any, row: Any) -> torch.Tensor:
        alive.extend(reference() is not None for reference in held)
        loss = plain(model, row)
        held.clear()
        held.append(weakref.ref(loss.grad_fn))
        if row.ids_1T.shape[1] > 300:
            raise torch.OutOfMemoryError("CUDA out of memory")
        held.clear()
        return loss

    monkeypatch.setattr(step, "row_loss", failing)
    train(tiny_recipe(tmp_path, train__micro_batch_tokens=500, train__max_steps=1))
    assert alive == [False], "the graph of the row that did not fit"


def test_memory_that_runs_out_outside_of_a_row_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def failing(self: Any, *args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has 1 MiB free.")

    tiny_recipe(tmp_path, train__max_steps=2)
    monkeypatch.setattr(torch.optim.AdamW, "step", failing)
    assert _run(["train", str(tmp_path / "recipe.yaml"), "--quiet"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "memory ran out outside of any row (CUDA out of memory)" in said
    assert "adamw_8bit" in said


@pytest.mark.slow
def test_a_real_allocator_fails_and_the_run_goes_on(tmp_path: Path) -> None:
    """In a process whose address space ends soon after what it has: long rows do not fit, shorter ones do."""
    write_rows(tmp_path / "train.jsonl", 40)
    write_rows(tmp_path / "eval.jsonl", 1)
    long = {"train__micro_batch_tokens": 100_000, "train__batch_size": 40, "train__max_steps": 2}
    base = write_model(tmp_path / "wide", "mistral", intermediate_size=4096)
    tiny_recipe(tmp_path, base=base, model__quantization="none", **long)

    def narrow() -> int:
        plain = trainer.Trainer.run

        def limited(self: trainer.Trainer) -> Any:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + 150_000_000
            before = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
            try:
                return plain(self)
            finally:
                resource.setrlimit(resource.RLIMIT_AS, before)

        trainer.Trainer.run = limited  # type: ignore[method-assign]
        return _run(["train", str(tmp_path / "recipe.yaml")])

    code = wait(fork(narrow, tmp_path / "log"))
    log = (tmp_path / "log").read_text()
    assert code == 0, log
    assert "warning: memory ran out at a row of" in log
    assert state(tmp_path / "run", 2)["shortened_from"] == 100_000


@pytest.mark.parametrize("part", ["training", pytest.param("evaluation", marks=SLOW)])
def test_two_processes_take_the_shorter_rows_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Only the second one runs out of memory; both do the step again, and the adapter is that of shorter rows."""
    changes = {"train__max_steps": 3, "train__batch_size": 16, "adapter__dropout": 0.2}
    changes |= {"data__eval": [str(tmp_path / "eval.jsonl")], "train__eval_every": 1, "train__keep_best": False}
    tiny_recipe(tmp_path, train__micro_batch_tokens=500, **changes)
    where = step if part == "training" else trainer
    plain = where.row_loss

    def failing(model: Any, row: Any) -> torch.Tensor:
        if os.environ.get("RANK") == "1" and row.ids_1T.shape[1] > 300:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(model, row)

    with monkeypatch.context() as patch:
        patch.setattr(where, "row_loss", failing)
        work = lambda rank: _run(["train", str(tmp_path / "recipe.yaml")])  # noqa: E731
        assert finish(start_work(work, 2, tmp_path / "log")) == [0, 0], (tmp_path / "log.0").read_text()
    said = (tmp_path / "log.0").read_text()
    assert said.count("memory ran out") == 1
    assert "memory" not in (tmp_path / "log.1").read_text()
    shorter = state(tmp_path / "run", 3)["row_tokens"]
    assert LONGEST <= shorter <= 300

    tiny_recipe(tmp_path, output=tmp_path / "again", **{**changes, "train__micro_batch_tokens": shorter})
    assert finish(start_work(work, 2, tmp_path / "log")) == [0, 0]
    if part == "training":
        assert adapter(tmp_path / "run") == adapter(tmp_path / "again")
        assert logged(tmp_path / "run")[1:] == logged(tmp_path / "again")[1:]
    losses, expected = ([entry["eval_loss"] for entry in logged(tmp_path / name)] for name in ("run", "again"))
    assert losses == pytest.approx(expected, rel=1e-5)


def test_the_next_smaller_plan() -> None:
    plan = RowPlan(1000, "none")
    assert smaller(plan, 1000, 300, True) == RowPlan(500, "none")
    assert smaller(plan, 500, 300, True) == RowPlan(300, "none"), "never below the longest example"
    assert smaller(plan, 300, 300, True) == RowPlan(1000, "full")
    assert smaller(plan, 300, 300, False) is None
    assert smaller(RowPlan(300, "full"), 300, 300, True) is None
    assert smaller(RowPlan(100_000, "none"), 700, 300, True) == RowPlan(350, "none"), "from the row, not the plan"


def test_what_a_resume_keeps_of_a_plan() -> None:
    now, before = RowPlan(400, "none"), RowPlan(200, "full")
    for written, recompute, shortened, kept in (
        ("auto", "auto", 0, RowPlan(200, "full")),
        (400, "none", 400, RowPlan(200, "none")),
        (400, "none", 300, RowPlan(400, "none")),
        (400, "auto", 0, RowPlan(400, "full")),
    ):
        section = Train(micro_batch_tokens=written, recompute=recompute)  # type: ignore[arg-type]
        assert keep_automatic(section, now, before, shortened) == kept


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError(f"{CPU} 4 bytes."), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (OSError(28, "No space left on device"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_are_memory(error: Exception, is_memory: bool) -> None:
    assert is_out_of_memory(error) is is_memory


def test_any_other_error_passes() -> None:
    class Apart:
        sharded = False

    short = Shortage(Apart(), None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="other"), short.caught():
        raise ValueError("other")
    assert short.tokens == 0
    with short.caught():
        raise MemoryError
    assert short.tokens == 1
