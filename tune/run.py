"""From a recipe to a finished run, on one page."""

from __future__ import annotations

import json
import math
import os
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune.errors import RecipeError, RunError, UntrustworthyError, UserError
from tune.folder import ADAPTER_FILES, RunFolder, explain_os_errors, file_digest, whole, write_file
from tune.recipe.later import refusals
from tune.recipe.load import hidden_keys, load_recipe, recipe_to_yaml
from tune.recipe.schema import Recipe

if TYPE_CHECKING:
    from peft import PeftModel

    from tune.adapters.coverage import Coverage
    from tune.data.added_tokens import Prepared
    from tune.data.load import Data
    from tune.models.load import LoadedBase
    from tune.planning.memory import RowPlan
    from tune.progress import Progress
    from tune.training.checkpoint import TrainingState
    from tune.training.devices import Devices
    from tune.training.trainer import Trainer


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """Where a run ended."""

    output: str
    steps: int
    adapter_step: int
    """The step whose adapter is in adapter/: the best by held-out loss, or the last."""
    measured_on: str
    """What the losses below are measured on: `held-out data` or `training data`."""
    loss_before: float
    loss_after: float
    """Of the adapter in adapter/, in nats per trained token."""
    tokens_per_second: float
    peak_memory_bytes: int
    adapter_files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the files in adapter/ that PEFT reads, by name."""
    own_code: str = ""
    """The files of the base's own Python code that ran, as `model.trust_remote_code` lets it; empty when none did."""
    already: bool = False
    """The run had finished before; nothing was trained now."""

    @property
    def adapter(self) -> Path:
        """The stock PEFT folder."""
        return Path(self.output) / "adapter"


def train(recipe: Recipe, resume: bool = False, progress: Progress | None = None) -> FinishedRun:
    """Train the adapter that a recipe describes.

    Args:
        recipe: from `load_recipe`.
        resume: go on from the newest whole checkpoint of the recipe's output, or from the start if there is none.
        progress: hears what happens; nothing is printed without one.

    Raises:
        UserError: something in the recipe, data, base or folder is the user's to mend; nothing was lost.
        UntrustworthyError: the loss diverged.
        StoppedError: SIGINT or SIGTERM, after a checkpoint.
    """
    from tune.progress import Progress
    from tune.training.devices import Devices
    from tune.training.out_of_memory import explained
    from tune.training.resume import check_alike
    from tune.training.together import ending_together

    refused = refusals(recipe)
    if refused:
        raise RecipeError(refused)
    assert recipe.output is not None
    run, devices = RunFolder(Path(os.path.expanduser(recipe.output))), Devices()
    heard = progress if progress is not None and devices.is_main else Progress()
    with ending_together(devices.rank, devices.processes, str(run.root)):
        check_alike(devices, recipe, resume)
        with explain_os_errors(run.root), explained(devices.device), ExitStack() as held:
            devices.first(lambda: held.enter_context(run.lock()))
            return _train_locked(recipe, resume, run, devices, heard)


def _train_locked(recipe: Recipe, resume: bool, run: RunFolder, devices: Devices, progress: Progress) -> FinishedRun:
    from tune.adapters.start import check_start_tokens, find_start
    from tune.data.added_tokens import prepare_tokenizer
    from tune.data.load import load_data
    from tune.export.push import check_push, push_command
    from tune.models.hub import fingerprint_base, read_config
    from tune.models.load import check_supported
    from tune.models.own_code import allow, announce
    from tune.models.sharding import local_bytes
    from tune.training.metrics import check_trackers
    from tune.training.optimizer import check_optimizer
    from tune.training.provenance import remember
    from tune.training.resume import check_same, check_sources, find_checkpoint
    from tune.training.trainer import Job, Trainer

    devices.first(lambda: run.check_start(resume))
    finished = run.read_finished()
    if finished is None:
        devices.first(lambda: check_push(recipe.push, run))
    if resume and not run.recipe.is_file():
        progress.line("resume from step 0: there is no run yet")
    check_optimizer(recipe.train, devices.device)
    check_trackers(recipe.tracking.to)
    code = announce(recipe.model, progress.line) if recipe.model.trust_remote_code else ""
    recipe = _pinned(recipe, run)
    model = recipe.model
    if problem := allow(model):  # by its commit, as the run goes by it from now on
        progress.warn(problem)
    check_supported(model, read_config(model.base, model.revision, model.trust_remote_code))
    if not model.trust_remote_code:
        announce(model, progress.line)
    words = prepare_tokenizer(recipe)
    tokenizer = words.tokenizer
    with progress.phase("reading data") as advance:
        data = load_data(recipe, tokenizer, advance)
    # What `auto` meant is part of what was trained: the saved recipe says it by name.
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"template": data.template.name})})

    base_fingerprint = fingerprint_base(model.base, model.revision)
    state = None
    if run.recipe.is_file():
        longer = check_same(run, recipe)
        if finished is not None and not longer:
            if recipe.push.repo is not None:
                progress.line(f"not published again. To publish it: {push_command(recipe.push, run)}")
            if not run.provenance.is_file():  # what is written down now must be what was trained on
                check_sources(run, data.fingerprint, base_fingerprint)
            devices.first(lambda: remember(run, recipe, data, words, base_fingerprint, again=False))
            return _already(run, finished)
        if finished is not None:
            devices.first(lambda: check_push(recipe.push, run))
        state = find_checkpoint(run, data.fingerprint, base_fingerprint, progress)
    start = find_start(recipe.adapter.start_from) if recipe.adapter.start_from is not None and state is None else None
    if start is not None:
        check_start_tokens(start, words.added)
    devices.wait()  # nobody changes the folder while another process still reads it

    base, adapted, coverage, rows = _adapt(recipe, data, words, state, start, devices, progress)
    local = [int(held) for held in devices.gather(str(local_bytes(base.model)))]
    fingerprints = (data.fingerprint, base_fingerprint)
    job = Job(recipe, run, adapted, data.train, data.eval, *fingerprints, base.packs, rows, devices, progress)
    trainer = Trainer(job, state.step if state is not None else None)
    devices.first(lambda: _begin(run, recipe, data, coverage, trainer.state.step))
    devices.first(lambda: remember(run, recipe, data, words, base_fingerprint))
    _tell(progress, data, words, coverage, local, base, trainer)

    state = trainer.run()
    result = replace(_result(recipe, run, state, data.eval is not None, devices), own_code=code)
    devices.first(lambda: _finish(run, recipe, tokenizer, data.template, result))
    if devices.is_main:  # the others need not wait: no work in common follows
        _publish(recipe, run, progress)
    return result


def _pinned(recipe: Recipe, run: RunFolder) -> Recipe:
    """The recipe with the commit of a base from the Hub, so that the run and its merge go on with these weights."""
    from tune.models.hub import commit_of, read_config

    model = recipe.model
    if model.revision is None and run.recipe.is_file():
        saved = load_recipe(run.recipe).model
        if saved.base == model.base:
            model = model.model_copy(update={"revision": saved.revision})
    read_config(model.base, model.revision, model.trust_remote_code)
    commit = commit_of(model.base, model.revision)
    if commit is not None:
        model = model.model_copy(update={"revision": commit})
    return recipe.model_copy(update={"model": model})


def _adapt(
    recipe: Recipe,
    data: Data,
    words: Prepared,
    state: TrainingState | None,
    start: Path | None,
    devices: Devices,
    progress: Progress,
) -> tuple[LoadedBase, PeftModel, Coverage, RowPlan]:
    """Load the base, attach the adapter, and check both against recipe and data."""
    from tune.adapters.coverage import check_coverage
    from tune.adapters.lora import attach, read_adapter, resolve_targets
    from tune.models.load import check_length, check_vocabulary, load_base
    from tune.models.vocabulary import grow_vocabulary
    from tune.planning.memory import RowPlan, keep_automatic, plan_rows
    from tune.training.recompute import recompute

    name = recipe.model.base
    if devices.sharded and words.ids:
        raise RecipeError(
            "data.add_tokens: rows of a vocabulary that is split over devices do not train in this version. Launch "
            "with --multi_gpu, which holds the base on each device, or choose a template whose tokens the base has."
        )
    parts = [part for part in (data.train, data.eval) if part is not None]
    longest = max(int(part.lengths.max()) for part in parts)
    with progress.phase("loading the base"):
        base = load_base(recipe.model, devices.device, sharded=devices.sharded)
        grow_vocabulary(base, name, words.ids)
    check_vocabulary(base, name, max(part.largest_id for part in parts))
    check_length(base.config, name, longest)
    claimed = resolve_targets(recipe.adapter, base, name, recipe.router)
    adapted = attach(base, recipe.adapter, name, recipe.train.seed, recipe.router, words.ids)
    if start is not None:
        read_adapter(start, adapted)
    coverage = check_coverage(base.model, claimed, recipe.model.quantization, words.ids)
    rows = _smallest(plan_rows(recipe.train, base.config, longest, base.model.dtype, devices.device), devices)
    if state is not None:
        before = RowPlan(state.row_tokens, state.recompute)
        rows = keep_automatic(recipe.train, rows, before, state.shortened_from)
    recompute(adapted, rows.recompute)
    return base, adapted, coverage, rows


def _smallest(rows: RowPlan, devices: Devices) -> RowPlan:
    """What fits on every device, where they have unequal memory free."""
    from tune.planning.memory import RECOMPUTED, RowPlan

    ways = list(RECOMPUTED)
    return RowPlan(-devices.agree(-rows.row_tokens), ways[devices.agree(ways.index(rows.recompute))])


def _already(run: RunFolder, finished: dict[str, Any]) -> FinishedRun:
    try:
        before = finished["loss_before"]
        before = float("nan") if before is None else before  # a base whose own loss is not finite
        return FinishedRun(**{**finished, "loss_before": before, "output": str(run.root), "already": True})
    except (TypeError, KeyError) as error:
        raise RunError(
            f"{run.finished}: was written by another version. Remove it; --resume writes it again."
        ) from error


def _begin(run: RunFolder, recipe: Recipe, data: Data, coverage: Coverage, step: int) -> None:
    """Write down what is about to be trained, from `step` on. From here on the folder holds a run."""
    from tune.training.checkpoint import forget_after, machine

    versions = machine()["versions"]
    header = [
        "# The recipe of this run, with every default. `tune train` accepts this file.",
        "# versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"# data: sha256 {data.fingerprint}",
    ]
    run.finished.unlink(missing_ok=True)  # first: a finished mark must never stand beside a longer recipe
    forget_after(run, step)
    write_file(run.recipe, "\n".join(header) + "\n" + recipe_to_yaml(recipe))
    write_file(run.coverage, json.dumps(coverage.to_json(), indent=1) + "\n")


def _tell(
    progress: Progress,
    data: Data,
    words: Prepared,
    coverage: Coverage,
    local: list[int],
    base: LoadedBase,
    trainer: Trainer,
) -> None:
    """The start-up table, and what a user should know before the first step.

    `local` is what each device holds of the frozen base, in bytes.
    """
    from tune.data.added_tokens import describe
    from tune.planning.memory import RECOMPUTED
    from tune.progress import size

    job = trainer.job
    report = data.report
    progress.coverage(coverage)
    progress.line(
        f"data {report.train_examples:,} examples, {report.train_tokens:,} tokens, "
        f"{report.train_trained / report.train_tokens:.0%} trained on; {report.eval_examples:,} held out"
    )
    if job.recipe.data.add_tokens:
        progress.line(describe(words.added))
    progress.line(job.devices.line)
    if len(local) > 1:
        alike = [(held, len(list(same))) for held, same in groupby(size(held) for held in local)]
        progress.line("local " + ", ".join(f"{count} x {held}" if count > 1 else held for held, count in alike))
    for line in coverage.lines:
        progress.line(line)
    progress.line(f"attention {base.attention}, {'packed' if job.packs else 'one example a row'}")
    progress.line(f"rows of {job.rows.row_tokens} tokens{RECOMPUTED[job.rows.recompute]}")
    batch = min(job.recipe.train.batch_size, trainer.order.epoch_length)
    progress.line(f"steps {trainer.total}, {batch:,} examples each")
    for warning in report.warnings():
        progress.warn(warning)
    if hidden := hidden_keys(job.recipe):
        progress.warn(
            f"{', '.join(hidden)}: {job.run.recipe} has *** in the place of a secret. To train by that file, write it "
            "there again"
        )
    for reason in base.declined:
        progress.warn(f"attention: {reason}, so {base.attention} is used")
    if batch < job.recipe.train.batch_size:
        examples = "1 example" if batch == 1 else f"{batch:,} examples"
        progress.warn(f"train.batch_size is {job.recipe.train.batch_size:,}, but an epoch has only {examples}")
    if job.recipe.adapter.dropout:
        progress.warn("dropout masks depend on how a step is split: other devices or rows give another adapter")
    if job.devices.unused_gpus:
        progress.warn(
            f"{job.devices.unused_gpus} more GPUs are idle. To use all: accelerate launch --multi_gpu "
            f"--num_processes {job.devices.unused_gpus + 1} -m tune train RECIPE"
        )


def _result(recipe: Recipe, run: RunFolder, state: TrainingState, held_out: bool, devices: Devices) -> FinishedRun:
    from tune.training.metrics import peak_memory_bytes

    best = state.best_step if state.best_step is not None and recipe.train.keep_best else None
    after = state.best_loss if best is not None else state.last_loss
    if after is None or not math.isfinite(after):
        measure = "no step had a finite one" if after is None else f"it is {after} at the end"
        raise UntrustworthyError(
            f"{run.root}: the loss diverged: of {state.step} steps on {'held-out' if held_out else 'training'} data, "
            f"{measure}. No adapter was written. Lower train.learning_rate, or look at the base's weights."
        )
    return FinishedRun(
        output=str(run.root),
        steps=state.step,
        adapter_step=best if best is not None else state.step,
        measured_on="held-out data" if held_out else "training data",
        loss_before=state.first_loss if state.first_loss is not None else float("nan"),
        loss_after=after,
        tokens_per_second=round(state.trained_tokens / max(state.trained_seconds, 1e-9), 1),
        peak_memory_bytes=peak_memory_bytes(devices.device),
    )


def _finish(run: RunFolder, recipe: Recipe, tokenizer: Any, template: Any, result: FinishedRun) -> None:
    """Write adapter/ from the chosen checkpoint, then the finished mark."""
    from tune.data.templates.default_system import with_system
    from tune.export.adapter import write_adapter
    from tune.export.card import adapter_card
    from tune.training.metrics import finite

    run.check_there()
    chosen = run.checkpoint(result.adapter_step)
    if not whole(chosen):
        raise RunError(
            f"{chosen}: the checkpoint to finish from is damaged or gone. Remove it and every later one; "
            "--resume then goes on from the one before, and trains it again."
        )
    losses = (result.loss_before, result.loss_after, result.measured_on, result.adapter_step)
    card = adapter_card(recipe, *losses, added=run.read_provenance().get("added_tokens"))
    with explain_os_errors(run.root, "finish with --resume"):
        write_adapter(run.adapter, chosen, tokenizer, with_system(template.jinja, recipe.data.system), card)
        summary = {key: value for key, value in asdict(result).items() if key != "already"}
        summary["adapter_files"] = {name: file_digest(run.adapter / name) for name in ADAPTER_FILES}
        write_file(run.finished, json.dumps(finite(summary), indent=1, allow_nan=False) + "\n")


def _publish(recipe: Recipe, run: RunFolder, progress: Progress) -> None:
    """Do what the recipe's `push` asks for: merge, prove, upload. The run is finished whatever comes of it."""
    from tune.export.merge import merge
    from tune.export.push import push_at_end, push_command

    if recipe.push.repo is None:
        return
    if recipe.push.merged:
        try:
            merge(run.root, progress=progress)
        except UserError as error:
            raise RunError(
                f"{error}\nThe run is finished, and not published. Merge it with `tune merge {run.root}`, then "
                f"publish it: {push_command(recipe.push, run)}"
            ) from error
    pushed = push_at_end(recipe.push, run, progress.line, progress.warn)
    if pushed is not None:
        progress.line(f"published {pushed.url}")
