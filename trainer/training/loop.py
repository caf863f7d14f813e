"""The one loop that both stages share: windows in, AdamW steps out, a score and a checkpoint every so often.

What differs between the stages (model, loss, what is validated) comes as a `Phase`. The position of a training is one
number, the step: the plan says which windows batch k of epoch e holds, the learning rate is a function of the step,
early stopping is a function of the score files, and whatever is random is keyed by seed, epoch and window. So a resume
needs the weights, Adam's moments and the step, and nothing is replayed.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from trainer.config import Config, OptimisationConfig
from trainer.data.batches import Batch
from trainer.errors import InputError
from trainer.run import checkpoint
from trainer.run.directory import StageDirectory
from trainer.run.processes import StopRequest


@dataclass
class Phase:
    """One optimisation: a model, what it learns from, and how it is judged.

    `objective(batch, epoch)` gives (sum of losses over the batch, number of terms in the sum); the loss of a step is
    the sum over all processes divided by the count over all processes. `batches(step)` gives this process's part of the
    global batches from a step on, without end, through all epochs. `validate(step)` scores the current weights, writes
    the score file and returns its quality (`checkpoint.quality`). `schedule_steps` is the length of the learning rate's
    schedule: a refit of fewer steps follows the same one. `keeps_validated` keeps every checkpoint that was validated,
    not only the best.
    """

    title: str
    directory: StageDirectory
    model: nn.Module
    objective: nn.Module
    batches: Callable[[int], Iterator[Batch]]
    steps_per_epoch: int
    total_steps: int
    schedule_steps: int
    optimisation: OptimisationConfig
    facts: dict[str, Any] = field(default_factory=dict)
    validate: Callable[[int], float] | None = None
    validate_every: int = 0
    val_set_name: str = ""
    keeps_validated: bool = False


@dataclass
class Tally:
    """What has happened since the last line of the log."""

    losses: list[Tensor] = field(default_factory=list)
    windows: int = 0
    waited: float = 0.0
    since: float = field(default_factory=time.perf_counter)

    def reset(self) -> None:
        """Begin a new line."""
        self.losses, self.windows, self.waited, self.since = [], 0, 0.0, time.perf_counter()


def learning_rate(step: int, total: int, optimisation: OptimisationConfig) -> float:
    """Learning rate of step 0, 1, ...: linear warm-up, then constant or half a cosine to 0."""
    warmup = optimisation.warmup_steps
    if step < warmup:
        return optimisation.lr * (step + 1) / warmup
    if optimisation.schedule == "constant":
        return optimisation.lr
    progress = (step - warmup) / max(1, total - warmup)
    return optimisation.lr * 0.5 * (1.0 + math.cos(math.pi * progress))


def should_stop(history: Sequence[tuple[int, float]], patience: int | None) -> bool:
    """Whether the last `patience` validations of [(step, quality), ...] brought nothing better than those before."""
    if patience is None or len(history) <= patience:
        return False
    values = [value for _, value in sorted(history)]
    return max(values[-patience:]) <= max(values[:-patience])


class Training:
    """A phase under way: its optimizer, its position and its validations so far."""

    def __init__(self, phase: Phase, accelerator: Accelerator, config: Config, *, resume: bool) -> None:
        self.phase, self.accelerator, self.config = phase, accelerator, config
        phase.model.to(accelerator.device)
        optimizer = adamw(phase.model, phase.optimisation)
        self.step = restore(phase, optimizer) if resume else 0
        self.objective, self.optimizer = accelerator.prepare(phase.objective, optimizer)
        scored = checkpoint.qualities(phase.directory.read_scores(), phase.val_set_name)
        self.history = [(step, value) for step, value in scored.items() if step <= self.step]
        self.tally = Tally()

    def run(self) -> int:
        """Train to the end and return the last step.

        Raises:
            Interrupted: a signal asked for an end; the checkpoint of the last step is written.
            FloatingPointError: the loss is not finite.
        """
        if self._validates_here() and self.step and self.step not in dict(self.history):
            self._validate()  # the last start ended between the checkpoint and its score
        batches = self._batches()
        with StopRequest() as stop, self._progress_bar() as bar:
            while not self._is_done():
                epoch, batch = next(batches)
                loss, norm = self._learn(batch.to(self.accelerator.device, non_blocking=True), epoch)
                self.tally.losses.append(loss)
                self.tally.windows += len(batch.windows) * self.accelerator.num_processes
                bar.update()
                if self.step % self.config.log_every == 0 or self.step == self.phase.total_steps:
                    self._report(norm, bar)
                self._keep(stop, loss, norm)
        return self.step

    def _is_done(self) -> bool:
        patience = self.phase.optimisation.patience
        return self.step >= self.phase.total_steps or should_stop(self.history, patience)

    def _batches(self) -> Iterator[tuple[int, Batch]]:
        """(epoch, batch) from the current step on, without end; notes how long each was waited for."""
        batches = self.phase.batches(self.step)
        for step in itertools.count(self.step):
            start = time.perf_counter()
            batch = next(batches)
            self.tally.waited += time.perf_counter() - start
            yield step // self.phase.steps_per_epoch, batch

    def _learn(self, batch: Batch, epoch: int) -> tuple[Tensor, Tensor]:
        """One optimisation step; returns the loss of the global batch and the gradient norm."""
        optimisation, accelerator = self.phase.optimisation, self.accelerator
        rate = learning_rate(self.step, self.phase.schedule_steps, optimisation)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.objective.train()
        with accelerator.autocast():
            total, count = self.objective(batch, epoch)
        count = accelerator.reduce(count, reduction="sum").clamp(min=1)
        # DDP averages gradients over ranks, and the loss is a mean over the terms of all ranks.
        accelerator.backward(total * (accelerator.num_processes / count))
        norm = accelerator.clip_grad_norm_(self.objective.parameters(), optimisation.clip_grad_norm or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return accelerator.reduce(total.detach(), reduction="sum") / count, norm

    def _validates_here(self) -> bool:
        ends = self.step == self.phase.total_steps
        return self.phase.validate is not None and (ends or self.step % self.phase.validate_every == 0)

    def _keep(self, stop: StopRequest, loss: Tensor, norm: Tensor) -> None:
        """Write a checkpoint and validate where this step asks for it; leave where a signal asked for that.

        Raises:
            FloatingPointError: loss or gradient is not finite; nothing is written over the good checkpoints.
        """
        every = self.config.checkpoint.every_steps
        ends = self.step == self.phase.total_steps
        if not (self._validates_here() or stop.requested or ends or (every and self.step % every == 0)):
            return
        self._check_finite(float(loss), float(norm))
        if self.accelerator.is_main_process:
            moments = adam_moments(self.phase.model, self.optimizer)
            content = checkpoint.Checkpoint(self.phase.model.state_dict(), moments, self.phase.facts)
            checkpoint.save(self.phase.directory.checkpoints, self.step, content)
        self.accelerator.wait_for_everyone()
        if stop.requested:
            stop.leave(self.step)
        if self._validates_here():
            self._validate()
        if self.accelerator.is_main_process:
            best = checkpoint.best_step(self.phase.directory.read_scores(), self.phase.val_set_name)
            kept = [step for step, _ in self.history] if self.phase.keeps_validated else [best]
            checkpoint.prune(self.phase.directory.checkpoints, keep_last=self.config.checkpoint.keep_last, keep=kept)

    def _validate(self) -> None:
        assert self.phase.validate is not None
        self.history.append((self.step, self.phase.validate(self.step)))
        self.tally.reset()  # the time of a validation is no part of the training's speed

    def _report(self, norm: Tensor, bar: Any) -> None:
        """Log what happened since the last line. Raises FloatingPointError as `_keep` does."""
        phase, tally = self.phase, self.tally
        loss = torch.stack(tally.losses).mean().item()
        self._check_finite(loss, float(norm))
        if self.accelerator.is_main_process:
            seconds = time.perf_counter() - tally.since
            line = {
                "epoch": self.step / phase.steps_per_epoch,
                "loss": loss,
                "lr": self.optimizer.param_groups[0]["lr"],
                "grad_norm": float(norm),
                "windows_per_s": tally.windows / seconds,
                "waiting": tally.waited / seconds,
            }
            phase.directory.append_metrics(kind="train", step=self.step, **line)
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            if bar.disable:
                print(
                    f"{phase.title} step {self.step}/{phase.total_steps} epoch {line['epoch']:.2f} loss {loss:.4f} "
                    f"{line['windows_per_s']:.0f} windows/s, {line['waiting']:.0%} of it waiting for data",
                    flush=True,
                )
        tally.reset()

    def _check_finite(self, loss: float, norm: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            known = checkpoint.steps(self.phase.directory.checkpoints)
            last = f"step {known[-1]}" if known else "none"
            raise FloatingPointError(
                f"{self.phase.title}: loss {loss}, gradient norm {norm} at step {self.step}; last checkpoint: {last}"
            )

    def _progress_bar(self) -> Any:
        """A bar on a terminal of the main process; elsewhere it is disabled and lines are printed."""
        visible = self.accelerator.is_main_process and sys.stderr.isatty()
        total, title = self.phase.total_steps, self.phase.title
        return tqdm(total=total, initial=self.step, desc=title, unit="step", disable=not visible)


def adamw(model: nn.Module, optimisation: OptimisationConfig) -> torch.optim.AdamW:
    """AdamW that decays weights, but neither biases nor the scales of norms."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (free if parameter.ndim < 2 or name.endswith("bias") else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": optimisation.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=optimisation.lr)


def adam_moments(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Adam's moments by parameter name: `exp_avg.<name>` and `exp_avg_sq.<name>`."""
    return {
        f"{moment}.{name}": optimizer.state[parameter][moment]
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for moment in ("exp_avg", "exp_avg_sq")
    }


def restore(phase: Phase, optimizer: torch.optim.AdamW) -> int:
    """Load the newest whole checkpoint into model and optimizer; returns its step, 0 without one.

    Raises:
        InputError: the checkpoint belongs to other streams, subjects or parcels.
    """
    found = checkpoint.newest_whole(phase.directory.checkpoints, lambda line: print(line, file=sys.stderr))
    if found is None:
        return 0
    for key, value in phase.facts.items():
        if found.meta.get(key) != value:
            raise InputError(
                phase.directory.checkpoints,
                f"{key} of the checkpoint",
                found=found.meta.get(key),
                expected=value,
                fix="Resume with the shards that the training started with.",
            )
    phase.model.load_state_dict(found.model)
    step = int(found.meta["step"])
    for name, parameter in phase.model.named_parameters():
        if f"exp_avg.{name}" in found.moments:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": found.moments[f"exp_avg.{name}"].to(parameter.device),
                "exp_avg_sq": found.moments[f"exp_avg_sq.{name}"].to(parameter.device),
            }
    return step
