"""What differs between the stages: model, loss, what is learnt from, and how it is validated."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from trainer.config import Config, OptimisationConfig
from trainer.data.batches import Batch
from trainer.data.loader import Reading, training_batches
from trainer.data.plan import Part, Plan, Span, used_subjects
from trainer.data.statistics import feature_statistics, starting_level
from trainer.data.study import Study
from trainer.models.anchor import Anchor, anchor_loss
from trainer.models.build import build_anchor, build_flow
from trainer.models.flow import FlowMatching
from trainer.models.latent import Latent
from trainer.models.randomness import keyed, make_keys
from trainer.progress import say
from trainer.run import checkpoint
from trainer.run.directory import RunDirectory, StageDirectory
from trainer.run.processes import Processes
from trainer.run.signals import StopRequest
from trainer.run.watchdog import Watchdog
from trainer.scoring.known import copy_record
from trainer.scoring.predictor import (
    TRAINED,
    AnchorPredictor,
    FlowPredictor,
    Items,
    Predictor,
    load_anchor,
    shapes_of,
)
from trainer.scoring.records import lines, printed, write_scores
from trainer.scoring.score import untrained_facts
from trainer.scoring.sets import SetScores, score_set
from trainer.training import crossfit, latent
from trainer.training.checks import told_of_features
from trainer.training.loop import Phase, Training, Watch


@dataclass(frozen=True)
class Job:
    """What every part of a training needs to know."""

    config: Config
    study: Study
    run: RunDirectory
    processes: Processes
    stop: StopRequest
    watchdog: Watchdog
    resume: bool

    def say(self, line: str) -> None:
        """Print on the main process."""
        if self.processes.is_main:
            say(line)


class AnchorObjective(nn.Module):
    """Stage 1's loss: squared error over what is there."""

    def __init__(self, anchor: Anchor, seed: int) -> None:
        super().__init__()
        self.anchor, self.seed = anchor, seed

    def forward(self, batch: Batch, epoch: int, terms: int) -> Tensor:
        """The batch's share of the mean squared error over the `terms` (subject, TR) pairs of the global batch."""
        with keyed(make_keys(self.seed, epoch, batch.windows)):
            prediction = self.anchor(batch.features, batch.mask)
        return anchor_loss(prediction, batch.bold, batch.loss_mask, batch.subject_mask, count=terms)


class FlowObjective(nn.Module):
    """Stage 2's loss: flow matching on the (window, subject) pairs that have BOLD."""

    def __init__(self, flow: FlowMatching, seed: int) -> None:
        super().__init__()
        self.flow, self.seed = flow, seed

    def forward(self, batch: Batch, epoch: int, terms: int) -> Tensor:
        """The batch's share of the mean loss over the `terms` (subject, TR) pairs of the global batch."""
        assert batch.anchor is not None
        items = Items(batch, self.seed, epoch)
        bold, anchor = items.take(batch.bold), items.take(batch.anchor)
        return self.flow.loss(bold, anchor, items.mask, items.subject, items.keys, count=terms)


def anchor_phase(
    job: Job,
    directory: StageDirectory,
    spans: Sequence[Span],
    title: str,
    *,
    validates: bool = False,
    steps: int | None = None,
    seed: int | None = None,
) -> Phase:
    """The phase that trains an anchor on `spans`, for `steps` or as long as the configuration says."""
    seed = job.config.seed if seed is None else seed
    torch.manual_seed(seed)
    anchor = build_anchor(job.config.stage1.model, shapes_of(job.study))
    if job.config.stage1.standardise_features:
        keep = job.config.stage1.keep_columns
        means, scales = feature_statistics(job.study.shards, spans, job.study.streams, keep)
        anchor.set_standardising(means, scales)
        if validates and job.processes.is_main:
            for line in told_of_features(job.study, means, scales):
                print(f"warning: {line}", file=sys.stderr)
    level, count = starting_level(
        job.study.shards, spans, job.study.scaling, judged_by=job.study.anchor_spans(refit=False)
    )
    anchor.start_at(torch.from_numpy(level), torch.from_numpy(count))
    phase = _phase(job, directory, anchor, AnchorObjective(anchor, seed), spans, job.config.stage1, title, seed, steps)
    if validates:
        phase.validate_every = phase.steps_per_epoch
        _validate_with(job, phase, 1, AnchorPredictor(anchor))
    return phase


def flow_phase(
    job: Job,
    directory: StageDirectory,
    stage1: StageDirectory,
    step: int,
    watch: Watch,
    *,
    refit: bool,
    steps: int | None = None,
) -> Phase:
    """The phase that trains the flow around the anchor of `stage1` at `step`."""
    config, device = job.config, job.processes.device
    spans = job.study.training_spans(refit=refit)
    job.processes.first(lambda: _copy_anchor(job.run.stage(1), stage1, step, directory.anchor))
    anchor = load_anchor(directory.anchor, job.study, device)
    predictions = _unseen_predictions(job, directory, anchor, job.study.anchor_spans(refit=refit), step, watch)

    torch.manual_seed(config.seed)
    flow = build_flow(config, shapes_of(job.study)).to(device)
    flow.set_trained(used_subjects(spans))
    if job.processes.first(lambda: checkpoint.newest_whole(directory.checkpoints, lambda _: None) is None):
        latent.fit_latent(flow, job.study, spans, predictions, job.processes, job.stop)
    title = "Stage 2 refit" if refit else "Stage 2"
    objective = FlowObjective(flow, config.seed)
    phase = _phase(job, directory, flow, objective, spans, config.stage2, title, config.seed, steps, anchor=predictions)
    phase.ema = config.stage2.ema
    if not refit:
        phase.validate_every = phase.steps_per_epoch * config.stage2.snapshot_every_epochs
        phase.keeps_validated = True
        _validate_with(job, phase, 2, FlowPredictor(anchor, flow, config, ("mean",)), flow)
    return phase


def _copy_anchor(stage: StageDirectory, part: StageDirectory, step: int, target: Path) -> None:
    """Once and for all: a stage 2 that goes on keeps the anchor that it started with.

    `part` is where the checkpoint lies: the stage itself, or its refit.
    """
    if not (target / "meta.json").exists():
        copy_record(stage, target)
        checkpoint.copy_weights(checkpoint.folder_of(part.checkpoints, step), target)


def _unseen_predictions(
    job: Job, directory: StageDirectory, anchor: Anchor, spans: Sequence[Span], steps: int, watch: Watch
) -> crossfit.Predictions:
    """What anchors that have not seen them predict for the TRs of `spans`; with cross_fit 0, what the anchor does.

    They must err as the anchor does: they are trained as it was, on the BOLD of all its subjects.
    """
    k = job.config.stage2.cross_fit
    predictions = crossfit.Predictions(directory.anchor / "predictions", job.study)
    if not k:
        predictions.write([(anchor, spans)], job.processes)
        return predictions
    held_out = crossfit.folds(spans, job.study.manifest, k)
    parts = []
    for fold, hidden in enumerate(held_out, start=1):
        fold_directory = StageDirectory(directory.anchor / f"fold_{fold}")
        seen = crossfit.without(spans, hidden)
        phase = anchor_phase(job, fold_directory, seen, f"Fold {fold} of {k}", steps=steps, seed=job.config.seed + fold)
        Training(phase, job.processes, job.config, watch, resume=True).run()
        assert isinstance(phase.model, Anchor)
        parts.append((phase.model, hidden))
    predictions.write(parts, job.processes)
    return predictions


def planned_steps(steps_per_epoch: int, optimisation: OptimisationConfig) -> int:
    """The steps that a configuration asks for; an early stop may come before."""
    steps = steps_per_epoch * optimisation.epochs
    return min(steps, optimisation.max_steps or steps)


def _phase(
    job: Job,
    directory: StageDirectory,
    model: nn.Module,
    objective: nn.Module,
    spans: Sequence[Span],
    optimisation: OptimisationConfig,
    title: str,
    seed: int,
    steps: int | None,
    *,
    anchor: crossfit.Predictions | None = None,
) -> Phase:
    study, processes, data = job.study, job.processes, job.config.data
    plan: Plan = study.plan(spans, seed)
    planned = planned_steps(plan.steps_per_epoch, optimisation)
    reading = Reading(
        study.streams if anchor is None else [],
        study.scaling,
        context=data.context_trs if anchor is None else 0,
        anchor=anchor,
        part=Part(processes.rank, processes.world, job.config.gradient_accumulation_steps),
    )

    def batches(step: int) -> Iterator[Batch]:
        pin = processes.device.type == "cuda"
        return training_batches(
            study.source, plan, reading, start=step, num_workers=data.num_workers, prefetch=data.prefetch, pin=pin
        )

    return Phase(
        title=title,
        directory=directory,
        model=model,
        objective=objective,
        batches=batches,
        terms=plan.terms,
        steps_per_epoch=plan.steps_per_epoch,
        total_steps=planned if steps is None else steps,
        schedule_steps=planned,
        optimisation=optimisation,
        facts={
            "shapes": shapes_of(study).as_json(),
            "shards": study.manifest.digest,
            "steps_per_epoch": plan.steps_per_epoch,
        },
        marks={TRAINED: study.labels_of(spans)},
        val_set_name=job.config.val_set_name,
    )


def _validate_with(job: Job, phase: Phase, stage: int, predictor: Predictor, flow: FlowMatching | None = None) -> None:
    """Let the phase score its validation set, in its own loop, with the weights as they are."""

    latent_std: list[float] | None = None

    def validate(step: int) -> float:
        nonlocal latent_std
        scores = score_set(predictor, job.study, phase.val_set_name, job.processes)
        # principal components are frozen: one look at all of the training BOLD is enough
        if flow is not None and (latent_std is None or not isinstance(flow.latent, Latent)):
            latent_std = _latent_range(job, flow, phase)
        value = job.processes.first(lambda: _write_validation(job, phase, stage, step, scores, latent_std))
        return -math.inf if value is None else value

    phase.validate = validate


def _write_validation(
    job: Job, phase: Phase, stage: int, step: int, scores: SetScores, latent_std: list[float] | None
) -> float | None:
    """Write and print a validation; returns its quality, None where it is not a number."""
    epoch = step // phase.steps_per_epoch
    facts = {"stage": stage, "step": step, "set": phase.val_set_name, "epoch": epoch, "validation": True}
    facts |= untrained_facts(job.study, phase.val_set_name, phase.marks[TRAINED])
    facts["data"] = job.study.digest(phase.val_set_name)
    written = write_scores(phase.directory, scores, job.study.manifest.subjects, facts)["mean"]
    logged = {"set": phase.val_set_name, "pearson_r": written["pearson_r"], "flow_loss": written.get("flow_loss")}
    if latent_std is not None:
        logged["latent_std"] = latent_std
    phase.directory.append_metrics(kind="val", step=step, **logged)
    if stage == 2:
        job.say("\n".join(lines(written)))
    else:
        job.say(f"{phase.title} step {step} epoch {epoch} r on {phase.val_set_name} {printed(written['pearson_r'])}")
    return checkpoint.quality(written)


def _latent_range(job: Job, flow: FlowMatching, phase: Phase) -> list[float]:
    """Least and largest standard deviation of the latents of the training BOLD; warns where they leave [0.5, 2]."""
    low, high = latent.latent_range(flow, job.study, job.study.spans["train"], job.processes)
    if job.processes.is_main and (low < 0.5 or high > 2.0):
        cause = (
            "runs differ in their means, which the components then show (bold.standardise: run evens them out)"
            if isinstance(flow.latent, Latent)
            else "the projection collapses (stage2.projection: pca does not)"
        )
        print(
            f"warning: {phase.title}: standard deviations of the latents lie between {low:.2f} and {high:.2f}, "
            f"expected within 0.5 and 2: {cause}",
            file=sys.stderr,
        )
    return [low, high]
