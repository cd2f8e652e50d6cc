"""The loop around the step: schedule, evaluation, checkpoints, signals.

Everything that decides what happens next is in `TrainingState`, which every checkpoint holds; the order of the
data follows from the step's number. The loop is the same for every number of devices: processes deal the same
examples among themselves, sum once, and take every decision from numbers they share.
"""

from __future__ import annotations

import signal
import time
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from tune.adapters.lora import adapter_parameters
from tune.data.batches import Order, deal
from tune.data.collate import Row
from tune.data.examples import Examples
from tune.errors import RunError, StoppedError, UntrustworthyError
from tune.evaluation.loss import held_out_loss, rows_of
from tune.folder import RunFolder
from tune.models.sharding import local_bytes
from tune.planning.memory import RowPlan, memory_parts, smaller
from tune.progress import Progress
from tune.recipe.schema import Recipe
from tune.training.checkpoint import TrainingState, prune, restore_checkpoint, save_checkpoint
from tune.training.devices import Devices
from tune.training.metrics import Metrics, peak_memory_bytes
from tune.training.optimizer import all_finite, build_optimizer, build_scheduler
from tune.training.out_of_memory import DidNotFitError, Shortage, does_not_fit, free, said_of
from tune.training.recompute import recompute
from tune.training.router_balance import StepBalance, routers_of
from tune.training.signals import Signals
from tune.training.step import StepResult, row_loss, train_step


@dataclass(frozen=True, slots=True)
class Job:
    """What is trained on what, and how it is laid out."""

    recipe: Recipe
    run: RunFolder
    model: PeftModel
    train: Examples
    held_out: Examples | None
    data_fingerprint: str
    base_fingerprint: str
    packs: bool
    rows: RowPlan
    devices: Devices
    progress: Progress


class Trainer:
    """Trains one adapter from a given state to the end of its schedule."""

    def __init__(self, job: Job, resume_step: int | None) -> None:
        """Build optimizer, schedule and order; with `resume_step`, put back that checkpoint.

        Raises:
            RunError: the training would be shorter than the one it goes on with.
        """
        self.job = job
        train, data = job.recipe.train, job.recipe.data
        self.order = Order(
            job.train.source, tuple(source.weight for source in data.train), train.batch_size, train.seed
        )
        self.total = self.order.steps(train.epochs, train.max_steps)
        self.lengths, self.trained_counts = job.train.lengths, job.train.trained_counts
        self.named = list(adapter_parameters(job.model))
        self.parameters = [parameter for _, parameter in self.named]
        self.optimizer = build_optimizer(train, self.named, job.devices.device)
        self.state = TrainingState()
        if resume_step is not None:
            folder = job.run.checkpoint(resume_step)
            self.state = restore_checkpoint(folder, job.model, self.optimizer, self.named)
            if self.total < self.state.total_steps:
                raise RunError(
                    f"{job.run.root}: train.epochs and train.max_steps may only grow on --resume (they make "
                    f"{self.total} steps, were {self.state.total_steps}). Put them back, or start anew."
                )
            if self.state.total_steps != self.total:
                job.progress.line(f"schedule {self.total} steps, was {self.state.total_steps}: derived again")
        self.state.total_steps = self.total
        self.state.data_fingerprint, self.state.base_fingerprint = job.data_fingerprint, job.base_fingerprint
        if self.state.row_tokens != job.rows.row_tokens:
            self.state.shortened_from = 0
        self._plan(job.rows)
        self.scheduler = build_scheduler(train, self.optimizer, self.total, self.state.step)
        self.network: Any = job.model.get_base_model()
        self.routers = routers_of(self.network)
        self.signals = Signals()

    def run(self) -> TrainingState:
        """Train to the end and return the final state.

        Raises:
            UntrustworthyError: `max_bad_steps` steps in a row had no finite loss or gradient.
            StoppedError: SIGINT or SIGTERM came; the checkpoint of the last whole step is on the disk.
            RunError: the disk is full or gone.
            RecipeError: memory ran out, and nothing smaller is left to try.
        """
        job, train, state = self.job, self.job.recipe.train, self.state
        metrics = Metrics(job.run, job.recipe, job.devices, state.step)
        job.progress.steps(state.step, self.total)
        self.network.train()
        try:
            with self.signals.noted(job.progress.line):
                if job.held_out is not None and not state.first_eval_done:
                    state.first_loss = state.last_loss = self._evaluate()
                    state.first_eval_done = True
                    job.progress.evaluation(0, state.first_loss, best=False)
                if state.unlogged is None and state.step < self.total and self._out_of_patience():
                    job.progress.warn(
                        f"patience ended this run at step {state.step}; more steps do not go on from there"
                    )
                while state.unlogged is not None or (state.step < self.total and not self._out_of_patience()):
                    entry = state.unlogged = state.unlogged or self._one_step()
                    self._refuse_divergence(metrics, entry)
                    if self._due(train.eval_every) and job.held_out is not None:
                        entry["eval_loss"] = self._evaluate_and_compare()
                    state.unlogged = None
                    metrics.write(entry)
                    last = state.step == self.total or self._out_of_patience()
                    job.progress.step(entry, self.total, log=self._due(train.log_every))
                    stop = job.devices.agree(self.signals.number)
                    if stop or last or state.step == state.best_step or state.step % train.save_every == 0:
                        self._save()
                    if stop:
                        self._stop(stop)
        finally:
            metrics.close()
        return state

    def _one_step(self) -> dict[str, Any]:
        job, state = self.job, self.state
        started = time.perf_counter()
        chosen = self.order.step(state.step)
        tokens = int(self.lengths[chosen].sum())
        rate = self.optimizer.param_groups[0]["lr"]
        result = None
        while result is None:
            result = self._try_step(chosen, tokens)
        state.step += 1
        with warnings.catch_warnings():
            # A step that was not applied moves the schedule on all the same; torch takes that for a mistake.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.scheduler.step()
        self._count_bad(result)
        if result.router is not None and result.applied:
            state.expert_counts = result.router.counts
        seconds = time.perf_counter() - started
        state.trained_seconds += seconds
        state.trained_tokens += tokens
        if job.held_out is None and result.applied:
            state.first_loss = result.loss if state.first_loss is None else state.first_loss
            state.last_loss = result.loss
        entry = {
            "step": state.step,
            "loss": result.loss,
            "learning_rate": rate,
            "grad_norm": result.grad_norm,
            "tokens": tokens,
            "tokens_per_second": round(tokens / seconds, 1),
            "memory_bytes": peak_memory_bytes(job.devices.device),
        }
        if not result.applied:
            entry["examples"] = [job.train.where(number) for number in chosen]
        return entry if result.router is None else {**entry, "router": result.router.metrics()}

    def _try_step(self, chosen: list[int], tokens: int) -> StepResult | None:
        """Do a step; None if memory ran out, the plan is a smaller one now, and nothing else has changed."""
        job, train = self.job, self.job.recipe.train
        # Dropout draws from generators that depend on nothing but these three numbers.
        torch.manual_seed(_seed_of(train.seed, self.state.step, job.devices.rank))
        mine = deal(chosen, self.lengths, job.devices.count)[job.devices.rank]
        try:
            return train_step(
                self.network,
                rows_of(job.train, mine, self.rows.row_tokens, job.packs, job.devices.device),
                int(self.trained_counts[chosen].sum()),
                self.parameters,
                self.optimizer,
                train.max_grad_norm,
                job.devices,
                self._balance(tokens),
            )
        except DidNotFitError as error:
            did_not_fit = error.tokens
        self._need_less(did_not_fit, trains=True)
        return None

    def _plan(self, rows: RowPlan) -> None:
        self.rows = rows
        self.state.row_tokens, self.state.recompute = rows.row_tokens, rows.recompute

    def _need_less(self, did_not_fit: int, trains: bool) -> None:
        """Go over to the next smaller plan.

        Raises:
            RecipeError: there is none; a checkpoint of the last whole step is on the disk.
        """
        job, before, device = self.job, self.rows, self.job.devices.device
        free(device)
        longest = max(int(part.lengths.max()) for part in (job.train, job.held_out) if part is not None)
        automatic = job.recipe.train.recompute == "auto"
        after = smaller(before, did_not_fit, longest, may_recompute=trains and automatic)
        if after is None:
            weights = job.devices.agree(local_bytes(self.network))  # all say the same, or each would say its own
            parts = memory_parts(self.network, weights, job.recipe.train, before, did_not_fit)
            if self.state.step and self.state.step not in job.run.steps():
                self._save()
            saved = f"Step {self.state.step} is saved." if self.state.step else "No step was done."
            raise does_not_fit(job.recipe, before, parts, did_not_fit, longest, saved, device)
        job.progress.warn(said_of(before, after, did_not_fit, bool(job.recipe.adapter.dropout)))
        if after.row_tokens < before.row_tokens:
            self.state.shortened_from = self.state.shortened_from or before.row_tokens
        if after.recompute != before.recompute:
            recompute(job.model, after.recompute)
        self._plan(after)

    def _balance(self, tokens: int) -> StepBalance | None:
        if self.routers is None:
            return None
        weight = self.job.recipe.router.balance_loss
        return StepBalance(self.routers, weight, tokens, self.state.expert_counts, self.job.devices.device)

    def _count_bad(self, result: StepResult) -> None:
        state = self.state
        state.bad_steps = 0 if result.applied else state.bad_steps + 1
        if not result.applied:
            numbers = f"loss {result.loss}, gradient norm {result.grad_norm}"
            self.job.progress.warn(f"step {state.step}: {numbers}: not applied")

    def _refuse_divergence(self, metrics: Metrics, entry: dict[str, Any]) -> None:
        state, limit = self.state, self.job.recipe.train.max_bad_steps
        if state.bad_steps >= limit:
            metrics.write(entry)
            examples = self.order.step(state.step - 1)
            where = ", ".join(self.job.train.where(i) for i in examples[:3])
            raise UntrustworthyError(
                f"{self.job.run.root}: the loss diverged: {limit} steps in a row, the last of them step {state.step} "
                f"(rows such as {where}; all of them are in {self.job.run.metrics.name}), had no finite loss or "
                "gradient. Nothing of them was saved. Lower train.learning_rate, or look at those rows with "
                "`tune preview`."
            )

    def _due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step == self.total

    def _out_of_patience(self) -> bool:
        patience = self.job.recipe.train.patience
        return patience is not None and self.state.evaluations_since_best >= patience

    def _evaluate(self) -> float:
        """Return the held-out loss, in shorter rows if memory runs out.

        Raises:
            StoppedError: a signal came; if a step has been done, it is saved, and its evaluation comes on resume.
        """
        job = self.job
        assert job.held_out is not None
        while True:
            short = Shortage(job.devices, self.network)
            with job.progress.phase("evaluating") as advance:
                loss = held_out_loss(
                    self.network,
                    job.held_out,
                    partial(self._unless_over, short),
                    self.rows.row_tokens,
                    job.packs,
                    job.devices.device,
                    job.devices.rank,
                    job.devices.count,
                    job.devices.sum,
                    short.rows,
                    advance,
                )
            if stop := job.devices.agree(self.signals.number):
                if self.state.unlogged is not None:
                    self._save()
                self._stop(stop)
            did_not_fit = job.devices.agree(short.tokens)
            if not did_not_fit:
                return loss
            self._need_less(did_not_fit, trains=False)

    def _unless_over(self, short: Shortage, model: Any, row: Row) -> Tensor:
        """A row's loss, or zero where the evaluation will not count: all processes still have to meet at its end."""
        if not self.signals.number or self.job.devices.sharded:
            with short.caught(row):
                return row_loss(model, row)
        return torch.zeros((), device=self.job.devices.device)

    def _evaluate_and_compare(self) -> float:
        state = self.state
        loss = state.last_loss = self._evaluate()
        better = loss < (state.best_loss if state.best_loss is not None else float("inf"))
        if better:
            state.best_loss = loss
            state.evaluations_since_best = 0
            if self.job.recipe.train.keep_best:
                state.best_step = state.step
        else:
            state.evaluations_since_best += 1
        worse_than_base = state.first_loss is not None and loss >= state.first_loss
        self.job.progress.evaluation(state.step, loss, better and not worse_than_base)
        return loss

    def _save(self) -> None:
        job, state = self.job, self.state
        if not all_finite(self.optimizer, self.named):  # on every process, which all hold the same
            raise UntrustworthyError(
                f"{job.run.root}: the loss diverged: after step {state.step} the adapter or its moments hold numbers "
                "that are not finite. Nothing of it was saved. Lower train.learning_rate, and go on from the last "
                "checkpoint by starting another run with adapter.start_from."
            )

        def save() -> None:
            seed = job.recipe.train.seed
            save_checkpoint(job.run, state, job.model, self.optimizer, self.scheduler, self.named, seed)
            prune(job.run, job.recipe.train.keep, state.best_step)
            job.progress.checkpoint(state.step)

        job.devices.first(save)

    def _stop(self, number: int) -> None:
        name = signal.Signals(number).name
        saved = self.job.run.steps()
        at = f"after step {saved[-1]}" if saved else "before the first checkpoint"
        raise StoppedError(
            f"{self.job.run.root}: stopped by {name} {at}. Go on with the same command and --resume.", 128 + number
        )


def _seed_of(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
