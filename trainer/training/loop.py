"""The one loop that both stages share: windows in, AdamW steps out, a score and a checkpoint every so often.

What differs between the stages (model, loss, what is validated) comes as a `Phase`; what differs between one process,
DDP and ZeRO is an `Update`. The position of a training is one number, the step: the plan says which windows batch k of
epoch e holds and what its loss is divided by, the learning rate is a function of the step, early stopping is a function
of the score files, and whatever is random is keyed by seed, epoch and window. So a resume needs the weights, Adam's
moments and the step, nothing is replayed, and any number of processes trains the same model.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from trainer.config import Config, OptimisationConfig
from trainer.data.batches import Batch
from trainer.errors import InputError
from trainer.run import checkpoint
from trainer.run.checkpoint import Checkpoint, Writer
from trainer.run.directory import StageDirectory
from trainer.run.heartbeat import Heartbeat
from trainer.run.processes import Boundary, Processes, StopRequest
from trainer.run.watchdog import Watchdog
from trainer.training.ema import MovingAverage
from trainer.training.tracking import Tracker
from trainer.training.update import make_update

MOST_SKIPPED = 25
"""Steps in a row whose gradient is not finite, after which a training is given up."""
CHECK_EVERY = 5
"""Steps between two looks at their number: a look waits for the device."""


@dataclass
class Phase:
    """One optimisation: a model, what it learns from, and how it is judged.

    `objective(batch, epoch, terms)` gives a micro-batch's share of the loss of a step: the sum over what it holds, over
    the `terms(step)` of the global batch. `batches(step)` gives this process's micro-batches from a step on, without
    end, through all epochs. `validate(step)` scores the current weights, writes the score file and returns its quality
    (`checkpoint.quality`); all processes take part. `schedule_steps` is the length of the learning rate's schedule: a
    refit of fewer steps follows the same one. `keeps_validated` keeps every checkpoint that was validated, not only
    the best. `ema` is the decay of the averaged weights, which then are what is validated. `facts` and `marks` stand in
    every checkpoint's meta.json; a resume must have the same facts.
    """

    title: str
    directory: StageDirectory
    model: nn.Module
    objective: nn.Module
    batches: Callable[[int], Iterator[Batch]]
    terms: Callable[[int], int]
    steps_per_epoch: int
    total_steps: int
    schedule_steps: int
    optimisation: OptimisationConfig
    facts: dict[str, Any] = field(default_factory=dict)
    marks: dict[str, Any] = field(default_factory=dict)
    validate: Callable[[int], float] | None = None
    validate_every: int = 0
    val_set_name: str = ""
    keeps_validated: bool = False
    ema: float | None = None


@dataclass(frozen=True)
class Watch:
    """Who looks on while a job trains: the wish to stop, the sign of life, and the guard against standing still."""

    stop: StopRequest
    heartbeat: Heartbeat | None
    watchdog: Watchdog

    def at(self, step: int, total: int, title: str) -> None:
        """Say how far the training is.

        Raises:
            InputError: another start has taken the stage directory over; nothing more may be written there.
        """
        self.watchdog.alive(step)
        if self.heartbeat is not None:
            self.heartbeat.at(step, total, title)
            if self.heartbeat.superseded:
                raise InputError(title, "another start has taken this directory over, as this one showed no life")


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
    """A phase under way: how it updates its weights, its position and its validations so far."""

    def __init__(self, phase: Phase, processes: Processes, config: Config, watch: Watch, *, resume: bool) -> None:
        self.phase, self.processes, self.config, self.watch = phase, processes, config, watch
        phase.model.to(processes.device)
        self.update = make_update(
            phase.model,
            phase.objective,
            phase.optimisation,
            processes,
            precision=config.precision,
            deterministic=config.deterministic,
        )
        self.average = None if phase.ema is None else MovingAverage(phase.model, phase.ema)
        self.writer = Writer(background=config.checkpoint.background)
        self.boundary = Boundary(processes)
        self.skipped = torch.zeros(2, dtype=torch.int64, device=processes.device)  # in all; in a row
        self.step = self._restore() if resume else 0
        scored = processes.first(lambda: checkpoint.qualities(phase.directory.read_scores(), phase.val_set_name))
        self.history = [(step, value) for step, value in scored.items() if step <= self.step]
        self.saved_at = time.monotonic()
        self.tally = Tally()

    def run(self) -> int:
        """Train to the end and return the last step.

        Raises:
            Interrupted: a signal asked for an end; the checkpoint of the last step is written.
            FloatingPointError: the gradients of many steps in a row are not finite.
            InputError: a checkpoint that is needed cannot be written.
        """
        self.watch.at(self.step, self.phase.total_steps, self.phase.title)
        if self._validates_here() and self.step and self.step not in dict(self.history):
            self._validate()  # the last start ended between the checkpoint and its score
        with self._progress_bar() as bar, self._tracker() as tracker:
            batches = self.phase.batches(self.step)
            while not self._is_done():
                self.boundary.begin(self.watch.stop.signum, self._is_time_to_save())
                self._learn(batches)
                bar.update()
                self.watch.at(self.step, self.phase.total_steps, self.phase.title)
                if self.step % self.config.log_every == 0 or self.step == self.phase.total_steps:
                    self._report(bar, tracker)
                self._keep()
        return self.step

    def _is_done(self) -> bool:
        patience = self.phase.optimisation.patience
        return self.step >= self.phase.total_steps or should_stop(self.history, patience)

    def _learn(self, batches: Iterator[Batch]) -> None:
        """One optimisation step, of as many micro-batches as the configuration says."""
        phase, processes = self.phase, self.processes
        epoch, terms = self.step // phase.steps_per_epoch, phase.terms(self.step)
        rate = learning_rate(self.step, phase.schedule_steps, phase.optimisation)
        turns = self.config.gradient_accumulation_steps
        self.update.objective.train()
        share = torch.zeros((), device=processes.device)
        for turn in range(turns):
            batch = self._next(batches)
            with self.update.micro_batch(last=turn == turns - 1):
                loss = self.update.objective(batch, epoch, terms)
                self.update.backward(loss)
            share += loss.detach()
        taken = self.update.step(rate)
        self.step += 1
        if self.average is not None:
            self.average.update(self.step)
        self.norm, self.rate = taken.norm, rate
        self.skipped = torch.stack((self.skipped[0] + taken.skipped, (self.skipped[1] + 1) * taken.skipped))
        self.tally.losses.append(share)

    def _next(self, batches: Iterator[Batch]) -> Batch:
        """The next micro-batch, on the device; notes how long it was waited for."""
        start = time.perf_counter()
        batch = next(batches)
        self.tally.waited += time.perf_counter() - start
        self.tally.windows += len(batch.windows) * self.processes.world
        return batch.to(self.processes.device, non_blocking=True)

    def _validates_here(self) -> bool:
        ends = self.step == self.phase.total_steps
        return self.phase.validate is not None and (ends or self.step % self.phase.validate_every == 0)

    def _is_time_to_save(self) -> bool:
        minutes = self.config.checkpoint.every_minutes
        return minutes is not None and self.processes.is_main and time.monotonic() - self.saved_at >= 60 * minutes

    def _keep(self) -> None:
        """Write a checkpoint and validate where this step asks for it; leave where a signal asked for that."""
        every = self.config.checkpoint.every_steps
        agreed = self.boundary.agreed()
        validates, ends = self._validates_here(), self.step == self.phase.total_steps
        needed = validates or ends or bool(agreed.signum)
        if self.step % CHECK_EVERY == 0 or needed:
            self._check_finite()
        if needed or agreed.save or (every and self.step % every == 0):
            self._save(needed=needed)
        if validates and not agreed.signum:
            self._validate()
        if needed:
            self.writer.wait()
            self._prune()
        if agreed.signum:
            self.watch.stop.leave(self.step, agreed.signum)

    def _save(self, *, needed: bool) -> None:
        """Copy what a resume needs on all processes, and let the main one write it while the training goes on."""
        content = self.update.snapshot()
        self.saved_at = time.monotonic()
        if content is None:
            return
        self.writer.wait()
        self._prune()
        meta = {**self.phase.facts, **self.phase.marks, **content.meta, "skipped": int(self.skipped[0])}
        averages = {} if self.average is None else self.average.snapshot()
        whole = Checkpoint(content.model, content.moments, meta, averages)
        self.writer.write(self.phase.directory.checkpoints, self.step, whole, needed=needed)

    def _prune(self) -> None:
        if self.processes.is_main:
            best = checkpoint.best_step(self.phase.directory.read_scores(), self.phase.val_set_name)
            kept = [step for step, _ in self.history] if self.phase.keeps_validated else [best]
            checkpoint.prune(self.phase.directory.checkpoints, keep_last=self.config.checkpoint.keep_last, keep=kept)

    def _validate(self) -> None:
        assert self.phase.validate is not None
        with nullcontext() if self.average is None else self.average.in_place():
            self.history.append((self.step, self.phase.validate(self.step)))
        self.tally.reset()  # the time of a validation is no part of the training's speed

    def _report(self, bar: Any, tracker: Tracker) -> None:
        """Log what happened since the last line, on the main process."""
        phase, tally = self.phase, self.tally
        loss = self.processes.sum(torch.stack(tally.losses).double().mean()).item()
        if self.processes.is_main:
            seconds = time.perf_counter() - tally.since
            line = {
                "epoch": self.step / phase.steps_per_epoch,
                "loss": loss if math.isfinite(loss) else None,
                "lr": self.rate,
                "grad_norm": float(self.norm) if math.isfinite(self.norm) else None,
                "windows_per_s": tally.windows / seconds,
                "waiting": tally.waited / seconds,
                "memory_gb": _memory_gb(self.processes.device),
                "skipped": int(self.skipped[0]),
            }
            phase.directory.append_metrics(kind="train", step=self.step, **line)
            tracker.log(self.step, **line)
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            if bar.disable:
                print(_status_line(phase, self.step, loss, float(self.norm), line), flush=True)
        tally.reset()

    def _check_finite(self) -> None:
        """Raise FloatingPointError after too many steps in a row without a finite gradient, on every process."""
        row = int(self.skipped[1])
        if row >= min(MOST_SKIPPED, self.phase.total_steps):
            self.writer.wait()
            known = checkpoint.steps(self.phase.directory.checkpoints)
            last = checkpoint.folder_of(self.phase.directory.checkpoints, known[-1]) if known else "none"
            raise FloatingPointError(
                f"{self.phase.title}: the gradients of {row} steps in a row, up to step {self.step}, were not finite, "
                f"and the steps were skipped; last good checkpoint: {last}"
            )

    def _restore(self) -> int:
        """Load the newest whole checkpoint, the same one on every process; returns its step, 0 without one.

        Raises:
            InputError: the checkpoint belongs to other streams, subjects or parcels.
        """
        checkpoints = self.phase.directory.checkpoints
        step = self.processes.first(lambda: _newest_step(checkpoints))
        if step is None:
            return 0
        found = checkpoint.load(checkpoint.folder_of(checkpoints, step))
        for key, value in self.phase.facts.items():
            if key != "shards" and found.meta.get(key) != value:  # the data were compared by content at the start
                raise InputError(
                    checkpoints,
                    f"{key} of the checkpoint",
                    found=found.meta.get(key),
                    expected=value,
                    fix="Resume with the shards that the training started with.",
                )
        self.update.restore(found)
        self.skipped[0] = int(found.meta["skipped"])
        if self.average is not None:
            self.average.restore(found.ema)
        return step

    def _progress_bar(self) -> Any:
        """A bar on a terminal of the main process; elsewhere it is disabled and lines are printed."""
        visible = self.processes.is_main and sys.stderr.isatty()
        total, title = self.phase.total_steps, self.phase.title
        return tqdm(total=total, initial=self.step, desc=title, unit="step", disable=not visible)

    def _tracker(self) -> Tracker:
        kind = self.config.tracker if self.processes.is_main else "none"
        facts = self.config.model_dump(mode="json")
        return Tracker(kind, self.phase.directory, self.phase.title, facts, self.step)


def _newest_step(checkpoints: Path) -> int | None:
    checkpoint.sweep(checkpoints)
    found = checkpoint.newest_whole(checkpoints, lambda line: print(line, file=sys.stderr))
    return None if found is None else int(found.meta["step"])


def _status_line(phase: Phase, step: int, loss: float, norm: float, line: dict[str, Any]) -> str:
    skipped = f", {line['skipped']} steps skipped (gradient not finite)" if line["skipped"] else ""
    return (
        f"{phase.title} step {step}/{phase.total_steps} epoch {line['epoch']:.2f} loss {loss:.4f} "
        f"lr {line['lr']:.2g} grad norm {norm:.3g} {line['windows_per_s']:.0f} windows/s, "
        f"{line['waiting']:.0%} of it waiting for data, {line['memory_gb']:.1f} GB{skipped}"
    )


def _memory_gb(device: torch.device) -> float:
    """Most memory that this process has held so far: of the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
